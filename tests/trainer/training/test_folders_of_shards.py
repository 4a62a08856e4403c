"""A run over a folder of shards is the run over their lines in one file."""

import json

import pytest
from builders.metadata import run as capmerge
from builders.runs import (
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)

from capmerge.errors import UsageError


@pytest.mark.slow
def test_a_folder_trains_the_same_weights(tmp_path):
    """Losses and states are equal bit by bit, and a run moves from the folder to the file."""
    joined, out = tmp_path / "joined.jsonl", tmp_path / "out"
    capmerge("convert", rewrite_examples(tmp_path, n_records=12), "-o", joined)
    lines = joined.read_bytes().splitlines(keepends=True)
    out.mkdir()
    for number in range(3):
        (out / f"{number}.jsonl").write_bytes(b"".join(lines[4 * number : 4 * number + 4]))
    changes = {
        "train": {"max_steps": 2, "batch_size": 2, "workers": 2},
        "checkpoint": {"every_steps": 1},
    }
    states = {}
    for name, metadata in (("file", joined), ("folder", out)):
        settings = settings_of(metadata, tmp_path / f"run-{name}", **changes)
        assert train_here(write_config(tmp_path / f"{name}.toml", settings)) == 0
        states[name] = state_of(tmp_path / f"run-{name}", 2)
    assert (tmp_path / "out.index").read_bytes() == (tmp_path / "joined.jsonl.index").read_bytes()
    assert metrics_of(tmp_path / "run-file") == metrics_of(tmp_path / "run-folder")
    assert_equal_bits(states["file"], states["folder"])
    # The content of the data is the same, so both runs may go on with either.
    onto_file = [f"data.metadata={json.dumps(str(joined))}", "train.max_steps=3"]
    for name in states:
        assert train_here(tmp_path / f"{name}.toml", *onto_file, resume="latest") == 0
        states[name] = state_of(tmp_path / f"run-{name}", 3)
    assert_equal_bits(states["file"], states["folder"])


def test_a_folder_of_another_format_is_refused(tmp_path):
    """The message names the shard and `capmerge convert`, and no run begins."""
    metadata, out = rewrite_examples(tmp_path, n_records=12), tmp_path / "out"
    out.mkdir()
    metadata.rename(out / "0.json")
    config = write_config(tmp_path / "run.toml", settings_of(out, tmp_path / "run"))
    with pytest.raises(UsageError) as error:
        train_here(config)
    message = str(error.value)
    assert f"{out}/0.json: found a file of JSON among the shards, expected plain JSON" in message
    assert f"capmerge convert {out}/0.json -o NEW/0.jsonl" in message
    assert not (tmp_path / "run").exists()
