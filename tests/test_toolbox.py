"""The chain of docs/toolbox.md runs on the example data, command by command."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "toolbox.md").read_text(encoding="utf-8")
CHAIN = re.compile(r"## From files to a trained model\n.*?```sh\n(?P<commands>.*?)```", re.DOTALL)
PYTHON = shlex.quote(sys.executable)
FUNCTIONS = f'capmerge() {{ {PYTHON} -m capmerge "$@"; }}; python() {{ {PYTHON} "$@"; }}; '


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a copy of the examples, in which every command of the chain has run."""
    folder = tmp_path_factory.mktemp("toolbox")
    shutil.copytree(ROOT / "examples", folder / "examples")
    found = CHAIN.search(PAGE)
    assert found
    for command in found["commands"].splitlines():
        done = subprocess.run(
            ["bash", "-c", FUNCTIONS + command],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
    return folder


def records_of(path):
    """The records of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def test_captions_come_back_from_their_parts(folder):
    """Four parts, joined, and joined with the tags of the original, are the original."""
    original = records_of(folder / "examples" / "meta_lat.json")
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["image_path"] for line in lines] == list(original)
    joined = records_of(folder / "joined.json")
    assert joined == original
    assert list(joined) == list(original)


def test_every_record_is_kept_or_listed(folder):
    """A record without tags or caption is listed by the join, and again by the filter."""
    joined, kept = records_of(folder / "joined.json"), records_of(folder / "kept.json")
    missing = [json.loads(line) for line in (folder / "missing.jsonl").read_text().splitlines()]
    dropped = [
        json.loads(line) for line in (folder / "kept.json.dropped.jsonl").read_text().splitlines()
    ]
    assert missing
    assert [(line["key"], [f"no {name}" for name in line["missing"]]) for line in missing] == [
        (line["key"], line["reasons"]) for line in dropped
    ]
    listed = {line["key"] for line in dropped}
    assert kept == {key: record for key, record in joined.items() if key not in listed}


def test_the_kept_records_are_ready(folder):
    """The rewrite has the kept records, and the files that training and reports need."""
    ready = records_of(folder / "ready.json")
    assert list(ready) == list(records_of(folder / "kept.json"))
    assert all(record["capmerge"] for record in ready.values())
    assert (folder / "ready.json.index").is_file()
    assert (folder / "ready.stats.json").is_file()


def test_latents_are_sound_and_packed(folder):
    """The report of the check is empty, and the shards hold the latents of the kept records."""
    assert (folder / "report.jsonl").read_text() == ""
    with tarfile.open(folder / "shards" / "latents-00000.tar") as shard:
        names = [re.sub(r"(_\d+x\d+_sdxl)?\.npz$", "", name) for name in shard.getnames()]
    assert names == list(records_of(folder / "kept.json"))


def test_a_model_is_trained_on_the_shards(folder):
    """The run reads every latent from the shards, and ends with a model."""
    run = folder / "runs" / "packed"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in steps) == 20
    assert (run / "model").is_dir()
