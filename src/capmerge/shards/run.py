"""A rewrite of many shards: plan, hand the missing ones to an engine, and add up what they left."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.captions.templates import MergeOptions
from capmerge.commands.latent_files import Evidence, count_names, evidence, with_image_size
from capmerge.commands.merge_blocks import OnError
from capmerge.errors import BusyError, UsageError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.shard_files import STATISTICS
from capmerge.shards.engine import run_here
from capmerge.shards.job import (
    LOGS,
    Failure,
    Job,
    failure_name,
    open_place,
    shard_names,
)
from capmerge.shards.manifest import (
    Mark,
    check_same,
    read_manifest,
    read_marks,
    remove_marks,
    shards_of,
    write_manifest,
)
from capmerge.shards.places import Place
from capmerge.shards.task import run_task
from capmerge.shards.totals import Totals, add_up, statistics
from capmerge.stats.collector import Tokenizers
from capmerge.stats.document import Document

Engine = Literal["local", "datatrove"]
Executor = Literal["local", "slurm", "ray"]


@dataclass(frozen=True, slots=True)
class ShardOptions:
    """The options of one run over shards."""

    source: str
    """The folder or the URL of the shards."""
    out: str
    """The folder or the URL of the outputs."""
    merge: MergeOptions = field(default_factory=MergeOptions)
    on_error: OnError = "stop"
    stats: Tokenizers | None = None
    latents: Path | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    engine: Engine = "local"
    executor: Executor = "local"
    tasks: int = 1
    """The number of groups that the shards are divided into."""
    workers: int | None = 1
    """How many groups are worked on at a time; None for all at once, on a cluster alone."""
    only_task: int | None = None
    """The number, from 0, of the one group that this run works on; None for all of them."""
    sbatch: dict[str, str] = field(default_factory=dict)
    """Options of sbatch by their names, for the executor "slurm"."""
    force: bool = False
    """True to rewrite shards anew that an earlier run has done, and replace other files."""


class ShardsOutcome(NamedTuple):
    """What became of a run."""

    shards: int
    done_before: int
    failures: list[Failure]
    totals: Totals
    latents: Evidence
    statistics: Document | None
    """None where they were not asked for, and while shards are missing."""


class Submitted(NamedTuple):
    """A job that Slurm will run."""

    job: str
    shards: int


class TaskOutcome(NamedTuple):
    """What became of one task, whose counts a later run adds up."""

    shards: int
    failures: list[Failure]


def run_shards(
    options: ShardOptions,
    *,
    begun: Callable[[int, int], Callable[[str], None]],
    listing: Callable[[int], None] | None = None,
) -> ShardsOutcome | Submitted | TaskOutcome:
    """Rewrite the shards that are not done yet, and add up the counts of all.

    With Slurm the shards are only handed over, and a later run adds up; so it does after a run of
    one task alone.

    `begun` is told how many shards there are and how many of them are done, and gives the function
    that is told each shard that is done or failed. Raises `UsageError` for options that cannot be
    carried out, `DataError` and `OutputError` where files cannot be read or written.
    """
    # Plan. The latents are looked at once, and not for each shard. One task alone looks at no other
    # shards than its own.
    shards, out = open_place(options.source), open_place(options.out)
    _check_apart(shards, out)
    _check_folder(out)
    names = shard_names(shards)
    alone = options.only_task is not None
    if alone:
        names = names[options.only_task :: options.tasks]
    latents = count_names(options.latents, listing) if options.latents else None
    job = Job(
        options.source,
        options.out,
        with_image_size(options.merge, latents),
        options.on_error,
        options.stats,
        options.max_record_bytes,
        {name: shards.fingerprint(name, listed=True) for name in names},
    )
    marks = _done_before(out, job, force=options.force, alone=alone)
    if not alone:
        write_manifest(out, job, marks)
    elif read_manifest(out) is None:
        with suppress(BusyError):  # another task writes it for its shards, with the same options
            write_manifest(out, job, marks)

    # Run what is missing.
    missing = [name for name in names if name not in marks]
    done = begun(len(names), len(marks))
    if alone:
        return TaskOutcome(len(names), run_task(job, missing, done))
    failures = _run(options, job, missing, done) if missing else []
    if isinstance(failures, str):
        return Submitted(failures, len(missing))

    # Add up.
    before, marks = len(marks), read_marks(out, names)
    totals = add_up(out, marks)
    document = None
    if options.stats and len(marks) == len(names):
        document = statistics(job, out, names, options.stats)
        out.write(STATISTICS, (json.dumps(document, indent=1) + "\n").encode())
    write_manifest(out, job, marks, totals.as_dict())
    kind = evidence(totals.tally, latents, image_size=bool(job.merge.image_size))
    return ShardsOutcome(len(names), before, failures, totals, kind, document)


def _run(
    options: ShardOptions, job: Job, missing: list[str], done: Callable[[str], None]
) -> list[Failure] | str:
    """Hand the missing shards to the engine; returns those that failed, or the job of Slurm."""
    shards, out = open_place(job.source), open_place(job.out)
    tasks = min(options.tasks, len(missing))
    files = out.files()
    for name in missing:
        if failure_name(name) in files:
            out.remove(failure_name(name))
    if options.engine == "local":
        # The threads of a store must not run when processes are forked.
        forks = shards.is_local and out.is_local
        return run_here(job, missing, tasks, options.workers or tasks, done, forks=forks)
    try:
        from capmerge.shards import datatrove_engine as datatrove
    except ModuleNotFoundError as error:
        if (error.name or "capmerge").startswith("capmerge"):
            raise  # a bug
        raise UsageError(
            f"--engine datatrove: the package {error.name} is not installed. Run: pip install "
            "'capmerge[scale]'"
        ) from error
    job = replace(job, source=shards.absolute, out=out.absolute)
    logs = f"{out.absolute}/{LOGS}/{_launches(files) + 1:03d}"
    if options.executor == "slurm":
        return datatrove.submit_to_slurm(job, missing, tasks, options.workers, logs, options.sbatch)
    if options.executor == "ray":
        datatrove.run_ray(job, missing, tasks, options.workers, logs)
    else:
        datatrove.run_local(job, missing, tasks, options.workers or tasks, logs)
    # A task may fail to write its message as well, so those without a mark count.
    marks = read_marks(out, missing)
    undone = [name for name in missing if name not in marks]
    unknown = (
        "the shard was not done, and its task left no message. Look for the cause in the logs in "
        f"{logs}, and run the same command again."
    )
    return [
        Failure(name, f"{printable(shards.full_name(name))}: {unknown}" if told is None else told)
        for name, told in zip(undone, _messages(out, undone), strict=True)
    ]


def _messages(out: Place, names: list[str]) -> Iterator[str | None]:
    """Why each of these shards failed; None where its task left no message."""
    for content in out.read([*map(failure_name, names)]):
        yield None if content is None else content.decode()


def _launches(files: Iterable[str]) -> int:
    """How many folders of logs there are."""
    return len({name.split("/")[2] for name in files if name.startswith(f"{LOGS}/")})


def _check_apart(shards: Place, out: Place) -> None:
    """Raise `UsageError` where one of the folders is the other, or in it."""
    here, there = (
        # Unlike Path.resolve, it takes a loop of links.
        Path(os.path.realpath(place.name) if place.is_local else place.name)
        for place in (shards, out)
    )
    if here == there or here in there.parents or there in here.parents:
        raise UsageError(
            f"{printable(out.name)}: the outputs would lie among the shards of "
            f"{printable(shards.name)}, which are never written to. Choose another -o."
        )


def _check_folder(out: Place) -> None:
    """Raise `UsageError` where the outputs would lie in something that is no folder."""
    if out.is_local and os.path.lexists(out.name) and not Path(out.name).is_dir():
        raise UsageError(
            f"{printable(out.name)}: found something that is no folder, expected a folder for the "
            "outputs of the shards, or nothing. Choose another -o."
        )


def _done_before(out: Place, job: Job, *, force: bool, alone: bool) -> dict[str, Mark]:
    """The marks of the shards that an earlier run of this job has done.

    With `force` they are removed. With `alone` the job has not all of the shards, and those that it
    lacks are not missed. Raises `UsageError` where OUT holds something else.
    """
    files = out.files()
    if force:
        remove_marks(out)
        return {}
    manifest = read_manifest(out)
    if manifest:
        before = () if alone else shards_of(manifest)
        marks = read_marks(out, {**dict.fromkeys(before), **job.fingerprints})
        check_same(out, manifest, marks, job)
        return {name: marks[name] for name in job.fingerprints if name in marks}
    for name in job.fingerprints:
        if name in files:
            raise UsageError(
                f"{printable(out.full_name(name))}: the file exists, and there is no manifest that "
                "says what it is from. Use --force to replace it, or choose another -o."
            )
    return {}
