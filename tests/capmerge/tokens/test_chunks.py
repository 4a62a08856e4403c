import pytest
from builders.tokens import clip, golden
from hypothesis import given
from hypothesis import strategies as st

from capmerge.errors import UsageError
from capmerge.tokens.chunks import (
    BOS_ID,
    CHUNK_IDS,
    EOS_ID,
    Chunker,
    Chunking,
    a1111,
    a1111_parts,
    chunks_needed,
    kohya,
)


def test_golden_a1111() -> None:
    """Every golden line has AUTOMATIC1111's chunks and count, and spans that cover its ids."""
    tokenizer = clip("sd1")
    for line in golden("a1111_chunks.jsonl"):
        cut = a1111(line["text"], tokenizer)
        assert (cut.chunks, cut.token_count) == (line["chunks"], line["token_count"]), line["text"]
        ids = [index for part in a1111_parts(line["text"]) for index in tokenizer.encode(part)]
        assert [index for start, end in cut.spans for index in ids[start:end]] == ids
        for (start, end), chunk in zip(cut.spans, cut.chunks, strict=True):
            assert chunk[1 : 1 + end - start] == ids[start:end]


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


@given(st.integers(0, 700), st.sampled_from([1, 2, 3, None]), st.sampled_from(["kohya", "crop"]))
def test_filled_is_what_the_chunks_hold(
    n_tokens: int, most: int | None, chunking: Chunking
) -> None:
    """A cut counts the tokens of each chunk that is laid out, and those that are dropped."""
    tokenizer = clip("sd1")
    chunker = Chunker((tokenizer,), chunking, most)
    cut = chunker.cut(" cat" * n_tokens)
    n_chunks = chunker.chunks_of(cut)
    (chunks,) = chunker.lay_out(cut, n_chunks)
    assert n_chunks == min(
        chunks_needed(n_tokens), 1 if chunking == "crop" else most or chunks_needed(n_tokens)
    )
    (cat,) = tokenizer.encode("cat")
    assert [chunk.count(cat) for chunk in chunks] == list(cut.filled[:n_chunks])
    assert cut.tokens == n_tokens
    assert cut.dropped_tokens(n_chunks) == max(0, n_tokens - 75 * n_chunks)


@pytest.mark.parametrize("max_tokens", [0, -75, 77, 100])
def test_limit_that_is_no_multiple(max_tokens: int) -> None:
    """A limit that is not a multiple of 75 is refused with a message that names some multiples."""
    with pytest.raises(
        UsageError, match=f"{max_tokens} tokens: expected a multiple of 75, such as 75, 150 or 225"
    ):
        kohya([], max_tokens, clip("sd1"))
