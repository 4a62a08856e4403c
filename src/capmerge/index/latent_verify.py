"""The comparison of packed latents with the loose files that they were made of."""

import contextlib
import os
from pathlib import Path

import numpy as np

from capmerge.errors import CapmergeError, printable
from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.files.openable import Openable, open_file
from capmerge.files.shards import Shards, shard_name
from capmerge.index.latent_half import half_of
from capmerge.index.latent_names import parse_array
from capmerge.index.latent_pack import Dtype, forget, members_of
from capmerge.index.latent_sizes import problem_of
from capmerge.index.latent_values import read_values


class Verifier:
    """The work of a process: to compare the members of one shard after the other with the files.

    They are read by the index, as a run reads them.
    """

    def __init__(self, folder: Path, dtype: Dtype) -> None:
        self._folder, self._dtype = folder, dtype
        self._shards: Shards | None = None

    def __call__(self, shard: tuple[int, int]) -> int:
        """Return the number of members of a shard, all of them right. Raises `CapmergeError`."""
        if self._shards is None:
            self._shards = Shards(self._folder)
        number, first = shard
        _drop_from_cache(self._shards.shard(number).descriptor)
        members = members_of(self._folder, number)
        for member, (name, path, _, _, _) in enumerate(members, start=first):
            try:
                problem = self._difference(self._shards[member], Path(path))
            except READ_ERRORS as error:
                problem = problem_of(error)
            if not problem and self._shards.name(member) != name:
                problem = f"the index names it {self._shards.name(member)!r}"
            if problem:
                forget(self._folder / shard_name(number))
                raise CapmergeError(
                    f"{printable(shard_name(number))}, member {printable(name)}: {problem}, "
                    f"expected the latents in {printable(path)}. Nothing was packed. If the file "
                    "was changed meanwhile, run again; otherwise check the disk."
                )
        return len(members)

    def _difference(self, member: Openable, path: Path) -> str:
        packed, loose = (_read(place) for place in (member, path))
        if packed == loose:
            return ""
        if self._dtype == "keep":
            return "found other bytes"
        with Npz(member) as found, Npz(path) as given:
            if list(found.names) != list(given.names):
                return f"found the arrays {sorted(found.names)}"
            for name in given.names:
                array, expected = found[name], half_of(given, name)
                if parse_array(name):
                    array, expected = read_values(found, name), expected.astype(np.float32)
                if array.dtype != expected.dtype or array.tobytes() != expected.tobytes():
                    return f'found other values of "{name}"'
        return ""


def _read(place: Path | Openable) -> bytes:
    file = open_file(place)
    with contextlib.closing(file):
        return file.read() or b""


def _drop_from_cache(descriptor: int) -> None:
    """Let the next reads come from the disk, where the system can be asked for that."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
