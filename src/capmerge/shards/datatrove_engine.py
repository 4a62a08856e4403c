"""The engine datatrove: its executors run the tasks here, under Slurm or on Ray.

The step of the pipeline takes file names alone, and no record passes through datatrove. Each launch
divides the shards that are missing then, and has a folder of logs and completions of its own.
"""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import redirect_stderr
from importlib import import_module
from pathlib import Path
from typing import Any

import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from datatrove.utils.stats import PipelineStats

from capmerge.errors import CapmergeError, UsageError
from capmerge.processes import kill_with_parent
from capmerge.shards.job import Failure, Job
from capmerge.shards.task import run_task


class TaskFailedError(CapmergeError):
    """Shards of a task could not be rewritten, while its other shards are done."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__("\n".join(failure.message for failure in failures))


class RewriteShards(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """The step: a task rewrites every n-th of the names, where n is the number of tasks."""

    type, name = "capmerge", "rewrite"

    def __init__(self, job: Job, names: Sequence[str], *, raises: bool) -> None:
        super().__init__()
        self.job, self.names, self.raises = job, list(names), raises
        self.failures: list[Failure] = []

    def run(
        self,
        data: object = None,  # noqa: ARG002  # the records of an earlier step
        rank: int = 0,
        world_size: int = 1,
    ) -> Generator[None, None, None]:
        """Rewrite the shards of a task; raises `TaskFailedError` at the end if it should."""
        yield from ()  # datatrove runs a step by reading what it yields
        for name in self.names[rank::world_size]:
            failed = run_task(self.job, [name])
            self.failures += failed
            self.stat_update("failed" if failed else "done", unit="shard")
            logger.info(f"failed: {failed[0].message}" if failed else f"done: {name}")
        if self.failures and self.raises:
            raise TaskFailedError(self.failures)


class _Quiet:
    """What the executors here add: a failed shard is told by its message, and not by a traceback.

    A task with one is not marked as complete.
    """

    pipeline: list[RewriteShards]

    def mark_rank_as_completed(self, rank: int) -> None:
        """Mark a task, unless a shard of it failed."""
        if not self.pipeline[0].failures:
            super().mark_rank_as_completed(rank)  # type: ignore[misc]  # datatrove's


class LocalExecutor(_Quiet, LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """Processes of this machine. What datatrove says is in its logs alone."""

    def __init__(self, pid: int, **options: Any) -> None:
        super().__init__(**options)
        self._parent_pid = pid

    def _launch_run_for_rank(self, *arguments: Any, **options: Any) -> PipelineStats:
        if os.getpid() != self._parent_pid:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what it means
            kill_with_parent()
        logger.remove()
        with redirect_stderr(io.StringIO()):
            return super()._launch_run_for_rank(*arguments, **options)


class RayExecutor(_Quiet, RayPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """Tasks of a Ray cluster."""


def run_local(job: Job, names: Sequence[str], tasks: int, workers: int, logs: str) -> None:
    """Run the tasks in processes of this machine, and wait for all of them."""
    logger.remove()
    # datatrove forks a process that keeps its counters, and waits for orders for ever.
    if sys.platform == "linux":
        os.register_at_fork(after_in_child=kill_with_parent)
    # The processes are forked from one that has done the imports.
    multiprocess.set_forkserver_preload([__name__])
    executor = LocalExecutor(
        os.getpid(),
        pipeline=[RewriteShards(job, names, raises=False)],
        tasks=min(tasks, len(names)),
        workers=min(workers, tasks, len(names)),
        logging_dir=logs,
        start_method="forkserver" if sys.platform == "linux" else "spawn",
    )
    executor.run()


def ray_executor(
    job: Job, names: Sequence[str], tasks: int, workers: int | None, logs: str
) -> RayExecutor:
    """The executor of a Ray cluster; its `run` waits for all tasks."""
    return RayExecutor(
        [RewriteShards(job, names, raises=False)],
        tasks=min(tasks, len(names)),
        workers=workers or -1,
        logging_dir=logs,
    )


def run_ray(job: Job, names: Sequence[str], tasks: int, workers: int | None, logs: str) -> None:
    """Run the tasks on the Ray cluster of RAY_ADDRESS, and wait for all of them.

    Raises `UsageError` where Ray is not installed.
    """
    try:
        import_module("ray")
    except ImportError as error:
        raise UsageError(
            "--executor ray: the package ray is not installed. Install it here and on the machines "
            "of the cluster: pip install ray"
        ) from error
    ray_executor(job, names, tasks, workers, logs).run()


def submit_to_slurm(
    job: Job,
    names: Sequence[str],
    tasks: int,
    workers: int | None,
    logs: str,
    sbatch: Mapping[str, str],
) -> str:
    """Submit the tasks as a job array of Slurm, `workers` of them at a time; returns its number.

    `sbatch` are options of sbatch without the dashes, of which "partition" and "time" are needed.
    Raises `UsageError` without them or without Slurm, and `CapmergeError` when sbatch refuses.
    """
    given = dict(sbatch)
    for name, example in (("partition", "cpu"), ("time", "04:00:00")):
        if name not in given:
            raise UsageError(
                f"--executor slurm: the {name} is missing. Give --sbatch {name}={example}."
            )
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--executor slurm: the program sbatch is not found. Run this on a machine that submits "
            "jobs to Slurm, or use another executor."
        )
    activate = Path(sys.prefix, "bin", "activate")
    logger.remove()
    executor = SlurmPipelineExecutor(
        [RewriteShards(job, names, raises=True)],
        tasks=min(tasks, len(names)),
        workers=workers or -1,
        partition=given.pop("partition"),
        time=given.pop("time"),
        qos=given.pop("qos", None),
        job_name="capmerge",
        venv_path=str(activate) if activate.exists() else None,
        sbatch_args=given,
        logging_dir=logs,
    )
    try:
        executor.run()
    except subprocess.CalledProcessError as error:
        raise CapmergeError(
            f"sbatch refused the job (exit code {error.returncode}); its message is above. The job "
            f"is {logs}/launch_script.slurm. Change the options that --sbatch gives."
        ) from error
    return str(executor.job_id)
