"""The names of cached latents, which are built on the stem of a record's key.

The key of a record is the path of its picture, with the extension or without, relative or absolute.
All functions are pure. Source: sd-scripts-facts A1 and A4.
"""

import ntpath
import os
import posixpath
import re
from hashlib import blake2b
from typing import NamedTuple

INSIDE, ABSOLUTE, ABOVE = range(3)
"""The directions of a stem: below its folder, to an absolute path, or out of its folder by `..`."""

ENDING = ".npz"
LEGACY = 1
"""The form `<stem>.npz`."""
SIZED = {"_sd": 2, "_sdxl": 4}
"""The forms `<stem>_{w:04d}x{h:04d}_sd.npz` and `_sdxl.npz`.

w and h are the size of the original picture in px.
"""
PIXELS_PER_LATENT = 8
"""The number of pixels per latent position along each side of a picture, in every family."""
BROKEN = 128
"""Added to the form of a file that was opened and in which no size was found."""

_SIZED_NAME = re.compile(r"(?s)(.+)_(\d{4}|[1-9]\d{4,8})x(\d{4}|[1-9]\d{4,8})(_[a-z0-9]+)")
_ARRAY = re.compile(r"latents(_flipped)?(_([1-9]\d{0,5})x([1-9]\d{0,5}))?")
_TEXT_OUTPUTS = re.compile(r"(?s).*_te(_outputs)?")
_PICTURES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jxl", ".heic"}
)
_LONGEST_EXTENSION = max(map(len, _PICTURES))
_IRREGULAR = re.compile(r"(?:^|/)\.{1,2}(?:/|$)|//|/$")


class Stem(NamedTuple):
    """A normal path without the picture's extension."""

    text: str
    leads: int
    """`INSIDE`, `ABSOLUTE` or `ABOVE`."""


def stem_of(key: str) -> Stem:
    """Return the stem of a `key`: its normal path without the extension of a picture.

    Any other text behind a dot stays, since it may be part of a name.

    >>> stem_of("a/b.PNG"), stem_of("v1.5"), stem_of("../b.png").leads == ABOVE
    (Stem(text='a/b', leads=0), Stem(text='v1.5', leads=0), True)
    """
    if "." not in key and key[:1] != "/" and key[-1:] != "/" and "//" not in key and os.sep == "/":
        return Stem(key, INSIDE)  # nearly all keys
    dot = key.rfind(".", len(key) - _LONGEST_EXTENSION if len(key) > _LONGEST_EXTENSION else 0)
    if dot > 0 and key[dot - 1] not in "/\\" and key[dot:].lower() in _PICTURES:
        key = key[:dot]
    if os.sep == "\\":
        key = key.replace("\\", "/")
        if ntpath.isabs(key) or ntpath.splitdrive(key)[0]:
            return Stem(posixpath.normpath(key), ABSOLUTE)
    if key[:1] == "/":
        return Stem(posixpath.normpath("/" + key.lstrip("/")), ABSOLUTE)
    if ("." in key or "//" in key or key[-1:] == "/") and _IRREGULAR.search(key):
        key = posixpath.normpath(key)
        return Stem(key, ABOVE if key == ".." or key.startswith("../") else INSIDE)
    return Stem(key, INSIDE)


def hash_of(stem: str) -> bytes:
    """Return eight bytes that tell stems apart.

    Among 12 million stems, the chance that any two agree is 1 in 250,000.
    """
    return blake2b(stem.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def legacy_name(stem: str) -> str:
    """Return the file name of the form `LEGACY`."""
    return stem + ENDING


def sized_name(stem: str, width: int, height: int, suffix: str) -> str:
    """Return the file name of a form of `SIZED`.

    >>> sized_name("a/b", 832, 1216, "_sdxl")
    'a/b_0832x1216_sdxl.npz'
    """
    return f"{stem}_{width:04d}x{height:04d}{suffix}{ENDING}"


def parse_sized(name: str) -> tuple[str, int, int, str] | None:
    """Return stem, width, height and suffix of a new-style name, of any model, else None.

    The name is given without `ENDING`.

    >>> parse_sized("a_0832x1216_sdxl"), parse_sized("a_832x1216_sdxl")
    (('a', 832, 1216, '_sdxl'), None)
    """
    match = _SIZED_NAME.fullmatch(name)
    return (match[1], int(match[2]), int(match[3]), match[4]) if match else None


class ArrayName(NamedTuple):
    """The name of an array of latents inside of a file."""

    flipped: bool
    suffix: str
    """`_{h}x{w}` in latent units, which the other arrays of that resolution have too, or ""."""
    sides: tuple[int, int] | None
    """h and w of the suffix."""


def parse_array(name: str) -> ArrayName | None:
    """Return what the name of an array says, or None if it is not one of latents.

    >>> parse_array("latents_flipped_152x104"), parse_array("latents_dtype")
    (ArrayName(flipped=True, suffix='_152x104', sides=(152, 104)), None)
    """
    match = _ARRAY.fullmatch(name)
    if not match:
        return None
    sides = (int(match[3]), int(match[4])) if match[2] else None
    return ArrayName(match[1] is not None, match[2] or "", sides)


def is_text_output(name: str) -> bool:
    """Return whether a name without `ENDING` is that of cached outputs of a text encoder."""
    return _TEXT_OUTPUTS.fullmatch(name) is not None
