"""Compressed files are read whole or are an error, in bounded memory."""

import gzip
import io
import random
import shutil
import subprocess
import tracemalloc
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from capmerge.errors import DataError
from capmerge.files.compression import BrokenStreamError, ZstdReader, compress, decompressing
from capmerge.files.source import StreamSource, open_source

DATA = random.Random(7).randbytes(300_000) + bytes(300_000) + b"a text that repeats itself, " * 9000
SKIPPED = b"\x53\x2a\x4d\x18\x03\x00\x00\x00abc"


def frame(data, **options):
    """One frame of zstd."""
    return zstandard.ZstdCompressor(**options).compress(data)


def stream(data, **options):
    """One frame whose head does not tell the size of the data, as a pipe to zstd gives it."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    return compressor.compress(data) + compressor.flush()


def read(data, size=1 << 18):
    """All that a reader of these bytes gives, in reads of about `size`."""
    reader = ZstdReader(io.BufferedReader(io.BytesIO(data)))
    return b"".join(iter(lambda: reader.read(size), b""))


FILES = {
    "one frame": frame(DATA),
    "a stream": stream(DATA),
    "a checksum": frame(DATA, write_checksum=True),
    "no size": frame(DATA, write_content_size=False),
    "many frames": b"".join(frame(DATA[n : n + 70_000]) for n in range(0, len(DATA), 70_000)),
    "frames without data": SKIPPED + frame(b"") + frame(DATA) + SKIPPED + stream(b""),
    "fast": frame(DATA, level=-5),
    "small": frame(DATA, level=19),
}


@pytest.mark.parametrize("kind", FILES)
def test_any_zstd_file_is_read_whole(tmp_path, kind):
    """Frames of any kind and number give what was compressed, whatever the name says."""
    path = tmp_path / "m.json"
    path.write_bytes(FILES[kind])
    with open_source(str(path)) as source:
        assert isinstance(source, StreamSource)
        assert source.total_bytes == path.stat().st_size
        assert source.window(0, 2 << 20) == DATA
        assert source.read_bytes(0) == path.stat().st_size
    assert read(FILES[kind], 1) == DATA


@given(st.lists(st.binary(max_size=300), max_size=6), st.data())
def test_parts_written_here_make_one_file(parts, data):
    """Parts compressed one by one are read as one file, by us and by the tools of the format."""
    joined = b"".join(parts)
    for compression in ("gz", "zst"):
        file = b"".join(compress(part, compression) for part in parts)
        found = decompressing(io.BufferedReader(io.BytesIO(file)))
        assert (found is None) == (not parts)
        if found:
            assert b"".join(iter(lambda reader=found: reader.read(100), b"")) == joined
    cut = data.draw(st.integers(0, len(file)))
    with suppress(BrokenStreamError):
        assert joined.startswith(read(file[:cut]))  # cut at the end of a frame


@pytest.mark.parametrize("kind", ["one frame", "a stream", "a checksum", "frames without data"])
def test_a_zstd_file_cut_anywhere_is_an_error(tmp_path, kind):
    """A file that is cut off is never taken for a shorter one."""
    whole, path = FILES[kind], tmp_path / "m.json.zst"
    ends = {len(SKIPPED), len(SKIPPED) + len(frame(b"")), len(whole) - len(SKIPPED + stream(b""))}
    ends |= {len(whole) - len(stream(b""))}
    for end in [1, 2, 3, 4, 5, 6, 9, 12, 100, len(whole) // 2, len(whole) - 3, len(whole) - 1]:
        if kind == "frames without data" and end in ends:
            continue
        path.write_bytes(whole[:end])
        with (
            open_source(str(path)) as source,
            pytest.raises(DataError, match=r"zstd data is broken \(it is cut off\).*zstd -t"),
        ):
            source.window(0, 2 << 20)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data + b"no zstd", "something else follows a frame"),
        (lambda data: data + b"\n", "something else follows a frame"),
        (lambda data: data + gzip.compress(b""), "something else follows a frame"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "checksum"),
        (lambda data: data[:150_000] + b"x" * 9 + data[150_009:], "checksum"),
        (lambda data: data[:4] + bytes([data[4] | 8]) + data[5:], ""),
        (lambda data: data[:4] + b"\x0c" + data[5:], ""),
    ],
)
def test_a_broken_zstd_file(tmp_path, spoil, reason):
    """Damage and garbage behind the end are an error with the place, and the command to check."""
    path = tmp_path / "m.json"
    path.write_bytes(spoil(frame(DATA, write_checksum=True)))
    with (
        open_source(str(path)) as source,
        pytest.raises(DataError, match=rf"zstd data is broken \(.*{reason}.*zstd -t") as error,
    ):
        source.window(0, 2 << 20)
    assert error.value.name == str(path)
    assert 0 < error.value.offset <= path.stat().st_size


def test_a_bomb_takes_no_memory():
    """A few KB that become 2 GB are read piece by piece."""
    compressor = zstandard.ZstdCompressor(level=1).compressobj()
    zeros = bytes(1 << 24)
    bomb = b"".join([*(compressor.compress(zeros) for _ in range(128)), compressor.flush()])
    assert len(bomb) < 100_000
    reader = ZstdReader(io.BufferedReader(io.BytesIO(bomb)))
    tracemalloc.start()
    assert len(reader.read(1 << 18)) < 1 << 19
    assert len(reader.read(1 << 18)) < 1 << 19
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


def test_a_long_window_is_refused_with_a_way_out(tmp_path):
    """What was compressed with --long needs memory without bound: the message says what helps."""
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=30)
    path = tmp_path / "m.zst"
    path.write_bytes(stream(b"{}", compression_params=long))
    with (
        open_source(str(path)) as source,
        pytest.raises(DataError, match=r"long window.*--long=31"),
    ):
        source.window(0, 10)


def test_many_empty_frames_take_linear_time():
    """A file of nothing but empty frames is read in one pass, without deep calls."""
    assert read(frame(b"") * 50_000 + frame(b"end")) == b"end"


@pytest.mark.skipif(not shutil.which("zstd"), reason="the program zstd is not installed")
def test_the_program_zstd_agrees(tmp_path):
    """It reads what is written here, and what it writes is read here."""
    path = tmp_path / "a.zst"
    path.write_bytes(compress(DATA, "zst") + compress(b"{}", "zst"))
    unpacked = subprocess.run(["zstd", "-dc", path], capture_output=True, check=True).stdout
    assert unpacked == DATA + b"{}"
    packed = subprocess.run(["zstd", "-c"], input=DATA, capture_output=True, check=True).stdout
    assert read(packed) == DATA
