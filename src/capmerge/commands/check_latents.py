"""The command `capmerge check-latents`: every latents file read whole, before a run needs it.

With a report, what was found is noted file by file in a hidden folder beside it. When the check is
interrupted, the next one takes what it knows of a file from there, as long as the file has the same
size and time.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from heapq import merge
from pathlib import Path
from typing import TYPE_CHECKING

from capmerge.commands.check_notes import CheckNotes, has_notes, line_of
from capmerge.errors import BusyError, OutputError, UsageError, printable
from capmerge.files.atomic import AtomicFile
from capmerge.files.lock import open_locked
from capmerge.files.moving import move_to_free_name

if TYPE_CHECKING:
    from capmerge.index.latent_check import CheckedFile
    from capmerge.index.latent_listing import Listing

Progress = Callable[[int], None]


@dataclass(frozen=True)
class CheckOptions:
    """What is checked, and what becomes of it."""

    latents: Path
    report: Path | None
    """Its real path, links followed."""
    quarantine: Path | None
    jobs: int
    max_record_bytes: int


@dataclass(frozen=True)
class Finding:
    """A file that a run could not train with, or a record that has none."""

    key: str
    file: str | None
    fault: str
    """`broken`, `other size`, `unreadable` or `missing`."""
    problem: str
    """A part of a sentence, without a full stop."""
    moved_to: str | None = None
    not_moved: str | None = None
    """Why it was not moved although that was asked for."""


@dataclass
class CheckSummary:
    """What was checked."""

    records: int = 0
    files: int = 0
    known: int = 0
    """The number of files that an interrupted check had read."""
    faults: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("missing", "broken", "other size", "unreadable"), 0)
    )
    moved: int = 0
    not_moved: int = 0
    seconds: float = 0.0
    """The time that the reading of the files took."""

    @property
    def found(self) -> int:
        """The number of all findings."""
        return sum(self.faults.values())


def check_folders(options: CheckOptions) -> None:
    """Raise `UsageError` when the folders cannot be used as given."""
    from capmerge.files.shards import is_packed

    shown = printable(str(options.latents))
    if not options.latents.is_dir():
        raise UsageError(
            f"--latents {shown}: there is no such folder. Name the folder of the cached latents."
        )
    if options.quarantine is not None:
        quarantine = printable(str(options.quarantine))
        if is_packed(options.latents):
            raise UsageError(
                f"--quarantine: {shown} holds shards, whose members cannot be moved. "
                "Leave the option out."
            )
        if options.quarantine.exists() and not options.quarantine.is_dir():
            raise UsageError(f"--quarantine {quarantine}: found no folder. Choose another name.")
        inside = os.path.realpath(options.quarantine) + os.sep
        if inside.startswith(os.path.realpath(options.latents) + os.sep):
            raise UsageError(
                f"--quarantine {quarantine}: it is inside of the folder of latents, where its "
                "files would still be found. Choose a folder outside."
            )


def check_latents(
    metadata: Path,
    options: CheckOptions,
    found: Callable[[Finding], None],
    moved: Callable[[Finding], None],
    indexing: Progress | None = None,
    listing_files: Progress | None = None,
    checking: Progress | None = None,
) -> CheckSummary:
    """Check the latents of all records of `metadata`, and return the counts.

    `found` is told each finding in the order of the records, the same with any number of jobs, and
    `moved` each file that was to be moved. The other arguments are told the byte of the metadata
    that was read, and the numbers of files that were listed and checked. A file that several
    records have counts for each of them. Raises `OutputError` (`BusyError` while another check
    writes the same report), and what `build_index` and `ensure_listing` raise.
    """
    from capmerge.index.latent_check import iter_checked
    from capmerge.index.latent_records import index_of_any, iter_missing, listing_anew

    summary = CheckSummary()
    with ExitStack() as closing:
        # The listing of the folder, made anew
        work = closing.enter_context(_work_folder(options.report))
        index = index_of_any(metadata, work, options.jobs, indexing, options.max_record_bytes)
        listing = listing_anew(index, options.latents, work, options.jobs, listing_files)
        summary.records = len(index)
        report = notes = None
        if options.report is not None:
            report = closing.enter_context(AtomicFile(options.report))
            shards = listing.shards.identity if listing.shards else None
            about = {"metadata": index.fingerprint, "latents": str(listing.folder.absolute())}
            notes = closing.enter_context(CheckNotes(work, {**about, "shards": shards}))
        findings = closing.enter_context((work / "findings").open("w+b"))

        # Every file and every record without one, in the order of the records
        started = time.perf_counter()
        checked = iter_checked(
            index, listing, options.jobs, checking, notes.known if notes else None
        )
        answers: Iterator[tuple[int, CheckedFile | str]] = merge(
            ((file.record, file) for file in checked),
            iter_missing(index, listing),
            key=lambda entry: entry[0],
        )
        for record, answer in answers:
            if isinstance(answer, str):
                finding = Finding(answer, None, "missing", "found no latents file")
            else:
                summary.files += 1
                summary.known += not answer.answer.opened
                if notes:
                    notes.write(record, answer)
                if not answer.answer.problem:
                    continue
                fault, problem = answer.answer.fault, answer.answer.problem
                finding = Finding(answer.key, str(answer.place), fault, problem)
            summary.faults[finding.fault] += 1
            findings.write(line_of(vars(finding)))
            found(finding)
        summary.seconds = time.perf_counter() - started

        # What becomes of them. Nothing is moved before everything was checked.
        findings.seek(0)
        for line in findings:
            finding = Finding(**json.loads(line))
            if options.quarantine is not None and finding.file is not None:
                is_there = os.path.lexists(finding.file)
                finding = _moved(finding, options.quarantine, listing)
                summary.moved += is_there and finding.moved_to is not None
                summary.not_moved += finding.not_moved is not None
                moved(finding)
            if report:
                report.write(line_of(vars(finding)))
        if report:
            report.publish()
        if notes:
            notes.remove()
    return summary


@contextmanager
def _work_folder(report: Path | None) -> Iterator[Path]:
    """A folder for what is needed on the way: a hidden one beside the report, else a temporary one.

    That beside the report stays when the check is interrupted, for the notes in it.
    """
    if report is None:
        with tempfile.TemporaryDirectory(prefix="capmerge-") as folder:
            yield Path(folder)
        return
    shown = printable(str(report))
    work = report.with_name(f".{report.name}.capmerge-tmp.d")
    try:
        work.mkdir(exist_ok=True)
        lock = open_locked(work / "lock")
    except BlockingIOError as error:
        raise BusyError(
            f"{shown}: another check writes this report. Wait for it, or choose another."
        ) from error
    except OSError as error:
        raise OutputError(
            f"{shown}: cannot write, {error.strerror}. Check the folder and its permissions, or "
            "choose another folder."
        ) from error
    with lock:
        try:
            yield work
        except BaseException:
            if not has_notes(work):
                shutil.rmtree(work, ignore_errors=True)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _moved(finding: Finding, quarantine: Path, listing: "Listing") -> Finding:
    """The finding of a file that was moved because of its bytes, or with the reason why not."""
    assert finding.file is not None
    if finding.fault == "unreadable":
        return replace(finding, not_moved="it could not be read, which may be the disk's fault")
    path = Path(finding.file)
    target = quarantine / listing.below(path)
    try:
        listing.check_inside(path)
        move_to_free_name(path, target)
    except FileExistsError:
        return replace(finding, not_moved=f"{target} exists already")
    except OSError as error:
        # Two records may have one file.
        if not isinstance(error, FileNotFoundError) or not os.path.lexists(target):
            return replace(finding, not_moved=error.strerror or str(error))
    return replace(finding, moved_to=str(target))
