"""Defines how records lie in the columns of a Parquet file, so that nothing of them is lost.

A field whose value has the type of its column lies there. Everything else is JSON text: other
fields, and values of another type, such as a number where tags are strings. Row by row:

    image_path          the key, or null where UTF-8 cannot hold it (a lone surrogate)
    caption, tags, ...  the values of the fields in `FIELDS`; null where a record has no such field,
                        or a value that does not fit: an explicit null is JSON text
    other_fields        the JSON text of an object: all other fields, in their order
    exact               null for nearly all records, otherwise the JSON text of an object with
                        "order" (all names of fields, where it is not that of the columns and then
                        of the other fields), "key" (where `image_path` is null) or "value" (a
                        record that is no object)

A file is known by `MARK` in the metadata of its schema. Files without it are read as tables of any
program: every column is a field.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from capmerge.errors import UsageError
from capmerge.metadata.scan import IMAGE_PATH

if TYPE_CHECKING:
    import pyarrow as pa

MAGIC = b"PAR1"
"""The first bytes of a Parquet file."""
MARK = {b"capmerge": b"records 1"}
"""What the schema of a file says that was written here: the kind of its rows, and the version."""
OTHER, EXACT = "other_fields", "exact"
_LEAST, _MOST = -(1 << 63), (1 << 63) - 1


def is_utf8(value: Any) -> bool:
    """True for a string that UTF-8 can hold, so one without lone surrogates."""
    if value.__class__ is not str:
        return False
    if value.isascii():
        return True
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_integers(value: Any) -> bool:
    """True for a list of integers of 64 bits; true and 512.0 are none."""
    return value.__class__ is list and all(
        item.__class__ is int and _LEAST <= item <= _MOST for item in value
    )


FIELDS: dict[str, Callable[[Any], bool]] = {
    "caption": is_utf8,
    "tags": is_utf8,
    "train_resolution": is_integers,
    "image_size": is_integers,
    "capmerge": is_utf8,
    "capmerge_weights": is_integers,
}
"""The fields that have columns, in the order of the columns, and which values fit there."""
COLUMNS = (IMAGE_PATH, *FIELDS, OTHER, EXACT)


def schema() -> "pa.Schema":
    """The schema of the files that are written here."""
    pa = import_pyarrow()
    texts, lists = pa.string(), pa.list_(pa.int64())
    fields = [(name, texts if fits is is_utf8 else lists) for name, fits in FIELDS.items()]
    return pa.schema([(IMAGE_PATH, texts), *fields, (OTHER, texts), (EXACT, texts)], metadata=MARK)


def import_pyarrow() -> Any:
    """pyarrow, which is an extra. Raises `UsageError` where it is missing."""
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError(
            f"Parquet needs the package pyarrow, which cannot be imported ({error}). "
            "Install it: pip install 'capmerge[parquet]'"
        ) from error
    return pa
