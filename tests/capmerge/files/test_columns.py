import numpy as np
import pytest
from builders.columns import edit_head

from capmerge.errors import StaleError
from capmerge.files.atomic import AtomicFile
from capmerge.files.columns import Column, Columns, Schema, write_columns

BIG, SMALL, EXTRA = np.dtype("<u8"), np.dtype("u1"), np.dtype("<u4")
SCHEMA = Schema(
    "test.kind",
    3,
    {"word": ("one", "two"), "text": str, "count": int, "flag": bool},
    {"big": BIG, "small": SMALL, "extra": EXTRA},
    optional=("extra",),
)
ABOUT = {"kind": "test.kind", "version": 3, "word": "two", "text": "é", "count": 0, "flag": False}
ROWS = 10


def written(path, rows=ROWS, names=("big", "small", "extra")):
    """Write a file of columns whose rows count from 1; returns its path."""
    arrays = {name: np.arange(1, rows + 1).astype(SCHEMA.columns[name]) for name in names}
    with AtomicFile(path) as file:
        columns = {name: Column(array.dtype, (array.tobytes(),)) for name, array in arrays.items()}
        write_columns(file, ABOUT, rows, columns)
        file.publish()
    return path


@pytest.fixture
def path(tmp_path):
    """Return a file of ten rows with all columns."""
    return written(tmp_path / "columns")


@pytest.mark.parametrize("rows", [0, 1, 8, ROWS, 64, 1000])
@pytest.mark.parametrize("names", [("big", "small"), ("big", "small", "extra")])
def test_columns_come_back_as_they_were_written(tmp_path, rows, names):
    """Any number of rows is read back with its head, with and without the optional columns."""
    columns = Columns(written(tmp_path / "columns", rows, names), SCHEMA, "Build it again.")
    assert columns.about.items() >= ABOUT.items()
    assert columns.rows == rows
    assert ("extra" in columns) == ("extra" in names)
    for name in names:
        assert (
            columns[name].tolist() == np.arange(1, rows + 1).astype(SCHEMA.columns[name]).tolist()
        )
        assert columns[name].dtype == SCHEMA.columns[name]
        assert not columns[name].flags.writeable or not rows


def moved(head, by, names=("big", "small", "extra")):
    """Shift the offsets of some columns."""
    for name in names:
        head["columns"][name][1] += by


def renamed(head, old, new):
    """Give a column another name without changing its order."""
    head["columns"] = {new if name == old else name: at for name, at in head["columns"].items()}


DAMAGES = {
    "fraction for the version": (
        lambda head: head.update(version=3.0),
        "found 3.0 as its 'version'",
    ),
    "no entry": (lambda head: head.pop("text"), "found None as its 'text', expected a string"),
    "no rows": (lambda head: head.pop("rows"), "found None as its 'rows'"),
    "no size": (lambda head: head.pop("file_bytes"), "found None as its 'file_bytes'"),
    "no columns": (lambda head: head.pop("columns"), r"found the columns \[\], expected \['big'"),
    "wrong word": (
        lambda head: head.update(word="three"),
        "found 'three' as its 'word', expected 'one' or 'two'",
    ),
    "list for a word": (lambda head: head.update(word=["one"]), r"found \['one'\] as its 'word'"),
    "number for text": (lambda head: head.update(text=1), "found 1 as its 'text'"),
    "text for a number": (
        lambda head: head.update(count="1"),
        "found '1' as its 'count', expected a whole number of 0 or more",
    ),
    "true for a number": (lambda head: head.update(count=True), "found True as its 'count'"),
    "fraction": (lambda head: head.update(rows=10.0), "found 10.0 as its 'rows'"),
    "negative number": (lambda head: head.update(count=-1), "found -1 as its 'count'"),
    "negative rows": (lambda head: head.update(rows=-1), "found -1 as its 'rows'"),
    "number for a flag": (
        lambda head: head.update(flag=0),
        "found 0 as its 'flag', expected true or false",
    ),
    "list of columns": (lambda head: head.update(columns=["big"]), "found the columns"),
    "no needed column": (lambda head: head["columns"].pop("small"), "found the columns"),
    "unknown column": (lambda head: renamed(head, "extra", "other"), "found the columns"),
    "wrong order": (
        lambda head: head.update(columns=dict(reversed(head["columns"].items()))),
        "found the columns",
    ),
    "wrong dtype": (
        lambda head: head["columns"]["extra"].__setitem__(0, "<i4"),
        r"found \['<i4', \d+\] as its column 'extra', expected \['<u4', offset\]",
    ),
    "object dtype": (
        lambda head: head["columns"]["big"].__setitem__(0, "|O"),
        "as its column 'big'",
    ),
    "place is text": (
        lambda head: head["columns"]["big"].__setitem__(1, "320"),
        "as its column 'big'",
    ),
    "no place": (lambda head: head["columns"]["big"].pop(), "as its column 'big'"),
    "unaligned": (lambda head: moved(head, 8), "column 'big' begins at byte"),
    "one shifted": (lambda head: moved(head, 64, ["small"]), "column 'small' begins at byte"),
    "all shifted on": (lambda head: moved(head, 64), "before column 'big' that belong to no"),
    "all shifted back": (lambda head: moved(head, -64), "found bytes"),
    "in the head": (lambda head: moved(head, -1 << 40), "column 'big' begins at byte"),
    "far outside": (lambda head: moved(head, 1 << 70), "found bytes before column 'big'"),
    "a row too few": (lambda head: head.update(rows=9), "found bytes before column 'small'"),
    "rows beyond the column": (
        lambda head: head.update(rows=17),
        "column 'small' begins at byte",
    ),
    "endless rows": (lambda head: head.update(rows=1 << 80), "column 'small' begins at byte"),
}


@pytest.mark.parametrize(("edit", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_head_is_stale(path, edit, message):
    """A head that is not exactly what the reader needs is refused, and the message says why."""
    edit_head(path, edit)
    with pytest.raises(StaleError, match=f"the file is broken: .*{message}.*Build it again"):
        Columns(path, SCHEMA, "Build it again.")


def test_a_row_count_that_ends_elsewhere_is_stale(tmp_path):
    """The last column too must end where the file does."""
    path = written(tmp_path / "columns", rows=16, names=("big", "small"))
    edit_head(path, lambda head: (head["columns"].pop("small"), head.update(rows=8)))
    schema = SCHEMA._replace(columns={"big": BIG}, optional=())
    with pytest.raises(StaleError, match=r"its columns of 8 rows end at byte [\d,]+, expected"):
        Columns(path, schema, "")


@pytest.mark.parametrize("text", [b"[]", b"{", b"[" * 200_000, b"\xff", b"null"])
def test_a_head_that_is_no_object_is_stale(tmp_path, text):
    """Other JSON, broken JSON and JSON that nests too deeply raise `StaleError` too."""
    path = tmp_path / "columns"
    path.write_bytes(b"CMCOLS\r\n" + len(text).to_bytes(8, "little") + text)
    with pytest.raises(StaleError, match="the file is broken"):
        Columns(path, SCHEMA, "")


def test_a_changed_byte_in_a_column_is_stale(path):
    """Any byte of the columns or of their checksum is compared, unless the file is not read."""
    whole = path.read_bytes()
    start = min(place for _, place in Columns(path, SCHEMA, "").about["columns"].values())
    for place in range(start, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(StaleError, match=r"the file is broken: .*Build it again"):
            Columns(path, SCHEMA, "Build it again.")
    path.write_bytes(whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :])
    assert Columns(path, SCHEMA, "", read_all=False)["big"][0] == 0


@pytest.mark.parametrize("change", [lambda data: data[:-64], lambda data: data + bytes(64)])
def test_a_file_of_another_size_is_stale(path, change):
    """A file that was cut off or extended is recognized by the size in its head."""
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(StaleError, match=r"found [\d,]+ bytes, expected [\d,]+: the file was cut"):
        Columns(path, SCHEMA, "")
