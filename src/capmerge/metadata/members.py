"""Finds every member of a JSON object in its bytes, including those with equal keys.

A JSON library keeps one value for each key of an object, but a rewrite keeps every record. So the
bytes themselves tell where each member is. Nothing here is a guess, whatever the layout and
whatever the strings hold, as long as the bytes are valid JSON: members of one object from the quote
of the first key on, with the commas between them, and perhaps the object's closing brace.
"""

import re
from itertools import pairwise
from json import JSONDecoder

# The standard library's scanner at its fastest: of each object and each number it makes a length
# that nobody reads.
_SCAN = JSONDecoder(
    object_pairs_hook=len, parse_int=len, parse_float=len, parse_constant=len
).raw_decode
_COLON, _SPACE = re.compile(r"[ \t\n\r]*:[ \t\n\r]*"), re.compile(r"[ \t\n\r]*")
_AFTER_STRINGS = b" \t\n\r:,}]"


def split_members(data: bytes) -> list[bytes]:
    """The members in `data`, each of them `"key": value`.

    >>> split_members(b'"a": {"b": 1}, "a": [2, 3]}')
    [b'"a": {"b": 1}', b'"a": [2, 3]']
    """
    return [data[start:end].rstrip(b", \t\n\r") for start, end in pairwise(member_starts(data))]


def member_starts(data: bytes) -> list[int]:
    """The offset of each member, and that behind the last one; one offset if there is no member.

    Plain records of one layout take a tenth of the time of others. Raises `RecursionError` for a
    member that is nested deeper than the standard library reads.
    """
    find, startswith = data.find, data.startswith
    starts: list[int] = []
    start, text = 0, ""
    # What stands between a key's letters and the first field of its record, and between the last
    # field and the next key's letters, as the last scanned member shows it: `": {` and `}, "`.
    opening = closing = b""
    while startswith(b'"', start):
        # The usual member is a key, `opening`, no further brace, and `closing`. If that closing
        # brace were in a string, the quote behind it would end the string, and then another kind of
        # character would follow. So the brace is outside of strings, and the one brace before it is
        # the one that it closes.
        while opening and startswith(opening, quote := find(b'"', start + 1)):
            closed = find(b"}", quote)
            following = closed + len(closing)
            if (
                not startswith(closing, closed)
                or find(b"{", quote + len(opening), closed) >= 0
                or data[following : following + 1] in _AFTER_STRINGS  # also at the end of `data`
            ):
                break
            starts.append(start)
            start = following - 1
        # Any other member is scanned. As Latin-1 each byte is one character, so offsets agree.
        text = text or data.decode("latin-1")
        key_end, value, value_end = _scan_member(text, start)
        starts.append(start)
        space = _SPACE.match(text, value_end)
        assert space is not None  # the pattern matches the empty text
        start = find(b'"', space.end())
        if start < 0 or not startswith(b",", space.end()):
            return [*starts, value_end]
        if startswith(b"{", value):
            opening, closing = data[key_end - 1 : value + 1], data[value_end - 1 : start + 1]
    return [*starts, start]


def _scan_member(text: str, start: int) -> tuple[int, int, int]:
    """The offset behind the key of the member at `start`, and those of its value and its end."""
    key_end = _SCAN(text, start)[1]
    colon = _COLON.match(text, key_end)
    assert colon is not None  # the text is valid JSON
    return key_end, colon.end(), _SCAN(text, colon.end())[1]
