"""Which keys have a latents file in a folder, by one listing of its names and without an index.

`latent_listing` says which of several files a record takes and how large its latents are; this says
only whether there is one, for metadata that has no index yet.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.files.digest_set import DigestSet
from capmerge.index.latent_names import ABOVE, ABSOLUTE, parse_sized, stem_of
from capmerge.index.latent_roots import absolute, is_below, roots_of
from capmerge.index.latent_scan import iter_latents
from capmerge.metadata.key_bytes import key_bytes

_FILES_PER_REPORT = 1 << 14


class LatentStems:
    """The stems of all latents files in `folder` and below: up to 32 bytes of memory per file.

    A file counts under every name that sd-scripts gives it: `<stem>.npz`, and `<stem>_WxH_X.npz` of
    any model X. `progress` is told the number of files seen. Raises `UsageError` if there is no
    such folder, and `CapmergeError` if it cannot be listed.
    """

    def __init__(self, folder: Path, progress: Callable[[int], None] | None = None) -> None:
        if not folder.is_dir():
            raise UsageError(
                f"--latents {printable(str(folder))}: there is no such folder. "
                "Name the folder of the cached latents."
            )
        self.files = 0
        """The number of files."""
        self._roots = roots_of(folder)
        self._stems = DigestSet(self._iter_stems(folder, progress))

    def _iter_stems(self, folder: Path, progress: Callable[[int], None] | None) -> Iterator[bytes]:
        for below, name in iter_latents(absolute(folder)):
            self.files += 1
            yield key_bytes(below + name)
            if sized := parse_sized(name):
                yield key_bytes(below + sized[0])
            if progress and not self.files % _FILES_PER_REPORT:
                progress(self.files)
        if progress:
            progress(self.files)

    def have(self, keys: Sequence[str]) -> list[bool | None]:
        """For each key whether it has a file; None for one that leads out of the folder."""
        stems = list(map(self._stem, keys))
        found = self._stems.contains([key_bytes(stem or "") for stem in stems])
        return [
            None if stem is None else has_file for stem, has_file in zip(stems, found, strict=True)
        ]

    def _stem(self, key: str) -> str | None:
        """The stem of a key as the folder's names begin; None if it is outside of the folder."""
        stem, leads = stem_of(key)
        if leads == ABOVE:
            return None
        if leads == ABSOLUTE:
            inside = [root for root in self._roots if is_below(stem, root)]
            return stem[len(inside[0].rstrip("/")) + 1 :] if inside else None
        return stem
