"""Compressed streams: gzip and zstd, told by their first bytes, read whole and in bounded memory.

A stream may have several parts: members of gzip, frames of zstd. One that is cut off, damaged or
followed by something else is an error, never a shorter file.
"""

import gzip
import io
import zlib
from pathlib import Path
from typing import Literal, Protocol

Compression = Literal["", "gz", "zst"]
"""How a file is compressed, as its ending says; "" if it is not."""

_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_SKIPPED_MAGICS = tuple(bytes([first]) + b"\x2a\x4d\x18" for first in range(0x50, 0x60))
"""The first bytes of frames that hold no data, as `pzstd` writes them."""
_ZSTD_LEVEL = 3
_LEN_OF_DICTIONARY_ID = (0, 1, 2, 4)
_LEN_OF_CONTENT_SIZE = (0, 2, 4, 8)
_AGAIN = "Copy or download the file again; `{} -t` checks it."


class BrokenStreamError(Exception):
    """The compressed data cannot be read."""

    def __init__(self, problem: str, next_step: str) -> None:
        super().__init__(problem, next_step)
        self.problem, self.next_step = problem, next_step


class Reader(Protocol):
    """A compressed file as the bytes that were compressed."""

    def read(self, size: int, /) -> bytes:
        """Return some of the next bytes, about `size`; none only at the end.

        Raises `BrokenStreamError` where the data cannot be read.
        """

    def fileno(self) -> int:
        """The descriptor of the compressed file."""

    def close(self) -> None:
        """Close the reader, not the compressed file."""


def compression_of(path: Path) -> Compression:
    """How a file is compressed by the ending of its name."""
    endings: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
    return endings.get(path.suffix.lower(), "")


def without_compression(path: Path) -> Path:
    """The path without the ending of its compression."""
    return path.with_suffix("") if compression_of(path) else path


def compress(data: bytes, compression: Compression) -> bytes:
    """`data` as one part of a compressed file.

    It has no time stamp, so equal data give equal bytes.
    """
    if compression == "gz":
        return zlib.compress(data, 6, wbits=31)
    if compression == "zst":
        import zstandard

        return zstandard.ZstdCompressor(_ZSTD_LEVEL, write_checksum=True).compress(data)
    return data


def decompressing(file: io.BufferedReader) -> Reader | None:
    """A reader of `file` if its first bytes are those of a compressed one, else None."""
    # peek() may give fewer bytes than there are, but at least one before the end. No text of JSON
    # begins with the first byte of a magic number.
    head = file.peek(4)[:4]
    if not is_compressed(head):
        return None
    return ZstdReader(file) if _begins_zstd(head) else GzipReader(file)


def is_compressed(head: bytes) -> bool:
    """Return whether the first bytes of a file, up to 4, are those of a compressed one."""
    return bool(head) and (_GZIP_MAGIC.startswith(head[:2]) or _begins_zstd(head))


class GzipReader:
    """The bytes that a gzip file holds."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = gzip.GzipFile(fileobj=file)

    def read(self, size: int, /) -> bytes:
        """Return some of the next bytes; none at the end."""
        try:
            return self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise BrokenStreamError(
                f"the gzip data is broken ({error}).", _AGAIN.format("gzip")
            ) from error

    def fileno(self) -> int:
        """The descriptor of the compressed file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the reader, not the compressed file."""
        self._file.close()


class ZstdReader:
    """The bytes that a zstd file holds, in one frame or several.

    The library tells neither that a file is cut off nor where a frame ends, and it decompresses
    what it is given at once, however much that becomes. So frames are taken apart here (RFC 8878):
    the library is given one block at a time, which becomes 128 KiB at the most.
    """

    def __init__(self, file: io.BufferedReader) -> None:
        import zstandard

        self._file, self._error = file, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor()
        self._frame = self._decompressor.decompressobj()
        self._has_checksum = self._is_inside = False

    def read(self, size: int, /) -> bytes:
        """Return some of the next bytes, `size` or a little more; none at the end."""
        parts, found = [], 0
        while found < size:
            try:
                part = self._block() if self._is_inside else self._header()
            except self._error as error:
                raise _broken(str(error).removeprefix("zstd decompress error: ")) from error
            if part is None:
                break
            parts.append(part)
            found += len(part)
        return b"".join(parts)

    def fileno(self) -> int:
        """The descriptor of the compressed file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close nothing: the reader holds nothing open."""

    def _header(self) -> bytes | None:
        """Begin the next frame, or skip one without data; None at the end of the file."""
        magic = self._file.read(4)
        if not magic:
            return None
        if magic in _SKIPPED_MAGICS:
            self._skip(int.from_bytes(self._take(4), "little"))
            return b""
        if magic != _ZSTD_MAGIC:
            is_cut = _begins_zstd(magic)
            raise _broken("it is cut off" if is_cut else "something else follows a frame")
        descriptor = self._take(1)
        flags = descriptor[0]
        is_single = bool(flags & 0x20)
        rest = (
            (0 if is_single else 1)
            + _LEN_OF_DICTIONARY_ID[flags & 3]
            + (_LEN_OF_CONTENT_SIZE[flags >> 6] or (1 if is_single else 0))
        )
        self._has_checksum, self._is_inside = bool(flags & 4), True
        self._frame = self._decompressor.decompressobj()
        return self._frame.decompress(magic + descriptor + self._take(rest))

    def _block(self) -> bytes:
        """The bytes of the next block of the frame."""
        header = self._take(3)
        about = int.from_bytes(header, "little")
        is_last, kind, size = about & 1, about >> 1 & 3, about >> 3
        block = header + self._take(1 if kind == 1 else size)  # 1: a byte that is repeated
        if is_last:
            self._is_inside = False
            block += self._take(4 if self._has_checksum else 0)
        return self._frame.decompress(block)

    def _take(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise _broken("it is cut off")
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._take(min(size, 1 << 16)))


def _begins_zstd(head: bytes) -> bool:
    """True for the first bytes of a frame, four or fewer."""
    return any(magic.startswith(head) for magic in (_ZSTD_MAGIC, *_SKIPPED_MAGICS))


def _broken(reason: str) -> BrokenStreamError:
    if "too much memory" in reason:
        return BrokenStreamError(
            f"the zstd data was compressed with a long window ({reason}).",
            "Compress it again without --long: zstd -dc --long=31 FILE | zstd > NEW.",
        )
    return BrokenStreamError(f"the zstd data is broken ({reason}).", _AGAIN.format("zstd"))
