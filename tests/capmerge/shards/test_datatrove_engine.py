"""The jobs that are made for Slurm and Ray: what they hold, and that a task of them works."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from builders.metadata import COMMAND, run
from builders.shards import SHARDS, joined_outputs, make_shards, shard_name

from capmerge.captions.templates import MergeOptions
from capmerge.shards.job import Job
from capmerge.shards.places import LocalFolder

engine = pytest.importorskip("capmerge.shards.datatrove_engine", exc_type=ImportError)

PROGRAMS = {
    "sbatch": 'echo "$@" >> "$RECORD/calls"; n=$(wc -l < "$RECORD/calls"); '
    'for last; do :; done; cp "$last" "$RECORD/job-$n"; echo "Submitted batch job 4$n"',
    "srun": 'while [ "$1" != launch_pickled_pipeline ]; do shift; done; exec "$@"',
    "scontrol": "echo node-1",
}
"""What stands for the programs of Slurm: sbatch keeps the job, srun runs what it is given."""


@pytest.fixture
def slurm(tmp_path):
    """An environment with programs that stand for Slurm's, and the folder where jobs are kept."""
    programs, record = tmp_path / "bin", tmp_path / "record"
    programs.mkdir()
    record.mkdir()
    for name, script in PROGRAMS.items():
        path = programs / name
        path.write_text(f"#!/bin/bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    path = f"{programs}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "RECORD": str(record)}, record


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("datatrove", "fsspec"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])

sys.meta_path.insert(0, Missing())
from capmerge.__main__ import main
main()
"""


@pytest.mark.parametrize(
    ("source", "engine", "told"),
    [
        ("shards", "local", ""),
        ("shards", "datatrove", "--engine datatrove: the package datatrove is not installed"),
        ("s3://bucket/x", "local", "URLs need the package fsspec"),
    ],
)
def test_without_the_packages(tmp_path, source, engine, told):
    """Local folders need none of them; otherwise a message says what to install."""
    make_shards(tmp_path)
    words = ["rewrite", source, "-o", "out", "--engine", engine, "--quiet", "-j", "2"]
    command = [sys.executable, "-c", WITHOUT, *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode == (2 if told else 0), done.stderr
    assert told in done.stderr
    assert not told or "pip install 'capmerge[scale]'" in done.stderr


def test_a_job_of_slurm_does_its_tasks(tmp_path, slurm):
    """The job array has the options that were given, and its tasks, run by hand, do the shards."""
    environment, record = slurm
    shards, out = make_shards(tmp_path), tmp_path / "out"
    words = [*COMMAND, "rewrite", str(shards), "-o", str(out), "--engine", "datatrove"]
    words += ["--executor", "slurm", "--tasks", "2", "-j", "1"]
    for option in ("partition=cpu", "time=04:00:00", "account=me", "mem-per-cpu=3G"):
        words += ["--sbatch", option]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "submitted 16 shards to Slurm as job 41" in done.stdout
    assert not list(out.glob("part-*"))

    job = (record / "job-1").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(.*)$", job, re.MULTILINE))
    assert (
        options.items()
        >= {
            "partition": "cpu",
            "time": "04:00:00",
            "account": "me",
            "mem-per-cpu": "3G",
            "array": "0-1%1",
            "cpus-per-task": "1",
        }.items()
    )

    for task in range(2):
        inside = {"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node-1", "RUN_OFFSET": "0"}
        subprocess.run(
            ["bash", record / "job-1"], env=environment | inside, capture_output=True, check=True
        )
        assert len(list(out.glob("part-??.jsonl"))) == (task + 1) * SHARDS // 2
    # The same command finds all of them done, and adds up.
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "16 of 16 shards are done already" in done.stderr
    assert len(list(record.glob("job-*"))) == 2  # with the one that merges datatrove's statistics
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl")
    assert joined_outputs(out) == (tmp_path / "one.jsonl").read_bytes()


def test_a_refusal_of_sbatch_is_told(tmp_path, slurm):
    """What sbatch says is shown, and the message names the script of the job."""
    environment, _ = slurm
    refusing = Path(environment["PATH"].split(":")[0], "sbatch")
    refusing.write_text("#!/bin/bash\necho no such partition >&2; exit 3\n")
    words = [*COMMAND, "rewrite", str(make_shards(tmp_path)), "-o", str(tmp_path / "out")]
    words += ["--engine", "datatrove", "--executor", "slurm"]
    words += ["--sbatch", "partition=x", "--sbatch", "time=1"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "no such partition" in done.stderr
    assert "sbatch refused the job (exit code 3)" in done.stderr
    assert "launch_script.slurm" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.filterwarnings("ignore")
def test_a_task_for_ray_does_its_shards(tmp_path, monkeypatch):
    """The executor has the tasks, and one task, run by hand, does every second shard."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shards, out = make_shards(tmp_path), tmp_path / "out"
    names = [shard_name(number) for number in range(SHARDS)]
    place = LocalFolder(shards)
    prints = {name: place.fingerprint(name) for name in names}
    job = Job(str(shards), str(out), MergeOptions(image_size=True), fingerprints=prints)
    executor = engine.ray_executor(job, names, 2, None, str(tmp_path / "logs"))
    assert (executor.world_size, executor.workers, executor.cpus_per_task) == (2, 2, 1)
    executor._run_for_rank(1)
    assert sorted(path.name for path in out.glob("part-??.jsonl")) == names[1::2]
    assert executor.get_incomplete_ranks() == [0]


def test_a_failure_without_a_message_is_told(tmp_path):
    """A shard whose task could not even write why it failed is no success."""
    shards, out = tmp_path / "in", tmp_path / "out"
    shards.mkdir()
    (shards / "a.json").write_bytes(b'{"k": 1}')
    (out / ".capmerge").mkdir(parents=True)
    (out / ".capmerge" / "failed").symlink_to(tmp_path / "nowhere")
    told = run("rewrite", shards, "-o", out, "-j", "1", "--engine", "datatrove", fails=1).err
    assert "1 shard of 1 could not be rewritten" in told
    assert "its task left no message" in told
