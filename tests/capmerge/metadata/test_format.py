import gzip
import json

import pytest
import zstandard
from builders.blocks import RECORDS

from capmerge.files.atomic import AtomicFile
from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.codec import Records
from capmerge.metadata.encoding import encode
from capmerge.metadata.format import WRITTEN, Format, RecordWriter
from capmerge.metadata.offsets import spans_written

UNPACK = {
    "": bytes,
    "gz": gzip.decompress,
    "zst": lambda data: (
        zstandard.ZstdDecompressor().stream_reader(data, read_across_frames=True).read()
    ),
}


def write(path, out, blocks):
    """Write blocks of records as a rewrite does.

    Returns the offset where the output of each block begins, and its bytes.
    """
    file, begun = AtomicFile(path), []
    writer = RecordWriter(file, out)
    for pairs in blocks:
        body = bytes(encode(Records(pairs), out.kind))
        for number, part in enumerate(out.parts(body)):
            writer.write(part, new_block=number == 0)
        begun.append((writer.block_start, body))
    writer.finish()
    file.publish()
    return begun


def in_blocks(pairs, size):
    """The pairs in lists of `size`."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


@pytest.mark.parametrize("compression", ["", "gz", "zst"])
@pytest.mark.parametrize("count", [0, 1, 2, len(RECORDS)])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_framing_and_encoding_make_one_json_file(tmp_path, compression, count, size):
    """Framed blocks of any size give the bytes of json.dump(indent=2), also without records."""
    pairs = list(RECORDS.items())[:count]
    write(tmp_path / "out", Format("json", compression), in_blocks(pairs, size))
    data = (tmp_path / "out").read_bytes()
    expected = json.dumps(dict(pairs), indent=2, ensure_ascii=False).encode()
    assert UNPACK[compression](data) == expected


@pytest.mark.parametrize("count", [0, 1, 2, len(RECORDS)])
@pytest.mark.parametrize("size", [1, 7, 100])
def test_framing_and_encoding_make_json_lines(tmp_path, count, size):
    """Framed blocks of any size give one line per record, each with its line break."""
    pairs = list(RECORDS.items())[:count]
    write(tmp_path / "out", Format("jsonl"), in_blocks(pairs, size))
    lines = (tmp_path / "out").read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert list(map(json.loads, lines)) == [{"image_path": key, **record} for key, record in pairs]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_what_is_written_is_read_with_the_same_separator(tmp_path, kind):
    """The layout that is stated for the output is the one that a reader of it finds."""
    write(tmp_path / "out", Format(kind), [list(RECORDS.items())])
    data = (tmp_path / "out").read_bytes()
    found = read_layout(BytesSource("out", data, 0))
    assert (found.kind, found.separator) == (kind, WRITTEN[kind].separator)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_offsets_of_written_records_are_those_in_the_file(tmp_path, kind):
    """The offset of a record in the file is its offset in the block plus that of the block."""
    pairs = list(RECORDS.items())
    blocks = in_blocks(pairs, 7)
    begun = write(tmp_path / "out", Format(kind), blocks)
    data, read = (tmp_path / "out").read_bytes(), []
    for block, (block_start, body) in zip(blocks, begun, strict=True):
        for start, end in spans_written(body, kind, len(block)):
            text = data[block_start + start : block_start + end]
            read.append(json.loads(text if kind == "jsonl" else b"{" + text + b"}"))
    assert read == [
        {"image_path": key, **record} if kind == "jsonl" else {key: record} for key, record in pairs
    ]
