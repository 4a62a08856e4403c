import json
import random

import numpy as np
import pytest
from builders.paths import DATA

from capmerge.tokens.caption_lengths import TextLengths, a1111_chunk_counts
from capmerge.tokens.chunks import CHUNK_TOKENS, a1111, a1111_bounds
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_clip

# fmt: off
WORDS = (
    "cat", "hair,", "saber_(fate),", "a,b", "it's,", ",", ",,", "!", "wow!", "wow!,", "\\(x\\),",
    "BREAKER", "12,345,", "...,", "", "supercalifragilistic,", "<|endoftext|>,", "\t,", "x\t,y,",
    "1girl,", "long_hair,", "antidisestablishmentarianism",
)
# fmt: on
FOREIGN = ("“quoted”,", "日本,", "é,", "&amp;", "&eacute;,", "naïve", "Ã©,", "\uff01", "🙂,")


def texts_of(count):
    """Texts of all lengths with commas next to every kind of character.

    Some contain characters that the clean-up reads together with their neighbours.
    """
    rng = random.Random(3)
    texts = ["", " ", ",", "," * 200]
    for number in range(count):
        words = rng.sample(WORDS, rng.randint(1, len(WORDS))) + (
            rng.sample(FOREIGN, 2) if number % 5 == 0 else []
        )
        text = " ".join(rng.choices(words, k=rng.choice((1, 5, 20, 40, 60, 90, 150))))
        texts.append(text.replace(" ", " BREAK ", number % 3) if number % 17 == 0 else text)
    return texts


@pytest.fixture(scope="module")
def lengths():
    """The object that measures texts for an index."""
    return TextLengths()


def test_lengths_are_those_of_the_ids(lengths):
    """Tokens and chunks of both tokenizers equal those of the ids, new and remembered."""
    # NUL keeps the last batch from being counted by pieces.
    texts = texts_of(800) + ["a\0b, c" * 40] * 300
    sd1, sd2 = load_clip("sd1"), load_clip("sd2")
    expected = [
        [
            *(len(t.encode(text)) for t in (sd1, sd2)),
            *(len(a1111(text, t).chunks) for t in (sd1, sd2)),
        ]
        for text in texts
    ]
    assert lengths.count(texts).tolist() == expected
    assert lengths.count(texts[::-1]).tolist() == expected[::-1]
    assert len({row[2] for row in expected}) > 5
    assert any(row[0] != row[1] for row in expected)


def test_chunks_are_those_of_the_golden_file(lengths):
    """The numbers of chunks are those of AUTOMATIC1111's own function."""
    golden = [
        json.loads(line)
        for line in (DATA / "a1111_chunks.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    found = lengths.count([line["text"] for line in golden])
    assert found[:, 2].tolist() == [len(line["chunks"]) for line in golden]


def test_commas_are_found():
    """Every comma token is found at its position, and only in the texts that are asked for."""
    texts = [*texts_of(300), "word " * 40 + ",", "&amp;", ", " + "word " * 40]
    tokenizer = load_clip("sd1")
    counter = TokenCounter(tokenizer)
    found = counter.count_tokens_and_commas(texts, lambda counts: (counts > 30).nonzero()[0])
    ids = [tokenizer.encode(text) for text in texts]
    assert found.counts.tolist() == [len(some) for some in ids]
    row = [index == tokenizer.comma and len(some) > 30 for some in ids for index in some]
    assert found.commas.tolist() == [place for place, is_comma in enumerate(row) if is_comma]


def test_the_bounds_of_chunks_are_kept():
    """The number of chunks is between the two bounds for any commas, and both are reached."""
    rng = random.Random(1)
    for n_tokens in (0, 1, 75, 76, 131, 132, 150, 151, 187, 188, 225, 243, 244, 300, 301, 1000):
        fewest, most = a1111_bounds(n_tokens)
        tries = [
            sorted(rng.sample(range(n_tokens), rng.randint(0, n_tokens // 4))) for _ in range(50)
        ]
        tries += [[], list(range(CHUNK_TOKENS - 20, n_tokens, CHUNK_TOKENS - 19))]
        row = [place + number * n_tokens for number, commas in enumerate(tries) for place in commas]
        counts = a1111_chunk_counts(np.full(len(tries), n_tokens), np.array(row, np.int64))
        assert (counts.min(), counts.max()) == (fewest, most)
