"""A folder that appears whole or not at all: written under another name, synced, renamed. Knows nothing of what is in it."""

import os
import shutil
from pathlib import Path

from capmerge.files.atomic import sync_folder


def sync_files(folder: Path) -> None:
    """Put every file of a folder, and the names of its own entries, on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def publish_folder(unfinished: Path, final: Path) -> None:
    """Give a finished folder its name, replacing an older one; a kill in between leaves the older one as `.NAME.replaced`."""
    _share_files(unfinished)
    sync_files(unfinished)
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _share_files(folder: Path) -> None:
    """Let whoever may read the folder read its files: safetensors writes them for their owner alone."""
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:  # a hard link is somebody else's file too
            path.chmod(mode)
