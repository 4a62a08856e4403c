"""Moving a file to a free name, on this file system or another one, so that it is never lost."""

import contextlib
import errno
import os
import shutil
from pathlib import Path

_NO_HARD_LINKS = {
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
}


def move_to_free_name(source: Path, target: Path) -> None:
    """Move a file or a link, making the folders of `target` first.

    An existing file is never replaced, and at every moment the file is whole under one of the two
    names at least. A link is moved as a link to the same file. Raises `FileExistsError` when the
    name is taken, and `OSError`; the file then stays where it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        where = os.path.join(source.parent.absolute(), source.readlink())  # noqa: PTH118  # keeps ..
        target.symlink_to(where)
        source.unlink()
        return
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        if not source.is_file():
            raise  # a pipe cannot be copied
        _copy(source, target)
    source.unlink()


def _copy(source: Path, target: Path) -> None:
    """Copy a file to a free name with its times, and put it on disk."""
    written = False
    try:
        with source.open("rb") as file, target.open("xb") as copy:
            written = True
            shutil.copyfileobj(file, copy, 1 << 20)
            copy.flush()
            os.fsync(copy.fileno())
        shutil.copystat(source, target)
    except BaseException:
        if written:
            with contextlib.suppress(OSError):
                target.unlink()
        raise
