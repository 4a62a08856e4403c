"""Folders that appear whole or not at all: written under another name, synced, then renamed."""

import os
import shutil
from pathlib import Path

from capmerge.files.atomic import sync_folder


def sync_files(folder: Path) -> None:
    """Put every file of a folder, and the names of its entries, durably on disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            sync_folder(path)
    sync_folder(folder)


def publish_folder(unfinished: Path, final: Path) -> None:
    """Sync a finished folder and give it its final name, replacing an older one.

    A kill between the two renames leaves the older folder as `.NAME.replaced`.
    """
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
    """Let everybody who may read the folder read its files too.

    safetensors writes its files for their owner alone.
    """
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        # A file with several hard links belongs to another folder too.
        if path.is_file() and path.stat().st_nlink == 1:
            path.chmod(mode)
