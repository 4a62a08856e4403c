"""Turns text into token ids.

For CLIP this is exactly sd-scripts' tokenizer; for every other model it is the pipeline of its
file. The module owns the order of the steps between a caption and its ids. It knows neither chunks
nor limits, nor where a vocabulary came from.
"""

import codecs
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from operator import add, sub
from typing import Final

from capmerge.errors import UsageError
from capmerge.tokens.clean import clean
from capmerge.tokens.vocabulary import BOS, EOS, ClipVocabulary, byte_alphabet

# Source: openai/CLIP, clip/simple_tokenizer.py. Ignoring case matters although the text is in lower
# case, because a long s counts as s here.
_PATTERN = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
# The same for ASCII text in lower case, with the line breaks between texts; it takes half the time.
_ASCII_WORDS_AND_ENDS = re.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+|\n"
)
# How many words are remembered, and the longest of them: a run of signs is a word of any length.
_WORDS_REMEMBERED, _LONGEST_REMEMBERED = 1 << 16, 64


class ClipTokenizer:
    """A CLIP tokenizer, which gives the ids of sd-scripts' slow CLIPTokenizer.

    The ids are without BOS and EOS and without any limit. A tokenizer is immutable except for its
    memory of words. `bos`, `eos`, `pad` and `comma` are ids; `added` maps the literals that become
    ids before the clean-up, in their exact case, to these ids. Building a tokenizer takes about
    0.1 s.

    Raises `UsageError` if the merges of `vocabulary` do not fit its ids.
    """

    __slots__ = (
        "_any_added",
        "_model",
        "_remembered",
        "_symbols",
        "_word_ids",
        "_words",
        "_words_and_ends",
        "added",
        "bos",
        "comma",
        "eos",
        "name",
        "pad",
    )

    def __init__(self, name: str, vocabulary: ClipVocabulary) -> None:
        import regex
        from tokenizers.models import BPE

        ids, merges, added, pad = vocabulary
        try:
            model = BPE(
                vocab=ids,
                merges=merges,
                unk_token=EOS,
                continuing_subword_prefix="",
                end_of_word_suffix="</w>",
            )
        except Exception as error:  # the library raises no narrower class
            raise UsageError(
                f"{name}: its vocabulary and merges do not fit together: {error}. "
                "Expected both files of one tokenizer. Copy or download the tokenizer again."
            ) from error
        literals = {literal: (ids[literal],) for literal in (BOS, EOS)}
        alphabet = [symbol for _, symbol in sorted(byte_alphabet().items())]

        def word_ids(word: str) -> tuple[int, ...]:
            # A literal gets here if it was in capitals, or if an entity was unescaped. Otherwise it
            # was found in the raw text.
            if word in literals:
                return literals[word]
            if word == "\n":  # the end of one text of many
                return ()
            return tuple(token.id for token in model.tokenize(symbols(word)))

        def symbols(word: str) -> str:
            if word.isascii() and word.isprintable():
                return word
            return "".join([alphabet[byte] for byte in word.encode()])

        # Longest first, because the longer of two added tokens that begin together is meant.
        any_added = "|".join(regex.escape(token) for token in sorted(added, key=len, reverse=True))
        self.name: Final = name
        self.bos: Final = ids[BOS]
        self.eos: Final = ids[EOS]
        self.pad: Final = pad
        self.comma: Final = ids.get(",</w>")
        self.added: Final = added
        self._any_added: Final = regex.compile(f"({any_added})")
        self._words: Final = regex.compile(_PATTERN, regex.IGNORECASE)
        self._words_and_ends: Final = regex.compile(_PATTERN + r"|\n", regex.IGNORECASE)
        self._word_ids: Final = word_ids
        self._symbols: Final = symbols
        self._remembered: Final = functools.lru_cache(_WORDS_REMEMBERED)(word_ids)
        self._model: Final = model

    @property
    def adds_up(self) -> bool:
        """True when a text's count is the sum of the counts of its space-separated pieces.

        That is always the case, unless an added token contains white space.
        """
        return not any(char.isspace() for token in self.added for char in token)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, which is given as it will be trained, without escapes.

        "A  cat" gives [320, 2368].
        """
        ids: list[int] = []
        for part, added in self._parts(text):
            if added is None:
                words = self._words.findall(clean(part))
                ids.extend(itertools.chain.from_iterable(map(self._ids_of, words)))
            else:
                ids.append(added)
        return ids

    def count_each(self, texts: Sequence[str]) -> list[int]:
        """The length of `encode(text)` of each text, for many short texts.

        One search over all texts is three times as fast as one search for each.
        """
        # How it works: the cleaned texts are joined, with a line break after each, and split into
        # words at once. The running sum of the words' counts at each line break gives the counts of
        # the texts. A text with an added token is encoded by itself and leaves an empty line.
        has_added = self._any_added.search
        none_has = has_added("\n".join(texts)) is None
        counts, lines = [], []
        for text in texts:
            counted = not none_has and has_added(text) is not None
            counts.append(len(self.encode(text)) if counted else 0)
            lines.append("" if counted else clean(text))
        return list(map(add, counts, self._count_cleaned(lines)))

    def count_ascii(self, pieces: Sequence[str]) -> list[int]:
        """The same as `count_each` for pieces of printable ASCII, without spaces and entities.

        It takes half the time.
        """
        joined = "\n".join(pieces)
        if self._any_added.search(joined):
            return self.count_each(pieces)
        return self._count_cleaned(joined.lower().split("\n")) if pieces else []

    def _count_cleaned(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, none of which has a line break."""
        joined = "\n".join((*texts, ""))
        pattern = _ASCII_WORDS_AND_ENDS if joined.isascii() else self._words_and_ends
        words = pattern.findall(joined)
        so_far = itertools.accumulate(self._lengths_of(words))
        ends = list(itertools.compress(so_far, map("\n".__eq__, words)))
        return list(map(sub, ends, [0, *ends[:-1]]))

    def _ids_of(self, word: str) -> tuple[int, ...]:
        """The ids of a word."""
        return (self._remembered if len(word) <= _LONGEST_REMEMBERED else self._word_ids)(word)

    def _lengths_of(self, words: list[str]) -> Iterator[int]:
        """The number of ids of each word."""
        if max(map(len, words), default=0) <= _LONGEST_REMEMBERED:
            return map(len, map(self._remembered, words))
        # No literal is as long as the words that are not remembered.
        return (
            len(self._remembered(word))
            if len(word) <= _LONGEST_REMEMBERED
            else len(self._model.tokenize(self._symbols(word)))
            for word in words
        )

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        """The ids of `text`, each with its part of the cleaned text and the spaces before the part.

        The joined parts give the text as CLIP reads it. If a character takes several tokens, the
        last of them has it and the others have "".
        """
        pairs: list[tuple[int, str]] = []
        for part, added in self._parts(text):
            space = " " if pairs and part[:1].isspace() else ""
            if added is not None:
                pairs.append((added, part))
                continue
            cleaned, end = clean(part), 0
            for match in self._words.finditer(cleaned):
                ids = self._ids_of(match[0])
                texts = self._word_texts(match[0], ids)
                texts[0] = space + cleaned[end : match.start()] + texts[0]
                pairs.extend(zip(ids, texts, strict=True))
                space, end = "", match.end()
        return pairs

    def _parts(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The added tokens in `text` with their ids, and the parts between them with None.

        Each part between them is cleaned by itself.
        """
        for part in self._any_added.split(text):
            if part:
                yield part, self.added.get(part)

    def _word_texts(self, word: str, ids: tuple[int, ...]) -> list[str]:
        """The part of `word` that each of its `ids` encodes."""
        if len(ids) == 1:
            return [word]
        decoder = codecs.getincrementaldecoder("utf-8")()
        encoded, texts, start = word.encode(), [], 0
        for index in ids:
            # In the byte alphabet, a token has one character per byte.
            n_bytes = len(str(self._model.id_to_token(index)).removesuffix("</w>"))
            texts.append(decoder.decode(encoded[start : start + n_bytes]))
            start += n_bytes
        return texts


class FileTokenizer:
    """A tokenizer of any other model, built from the text of its `tokenizer.json`.

    It gives ids without special tokens, truncation or padding. `n_special` is the number of special
    tokens that the model adds to one text; T5 adds 1, so a limit of 256 leaves 255 for the caption.

    Raises `UsageError` if the tokenizers library cannot build it.
    """

    __slots__ = ("_tokenizer", "n_special", "name")

    def __init__(self, name: str, text: str) -> None:
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # the library raises no narrower class
            raise UsageError(
                f"{name}: the tokenizers library cannot build this tokenizer: {error}. "
                "Save it again with transformers."
            ) from error
        tokenizer.no_truncation()  # files made for a model often cut at its length
        tokenizer.no_padding()
        self.name: Final = name
        self.n_special: Final[int] = tokenizer.num_special_tokens_to_add(False)
        self._tokenizer: Final = tokenizer

    @property
    def adds_up(self) -> bool:
        """False, because such a tokenizer may join text across a space: count each text whole."""
        return False

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; a lone surrogate is read as U+FFFD."""
        return list(self._tokenizer.encode(_without_surrogates(text), add_special_tokens=False).ids)

    def encode_with_text(self, text: str) -> list[tuple[int, str]]:
        """The ids of `text`, each with its part of the text and the spaces before that part."""
        text = _without_surrogates(text)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        pairs, done = [], 0
        for index, (_, end) in zip(encoding.ids, encoding.offsets, strict=True):
            pairs.append((index, text[done:end]))
            done = max(done, end)
        return pairs


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
