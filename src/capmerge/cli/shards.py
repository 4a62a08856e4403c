"""The command `capmerge rewrite` for a folder of shards or a URL: its run, and what it prints."""

import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from capmerge.cli.merge_options import MergeChoice
from capmerge.commands.rewrite_summary import Summary
from capmerge.cores import usable_cores
from capmerge.errors import CapmergeError, UsageError, printable
from capmerge.terminal import count_bar, shard_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from capmerge.shards.job import Failure
    from capmerge.shards.run import Engine, Executor, ShardOptions, ShardsOutcome
    from capmerge.stats.collector import Tokenizers

_NAMED = 10
"""How many failed shards the last message names."""

EngineOption = Annotated[
    Literal["local", "datatrove"] | None,
    typer.Option(
        "--engine",
        help="For a folder of shards: what runs the tasks. local: processes of this machine. "
        "datatrove: the library of that name. Default: local.",
        show_default=False,
    ),
]
TasksOption = Annotated[
    int | None,
    typer.Option(
        "--tasks",
        metavar="N",
        min=1,
        help="For a folder of shards: the number of tasks that they are divided into. "
        "Default: as many as --jobs.",
        show_default=False,
    ),
]
OnlyTaskOption = Annotated[
    int | None,
    typer.Option(
        "--only-task",
        metavar="K",
        min=0,
        help="For a folder of shards: run only task K of --tasks N, counted from 0, as in a job "
        "array. A run without the option adds up the counts at the end.",
        show_default=False,
    ),
]
ExecutorOption = Annotated[
    Literal["local", "slurm", "ray"] | None,
    typer.Option(
        "--executor",
        help="For --engine datatrove: where the tasks run. Default: local.",
        show_default=False,
    ),
]
SbatchOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sbatch",
        metavar="NAME=VALUE",
        help="For --executor slurm: an option of sbatch. partition and time are needed. Repeat the "
        "option for more.",
        show_default=False,
    ),
]


class _InterruptedRunError(CapmergeError):
    """Ctrl-C, after which the shards that are done are kept."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__(
            "interrupted; the shards that are done are kept. Run the same command again to do the "
            "others."
        )


@dataclass(frozen=True, slots=True)
class ShardChoice:
    """The options of runs over shards as the command line gives them; None for one not given."""

    engine: "Engine | None"
    tasks: int | None
    only_task: int | None
    executor: "Executor | None"
    sbatch: list[str] | None

    def refuse_for_file(self, src: str) -> None:
        """Raise `UsageError` for an option that was given for a single file."""
        for option in fields(self):
            if getattr(self, option.name) is not None:
                shown = f"--{option.name.replace('_', '-')}"
                raise UsageError(
                    f"{shown} is for a folder of shards, and {printable(src)} is none. "
                    f"Leave {shown} out, or give a folder."
                )

    def options(
        self,
        src: str,
        out: str | None,
        merge: MergeChoice,
        stats: "Tokenizers | None",
        latents: Path | None,
        max_record: int,
        jobs: int | None,
        *,
        force: bool,
    ) -> "ShardOptions":
        """The options of a run over the shards of `src`.

        Raises `UsageError` without an OUT, and for options that have no effect without another.
        """
        from capmerge.shards.run import ShardOptions

        if out is None or out == "-":
            raise UsageError(
                f"{printable(src)}: found a folder or a URL, whose shards are rewritten to another "
                "one. Give it with -o OUT, or name a metadata file."
            )
        self._check(force=force)
        on_cluster = self.executor in ("slurm", "ray")
        return ShardOptions(
            src,
            out,
            merge.options(counts_tokens=stats is not None, counters=("--stats",)),
            merge.on_error or "stop",
            stats,
            latents,
            max_record,
            self.engine or "local",
            self.executor or "local",
            tasks=self.tasks or jobs or usable_cores(),
            workers=jobs or (None if on_cluster else usable_cores()),
            only_task=self.only_task,
            sbatch=_sbatch_options(self.sbatch or []),
            force=force,
        )

    def _check(self, *, force: bool) -> None:
        """Raise `UsageError` for options that have no effect without another one, or beside one."""
        if self.executor and self.engine != "datatrove":
            raise UsageError(
                f"--executor {self.executor} belongs to --engine datatrove. Give it too, or leave "
                "--executor out."
            )
        if self.sbatch and self.executor != "slurm":
            raise UsageError(
                "--sbatch belongs to --executor slurm. Give it too, or leave --sbatch out."
            )
        if self.only_task is None:
            return
        if self.tasks is None or self.only_task >= self.tasks:
            raise UsageError(
                f"--only-task {self.only_task}: expected --tasks N with it, and a number from 0 to "
                "N - 1."
            )
        if self.engine == "datatrove" or force:
            other = "--engine datatrove" if self.engine == "datatrove" else "--force"
            raise UsageError(
                f"--only-task runs one task of many, which {other} would start anew. "
                "Leave one of them out."
            )


def _sbatch_options(given: list[str]) -> dict[str, str]:
    options = {}
    for text in given:
        name, sign, value = text.partition("=")
        name = name.removeprefix("--")
        if not sign or not name:
            raise UsageError(
                f"--sbatch {printable(text)}: expected NAME=VALUE, such as partition=cpu."
            )
        options[name] = value
    return options


def refuse_for_shards(src: str, given: dict[str, object]) -> None:
    """Raise `UsageError` for an option of single files that was given for a folder of shards."""
    for option, value in given.items():
        if value not in (None, False):
            raise UsageError(
                f"{option} is for a single file, and {printable(src)} is a folder of shards. "
                f"Leave {option} out, or name a file."
            )


def rewrite_shards(options: "ShardOptions", *, quiet: bool) -> None:
    """Run, print the summary, and raise `CapmergeError` for shards that failed."""
    from capmerge.shards.run import Submitted, TaskOutcome, run_shards

    started = time.perf_counter()
    with ExitStack() as bars:
        listing = None
        if options.latents:
            listing = bars.enter_context(count_bar(options.latents, quiet=quiet))

        def begun(shards: int, done: int) -> "Callable[[str], None]":
            if done and not quiet:
                print(f"{done:,} of {shards:,} shards are done already", file=sys.stderr)
            progress = bars.enter_context(shard_bar(options.source, shards, quiet=quiet))
            finished = done

            def another(_name: str) -> None:
                nonlocal finished
                finished += 1
                if progress:
                    progress(finished)

            return another

        try:
            outcome = run_shards(options, begun=begun, listing=listing)
        except KeyboardInterrupt:
            raise _InterruptedRunError from None
    if isinstance(outcome, Submitted):
        print(
            f"submitted {outcome.shards:,} shards to Slurm as job {outcome.job}. Run the same "
            "command again when it has ended: that rewrites what is still missing, and adds up the "
            "counts."
        )
        return
    if isinstance(outcome, TaskOutcome):
        if outcome.failures:
            raise _failed(options.source, outcome.shards, outcome.failures)
        return
    seconds = None if outcome.done_before else time.perf_counter() - started
    if not quiet:
        _print_summary(options, outcome, seconds)
    if outcome.failures:
        raise _failed(options.source, outcome.shards, outcome.failures)


def _print_summary(
    options: "ShardOptions", outcome: "ShardsOutcome", seconds: float | None
) -> None:
    from capmerge.cli.stats import print_statistics
    from capmerge.metadata.shard_files import STATISTICS
    from capmerge.shards.job import open_place

    totals = outcome.totals
    summary = Summary(
        totals.tally,
        totals.read_bytes,
        totals.written_bytes,
        seconds,
        outcome.latents,
        totals.repeated,
        options.merge,
    )
    print(summary.text())
    if note := totals.keys.note():
        print(f"note: {note}")
    if outcome.statistics:
        written = open_place(options.out).full_name(STATISTICS)
        print_statistics(outcome.statistics, [written], to=sys.stdout)


def _failed(source: str, shards: int, failures: "list[Failure]") -> CapmergeError:
    failures = sorted(failures, key=lambda failure: failure.shard)
    lines = [
        f"  {failure.message}"
        if failure.shard in failure.message
        else f"  {printable(failure.shard)}: {failure.message}"
        for failure in failures[:_NAMED]
    ]
    if len(failures) > _NAMED:
        lines.append(f"  and {len(failures) - _NAMED:,} more")
    what = "1 shard" if len(failures) == 1 else f"{len(failures):,} shards"
    return CapmergeError(
        f"{printable(source)}: {what} of {shards:,} could not be rewritten, and "
        "the others are done. Run the same command again when the cause is removed; it does only "
        "what is missing.\n" + "\n".join(lines)
    )
