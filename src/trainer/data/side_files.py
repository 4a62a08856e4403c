"""Where the index and the listing of a data set lie: beside the metadata, or in the run's folder.

A folder of data that cannot be written must not keep anybody from training with it.
"""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from capmerge.errors import OutputError, printable
from capmerge.index.build import ensure_index
from capmerge.index.latent_build import ensure_listing
from capmerge.index.latent_listing import Listing
from capmerge.index.reader import Index, open_indexable
from capmerge.terminal import count_bar, progress_bar
from trainer.config.settings import Config

Made = TypeVar("Made")

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


def open_side_files(
    config: Config,
    number: int,
    jobs: int,
    tell: Callable[[str], None],
    *,
    tokens: bool | None,
    relist: bool,
) -> tuple[Index, Listing]:
    """The index and the listing of data set `number`, made first where they are missing.

    They lie at `data.index`, or beside the metadata; those that cannot be written there are made in
    `train.output_dir`, and `tell` is told. Raises the errors of `ensure_index` and
    `ensure_listing`, and `OutputError` when neither folder can be written.
    """
    settings = config.data[number]
    fallback = config.train.output_dir / f"data-{number}.index"

    def make_index(at: Path | None) -> Index:
        with open_indexable(settings.metadata) as source, progress_bar(source) as progress:
            return ensure_index(
                settings.metadata, at=at, jobs=jobs, progress=progress, tokens=tokens, tell=tell
            )

    def make_listing(beside: Path | None) -> Listing:
        with count_bar(settings.latents) as progress:
            return ensure_listing(
                index,
                settings.latents,
                beside=beside,
                relist=relist,
                allow_outside=settings.allow_outside,
                jobs=jobs,
                progress=progress,
                tell=tell,
            )

    if settings.index is not None:
        index = make_index(settings.index)
        return index, make_listing(None)
    index = _made(make_index, fallback, "index", tell)
    return index, _made(make_listing, fallback, "listing of latents", tell)


def _made(
    make: Callable[[Path | None], Made], fallback: Path, what: str, tell: Callable[[str], None]
) -> Made:
    """What `make` makes in its usual place, or at `fallback` where that cannot be written."""
    try:
        return make(None)
    except OutputError as error:
        cause = error.__cause__
        if not isinstance(cause, OSError) or cause.errno not in _UNWRITABLE:
            raise
        try:
            fallback.parent.mkdir(parents=True, exist_ok=True)
        except OSError as second:
            raise OutputError(
                f"train.output_dir: {printable(str(fallback.parent))} cannot be written "
                f"({second.strerror}), and neither can the folder of the metadata, but the {what} "
                "has to be kept somewhere. Set data.index to a path that can be written."
            ) from second
        made = make(fallback)
    tell(
        f"the folder of the metadata cannot be written, so the {what} is kept in "
        f"{printable(str(fallback.parent))}. With data.index = PATH, other runs use it too."
    )
    return made
