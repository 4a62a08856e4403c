"""The command `capmerge pack-latents`: loose files of latents -> tar shards with an index.

Everything is made in a hidden folder beside the target, which takes its name at the end. A run that
was interrupted leaves that folder, and the next one takes over the shards that were finished.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from capmerge.errors import BusyError, CapmergeError, OutputError, UsageError, printable
from capmerge.files.atomic import AtomicFile
from capmerge.files.folders import publish_folder
from capmerge.files.lock import LockedFile, open_locked

if TYPE_CHECKING:
    from capmerge.index.latent_listing import Listing
    from capmerge.index.latent_pack import LeftOut, Packed
    from capmerge.index.reader import Index

Progress = Callable[[int], None]

LEFT_OUT = "left-out.jsonl"
"""The file in a folder of shards that lists what is not in them."""
_FIRST_TOLD = 5


@dataclass(frozen=True)
class PackOptions:
    """What is packed, and how."""

    latents: Path
    out: Path
    dtype: Literal["keep", "fp16"]
    shard_bytes: int
    verify: bool
    jobs: int
    max_record_bytes: int


@dataclass
class PackSummary:
    """What was packed."""

    records: int = 0
    missing: int = 0
    """The number of records without a file."""
    files: int = 0
    """The number of files that were found for the records."""
    members: int = 0
    broken: int = 0
    """The number of files that were left out."""
    unchanged: int = 0
    """The number of files that float16 cannot hold."""
    shards: int = 0
    reused: int = 0
    """The number of shards that an interrupted run had finished."""
    size: int = 0
    """The bytes of all shards."""
    verified: int = 0
    seconds: float = 0.0
    first: list[str] = field(default_factory=list)
    """The first few files and records that were left out, in words."""


def check_pack(options: PackOptions) -> None:
    """Raise `UsageError` when the folders cannot be those of a packing."""
    from capmerge.files.shards import is_packed

    shown = printable(str(options.latents))
    if not options.latents.is_dir():
        raise UsageError(
            f"--latents {shown}: there is no such folder. Name the folder of the cached latents."
        )
    if is_packed(options.latents):
        raise UsageError(f"--latents {shown}: it is packed already. Name a folder of loose files.")
    out = printable(str(options.out))
    if os.path.lexists(options.out):
        raise UsageError(f"{out}: it exists. Choose another name, or remove it first.")
    if not options.out.name or not options.out.parent.is_dir():
        raise UsageError(
            f"{out}: there is no folder {printable(str(options.out.parent))}. Create it first, or "
            "choose another folder."
        )


def pack(
    metadata: Path,
    options: PackOptions,
    indexing: Progress | None = None,
    listing_files: Progress | None = None,
    packing: Progress | None = None,
    verifying: Progress | None = None,
) -> PackSummary:
    """Pack the latents that the records of `metadata` have, and return what was done.

    The folder appears whole or not at all. The same input gives the same bytes with any number of
    jobs. The other arguments are told the byte of the metadata that was read, and the numbers of
    files that were listed, packed and verified. Raises `CapmergeError` when there is nothing to
    pack or what was packed is not what was read, `OutputError` (`BusyError` while another run
    packs to the same name), and what `build_index` and `ensure_listing` raise.
    """
    from capmerge.index.latent_pack import has_finished_shards
    from capmerge.index.latent_records import index_of_any, listing_anew

    started = time.perf_counter()
    work = options.out.with_name(f".{options.out.name}.capmerge-tmp")
    with _locked(work, options.out):
        shards = work / "shards"
        try:
            shards.mkdir(exist_ok=True)
            index = index_of_any(metadata, work, options.jobs, indexing, options.max_record_bytes)
            listing = listing_anew(index, options.latents, work, options.jobs, listing_files)
            summary = _write(index, listing, shards, options, packing, verifying)
            publish_folder(shards, options.out)
        except BaseException as error:
            if not has_finished_shards(shards):
                shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError):
                raise _cannot_write(options.out, error) from error
            raise
        shutil.rmtree(work, ignore_errors=True)
    summary.seconds = time.perf_counter() - started
    return summary


def _locked(work: Path, out: Path) -> LockedFile:
    """The lock of the hidden folder, which is made if it is missing."""
    shown = printable(str(out))
    try:
        work.mkdir(exist_ok=True)
        return open_locked(work / "lock")
    except BlockingIOError as error:
        raise BusyError(
            f"{shown}: another run is packing to this name. Wait for it, or choose another."
        ) from error
    except OSError as error:
        raise _cannot_write(out, error) from error


def _cannot_write(out: Path, error: OSError) -> OutputError:
    return OutputError(
        f"{printable(str(out))}: cannot write, {error.strerror}. Check the folder and its "
        "permissions, or choose another folder."
    )


def _write(
    index: "Index",
    listing: "Listing",
    folder: Path,
    options: PackOptions,
    packing: Progress | None,
    verifying: Progress | None,
) -> PackSummary:
    """Write the shards, their index and the list of what is not in them, and read them back."""
    from capmerge.index.latent_build import roots_for
    from capmerge.index.latent_pack import (
        LeftOut,
        ShardWriter,
        iter_plans,
        remove_notes,
        write_shard_index,
    )
    from capmerge.index.latent_pool import FilePool
    from capmerge.index.latent_records import iter_missing
    from capmerge.index.latent_verify import Verifier

    summary = PackSummary(records=len(index))
    with AtomicFile(folder / LEFT_OUT) as left_out:

        def tell(entries: Iterable[LeftOut], *, packed: bool = False) -> None:
            for entry in entries:
                _tell(summary, left_out, entry, packed=packed)

        # Shards
        lost: list[LeftOut] = []
        shards = 0
        with FilePool(ShardWriter(folder, options.dtype), options.jobs, per_message=1) as pool:
            for done in pool.map(iter_plans(index, listing, options.shard_bytes, lost.append)):
                shards = done.number + 1
                _count(summary, done)
                tell(done.left_out)
                tell(done.unchanged, packed=True)
                if packing:
                    packing(summary.files)

        # What is not in them
        tell(lost)
        summary.files += len(lost)
        summary.broken += len(lost)
        for _, key in iter_missing(index, listing):
            summary.missing += 1
            tell([LeftOut(key, "", "found no latents file")])
        if not summary.members:
            raise CapmergeError(
                f"{printable(str(options.latents))}: found {summary.files:,} latents files of "
                f"{summary.records:,} records, none of them sound, so nothing was packed. "
                "Check --latents; capmerge check-latents tells what is wrong with each file."
            )
        if left_out.written_bytes:
            left_out.publish()

    # Index
    firsts = write_shard_index(folder, shards, options.dtype, roots_for(index, listing.folder))
    if options.verify:
        with FilePool(Verifier(folder, options.dtype), options.jobs, per_message=1) as readers:
            for count in readers.map(firsts):
                summary.verified += count
                if verifying:
                    verifying(summary.verified)
    remove_notes(folder, shards)
    return summary


def _count(summary: PackSummary, done: "Packed") -> None:
    summary.files += done.files
    summary.members += done.members
    summary.broken += len(done.left_out)
    summary.unchanged += len(done.unchanged)
    summary.shards += bool(done.members)
    summary.reused += done.reused
    summary.size += done.size


def _tell(summary: PackSummary, file: AtomicFile, entry: "LeftOut", *, packed: bool) -> None:
    line = {
        "key": entry.key,
        "file": entry.name or None,
        "packed": packed,
        "problem": entry.problem,
    }
    file.write(json.dumps(line).encode() + b"\n")
    if len(summary.first) < _FIRST_TOLD:
        summary.first.append(f"{entry.name or entry.key}: {entry.problem}")
