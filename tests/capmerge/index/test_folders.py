"""The index of a folder of JSON lines: that of the joined file, with messages that name files."""

import gzip
import json
import pickle

import numpy as np
import pytest
from builders.metadata import as_indent_2, as_jsonl, make_records, read_jsonl, rewritten, run

from capmerge.errors import DataError, StaleError
from capmerge.files.compression import compress
from capmerge.index.build import build_index
from capmerge.index.reader import open_index

RECORDS = {key: rewritten(record) for key, record in make_records(900, nested=True).items()}
MARK = b"\xef\xbb\xbf"


def lines_of(records):
    """Return the lines of JSON lines, each with its end."""
    return as_jsonl(records).splitlines(keepends=True)


@pytest.fixture
def folder(tmp_path):
    """Return a folder with shards in folders below it, and files that are none."""
    lines = lines_of(RECORDS)
    shards = {
        "b/1.jsonl": b"".join(lines[:300]),
        "b/2.jsonl": b"",
        "b/3.JSONL": MARK + b"".join(lines[300:301]),
        "c.jsonl": b"".join(lines[301:]),
        "c.jsonl.rejects.jsonl": b"not this\n",
        "c.jsonl.capmerge.json": b"{}",
        "manifest.json": b"{}",
        "stats.json": b"{}",
        ".hidden/4.jsonl": b"nor this\n",
        "notes.txt": b"nor these",
    }
    for name, content in shards.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "joined.jsonl").write_bytes(b"".join(lines))
    return tmp_path / "out"


@pytest.mark.parametrize(("jobs", "start_method"), [(1, "fork"), (3, "fork"), (2, "spawn")])
def test_it_is_the_index_of_the_joined_file(folder, jobs, start_method):
    """All bytes of the two indexes are equal, and so is each record that is read by them."""
    index = build_index(folder, jobs=jobs, start_method=start_method)
    expected = build_index(folder.with_name("joined.jsonl"))
    assert index.path == folder.with_name("out.index")
    assert index.path.read_bytes() == expected.path.read_bytes()
    again = pickle.loads(pickle.dumps(index))
    assert len(index) == len(RECORDS)
    for number, (key, record) in enumerate(RECORDS.items()):
        assert index.read(number) == again.read(number) == expected.read(number)
        assert index.read(number) == (key, record)
        assert index.rows_of(key) == [number]
        name, offset = index.place_of(number)
        line = (folder / name).read_bytes()[offset:].split(b"\n")[0]
        assert json.loads(line)["image_path"] == key


def test_a_shard_without_a_last_line_break(folder):
    """The records on both sides of the seam are whole."""
    path = folder / "b" / "1.jsonl"
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    index = build_index(folder)
    assert [index.read(number)[0] for number in (0, 299, 300, 301)] == [
        [*RECORDS][number] for number in (0, 299, 300, 301)
    ]


def test_the_last_record_of_a_key_counts(folder):
    """As in a single file, also where the key is in two shards."""
    key, record = next(iter(RECORDS.items()))
    (folder / "d.jsonl").write_bytes(as_jsonl({key: {**record, "extra": 1}}))
    index = build_index(folder)
    assert (len(index), index.repeated) == (len(RECORDS), 1)
    assert index.read(index.rows_of(key)[0])[1]["extra"] == 1


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("d.jsonl.gz", gzip.compress(b"{}"), "a compressed file"),
        ("d.jsonl.zst", compress(b"{}", "zst"), "a compressed file"),
        ("d.parquet", b"PAR1", "a Parquet file"),
        ("d.1.jsonl.gz", gzip.compress(b"{}"), "a compressed file"),
        ("d.json", as_indent_2(RECORDS), "a file of JSON"),
        ("d.jsonl", gzip.compress(b"{}"), "a compressed file"),
        ("d.jsonl", compress(b"{}", "zst"), "a compressed file"),
        ("d.jsonl", b"PAR1....PAR1", "a Parquet file"),
        ("d.jsonl", as_indent_2(RECORDS), "a JSON object"),
        ("d.jsonl", b'{"a/b": {"caption": "x"}}', "a JSON object"),
    ],
)
def test_other_formats_are_refused(folder, name, content, found):
    """The message names the file, what it is, and `capmerge convert`."""
    (folder / "sub").mkdir()
    (folder / "sub" / name).write_bytes(content)
    finished = run("index", folder, fails=2)
    assert f"sub/{name}: found {found} among the shards, expected plain JSON" in finished.err
    new = "d.1.jsonl" if name.startswith("d.1") else "d.jsonl"
    assert f"capmerge convert {folder}/sub/{name} -o NEW/{new}" in finished.err
    assert not folder.with_name("out.index").exists()


def test_the_way_out_is_a_way(folder, tmp_path):
    """What the message says to do gives a folder that is taken, with the same records."""
    compressed = folder / "c.jsonl.gz"
    compressed.write_bytes(gzip.compress((folder / "c.jsonl").read_bytes()))
    (folder / "c.jsonl").unlink()
    message = run("index", folder, fails=2).err
    words = message.rpartition("capmerge convert ")[2].split()
    (tmp_path / "NEW").mkdir()
    run("convert", *words, cwd=tmp_path)
    assert len(build_index(tmp_path / "NEW")) == len(read_jsonl(tmp_path / "NEW" / "c.jsonl"))


def test_a_folder_without_shards(tmp_path):
    """Nothing to index is a mistake, and not an index of nothing."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x.rejects.jsonl").write_bytes(b"")
    assert "found no shards in the folder" in run("index", tmp_path / "out", fails=2).err


@pytest.mark.parametrize("change", ["added", "removed", "longer", "renamed"])
def test_a_changed_folder_has_another_index(folder, change):
    """An index of other content is refused, and built again by the command."""
    build_index(folder)
    shard = folder / "c.jsonl"
    if change == "added":
        (folder / "d.jsonl").write_bytes(as_jsonl({"new": next(iter(RECORDS.values()))}))
    elif change == "removed":
        (folder / "b" / "3.JSONL").unlink()
    elif change == "longer":
        shard.write_bytes(shard.read_bytes() + b"\n")
    else:
        shard.rename(folder / "a.jsonl")
    with pytest.raises(StaleError, match="was made of other content than out has now"):
        open_index(folder)
    output = run("index", folder).out.decode()
    assert "It is built again." in output
    assert open_index(folder).read(0)[0] in RECORDS


def test_messages_name_the_shard_and_its_own_offset(folder):
    """A damaged line, a record that is not rewritten, and one that changed under an index."""
    shard = folder / "c.jsonl"
    lines = shard.read_bytes().splitlines(keepends=True)
    place = len(b"".join(lines[:200]))
    index = build_index(folder)
    number = 301 + 200
    assert index.place_of(number) == (str(shard), place)

    # The same number of bytes, so that only the checksum of the record tells.
    other = lines[200].replace(b"caption", b"kaption")
    shard.write_bytes(b"".join([*lines[:200], other, *lines[201:]]))
    with pytest.raises(StaleError, match=rf"c\.jsonl, byte {place:,}: this is not record {number}"):
        index.read(number)

    shard.write_bytes(b"".join([*lines[:200], b'{"image_path": "k"}\n', *lines[201:]]))
    with pytest.raises(DataError, match=rf'c\.jsonl, byte {place:,}, record "k": found a record w'):
        build_index(folder)
    shard.write_bytes(b"".join([*lines[:200], b'{"image_path": \n', *lines[201:]]))
    with pytest.raises(DataError, match=r"c\.jsonl, byte [0-9,]+: "):
        build_index(folder, jobs=2)
    again = pickle.loads(pickle.dumps(index))
    shard.unlink()
    with pytest.raises(DataError, match=r"c\.jsonl: the source cannot be read"):
        again.read(number + 1)


def test_many_shards(tmp_path):
    """A shard for each record, more than may be open at a time."""
    for number, (key, record) in enumerate(RECORDS.items()):
        (tmp_path / f"{number:05d}.jsonl").write_bytes(as_jsonl({key: record}))
    index = build_index(tmp_path, at=tmp_path.with_name("many.index"), jobs=2)
    for number in np.random.default_rng(3).permutation(len(RECORDS)).tolist():
        assert index.read(number)[0] == [*RECORDS][number]
