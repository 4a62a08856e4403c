"""Which pictures there are, and where the picture of a key lies.

A key is the path of a picture below the folder of the pictures, or an absolute one that leads
there, with the extension or without. Its stem, below that folder, names the picture's latents, and
whatever is random about them follows from it.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from capmerge import iter_records
from capmerge.index.latent_names import ABOVE, ABSOLUTE, stem_of
from capmerge.index.latent_roots import roots_of
from trainer.caching.pictures import PictureError

ENDINGS = tuple(
    sorted(
        ending
        for lower in (".avif", ".bmp", ".jpeg", ".jpg", ".png", ".webp")
        for ending in (lower, lower.upper())
    )
)
"""The extensions of pictures, in the order in which one is looked for, which is sd-scripts'."""


class Item(NamedTuple):
    """A picture that is asked for."""

    number: int
    """The number of its record in the metadata, or of the picture in its folder, from 0."""
    key: str
    problem: str = ""
    """Why it has no latents, if that is known already."""


class Found(NamedTuple):
    """Where a picture is."""

    stem: str
    """Its path below the folder of the pictures, without the extension, with slashes."""
    path: Path
    is_absolute: bool
    """True if its key is an absolute path."""


def items_of_metadata(path: Path) -> Iterator[Item]:
    """One item for each record of a metadata file, in its order; raises as `iter_records` does."""
    for number, (key, _) in enumerate(iter_records(path)):
        yield Item(number, key)


def items_of_folder(images: Path) -> Iterator[Item]:
    """The pictures in the folder and below it, in the order of their stems; links are not followed.

    Of pictures whose names differ in the extension alone, only the first has latents. Raises
    `OSError` for a folder that cannot be read.
    """
    number = 0
    for folder, inner, names in os.walk(images, onerror=_raise):
        inner.sort()
        below = Path(folder).relative_to(images)
        before = None
        for stem, ending in sorted(os.path.splitext(name) for name in names):  # noqa: PTH122
            if ending.lower() not in ENDINGS:
                continue
            problem = f"its latents have the name of those of {before}" if before else ""
            if before is None or os.path.splitext(before)[0] != stem:  # noqa: PTH122
                before, problem = stem + ending, ""
            yield Item(number, (below / (stem + ending)).as_posix(), problem)
            number += 1


def _raise(error: OSError) -> None:
    raise error


class PictureFolder:
    """The folder of the pictures, which finds the picture of a key."""

    def __init__(self, images: Path) -> None:
        self.images = images
        self._roots = tuple(root.rstrip("/") + "/" for root in roots_of(images))

    def find(self, key: str) -> Found:
        """Where the picture of a key is.

        Raises `PictureError` when there is none, or when it is not inside of the folder.
        """
        stem, leads = stem_of(key)
        if leads == ABSOLUTE:
            root = next((root for root in self._roots if stem.startswith(root)), None)
            if root is None:
                raise PictureError(f"its key leads out of the folder {self.images}")
            stem = stem.removeprefix(root)
        elif leads == ABOVE:
            raise PictureError(f"its key leads out of the folder {self.images}")
        base = str(self.images / stem)
        ending = os.path.splitext(key)[1]  # noqa: PTH122
        endings = (ending,) if ending.lower() in ENDINGS else ENDINGS
        try:
            path = next((base + one for one in endings if os.path.isfile(base + one)), None)  # noqa: PTH113
        except ValueError:  # a name with NUL or with a lone surrogate
            path = None
        if path is None:
            raise PictureError("there is no such file")
        return Found(stem, Path(path), leads == ABSOLUTE)
