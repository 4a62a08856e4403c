"""The paths by which a folder of latents is known, and which others lie inside of it."""

import os
from pathlib import Path


def absolute(folder: Path) -> str:
    """Return the path of the folder from the root, links not followed."""
    return os.path.abspath(folder)  # noqa: PTH100  # Path.absolute() keeps `..`


def roots_of(folder: Path) -> tuple[str, ...]:
    """Return the paths of the folder that absolute keys can begin with, the real one last.

    They are written with slashes, as stems are.
    """
    given, real = (
        path.replace(os.sep, "/") for path in (absolute(folder), os.path.realpath(folder))
    )
    return tuple(dict.fromkeys((given, real))) if given != real else (real,)


def is_below(path: str, root: str) -> bool:
    """True if a path is inside the folder `root`; no links are followed."""
    return path.replace(os.sep, "/").startswith(root.rstrip("/") + "/")
