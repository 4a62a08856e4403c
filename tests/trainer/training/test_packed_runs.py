"""A run over packed latents is the run over loose files: the same losses and weights."""

import json

import pytest
from builders.metadata import run as capmerge
from builders.runs import (
    LATENTS,
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)


@pytest.mark.slow
def test_packed_latents_train_the_same_weights(tmp_path):
    """Losses and states are equal bit by bit, and a run moves from loose files to shards."""
    metadata = rewrite_examples(tmp_path, n_records=12)
    shards = tmp_path / "shards"
    capmerge("pack-latents", metadata, "--latents", LATENTS, "-o", shards)
    states = {}
    for name, latents in (("loose", LATENTS), ("packed", shards)):
        changes = {
            "data": {"latents": str(latents), "flip": True},
            "train": {"max_steps": 2, "batch_size": 2, "workers": 1},
            "checkpoint": {"every_steps": 1},
        }
        config = write_config(
            tmp_path / f"{name}.toml", settings_of(metadata, tmp_path / name, **changes)
        )
        assert train_here(config) == 0
        states[name] = state_of(tmp_path / name, 2)
    assert metrics_of(tmp_path / "loose") == metrics_of(tmp_path / "packed")
    assert_equal_bits(states["loose"], states["packed"])
    # Two steps on loose files and one on shards.
    onto_shards = [f"data.latents={json.dumps(str(shards))}", "train.max_steps=3"]
    for name in states:
        assert train_here(tmp_path / f"{name}.toml", *onto_shards, resume="latest") == 0
        states[name] = state_of(tmp_path / name, 3)
    assert_equal_bits(states["loose"], states["packed"])
