"""Tokens: ids, counts and chunks against golden data, and counts against ids on hostile text."""

import gzip
import importlib.metadata
import itertools
import json
import random
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import ftfy
import pytest
import regex
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from capmerge import tokens_clean
from capmerge.errors import CapmergeError, UsageError
from capmerge.tokens import (
    BOS_ID,
    CHUNK_IDS,
    EOS_ID,
    FAMILIES,
    ClipTokenizer,
    FileTokenizer,
    TokenCounter,
    a1111,
    a1111_parts,
    chunks_needed,
    clean,
    dropped_tokens,
    kohya,
    kohya_spans,
    load_tokenizer,
    load_tokenizer_file,
)
from capmerge.tokens_clean import is_local
from capmerge.tokens_vocabulary import read_clip_vocabulary

DATA = Path(__file__).parent.parent / "data"
TYPOGRAPHIC = "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u2010\u2011\u2012\u2013\u2014\u2015\u2022\u2026"
TWO_IDS = '{"<|startoftext|>": 0, "<|endoftext|>": 1}'
# fmt: off
FRAGMENTS = [
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|EndOf", "Text|>", "<|", "|>", "<|\u017ftartoftext|>", "&lt;|endoftext|&gt;",
    "!", "\uff01", "!!", "?!", "&amp;", "&lt;", "&", ";", "&#33;", "\uff06amp;", "'s", "'LL", "\u2019s", "'\u017f", ",", "(x)", "\\(",
    "^_^", "\u200b", "\ufeff", "\x00", "\x7f", "\x1b[31m", "\ud83d", "\u0130", "\u03a3", "\u00df", "\ufb01", "\ufb06", "e\u0301",
    "\u304b\u3099", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "\u00c3 ", "\u00c2", "\u0152", "\u0153", "\u00d7", "\u00b0", "\u00b2",
    "\u20ac", "\u2122", "\uff76\uff9e", "\u65e5\u672c", "\u00bd", "\u0661", "\u00e9", "\u00c9", "\U0001f600",
    "\U0001f469\u200d\U0001f4bb", " ", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028", "a",
    "Cat", "1girl,", "long_hair", "c" * 40, *TYPOGRAPHIC,
]
# fmt: on
fragments = st.sampled_from(FRAGMENTS) | st.text(max_size=3) | st.text(st.sampled_from("ab .,'&;<"), max_size=4)
hostile_text = st.lists(fragments, max_size=12).map("".join)


def golden(name: str) -> list[dict[str, Any]]:
    """The lines of a golden file."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def clip(family: str) -> ClipTokenizer:
    """The tokenizer of a family."""
    tokenizer = load_tokenizer(family)
    assert isinstance(tokenizer, ClipTokenizer)
    return tokenizer


def slow_clean(text: str) -> str:
    """What transformers' slow CLIPTokenizer does, to the letter."""
    return regex.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()


# Ids and chunks against golden data


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_ids_and_chunks(family: str) -> None:
    """Every golden line has the ids, the count and the 75/150/225 chunks of sd-scripts."""
    tokenizer = clip(family)
    for line in golden("token_chunks.jsonl"):
        ids = tokenizer.encode(line["text"])
        assert len(ids) == line[f"tokens_{family}"]
        for max_tokens in (75, 150, 225):
            assert kohya(ids, max_tokens, tokenizer) == line[f"{family}_{max_tokens}"], line["text"]


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_hostile_ids(family: str) -> None:
    """Texts made to confuse clean-up and literals have the ids of transformers 4.54's slow tokenizer with ftfy 6.3.1."""
    for line in golden("hostile_ids.jsonl"):
        assert clip(family).encode(line["text"]) == line[family], ascii(line["text"])


def test_golden_a1111() -> None:
    """Every golden line has the chunks and the token count of AUTOMATIC1111, and spans that cover its ids."""
    tokenizer = clip("sd1")
    for line in golden("a1111_chunks.jsonl"):
        cut = a1111(line["text"], tokenizer)
        assert (cut.chunks, cut.token_count) == (line["chunks"], line["token_count"]), line["text"]
        ids = [index for part in a1111_parts(line["text"]) for index in tokenizer.encode(part)]
        assert [index for start, end in cut.spans for index in ids[start:end]] == ids
        for (start, end), chunk in zip(cut.spans, cut.chunks, strict=True):
            assert chunk[1 : 1 + end - start] == ids[start:end]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_ids(family: str) -> None:
    """The ids in the vocabulary are the module's constants, and the padding is the family's."""
    tokenizer = clip(family)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.comma) == (BOS_ID, EOS_ID, 267)
    assert tokenizer.pad == {"sd1": EOS_ID, "sd2": 0, "sdxl_g": 0}[family]


def test_a1111_padding_is_the_familys() -> None:
    """A short chunk of SDXL's second encoder ends in one EOS, then zeros."""
    (chunk,) = a1111("a cat", clip("sdxl_g")).chunks
    assert chunk == [BOS_ID, 320, 2368, EOS_ID, *[0] * 73]
    assert len(chunk) == CHUNK_IDS


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (r"saber \(fate\)", ["saber (fate)"]),
        (r"\[a\] \\ (b:1.2) [c]", [r"[a] \ (b:1.2) [c]"]),
        (r"\m/, end\ ".rstrip(), ["m/, end"]),
        ("a\n BREAK  b BREAK", ["a", "b", ""]),
        ("aBREAK_b break BREAKS", ["aBREAK_b break BREAKS"]),
        (r"BR\EAK", ["BREAK"]),
    ],
)
def test_a1111_parts(text: str, parts: list[str]) -> None:
    """Escapes lose their backslash, lone backslashes vanish, and only a whole BREAK splits."""
    assert a1111_parts(text) == parts


@given(st.integers(0, 700), st.sampled_from([75, 150, 225, 300]))
def test_kohya_spans(n_tokens: int, max_tokens: int) -> None:
    """The spans hold what the chunks hold, in order, up to the limit."""
    tokenizer = clip("sd1")
    ids = list(range(1000, 1000 + n_tokens))
    spans, chunks = kohya_spans(n_tokens, max_tokens), kohya(ids, max_tokens, tokenizer)
    assert len(spans) == len(chunks) == max_tokens // 75
    for (start, end), chunk in zip(spans, chunks, strict=True):
        assert chunk[1 : 1 + end - start] == ids[start:end]
    assert spans[-1][1] == n_tokens - dropped_tokens(n_tokens, max_tokens)
    assert sum(start < end for start, end in spans) == min(max_tokens // 75, chunks_needed(n_tokens) if n_tokens else 0)


@pytest.mark.parametrize("max_tokens", [0, -75, 77, 100])
def test_limit_that_is_no_multiple(max_tokens: int) -> None:
    """A limit that is no multiple of 75 is refused, with the ones that are."""
    with pytest.raises(UsageError, match=f"{max_tokens} tokens: expected a multiple of 75, such as 75, 150 or 225"):
        kohya([], max_tokens, clip("sd1"))


# Clean-up


@settings(max_examples=600, deadline=None)
@given(hostile_text)
def test_clean_equals_the_slow_way(text: str) -> None:
    """The shortcut around ftfy changes no text, hostile or not."""
    assert clean(text) == slow_clean(text)


@settings(max_examples=400, deadline=None)
@given(st.text(st.sampled_from(TYPOGRAPHIC + " \t\n\raA.,'\"5<&;\u00e9\u00e0\u00c9\u00d7\u00b2\u20ac\u2122\u00b0\u2588"), max_size=30))
def test_clean_of_typographic_text(text: str) -> None:
    """Mixtures of what looks like mojibake and what describers write come out as from ftfy."""
    assert clean(text) == slow_clean(text)


def test_white_space_and_controls() -> None:
    """Each white-space and control character is treated as by ftfy and CLIP's pattern, at the ends and inside."""
    for char in map(chr, range(0x10000)):
        if char.isspace() or (unicodedata.category(char)[0] in "CZ" and unicodedata.category(char) not in ("Co", "Cn")):
            assert clean(f"{char}a{char}B{char}") == slow_clean(f"{char}a{char}B{char}"), ascii(char)


def test_local_characters_stand_alone() -> None:
    """Ftfy leaves each local character alone but for quotes, and none of them joins a neighbour under NFC."""
    seconds = {
        int(parts[1], 16)
        for parts in (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
        if len(parts) == 2 and not parts[0].startswith("<")
    }
    local = [code for code in range(0x110000) if tokens_clean._LOCAL.fullmatch(chr(code))]
    assert len(local) > 30_000
    assert not seconds.intersection(local)
    for char in map(chr, local):
        assert unicodedata.combining(char) == 0
        fixed = ftfy.fix_text(f"a{char}b")
        assert fixed == f"a{char}b" or (char in "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\r" and fixed[1] in "'\"\n")


def test_no_sequence_of_typographic_characters_is_bad() -> None:
    """No three characters of the cheapest class look like mojibake to ftfy, whose suspicions are at most that long there."""
    characters = TYPOGRAPHIC + " aA.,5'"
    assert all(tokens_clean._TYPOGRAPHIC.fullmatch(char) for char in characters)
    assert not any(is_bad("".join(chars)) for chars in itertools.product(characters, repeat=3))


def test_local_pieces_add_up() -> None:
    """Texts of local pieces are not suspicious to ftfy as a whole, and their clean-up is that of the pieces."""
    rng = random.Random(1)
    codes = itertools.chain(range(0x20, 0x7F), range(0xA1, 0x180), range(0x2010, 0x2060), range(0x2550, 0x25A0), (0x20AC, 0x2122))
    alphabet = list(map(chr, codes))
    n_local = 0
    for _ in range(30_000):
        text = "".join(rng.choices(rng.choice([alphabet, alphabet[95:] + [" "] * 60]), k=rng.randint(1, 12)))
        if all(map(is_local, text.split(" "))):
            n_local += 1
            assert not is_bad(text), ascii(text)
            assert " ".join(filter(None, map(clean, text.split(" ")))) == slow_clean(text), ascii(text)
    assert n_local > 5_000


# Counts


@pytest.mark.parametrize("family", FAMILIES)
def test_golden_counts(family: str) -> None:
    """The counter gives the golden counts, one text at a time and all at once, new and remembered."""
    texts = [line["text"] for line in golden("token_chunks.jsonl")]
    expected = [line[f"tokens_{family}"] for line in golden("token_chunks.jsonl")]
    counter = TokenCounter(load_tokenizer(family))
    assert [counter.count_tokens([text])[0] for text in texts] == expected
    assert counter.count_tokens(texts) == expected
    assert counter.count_tokens(texts) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile_text, max_size=24), st.sampled_from(sorted(FAMILIES)))
def test_counts_equal_ids(texts: list[str], family: str) -> None:
    """The counter agrees with the tokenizer on hostile texts, also while its table forgets."""
    tokenizer = clip(family)
    expected = [len(tokenizer.encode(text)) for text in texts]
    assert tokenizer.count_each(texts) == expected
    counter = TokenCounter(tokenizer, n_slots=16)
    assert counter.count_tokens(texts) == expected
    assert counter.count_tokens(texts) == expected


def test_one_counter_for_many_texts() -> None:
    """Batches, repeats and pieces of every length from none to past the longest remembered are counted exactly."""
    rng = random.Random(2)
    tokenizer = clip("sd2")
    pieces = ["".join(rng.choices("ab1,!\u2019\u00e9", k=rng.randint(0, 36))) for _ in range(5000)]
    texts = [" ".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(1500)]
    texts += ["", " ", "a" * 5000, "\0", "a\0 a", "x"]
    counter = TokenCounter(tokenizer)
    expected = [len(tokenizer.encode(text)) for text in texts]
    assert counter.count_tokens(texts) == expected
    assert counter.count_tokens(texts[::-1]) == expected[::-1]


def test_the_table_is_bounded() -> None:
    """A counter holds no more pieces than it has rows, and still counts exactly."""
    counter = TokenCounter(load_tokenizer("sd1"), n_slots=256)
    texts = [f"word{n} number_{n:08} {'long' * 5}{n}" for n in range(3000)]
    assert counter.count_tokens(texts) == [len(counter.tokenizer.encode(text)) for text in texts]
    assert 512 < counter.pieces_held <= 3 * 256
    assert counter.count_tokens(texts[:100]) == [len(counter.tokenizer.encode(text)) for text in texts[:100]]


# Text of tokens


@settings(max_examples=200, deadline=None)
@given(hostile_text, st.sampled_from(sorted(FAMILIES)))
def test_encode_with_text(text: str, family: str) -> None:
    """The pieces carry the same ids, and joined they are the cleaned text where no literal cuts it."""
    tokenizer = clip(family)
    pairs = tokenizer.encode_with_text(text)
    assert [index for index, _ in pairs] == tokenizer.encode(text)
    if not any(token in text for token in tokenizer.added):
        assert "".join(piece for _, piece in pairs) == clean(text)


def test_encode_with_text_by_example() -> None:
    """Spaces stand before the token they precede, and a character of two tokens with the second."""
    pairs = clip("sd2").encode_with_text("Hello!  a_b \u65e5")
    assert [piece for _, piece in pairs] == ["hello", "!", " a", "_", "b", " \u65e5"]
    emoji = clip("sd1").encode_with_text("\U0001fae0")
    assert len(emoji) > 1
    assert [piece for _, piece in emoji] == [*[""] * (len(emoji) - 1), "\U0001fae0"]


# Tokenizers from files


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    """CLIP's own vocabulary."""
    return read_clip_vocabulary()


def write_clip_folder(folder: Path, vocabulary: Any, **special: str) -> Path:
    """A tokenizer folder as transformers 4 wrote it for the slow CLIPTokenizer."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary.ids), encoding="utf-8")
    lines = ["#version: 0.2", *map(" ".join, vocabulary.merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


def write_t5(path: Path, **changes: Any) -> Path:
    """A small tokenizer in the way of T5: unigrams, `_` for spaces, `</s>` at the end, cut and padded to 6."""
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "\u2581": -2.0, "\u2581cat": -3.0, "\u2581a": -3.0, "s": -4.0}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6, pad_token="<pad>")
    path.write_text(json.dumps(json.loads(tokenizer.to_str()) | changes), encoding="utf-8")
    return path


@pytest.mark.parametrize(("family", "pad"), [("sd1", "<|endoftext|>"), ("sd2", "!")])
def test_clip_folder(tmp_path: Path, vocabulary: Any, family: str, pad: str) -> None:
    """A CLIP folder with vocab.json and merges.txt gives the golden ids of the family whose padding it names."""
    tokenizer = load_tokenizer(write_clip_folder(tmp_path, vocabulary, pad_token=pad))
    assert isinstance(tokenizer, ClipTokenizer)
    for line in golden("token_chunks.jsonl"):
        assert kohya(tokenizer.encode(line["text"]), 150, tokenizer) == line[f"{family}_150"]


def test_clip_tokenizer_json(tmp_path: Path, vocabulary: Any) -> None:
    """A CLIP tokenizer.json gives the golden ids, clean-up included, though its own pipeline has none."""
    model = models.BPE(vocabulary.ids, vocabulary.merges, unk_token="<|endoftext|>", end_of_word_suffix="</w>")
    file = tmp_path / "tokenizer.json"
    file.write_text(Tokenizer(model).to_str(), encoding="utf-8")
    counter = TokenCounter(load_tokenizer_file(file))
    lines = golden("token_chunks.jsonl")
    assert counter.count_tokens([line["text"] for line in lines]) == [line["tokens_sd1"] for line in lines]


def test_added_token_with_a_space(tmp_path: Path, vocabulary: Any) -> None:
    """A token added with a space in it is found across pieces, and counted so."""
    folder = write_clip_folder(tmp_path, vocabulary)
    (folder / "added_tokens.json").write_text(json.dumps({"my cat": 49408, "my": 49409}), encoding="utf-8")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("my cat, my Cat") == [49408, 267, 49409, 2368]
    assert TokenCounter(tokenizer).count_tokens(["my cat, my Cat"] * 20) == [4] * 20


def test_t5_file(tmp_path: Path) -> None:
    """Another model's ids are the file's own, without its special tokens, truncation and padding."""
    tokenizer = load_tokenizer(write_t5(tmp_path / "tokenizer.json"))
    assert isinstance(tokenizer, FileTokenizer)
    assert tokenizer.n_special == 1
    text = "a cats a cat a cat a"
    assert tokenizer.encode(text) == [5, 4, 6, 5, 4, 5, 4, 5]
    assert TokenCounter(tokenizer).count_tokens([text, "", "a"]) == [8, 0, 1]
    assert "".join(piece for _, piece in tokenizer.encode_with_text(text)) == text
    assert load_tokenizer(tmp_path).encode(text) == tokenizer.encode(text)


def test_t5_and_a_lone_surrogate(tmp_path: Path) -> None:
    """Half a surrogate pair, which such files may hold, is counted as an unknown character and raises nothing."""
    tokenizer = load_tokenizer_file(write_t5(tmp_path / "tokenizer.json"))
    assert tokenizer.encode("a \ud83d") == tokenizer.encode("a \ufffd")


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        ({}, "nowhere", "neither a family nor an existing path. Expected sd1, sd2, sdxl_g, a Hugging Face"),
        ({}, ".", "found nothing; expected tokenizer.json, or CLIP's vocab.json and merges.txt"),
        ({"config.json": "{}", "a.safetensors": ""}, ".", "found a.safetensors, config.json; expected tokenizer.json"),
        ({"spiece.model": ""}, ".", "AutoTokenizer"),
        ({"tokenizer/merges.txt": ""}, ".", "a model's folder, not a tokenizer's. Try "),
        ({"tokenizer.json": "not"}, ".", "tokenizer.json: not JSON: Expecting value"),
        ({"tokenizer.json": "[1]"}, ".", "found a JSON list, expected an object"),
        ({"vocab.json": '{"a": 1}'}, "vocab.json", "found a; expected a tokenizer.json, with a key `model`"),
        ({"tokenizer.json": '{"model": {"type": "Nothing"}}'}, "tokenizer.json", "the tokenizers library cannot build this tokenizer"),
        ({"vocab.json": '{"a": 1}', "merges.txt": ""}, ".", "vocab.json: not CLIP's: no "),
        (
            {"vocab.json": TWO_IDS, "merges.txt": "#v\na b c"},
            ".",
            "merges.txt: expected one version line",
        ),
        (
            {"vocab.json": TWO_IDS, "merges.txt": "#v\na b"},
            ".",
            "its vocabulary and merges do not fit",
        ),
        (
            {"tokenizer.json": f'{{"model": {{"end_of_word_suffix": "</w>", "vocab": {TWO_IDS}}}}}'},
            ".",
            "not laid out like a Hugging Face tokenizer: KeyError('merges')",
        ),
    ],
)
def test_bad_tokenizer_paths(tmp_path: Path, files: dict[str, str], name: str, message: str) -> None:
    """A path that holds no tokenizer raises one line that names the path, what was found and what was expected."""
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load_tokenizer(tmp_path / name)
    assert message in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_path_that_is_missing(tmp_path: Path) -> None:
    """The file loader itself names a path that does not exist."""
    with pytest.raises(UsageError, match="no such file or folder"):
        load_tokenizer_file(tmp_path / "nowhere")


# CLIP's vocabulary in its package


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package that holds CLIP's vocabulary the error says what to install."""

    def distribution(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(CapmergeError, match="pip install openai-clip"):
        read_clip_vocabulary()


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"version\na b\n"), None])
def test_damaged_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None) -> None:
    """A vocabulary file that is missing, broken or short is named, with the way to mend it."""
    file = tmp_path / "vocabulary.gz"
    if content is not None:
        file.write_bytes(content)

    class Distribution:
        def locate_file(self, _: str) -> Path:
            return file

    monkeypatch.setattr(importlib.metadata, "distribution", lambda _: Distribution())
    with pytest.raises(CapmergeError, match=r"vocabulary\.gz: .*force-reinstall"):
        read_clip_vocabulary()


def test_imports_are_lazy() -> None:
    """Importing the module loads none of the libraries, and using it never the package of the vocabulary, nor torch."""
    script = (
        "import sys; import capmerge.tokens as t; "
        "print([m for m in ('ftfy', 'regex', 'tokenizers', 'numpy', 'importlib.metadata') if m in sys.modules]); "
        "print(t.TokenCounter(t.load_tokenizer('sd1')).count_tokens(['a cat \u2019'] * 9)); "
        "print([m for m in ('clip', 'torch', 'transformers') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.splitlines() == ["[]", str([3] * 9), "[]"]
