"""The files in a folder of latents: every name below it, links followed, or the members of shards.

A walk sees every name once, and forgets it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from capmerge.errors import CapmergeError, printable
from capmerge.files.shards import Shards, is_packed
from capmerge.index.latent_names import ENDING, stem_of
from capmerge.index.reader import Index


def iter_latents(folder: str) -> Iterator[tuple[str, str]]:
    """Yield every latents file in `folder` and below, links to folders followed.

    A file is given as its folder, written as a prefix of stems, and its name without `ENDING`. A
    link to a folder that contains the link is skipped, since it would never end. In a folder of
    shards, the members take the place of files. Raises `CapmergeError` for a folder that cannot be
    listed.
    """
    if is_packed(Path(folder)):
        yield from members_of(Shards(Path(folder)))
        return
    # Each entry has a path, its prefix, and the real folders that links on the way led out of.
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(folder, "", ())]
    while waiting:
        path, prefix, passed = waiting.pop()
        with _listed(path) as entries:
            for entry in entries:
                if entry.name.endswith(ENDING) and not entry.is_dir(follow_symlinks=False):
                    yield prefix, entry.name.removesuffix(ENDING)
                elif _is_folder(entry):
                    here = passed
                    if entry.is_symlink():
                        here = (*passed, os.path.realpath(path))
                        target = os.path.realpath(entry.path)
                        if any((above + os.sep).startswith(target + os.sep) for above in here):
                            continue
                    waiting.append((entry.path, f"{prefix}{entry.name}/", here))


def members_of(shards: Shards) -> Iterator[tuple[str, str]]:
    """Yield every member of shards in their order, by the rule of `iter_latents`."""
    for name in shards.names():
        below, slash, last = name.rpartition("/")
        yield below + slash, last.removesuffix(ENDING)


def latents_in(folder: Path) -> Iterator[str]:
    """Yield the names without `ENDING` of the latents in `folder` itself; none if it is missing."""
    if folder.is_dir():
        with _listed(str(folder)) as entries:
            for entry in entries:
                if entry.name.endswith(ENDING):
                    yield entry.name.removesuffix(ENDING)


def folders_of(index: Index, folder: Path, numbers: Iterable[int]) -> list[tuple[str, Path]]:
    """Return the folders outside of `folder` that the keys of these records lead to.

    Each is given as the prefix of its stems and its path.
    """
    parents = {stem_of(index.read(int(number))[0]).text.rpartition("/") for number in numbers}
    prefixes = {parent + slash for parent, slash, _ in parents if slash}
    return [(prefix, folder / prefix) for prefix in sorted(prefixes)]


def _listed(path: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(path)
    except OSError as error:
        raise CapmergeError(
            f"{printable(path)}: the folder cannot be listed ({error.strerror}). "
            "Check its permissions."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder and a link to one; False for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False
