import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.proof import signs

ESCAPE = re.compile(rb"\\(?:u[0-9a-fA-F]{4}|.)")
CHARACTERS = st.sampled_from(
    ['"', "\\", "u", "d", "8", "0", "22", "{", "[", "é", "\U0001f600", "a"]
)
HALVES = st.sampled_from(["\ud83d", "\ude00", "\\ud83d", "\\\\"])
TEXTS = st.lists(CHARACTERS | HALVES, max_size=30).map("".join)


def has_half_a_pair(escapes):
    """Whether a surrogate among the escapes, each with its place, lacks its other half."""
    codes = {place: int(e[2:].decode(), 16) for place, e in escapes if e[1:2] == b"u"}
    firsts = {place + 6 for place, code in codes.items() if 0xD800 <= code < 0xDC00}
    seconds = {place for place, code in codes.items() if 0xDC00 <= code < 0xE000}
    return firsts != seconds


@pytest.mark.parametrize("part_bytes", [1, 7, 1 << 20])
@settings(max_examples=200, deadline=None)
@given(value=st.lists(TEXTS, max_size=5))
def test_signs_are_those_that_a_scanner_finds(value, part_bytes):
    """Escapes are told from their looks, in parts that end anywhere."""
    text = json.dumps(value).encode()
    escapes = [(found.start(), found[0]) for found in ESCAPE.finditer(text)]
    kept, signs._PART_BYTES = signs._PART_BYTES, part_bytes
    try:
        exact, first = signs.exact_signs_of(text), signs.signs_of(text)
    finally:
        signs._PART_BYTES = kept
    assert exact == (2 * len(value), has_half_a_pair(escapes))
    assert first[:2] == (text.count(b'"'), text.count(b"["))
    assert signs.quotes_in(text) == text.count(b'"')
    assert first.may_have_half_a_pair or not exact.has_half_a_pair
    assert first.may_have_quote_codes or b"\\u0022" not in text


@pytest.mark.parametrize("before", range(9))
@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1, 10**30])
def test_a_long_integer_is_seen_wherever_it_stands(number, before):
    """Whatever the words of eight bytes are that it is made of; most other texts have none."""
    text = json.dumps(["a" * before, number, "b"]).encode()
    assert signs.may_have_long_integer(text)
    assert not signs.may_have_long_integer(json.dumps(["a" * before, 1234567]).encode())


def test_a_quote_that_is_written_as_a_code_is_seen():
    """Other codes, of Latin letters for example, are common, and make no second look needed."""
    assert signs.signs_of(rb'["\u0022"]').may_have_quote_codes
    assert not signs.signs_of(rb'["\u0021\u00e9\""]').may_have_quote_codes
