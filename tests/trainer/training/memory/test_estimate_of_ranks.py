"""What DeepSpeed divides is what the estimate says, on two real processes."""

import json
import re

import pytest
from builders.ranks import run_ranks
from builders.runs import rewrite_examples, settings_of, write_config

from trainer.config.load import load_config
from trainer.model.build import build_model
from trainer.training.engines.deepspeed_engine import _DEFAULTS, BUCKET
from trainer.training.memory.estimate import Shape, estimate_memory

TOLD = """
import json
import torch
import trainer.training.active_run as active_run
from trainer.run import main

def told(run, *_):
    optimizer = run.state.model.optimizer
    states = optimizer.optimizer.state.values()
    print("held", json.dumps({
        "master weights": sum(one.nbytes for one in optimizer.single_partition_of_fp32_groups),
        "optimizer state (AdamW)": sum(
            value.nbytes for kept in states for name, value in kept.items() if name != "step"
        ),
        "weights": sum(one.nbytes for one in run.state.bare_model.parameters()),
    }), flush=True)

active_run.ActiveRun.finish = told
main()
"""
"""A run that tells at its end what it holds, in place of writing a model."""


def test_the_buffer_is_that_of_the_engine():
    """The estimate has the buffer that the engine gives DeepSpeed."""
    assert _DEFAULTS["zero_optimization"]["reduce_bucket_size"] == BUCKET


@pytest.mark.ranks
@pytest.mark.slow
def test_shares_of_zero_2(tmp_path):
    """Each of two ranks holds the estimated bytes, up to the padding of a share."""
    settings = settings_of(
        rewrite_examples(tmp_path, 8),
        tmp_path / "run",
        train={"max_steps": 1, "batch_size": 1, "precision": "bf16"},
        engine={"kind": "deepspeed", "zero_stage": 2},
    )
    written = write_config(tmp_path / "config.toml", settings)
    ends = run_ranks(tmp_path, written, python=("-c", TOLD))
    assert [end.code for end in ends] == [0, 0], ends
    config = load_config(written, [])
    model = build_model(config, weights=False)
    estimate = estimate_memory(config, model, 2, Shape(256, 256, 3))
    expected = {part.name: part.size for part in estimate.lasting}
    for end in ends:
        held = json.loads(re.search(r"held (\{.*\})", end.output)[1])
        for name, size in held.items():
            assert size == pytest.approx(expected[name], abs=256), name
