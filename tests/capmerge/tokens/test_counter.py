import random

import pytest
from builders.tokens import clip, golden, hostile_text
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import CLIP_VARIANTS
from capmerge.tokens.load import load_clip


@pytest.mark.parametrize("family", CLIP_VARIANTS)
def test_golden_counts(family: str) -> None:
    """The counter gives the golden counts, one by one and all at once, new and remembered."""
    texts = [line["text"] for line in golden("token_chunks.jsonl")]
    expected = [line[f"tokens_{family}"] for line in golden("token_chunks.jsonl")]
    counter = TokenCounter(load_clip(family))
    assert [counter.count_tokens([text])[0] for text in texts] == expected
    assert counter.count_tokens(texts) == expected
    assert counter.count_tokens(texts) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(hostile_text, max_size=24), st.sampled_from(sorted(CLIP_VARIANTS)))
def test_counts_equal_ids(texts: list[str], family: str) -> None:
    """The counter agrees with the tokenizer on hostile texts, also when its table is full."""
    tokenizer = clip(family)
    expected = [len(tokenizer.encode(text)) for text in texts]
    assert tokenizer.count_each(texts) == expected
    counter = TokenCounter(tokenizer, n_slots=16)
    assert counter.count_tokens(texts) == expected
    assert counter.count_tokens(texts) == expected


def test_one_counter_for_many_texts() -> None:
    """Batches, repeated texts and pieces of any length, even too long for the table, are exact."""
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
    counter = TokenCounter(load_clip("sd1"), n_slots=256)
    texts = [f"word{n} number_{n:08} {'long' * 5}{n}" for n in range(3000)]
    assert counter.count_tokens(texts) == [len(counter.tokenizer.encode(text)) for text in texts]
    assert 512 < counter._table.n_held <= 3 * 256
    assert counter.count_tokens(texts[:100]) == [
        len(counter.tokenizer.encode(text)) for text in texts[:100]
    ]
