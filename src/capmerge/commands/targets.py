"""The check of a path before a command writes to it.

A command never writes over its source, and over other files only with --force.
"""

import re
from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.files.backup import check_backup
from capmerge.files.source import Source


def check_target(
    target: Path, source: Source | None, *, force: bool, side_suffixes: tuple[str, ...] = ()
) -> Path:
    """The real path to write to, links followed; `source` is None where it may be the target.

    Raises `UsageError` when it is the source, is not a regular file, is in a folder that does not
    exist, or exists already without `force`; and when a side file would be the source.
    """
    shown = printable(str(target))
    if shown == "-":
        raise UsageError(
            "-: standard output has no place for temporary and side files. Name a file, or ./- if "
            "that is its name."
        )
    try:
        target = target.resolve()
        if source and source.is_file(target):
            raise UsageError(
                f"{shown}: the output is the source itself, which is never written to. Choose "
                "another name."
            )
        for suffix in side_suffixes:
            if source and source.is_file(side_path(target, suffix)):
                raise UsageError(
                    f"{shown}: the side file with the ending {suffix} would be the source itself. "
                    "Choose another name."
                )
        return _checked(target, shown, force=force)
    except (OSError, RuntimeError, ValueError) as error:
        # The name is too long or holds NUL, or its links form a loop.
        raise UsageError(
            f"{shown}: the file system refuses this name ({error}). Choose another."
        ) from error


def check_in_place(source: Source) -> Path:
    """The real path of a source that is to be replaced, links followed.

    Raises `UsageError` when it is no file, or when it has a backup already.
    """
    shown = printable(source.name)
    path = Path(source.name)
    # A pipe is no file, and a name that led to the source may lead elsewhere by now.
    if not path.is_file() or not source.is_file(path):
        raise UsageError(
            f"{shown}: found a pipe or a device, expected a file that --in-place can replace. "
            "Give -o OUT instead."
        )
    path = check_target(path, None, force=True)
    check_backup(path)
    return path


def check_folder(target: Path, source: Source, names: re.Pattern[str], *, force: bool) -> Path:
    """The real path of a folder to write, links followed.

    Raises `UsageError` when it cannot be made, or exists and is not empty. With `force` a folder is
    replaced that holds nothing but files whose names match `names`, and not the source.
    """
    shown = printable(str(target))
    try:
        target = target.resolve()
        if not target.exists():
            if not target.parent.is_dir():
                raise UsageError(
                    f"{shown}: there is no folder {printable(str(target.parent))}. Create it "
                    "first, or choose another folder."
                )
            return target
        if not target.is_dir():
            raise UsageError(f"{shown}: found a file, expected a folder or a new name.")
        inside = sorted(target.iterdir())
        foreign = [path for path in inside if not names.fullmatch(path.name) or path.is_dir()]
        if foreign:
            raise UsageError(
                f"{shown}: the folder holds {printable(foreign[0].name)}, expected a new or an "
                "empty folder. Choose another name."
            )
        if any(source.is_file(path) for path in inside):
            raise UsageError(
                f"{shown}: the source is in this folder, which would be replaced. Choose another."
            )
        if inside and not force:
            raise UsageError(
                f"{shown}: the folder holds an earlier split. Use --force to replace it, or choose "
                "another name."
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{shown}: the file system refuses this name ({error}). Choose another."
        ) from error
    return target


def _checked(target: Path, shown: str, *, force: bool) -> Path:
    """`target`, when it can be written; `shown` is its name as the user gave it."""
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "a pipe or device"
        raise UsageError(
            f"{shown}: found {kind}, expected the name of a file. For a pipe or device use -o - "
            "and redirect it."
        )
    if target.exists() and not force:
        raise UsageError(
            f"{shown}: the file exists. Use --force to replace it, or choose another name."
        )
    if not target.parent.is_dir():
        raise UsageError(
            f"{shown}: there is no folder {printable(str(target.parent))}. Create it first, or "
            "choose another folder."
        )
    return target
