"""Combinations of settings that no run could follow are refused, and their neighbours are not."""

import pytest
from builders.config import load

from trainer.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"engine.kind": "deepspeed", "speed.channels_last": True},
            '`speed.channels_last = true` does not work with `engine.kind = "deepspeed"`, which',
        ),
        (
            {"engine.kind": "deepspeed", "engine.zero_stage": 3, "speed.compile": True},
            "`speed.compile = true` does not work with `engine.zero_stage = 3`, which fetches",
        ),
        (
            {"engine.kind": "deepspeed", "engine.zero_stage": 0, "train.precision": "bf16"},
            '`engine.zero_stage = 0` does not work with `train.precision = "bf16"`',
        ),
        (
            {
                "engine.kind": "deepspeed",
                "engine.offload_optimizer_device": "nvme",
                "engine.offload_optimizer_nvme_path": "/fast",
            },
            '`engine.offload_optimizer_device = "nvme"` does not work with `engine.zero_stage = 2`',
        ),
        (
            {
                "engine.kind": "deepspeed",
                "engine.zero_stage": 3,
                "engine.offload_param_device": "nvme",
            },
            '`engine.offload_param_device = "nvme"` needs a folder on that disk, found none. ',
        ),
        (
            {
                "engine.kind": "deepspeed",
                "engine.offload_optimizer_device": "cpu",
                "train.precision": "full_bf16",
            },
            '`engine.offload_optimizer_device = "cpu"` does not work with `train.precision = ',
        ),
        (
            {
                "engine.kind": "deepspeed",
                "engine.fp16_master_weights_and_gradients": True,
                "train.precision": "fp16",
            },
            "`engine.fp16_master_weights_and_gradients = true` needs engine.zero_stage 1 or 2, ",
        ),
        (
            {"noise.min_timestep": 500, "noise.max_timestep": 500},
            "`noise.min_timestep = 500` is not below `noise.max_timestep = 500`",
        ),
        (
            {"noise.zero_terminal_snr": True},
            '`noise.zero_terminal_snr = true` does not work with `noise.prediction = "epsilon"`',
        ),
        (
            {"noise.prediction": "flow", "loss.kind": "huber"},
            (
                '`loss.huber_schedule = "snr"`, the default, does not work with '
                '`noise.prediction = "flow"`'
            ),
        ),
        (
            {
                "noise.prediction": "flow",
                "loss.kind": "smooth_l1",
                "loss.huber_schedule": "snr",
            },
            '`loss.huber_schedule = "snr"` does not work with `noise.prediction = "flow"`',
        ),
        (
            {"noise.prediction": "flow", "loss.kind": "l1", "loss.contrastive": 0.05},
            '`loss.contrastive = 0.05` does not work with `loss.kind = "l1"`',
        ),
        (
            {
                "noise.prediction": "flow",
                "noise.timestep_sampling": "logit_normal",
                "noise.timestep_std": -0.2,
            },
            (
                "`noise.timestep_std` is -0.2, expected a number above 0. "
                "A mean, which may be below 0, is noise.timestep_mean."
            ),
        ),
        (
            {"optimizer.learning_rate": 0},
            (
                "`optimizer.learning_rate` and `optimizer.text_learning_rate` are 0, "
                "so nothing would be trained"
            ),
        ),
        (
            {"optimizer.schedule": "piecewise_constant"},
            "needs `optimizer.schedule_arguments.step_rules`, found none",
        ),
        (
            {"caption.secondary_separator": ","},
            (
                '`caption.secondary_separator` has no effect with `caption.separator = ","`: '
                "they are the same"
            ),
        ),
    ],
)
def test_what_cannot_be_carried_out_is_refused(tmp_path, settings, said):
    """Combinations that no training could follow are refused with the values at fault."""
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, settings)
    assert said in str(refused.value)
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"noise.min_timestep": 499, "noise.max_timestep": 500},
        {"noise.zero_terminal_snr": True, "noise.prediction": "v"},
        {"optimizer.learning_rate": 0, "optimizer.text_learning_rate": 1e-6},
        {
            "optimizer.learning_rate": 0,
            "optimizer.text2_learning_rate": 1e-6,
            "model.family": "sdxl",
        },
        {
            "optimizer.schedule": "piecewise_constant",
            "optimizer.schedule_arguments.step_rules": "1:5,0.1",
        },
        {"train.max_epochs": 2},
    ],
)
def test_what_can_be_carried_out_is_taken(tmp_path, settings):
    """The nearest combinations that make sense are accepted; steps and epochs may both be given."""
    load(tmp_path, settings)
