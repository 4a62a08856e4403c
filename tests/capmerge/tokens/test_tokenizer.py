import pytest
from builders.tokens import clip, golden, hostile_text
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.tokens.chunks import BOS_ID, EOS_ID, kohya
from capmerge.tokens.clean import clean
from capmerge.tokens.families import CLIP_VARIANTS


@pytest.mark.parametrize("family", CLIP_VARIANTS)
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
    """Texts that confuse the clean-up and the literals have the ids of the slow tokenizer.

    These ids are from transformers 4.54 with ftfy 6.3.1.
    """
    for line in golden("hostile_ids.jsonl"):
        assert clip(family).encode(line["text"]) == line[family], ascii(line["text"])


@pytest.mark.parametrize("family", CLIP_VARIANTS)
def test_special_ids(family: str) -> None:
    """The ids in the vocabulary are the module's constants, and the padding is the family's."""
    tokenizer = clip(family)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.comma) == (BOS_ID, EOS_ID, 267)
    assert tokenizer.pad == {"sd1": EOS_ID, "sd2": 0, "sdxl_g": 0}[family]


@settings(max_examples=200, deadline=None)
@given(hostile_text, st.sampled_from(sorted(CLIP_VARIANTS)))
def test_encode_with_text(text: str, family: str) -> None:
    """The parts have the ids of `encode`, and join to the cleaned text if it has no literal."""
    tokenizer = clip(family)
    pairs = tokenizer.encode_with_text(text)
    assert [index for index, _ in pairs] == tokenizer.encode(text)
    if not any(token in text for token in tokenizer.added):
        assert "".join(piece for _, piece in pairs) == clean(text)


def test_encode_with_text_by_example() -> None:
    """Spaces belong to the token after them, and a character of several tokens to the last."""
    pairs = clip("sd2").encode_with_text("Hello!  a_b \u65e5")
    assert [piece for _, piece in pairs] == ["hello", "!", " a", "_", "b", " \u65e5"]
    emoji = clip("sd1").encode_with_text("\U0001fae0")
    assert len(emoji) > 1
    assert [piece for _, piece in emoji] == [*[""] * (len(emoji) - 1), "\U0001fae0"]
