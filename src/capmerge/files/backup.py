"""A second name for a file that is about to be replaced, so that nothing of it is lost.

The file has its own name all the time, because the second one is a hard link; a rename would leave
a moment without it.
"""

import os
import shutil
from pathlib import Path

from capmerge.errors import OutputError, UsageError, in_words, printable
from capmerge.files.atomic import AtomicFile, side_path, sync_folder

_ENDING = ".bak"


def backup_path(path: Path) -> Path:
    """The path of the backup of a file: its whole name with `.bak` behind it."""
    return side_path(path, _ENDING)


def check_backup(path: Path) -> None:
    """Raise `UsageError` where the backup of `path` exists already.

    One that is the file itself is what a run leaves that was killed before it replaced the file.
    """
    backup = backup_path(path)
    if os.path.lexists(backup) and not _is_same(path, backup):
        raise UsageError(
            f"{printable(str(backup))}: the file exists, and a backup is never replaced. "
            "Move it away, or write to another file with -o."
        )


def keep_backup(path: Path) -> None:
    """Give the file at `path` the name of its backup, too, durably.

    On a file system without hard links the backup is a copy. Raises `UsageError` where the backup
    exists already, and `OutputError` where it cannot be made.
    """
    backup = backup_path(path)
    try:
        try:
            os.link(path, backup)
        except FileExistsError:
            check_backup(path)
        except OSError:  # no hard links here: FAT, and some network file systems
            _copy(path, backup)
        sync_folder(path.parent)
    except OSError as error:
        raise OutputError(
            f"{printable(str(backup))}: the backup cannot be made, {in_words(error)}. "
            f"{printable(str(path))} is as it was. Write to another file with -o."
        ) from error


def _copy(path: Path, backup: Path) -> None:
    with path.open("rb") as file, AtomicFile(backup) as copied:
        while part := file.read(1 << 20):
            copied.write(part)
        check_backup(path)
        shutil.copymode(path, copied.temporary)
        copied.publish()


def _is_same(path: Path, backup: Path) -> bool:
    return not backup.is_symlink() and os.path.samestat(path.stat(), backup.stat())
