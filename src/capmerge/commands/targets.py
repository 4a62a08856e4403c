"""Where a command may write: never over its source, and over other files only with --force."""

from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.files.source import Source


def check_target(
    target: Path, source: Source, *, force: bool, side_suffixes: tuple[str, ...] = ()
) -> Path:
    """The real path to write to, links followed.

    Raises `UsageError` when it is the source, no regular file, in no folder, or there already
    without `force`; and when a side file would be the source.
    """
    shown = printable(str(target))
    try:
        target = target.resolve()
        if source.is_file(target):
            raise UsageError(
                f"{shown}: the output is the source itself. Choose another -o; the source is never written to."
            )
        for suffix in side_suffixes:
            if source.is_file(side_path(target, suffix)):
                raise UsageError(
                    f"{shown}: its side file *{suffix} would be the source itself. Choose another -o."
                )
        return _checked(target, shown, force=force)
    except (OSError, RuntimeError) as error:  # a name that is too long; a loop of links
        raise UsageError(
            f"{shown}: this cannot be a file name here ({error}). Choose another -o."
        ) from error


def _checked(target: Path, shown: str, *, force: bool) -> Path:
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no regular file"
        raise UsageError(
            f"{shown}: found {kind}, expected a file name. For a pipe or device use -o - and redirect it."
        )
    if target.exists() and not force:
        raise UsageError(
            f"{shown}: the file exists. Use --force to replace it, or choose another -o."
        )
    if not target.parent.is_dir():
        raise UsageError(
            f"{shown}: there is no folder {printable(str(target.parent))}. Create it first."
        )
    return target
