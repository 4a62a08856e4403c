"""The layout of a zip file, checked strictly: what other readers could take in another way.

Readers of zip files forgive much, and each forgives something else: bytes behind the end, two
members of one name, members that share bytes, sizes that are not those of the data. No program that
caches latents writes such a file, so it was damaged or made to deceive. Source: PKWARE's APPNOTE
4.3, and `zipfile` of Python, which writes every `.npz`.
"""

import struct
import zipfile
from typing import NamedTuple

from capmerge.files.openable import BinaryFile

MOST_BYTES = 1 << 30
"""The bytes that all members may have together when they are unpacked.

The latents of 8192 x 8192 px with 16 channels and their flipped ones take 128 MiB, and an alpha
mask of them 256 MiB.
"""

_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_NEWEST = 63
"""The version of the format that all readers know, times ten."""
_LONGEST_COMMENT = (1 << 16) - 1
_LONGEST_DIRECTORY = 1 << 22
_UNKNOWN = (1 << 32) - 1
"""A size that an extra field tells."""


class _Entry(NamedTuple):
    name: bytes
    method: int
    packed: int
    unpacked: int
    start: int
    flags: int
    version: int
    """The version of the format that it needs, times ten."""


class LayoutError(zipfile.BadZipFile):
    """What is wrong with a zip file, as a part of a sentence."""


def check_layout(file: BinaryFile) -> dict[str, int]:
    """Return the size of each member when it is unpacked, by its name.

    Raises `LayoutError`, and `OSError` when the file cannot be read.
    """
    directory, entries = _directory(file)
    total = sum(entry.unpacked for entry in entries)
    if total > MOST_BYTES:
        raise LayoutError(
            f"its members unpack to {total:,} bytes, expected at most {MOST_BYTES:,} for latents"
        )
    # Compare each member with its own header, and its end with the start of the next one.
    before, end = b"", 0
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start < end:
            raise LayoutError(f"its members {_shown(before)} and {_shown(entry.name)} overlap")
        if not before and entry.start:
            raise LayoutError(f"found {entry.start:,} bytes before its first member")
        before, end = entry.name, _end_of(file, entry)
        if end > directory:
            raise LayoutError(f"its member {_shown(entry.name)} ends inside of its directory")
    sizes: dict[str, int] = {}
    for entry in entries:
        name = entry.name.decode("utf-8" if entry.flags & 0x800 else "cp437", "replace")
        if name in sizes:
            raise LayoutError(f"it has two members of the name {_shown(entry.name)}")
        sizes[name] = entry.unpacked
    return sizes


def _directory(file: BinaryFile) -> tuple[int, list[_Entry]]:
    """Return the offset of the central directory, and its entries."""
    # The end record, which must be the end of the file.
    size = file.seek(0, 2)
    if not size:
        raise LayoutError("the file is empty")
    tail_start = file.seek(max(0, size - _END.size - _LONGEST_COMMENT))
    tail = file.read() or b""
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) - place < _END.size:
        raise LayoutError("found no end of a zip: the file was cut off, or is no .npz")
    _, disk, start_disk, here, count, length, start, comment = _END.unpack_from(tail, place)
    rest = len(tail) - place - _END.size
    if rest != comment:
        raise LayoutError(f"found {rest:,} bytes behind its end, expected {comment:,}")
    if disk or start_disk or here != count or _UNKNOWN in (length, start):
        raise LayoutError("its directory is that of a zip in several parts or of more than 4 GiB")
    if start + length != tail_start + place:
        raise LayoutError(
            f"its directory ends at byte {start + length:,}, expected {tail_start + place:,}"
        )
    if length > _LONGEST_DIRECTORY:
        raise LayoutError(f"its directory takes {length:,} bytes, more than latents have")

    # Its entries, which must fill it.
    file.seek(start)
    data, at = file.read(length) or b"", 0
    entries: list[_Entry] = []
    for _ in range(count):
        if len(data) < at + _ENTRY.size or data[at : at + 4] != b"PK\1\2":
            raise LayoutError(f"its directory holds {len(entries)} members, expected {count}")
        fields = _ENTRY.unpack_from(data, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = data[at + _ENTRY.size : at + _ENTRY.size + name_bytes]
        entries.append(
            _Entry(name, fields[4], fields[8], fields[9], fields[16], fields[3], fields[2])
        )
        at += _ENTRY.size + name_bytes + extra_bytes + comment_bytes
        _check_entry(entries[-1])
    if at != length:
        raise LayoutError(f"its directory has {length - at:,} bytes that belong to no member")
    return start, entries


def _check_entry(entry: _Entry) -> None:
    if entry.flags & 1:
        raise LayoutError(f"its member {_shown(entry.name)} is encrypted")
    if entry.version > _NEWEST:
        raise LayoutError(
            f"its member {_shown(entry.name)} needs version {entry.version / 10} of the zip "
            f"format, expected at most {_NEWEST / 10}"
        )
    if entry.method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise LayoutError(
            f"its member {_shown(entry.name)} is compressed by method {entry.method}, expected "
            "none or deflate"
        )
    if _UNKNOWN in (entry.packed, entry.unpacked, entry.start):
        raise LayoutError(f"its member {_shown(entry.name)} has a size of more than 4 GiB")
    if entry.method == zipfile.ZIP_STORED and entry.packed != entry.unpacked:
        raise LayoutError(
            f"its member {_shown(entry.name)} is stored, with {entry.packed:,} bytes packed and "
            f"{entry.unpacked:,} unpacked, expected equal sizes"
        )


def _end_of(file: BinaryFile, entry: _Entry) -> int:
    """Return where the data of a member end; raises `LayoutError` if its own header differs."""
    file.seek(entry.start)
    head = file.read(_LOCAL.size + len(entry.name)) or b""
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        raise LayoutError(f"found no header of its member {_shown(entry.name)}")
    fields = _LOCAL.unpack_from(head)
    flags, method, packed, unpacked, name_bytes, extra_bytes = (
        fields[2],
        fields[3],
        fields[7],
        fields[8],
        fields[9],
        fields[10],
    )
    if name_bytes != len(entry.name) or head[_LOCAL.size :] != entry.name:
        raise LayoutError(f"the header of its member {_shown(entry.name)} has another name")
    # Sizes may follow the data (flag 8), or stand in an extra field.
    told = not flags & 8 and _UNKNOWN not in (packed, unpacked)
    if method != entry.method or (told and (packed, unpacked) != (entry.packed, entry.unpacked)):
        raise LayoutError(
            f"the header of its member {_shown(entry.name)} and its directory tell other sizes"
        )
    end: int = entry.start + _LOCAL.size + name_bytes + extra_bytes + entry.packed
    return end


def _shown(name: bytes) -> str:
    return f'"{name[:80].decode("utf-8", "replace")}"'
