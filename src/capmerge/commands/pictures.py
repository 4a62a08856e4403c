"""The pictures of a folder and the text files beside them, matched in one pass over sorted names.

Pictures are found, ordered and matched with texts as sd-scripts does it (`glob_images_pathlib` in
its library/train_util.py, `with_suffix` in its finetune/merge_*_to_metadata.py): by the endings in
`PICTURE_ENDINGS`, whose case counts, ordered by the parts of their paths, each with the text whose
name has another ending.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir
from typing import NamedTuple

from capmerge.files.sorted_entries import sorted_entries

_LOWER = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
PICTURE_ENDINGS = frozenset((*_LOWER, *(ending.upper() for ending in _LOWER)))
"""The endings of the pictures that sd-scripts finds."""
_LAST_ENDING = max(PICTURE_ENDINGS)
_SWEEP = 1 << 12
_EXAMPLES = 3


class Picture(NamedTuple):
    """A picture and the texts beside it."""

    path: Path
    stem: str
    is_repeated: bool
    """True if an earlier picture in its folder has the same stem, and so the same texts."""
    texts: dict[str, Path]
    """The text file of each field that has one."""


@dataclass(slots=True)
class Found:
    """A count of files, and the names of the first of them."""

    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Count one more."""
        self.count += 1
        if len(self.first) < _EXAMPLES:
            self.first.append(name)


@dataclass(slots=True)
class Walked:
    """What was found on the way."""

    pictures: int = 0
    same_stem: Found = field(default_factory=Found)
    """Pictures that have the folder and the stem of an earlier one, and so its texts."""
    texts_alone: Found = field(default_factory=Found)
    """Texts without a picture."""


class PictureWalk:
    """The pictures of a folder, in the order in which sd-scripts has them.

    `endings` are those of the text of each field. With `recursive`, the folders in it are walked
    through too, but not through links to folders. Only names that are near to each other in the
    order are in memory.
    """

    def __init__(
        self, folder: Path, endings: Mapping[str, str], target: Path | None, *, recursive: bool
    ) -> None:
        self._folder, self._endings = folder, endings
        self._scratch_beside = target or Path(gettempdir()) / "names"
        self._recursive = recursive
        self._last_text = max(endings.values())
        self.walked = Walked()

    def __iter__(self) -> Iterator[Picture]:
        under_way = [self._found(self._folder)]
        while under_way:
            found = next(under_way[-1], None)
            if found is None:
                under_way.pop()
            elif isinstance(found, Path):
                under_way.append(self._found(found))
            else:
                self.walked.pictures += 1
                yield found

    def _is_wanted(self, name: str) -> bool:
        return _is_picture(name) or name.endswith(tuple(self._endings.values()))

    def _found(self, folder: Path) -> Iterator[Picture | Path]:
        """The pictures of one folder, and the folders in it at the place of their names."""
        entries = sorted_entries(
            folder, self._is_wanted, folders=self._recursive, scratch_beside=self._scratch_beside
        )
        beside = _Window(folder, self._endings, self.walked)
        waiting: deque[_Waiting] = deque()
        for number, (name, is_folder) in enumerate(entries):
            # No text of a picture comes behind the last name that one could have.
            while waiting and (
                waiting[0].is_folder or _stem(waiting[0].name) + self._last_text < name
            ):
                yield beside.complete(waiting.popleft())
            if is_folder:
                waiting.append(_Waiting(name, is_folder=True))
            elif _is_picture(name):
                is_repeated = beside.add_picture(name)
                waiting.append(_Waiting(name, is_repeated=is_repeated))
            else:
                beside.add_text(name)
            if number % _SWEEP == _SWEEP - 1:
                beside.forget(waiting[0].name if waiting else name)
        while waiting:
            yield beside.complete(waiting.popleft())
        beside.forget(None)


class _Waiting(NamedTuple):
    """A picture whose texts may still come, or a folder behind one."""

    name: str
    is_folder: bool = False
    is_repeated: bool = False


class _Window:
    """The texts and the stems of pictures of one folder that are near in the order of names."""

    def __init__(self, folder: Path, endings: Mapping[str, str], walked: Walked) -> None:
        self._folder, self._endings, self._walked = folder, endings, walked
        self._texts: dict[str, bool] = {}  # whether a picture was found
        self._stems: set[str] = set()

    def add_text(self, name: str) -> None:
        """Note a text."""
        self._texts[name] = False

    def add_picture(self, name: str) -> bool:
        """Note a picture; True if an earlier one has the same stem."""
        stem = _stem(name)
        is_repeated = stem in self._stems
        if is_repeated:
            self._walked.same_stem.add(str(self._folder / name))
        self._stems.add(stem)
        return is_repeated

    def complete(self, found: _Waiting) -> Picture | Path:
        """The picture with the texts that were noted for its stem, or the folder."""
        if found.is_folder:
            return self._folder / found.name
        stem, texts = _stem(found.name), {}
        for name, ending in self._endings.items():
            if stem + ending in self._texts:
                self._texts[stem + ending] = True
                texts[name] = self._folder / (stem + ending)
        return Picture(self._folder / found.name, stem, found.is_repeated, texts)

    def forget(self, before: str | None) -> None:
        """Forget what no picture at or behind the name `before` can have; None for all."""
        for name, is_used in list(self._texts.items()):
            stems = [name.removesuffix(e) for e in self._endings.values() if name.endswith(e)]
            if before is None or all(stem + _LAST_ENDING < before for stem in stems):
                del self._texts[name]
                if not is_used:
                    self._walked.texts_alone.add(str(self._folder / name))
        self._stems = {
            stem for stem in self._stems if before is not None and stem + _LAST_ENDING >= before
        }


def _is_picture(name: str) -> bool:
    stem, dot, ending = name.rpartition(".")
    return bool(stem) and dot + ending in PICTURE_ENDINGS


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
