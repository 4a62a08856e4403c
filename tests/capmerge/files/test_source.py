import gzip
import io
import os
import random
import threading

import pytest

from capmerge.errors import DataError, UsageError
from capmerge.files.compression import compress
from capmerge.files.source import BytesSource, FileSource, StreamSource, fingerprint, open_source

DATA = random.Random(7).randbytes(1 << 20)


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time, as pipes may, and counts them."""

    def __init__(self, data):
        super().__init__()
        self._data = io.BytesIO(data)
        self.given_bytes = 0
        self._rng = random.Random(1)

    def read(self, size=-1):
        """Return at most `size` bytes, often fewer."""
        got = self._data.read(self._rng.randint(1, min(size, 5000)))
        self.given_bytes += len(got)
        return got


@pytest.fixture
def plain_file(tmp_path):
    """Return a file of DATA."""
    path = tmp_path / "m.json"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def gz_file(tmp_path):
    """Return a file of DATA as gzip, under a name that does not say so."""
    path = tmp_path / "m.json"
    path.write_bytes(gzip.compress(DATA[:300_000], 1) + gzip.compress(DATA[300_000:], 1))
    return path


WINDOWS = [
    (0, 10),
    (0, 1 << 20),
    (0, 2 << 20),
    (5, 0),
    (1000, 1 << 19),
    ((1 << 20) - 3, 10),
    (1 << 20, 10),
]


@pytest.mark.parametrize("kind", ["file", "gz", "zst", "pipe", "bytes"])
def test_a_window_is_the_bytes_asked_for(kind, tmp_path):
    """Any source gives the bytes [start, start + size), fewer only at its end."""
    path = tmp_path / "x"
    path.write_bytes(compress(DATA, kind) if kind in ("gz", "zst") else DATA)
    source = {
        "pipe": lambda: StreamSource("p", Trickle(DATA)),
        "bytes": lambda: BytesSource("b", DATA, 0),
    }.get(kind, lambda: open_source(str(path)))()
    for start, size in WINDOWS:
        assert source.window(start, size) == DATA[start : start + size]
    if kind != "bytes":
        source.close()


def test_bytes_in_memory_stand_at_their_offset():
    """A piece of a source is read with the source's own offsets."""
    source = BytesSource("b", b"abcdef", 100)
    assert source.window(102, 2) == b"cd"
    assert source.window(104, 10) == b"ef"
    assert source.window(106, 10) == b""


def test_a_stream_reads_no_further_than_asked():
    """A pipe is read only as far as windows ask, and at most one read further."""
    stream = Trickle(DATA)
    source = StreamSource("p", stream)
    source.window(0, 100_000)
    assert 100_000 <= stream.given_bytes < 105_000
    source.window(50_000, 20_000)
    assert stream.given_bytes < 105_000


def test_released_bytes_are_forgotten():
    """Released bytes are dropped, and all others are kept."""
    source = StreamSource("p", Trickle(DATA))
    source.window(0, 200_000)
    source.release(150_000)
    assert source.window(150_000, 60_000) == DATA[150_000:210_000]
    assert len(source._kept) < 70_000
    for start in range(210_000, len(DATA), 10_000):
        source.release(start)
        assert source.window(start, 10_000) == DATA[start : start + 10_000]
        assert len(source._kept) < 20_000


def test_gzip_is_told_by_its_content(gz_file):
    """A gzip file of several members is read whole, whatever its name."""
    with open_source(str(gz_file)) as source:
        assert isinstance(source, StreamSource)
        assert source.total_bytes == gz_file.stat().st_size
        assert source.window(0, 2 << 20) == DATA
        assert source.read_bytes(0) == gz_file.stat().st_size


def test_a_plain_file_named_gz_is_a_plain_file(tmp_path):
    """The name alone does not make a file gzip."""
    path = tmp_path / "m.json.gz"
    path.write_bytes(b"{}")
    with open_source(str(path)) as source:
        assert isinstance(source, FileSource)
        assert source.window(0, 10) == b"{}"
        assert source.read_bytes(1) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-5],
        lambda data: data[: len(data) // 2],
        lambda data: data[:2],
        lambda data: data[:-8] + b"\0\0\0\0" + data[-4:],
        lambda data: data[:20] + b"\xff\xff\xff" + data[23:],
        lambda data: data[:5000] + bytes(100) + data[5100:],
        lambda data: data + b"not gzip",
    ],
    ids=["short", "half", "magic only", "checksum", "first block", "middle", "garbage behind"],
)
def test_broken_gzip(spoil, tmp_path):
    """Broken gzip data is a `DataError` that says so and names the command that checks it."""
    path = tmp_path / "m.json.gz"
    path.write_bytes(spoil(gzip.compress(DATA[:50_000] + b" " * 50_000)))
    with (
        open_source(str(path)) as source,
        pytest.raises(DataError, match=r"gzip data is broken.*gzip -t") as error,
    ):
        source.window(0, 1 << 20)
    assert error.value.name == str(path)
    assert 0 <= error.value.offset <= path.stat().st_size


@pytest.mark.parametrize("start_first", [True, False])
def test_a_stream_works_like_a_file_to_its_end(start_first):
    """A window past the end is empty, however often it is asked for."""
    source = StreamSource("p", io.BytesIO(b"abc"))
    if start_first:
        assert source.window(0, 1) == b"a"
    assert source.window(2, 10) == b"c"
    assert source.window(3, 10) == b""
    assert source.window(10, 10) == b""
    assert source.read_bytes(3) == 3
    assert source.total_bytes is None
    source.check_unchanged()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("compression", ["", "gz", "zst"])
def test_a_named_pipe_is_read_whole(tmp_path, compression):
    """A named pipe, like that of a shell's <(...), is opened once and read from its first byte."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found = []

    def read():
        with open_source(str(path)) as source:
            found.append(source.window(0, 2000))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    path.write_bytes(compress(DATA[:1000], compression))
    reader.join(10)
    assert found == [DATA[:1000]]


def test_sources_that_cannot_be_read(tmp_path):
    """A missing file and a folder are usage errors that name the path."""
    with pytest.raises(UsageError, match="no such file"):
        open_source(str(tmp_path / "missing.json"))
    with pytest.raises(UsageError, match="found a folder"):
        open_source(str(tmp_path))


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_file_without_permission(plain_file):
    """A file that may not be read is a usage error."""
    plain_file.chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        open_source(str(plain_file))


def test_a_file_that_changes_is_noticed(plain_file):
    """A file that grows while it is read is an error; an unchanged one is not."""
    with open_source(str(plain_file)) as source:
        source.window(0, 100)
        source.check_unchanged()
        with plain_file.open("ab") as file:
            file.write(b"x")
        with pytest.raises(DataError, match="changed while it was read"):
            source.check_unchanged()


def test_the_fingerprint_ties_to_the_content(plain_file):
    """Equal content has an equal fingerprint; another size, start or end has another."""

    def of(data):
        plain_file.write_bytes(data)
        with open_source(str(plain_file)) as source:
            return fingerprint(source)

    first = of(DATA)
    assert first == of(DATA)
    assert first["bytes"] == len(DATA)
    others = [of(DATA + b"x"), of(b"x" + DATA[1:]), of(DATA[:-1] + b"x"), of(b""), of(b"{}")]
    assert len({tuple(found.items()) for found in [first, *others]}) == 6


@pytest.mark.parametrize("data", [b"", b"{}", b"x" * 4095, b"x" * 4096, b"x" * 4097])
def test_small_files_have_fingerprints(tmp_path, data):
    """A file shorter than one hashed block has a fingerprint of its size too."""
    path = tmp_path / "m.json"
    path.write_bytes(data)
    with open_source(str(path)) as source:
        assert fingerprint(source)["bytes"] == len(data)
        assert len(fingerprint(source)["blake2b"]) == 32


def test_a_stream_has_no_fingerprint(gz_file):
    """A stream is read once, front to back, so it has no fingerprint."""
    with open_source(str(gz_file)) as source:
        assert fingerprint(source) == {"bytes": None, "blake2b": None}
