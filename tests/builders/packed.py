"""Folders of latents and of shards for tests, and damaged files of every kind."""

import io
import json
import os
import warnings
import zipfile

import numpy as np

SIZE = (192, 128)


def arrays(**changes):
    """The arrays of a sound file for the bucket `SIZE`."""
    shape = (4, SIZE[1] // 8, SIZE[0] // 8)
    return {
        "latents": np.random.default_rng(0).standard_normal(shape, np.float32),
        "original_size": np.array(SIZE),
        "crop_ltrb": np.array([0, 0, *SIZE]),
        **changes,
    }


def write_sound(folder, names):
    """Write sound latents of these names, each with other values, and their metadata; its path."""
    for number, name in enumerate(names):
        path = folder / "latents" / f"{name}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays(latents=arrays()["latents"] + np.float32(number)))
    return write_metadata(folder, names)


def write_metadata(folder, keys):
    """Write metadata with these keys, which are not rewritten; its path."""
    records = {key: {"tags": "a, b", "train_resolution": [*SIZE]} for key in keys}
    path = folder / "meta.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def zipped(*members, compressed=False):
    """The bytes of a zip of these (name, bytes) pairs, in their order."""
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w") as target:
        warnings.simplefilter("ignore")  # of a doubled name
        for name, data in members:
            kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            target.writestr(zipfile.ZipInfo(name), data, kind)
    return file.getvalue()


def npy(array):
    """The bytes of an array as an npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def sound_members():
    """The members of a sound file, as `zipped` takes them."""
    return [(f"{name}.npy", npy(array)) for name, array in arrays().items()]


def _claim(shape):
    """An npy header that claims an array of this shape, with a few bytes behind it."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": "<f4", "fortran_order": False, "shape": shape}
    )
    return file.getvalue() + bytes(64)


def _sound():
    file = io.BytesIO()
    np.savez(file, **arrays())
    return file.getvalue()


def _flipped_bit():
    data = bytearray(_sound())
    data[400] ^= 1
    return bytes(data)


def _overlapping():
    """A sound zip whose second member begins inside of the first one's data."""
    inner = zipped(("crop_ltrb.npy", npy(arrays()["crop_ltrb"])))
    local = inner[: inner.index(b"PK\1\2")]
    outer = zipped(("latents.npy", npy(arrays()["latents"])[:-4] + local), *sound_members()[1:])
    place, found = outer.index(b"PK\1\2"), outer.index(local)
    entries = outer[place : outer.rindex(b"PK\5\6")]
    at = entries.rindex(b"PK\1\2")
    moved = entries[: at + 42] + found.to_bytes(4, "little") + entries[at + 46 :]
    return outer[:place] + moved + outer[outer.rindex(b"PK\5\6") :]


def _lying_size():
    """A zip whose directory says that a member is shorter than its own header says."""
    data = bytearray(zipped(*sound_members()))
    at = data.index(b"PK\1\2")
    for place in (at + 20, at + 24):
        size = int.from_bytes(data[place : place + 4], "little") - 4
        data[place : place + 4] = size.to_bytes(4, "little")
    return bytes(data)


def _bomb():
    return zipped(*sound_members(), ("zeros.npy", bytes((1 << 30) + 1)), compressed=True)


def _saved(**changes):
    file = io.BytesIO()
    np.savez(file, **{k: v for k, v in arrays(**changes).items() if v is not None})
    return file.getvalue()


BROKEN = {
    "empty": (lambda: b"", "the file is empty"),
    "cut": (lambda: _sound()[:-40], "found no end of a zip"),
    "half": (lambda: _sound()[:700], "found no end of a zip"),
    "behind": (lambda: _sound() + b"xyz", "found 3 bytes behind its end"),
    "before": (lambda: b"xyz" + _sound(), "its directory ends at byte"),
    "bit": (_flipped_bit, "Bad CRC-32"),
    "twice": (
        lambda: zipped(*sound_members(), ("latents.npy", npy(np.zeros(3)))),
        'two members of the name "latents.npy"',
    ),
    "overlap": (_overlapping, "overlap"),
    "lie": (_lying_size, "tell other sizes"),
    "claim": (
        lambda: zipped(("latents.npy", _claim((4, 8000, 8000))), *sound_members()[1:]),
        "claims to be float32",
    ),
    "longer": (
        lambda: zipped(
            ("latents.npy", sound_members()[0][1] + b"hidden"),
            *sound_members()[1:],
            compressed=True,
        ),
        "found 6 bytes behind the array",
    ),
    "pickle": (lambda: b"\x80\x04\x95\x0f\0\0\0\0\0\0\0\x8c\x0bos.system\x94.", "no end of a zip"),
    "object": (lambda: _saved(extra=np.array([{}], object)), "holds Python objects"),
    "nan": (lambda: _saved(latents=np.full((4, 16, 24), np.nan, "f4")), "NaN or infinite"),
    "int": (lambda: _saved(latents=np.zeros((4, 16, 24), "i4")), "expected a float type"),
    "tag": (lambda: _saved(latents_dtype=np.array("float16")), "expected both to agree"),
    "no crop": (lambda: _saved(crop_ltrb=None), '"crop_ltrb" is missing'),
    "flat": (lambda: _saved(latents=np.zeros(16, "f4")), "expected latents of the shape"),
    "flip": (
        lambda: _saved(latents_flipped=np.zeros((4, 8, 8), "f4")),
        '"latents_flipped" has the shape',
    ),
}
"""Bytes of broken files by what is wrong with them, and a part of what is told of them."""

EXACT = {
    "compressed": lambda: zipped(*sound_members(), compressed=True),
    "fortran": lambda: _saved(latents=np.asfortranarray(arrays()["latents"])),
    "half float": lambda: _saved(latents=arrays()["latents"].astype("f2")),
    "bfloat16": lambda: _saved(
        latents=(arrays()["latents"].view("u4") >> 16).astype("u2"),
        latents_dtype=np.array("bfloat16"),
    ),
    "text": lambda: zipped(*sound_members(), ("note.txt", b"hello")),
    "several": lambda: _saved(
        **{f"{name}_16x24": array for name, array in arrays().items()},
        latents=np.zeros((4, 8, 8), "f4"),
    ),
}
"""Bytes of unusual files that are sound."""


def write_broken(folder):
    """Write one file of each kind of `BROKEN` and `EXACT`, and their metadata; its path."""
    (folder / "latents").mkdir()
    for name, make in {**{n: make for n, (make, _) in BROKEN.items()}, **EXACT}.items():
        (folder / "latents" / f"{name}.npz").write_bytes(make())
    (folder / "latents" / "other.npz").write_bytes(_saved(latents=np.zeros((4, 16, 16), "f4")))
    (folder / "latents" / "folder.npz").mkdir()
    (folder / "latents" / "dangling.npz").symlink_to("nowhere")
    (folder / "latents" / "loop.npz").symlink_to("loop.npz")
    os.mkfifo(folder / "latents" / "pipe.npz")
    more = ["other", "folder", "dangling", "loop", "pipe", "gone"]
    return write_metadata(folder, [*BROKEN, *EXACT, *more])
