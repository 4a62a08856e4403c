"""What differs between the record found and the one expected, in words and with its place.

The digests only tell that two records differ. Here both are read again.
"""

import json
from typing import Any

from capmerge.captions.record_texts import Record
from capmerge.errors import quoted
from capmerge.files.source import Source
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.proof.parsers import Pair, pair_of
from capmerge.proof.reading import has_doubled_field, walk

RUN_AGAIN = "Run `capmerge rewrite` again, or give verify the options it was run with."


def record_at(
    source: Source, layout: FileLayout, block: Block, number: int
) -> tuple[int, Pair, bool]:
    """Return the offset in the file of record `number` of a block, and its key and value.

    Also tells whether one of its fields occurs more than once.
    """
    data = source.window(block.start, block.end - block.start)
    members, _ = walk(data, layout.kind, last=block.last)
    if number >= len(members):
        source.check_unchanged()
        raise AssertionError(f"a worker found record {number} in {block}")
    member = members[number]
    is_doubled = has_doubled_field(data, member, layout.kind)
    pair = member.value if layout.kind == "json" else pair_of(member.value)
    return block.start + member.start, pair, is_doubled


def difference(key: str, record: Record, found_key: str, found: Any) -> str:
    """The difference between the record found and the expected one; "" when they are equal."""
    if key != found_key:
        return f"found this key, expected record {quoted(key)}."
    # repr() tells 1 from 1.0, -0.0 from 0.0 and one order of keys from another; == does not.
    if repr(record) == repr(found):
        return ""
    if not isinstance(found, dict):
        return f"found {quoted(json.dumps(found))}, expected an object."
    for name, value in record.items():
        if name not in found:
            return f"the field {quoted(name)} is missing."
        if repr(value) != repr(found[name]):
            shown, expected = _excerpt(found[name], value), _excerpt(value, found[name])
            return f"the field {quoted(name)} is {shown}, expected {expected}."
    extra = [name for name in found if name not in record]
    return (
        f"found a field {quoted(extra[0])}, which the source and the options do not give."
        if extra
        else "the fields are in another order than expected."
    )


def _excerpt(value: object, other: object) -> str:
    """`value` for a message, from shortly before the character at which it differs from `other`."""
    text, other_text = (
        v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in (value, other)
    )
    same = next(
        (i for i, (a, b) in enumerate(zip(text, other_text, strict=False)) if a != b),
        min(len(text), len(other_text)),
    )
    start = max(0, same - 20)
    return ("…" if start else "") + quoted(text[start:], longest=60)
