"""Tokenizers and golden texts for the tests of `capmerge.tokens`."""

import json
from typing import Any

from hypothesis import strategies as st

from builders.paths import DATA
from capmerge.tokens.load import load_clip
from capmerge.tokens.tokenizer import ClipTokenizer

TYPOGRAPHIC = (
    "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f"
    "\u2010\u2011\u2012\u2013\u2014\u2015\u2022\u2026"
)


# fmt: off
FRAGMENTS = [
    "<|endoftext|>", "<|startoftext|>", "<|ENDOFTEXT|>", "<|EndOf", "Text|>", "<|", "|>",
    "<|\u017ftartoftext|>", "&lt;|endoftext|&gt;",
    "!", "\uff01", "!!", "?!", "&amp;", "&lt;", "&", ";", "&#33;", "\uff06amp;",
    "'s", "'LL", "\u2019s", "'\u017f", ",", "(x)", "\\(",
    "^_^", "\u200b", "\ufeff", "\x00", "\x7f", "\x1b[31m", "\ud83d",
    "\u0130", "\u03a3", "\u00df", "\ufb01", "\ufb06", "e\u0301",
    "\u304b\u3099", "\u00c3\u00a9", "\u00e2\u20ac\u2122", "\u00c3 ", "\u00c2",
    "\u0152", "\u0153", "\u00d7", "\u00b0", "\u00b2",
    "\u20ac", "\u2122", "\uff76\uff9e", "\u65e5\u672c", "\u00bd", "\u0661",
    "\u00e9", "\u00c9", "\U0001f600", "\U0001f469\u200d\U0001f4bb",
    " ", " ", "  ", "\t", "\n", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0", "\u2028",
    "a", "Cat", "1girl,", "long_hair", "c" * 40, *TYPOGRAPHIC,
]


# fmt: on
fragments = (
    st.sampled_from(FRAGMENTS)
    | st.text(max_size=3)
    | st.text(st.sampled_from("ab .,'&;<"), max_size=4)
)
hostile_text = st.lists(fragments, max_size=12).map("".join)


def golden(name: str) -> list[dict[str, Any]]:
    """The lines of a golden file."""
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def clip(family: str) -> ClipTokenizer:
    """The tokenizer of a family."""
    tokenizer = load_clip(family)
    assert isinstance(tokenizer, ClipTokenizer)
    return tokenizer
