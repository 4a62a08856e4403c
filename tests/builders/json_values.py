"""Values of JSON of every kind, and a whole file decoded piece by piece and written again."""

import json

from hypothesis import strategies as st

from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.encoding import encode
from capmerge.metadata.pieces import iter_source

TEXT = st.text(
    st.sampled_from('ab"\\/{},: \n\r\t\x00\x1f\x7f\u2028😀\ud800\udfff') | st.characters(),
    max_size=8,
)
NUMBERS = (
    st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([-0.0, 1e300, 5e-324, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
TAMED = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([0.5, -0.0, 1.25, 1000.0])
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
"""Values whose floats every JSON writer spells alike."""


def written(data, kind="json"):
    """The bytes of a whole source, decoded piece by piece and encoded again as a whole file."""
    source = BytesSource("s", data, 0)
    layout = read_layout(source)
    bodies = [
        bytes(encode(piece.records, kind)) for piece in iter_source(source, layout, keep=True)
    ]
    bodies = [body for body in bodies if body]
    if kind == "jsonl":
        return b"".join(body + b"\n" for body in bodies)
    return b"{\n" + b",\n".join(bodies) + b"\n}" if bodies else b"{}"


def read(data):
    """A representation of what json.load reads, to compare two files by.

    It tells 1 from 1.0, NaN from null, and one order of keys from another.
    """
    return repr(json.loads(data))
