"""Records written to Parquet come back as they were, whatever they hold."""

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from capmerge.files.atomic import AtomicFile
from capmerge.metadata.parquet_reader import iter_parquet
from capmerge.metadata.parquet_writer import ParquetWriter

NAMES = st.sampled_from(
    ["caption", "tags", "train_resolution", "image_size", "capmerge", "capmerge_weights"]
) | st.sampled_from(["", "rating", "image_path", "other_fields", "exact", "\ud83d", "a\nb"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(1 << 62, 1 << 66)
    | st.floats()
    | st.text(st.characters(), max_size=8)
)
VALUES = st.recursive(
    SCALARS | st.lists(st.integers(0, 4096), max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
RECORDS = st.dictionaries(NAMES, VALUES, max_size=6) | VALUES
PAIRS = st.lists(st.tuples(st.text(st.characters(), max_size=5), RECORDS), max_size=12)


def write(path: Path, pairs) -> Path:
    """The pairs as a Parquet file."""
    with AtomicFile(path) as file:
        writer = ParquetWriter(file)
        writer.write(pairs)
        writer.finish()
        file.publish()
    return path


@given(PAIRS)
def test_every_record_comes_back(tmp_path_factory, pairs):
    """Keys, values, types, fields and their order come back, and equal keys as often as they came.

    The JSON texts are compared, because NaN equals nothing and true equals 1.
    """
    path = write(tmp_path_factory.mktemp("parquet") / "records.parquet", pairs)
    assert list(map(json.dumps, iter_parquet(path))) == list(map(json.dumps, pairs))
