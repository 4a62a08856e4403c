import base64
import json

import pytest
from builders.config import load
from builders.runs import rewrite_examples, settings_of, train_here, write_config

from trainer.config.load import load_config, resolved_toml
from trainer.errors import ConfigError
from trainer.training.engines.launcher import agreed

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
LAUNCHED = DEEPSPEED | {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}
"""What `accelerate launch` passes on for a config that says nothing but DeepSpeed."""


@pytest.fixture(autouse=True)
def accelerate_file(monkeypatch):
    """Messages name this file as the config of accelerate."""
    for module in ("launcher", "launcher_wishes"):
        monkeypatch.setattr(
            f"trainer.training.engines.{module}.accelerate_file", lambda: "accelerate.yaml"
        )


@pytest.fixture
def agree(tmp_path):
    """A function that gives what a config with some settings and a launcher agree on."""

    def agree(settings, environment):
        return agreed(load(tmp_path, settings), "config.toml", environment)

    return agree


def test_nothing_is_asked_for(agree):
    """A launcher that says nothing leaves a run to DDP, and "deepspeed" needs none to say so."""
    assert not agree({}, {}).uses_deepspeed
    assert agree({"engine.kind": "deepspeed"}, {}).uses_deepspeed
    found = agree({"train.precision": "bf16", "train.accumulation": 4}, LAUNCHED)
    assert found.uses_deepspeed
    assert found.config.engine.zero_stage == 2


def test_the_launcher_says_more(agree):
    """What the launcher alone says about the engine is taken over."""
    found = agree(
        {"optimizer.clip_grad_norm": 0.5, "train.accumulation": 4, "train.precision": "bf16"},
        LAUNCHED
        | {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme",
            "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": "/Fast/Disk",
            "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
            "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_MIXED_PRECISION": "bf16",
        },
    )
    engine = found.config.engine
    assert (engine.zero_stage, engine.zero3_init_flag) == (3, True)
    assert (engine.offload_param_device, engine.offload_param_nvme_path) == ("nvme", "/Fast/Disk")
    assert engine.offload_optimizer_device == "none"


def test_the_resolved_config_of_a_run_agrees_again(agree, tmp_path):
    """The config that a run writes, with all settings, goes on under the same launcher."""
    environment = LAUNCHED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    for before in (agree({}, environment), agree({}, {})):
        (tmp_path / "resolved.toml").write_text(resolved_toml(before.config))
        again = load_config(tmp_path / "resolved.toml")
        after = agreed(again, "resolved.toml", environment if before.uses_deepspeed else {})
        assert after.config == before.config
        assert after.uses_deepspeed == before.uses_deepspeed


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        (
            {"engine.kind": "ddp"},
            LAUNCHED,
            'config.toml: `engine.kind = "ddp"`, but accelerate.yaml has DeepSpeed. ',
        ),
        (
            {"engine.zero_stage": 3},
            LAUNCHED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            "config.toml: `engine.zero_stage = 3`, but zero_stage: 1 in accelerate.yaml. ",
        ),
        (
            {"engine.kind": "deepspeed", "engine.offload_optimizer_device": "cpu"},
            LAUNCHED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "nvme"},
            "offload_optimizer_device: nvme in accelerate.yaml. ",
        ),
        (
            {"train.accumulation": 2},
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "config.toml: `train.accumulation = 2`, but gradient_accumulation_steps: 4 in accel",
        ),
        (
            {},
            LAUNCHED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"},
            "config.toml: `optimizer.clip_grad_norm = 1.0`, but gradient_clipping: 0.5 in ",
        ),
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            'config.toml: `train.precision = "fp32"`, but mixed_precision: bf16 in accelerate',
        ),
        (
            {"engine.kind": "deepspeed"},
            {"ACCELERATE_USE_CPU": "true"},
            "accelerate.yaml: found use_cpu: true (ACCELERATE_USE_CPU), with which ",
        ),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "accelerate.yaml: found FSDP, expected DDP or"),
        (
            {"engine.zero_stage": 3},
            {},
            '. Remove it, or set engine.kind to deepspeed. `engine.kind = "auto"` means "ddp" here',
        ),
        (
            {"train.precision": "full_bf16", "optimizer.stochastic_rounding": True},
            LAUNCHED,
            "config.toml: `optimizer.stochastic_rounding = true` does not work with `engine.kind",
        ),
        (
            {
                "optimizer.fused_backward": True,
                "optimizer.clip_grad_norm": 0,
                "train.on_nonfinite": "stop",
            },
            LAUNCHED,
            '`engine.kind = "auto"` means "deepspeed" here, because accelerate.yaml asks for',
        ),
        (
            {"train.precision": "fp16"},
            LAUNCHED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
            "accelerate.yaml: `engine.zero_stage = 0` does not work with `train.precision = ",
        ),
        (
            {},
            LAUNCHED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "7"},
            "accelerate.yaml: `engine.zero_stage` is 7, expected a whole number from 0 to 3.",
        ),
        (
            {},
            LAUNCHED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "disk"},
            'accelerate.yaml: `engine.offload_optimizer_device` is "disk", expected "none", "cpu"',
        ),
    ],
)
def test_what_disagrees_is_refused(agree, settings, environment, said):
    """Both values and both files are named."""
    with pytest.raises(ConfigError) as refused:
        agree(settings, environment)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "content", "said"),
    [
        ({}, {"train_micro_batch_size_per_gpu": 8}, "`train.batch_size = 1`, but train_micro_b"),
        ({}, {"gradient_clipping": 2.0}, "`optimizer.clip_grad_norm = 1.0`, but gradient_clipping"),
        (
            {"train.accumulation": 4},
            {"gradient_accumulation_steps": 1},
            "`train.accumulation = 4`, but gradient_accumulation_steps: 1 in ",
        ),
        ({}, {"bf16": {"enabled": True}}, '`train.precision = "fp32"`, but bf16.enabled: true in '),
        (
            {"train.precision": "bf16"},
            {"bf16": {"enabled": False}},
            '`train.precision = "bf16"`, but bf16.enabled: false in ',
        ),
        (
            {"engine.zero_stage": 1},
            {"zero_optimization": {"stage": 3}},
            "`engine.zero_stage = 1`, but zero_optimization.stage: 3 in ",
        ),
        ({}, {"optimizer": {"type": "Adam"}}, "found optimizer, expected none: optimizer.name in"),
        (
            {},
            {"bf16": {"check_grad_overflow": False}},
            "found bf16.check_grad_overflow: false, but",
        ),
        (
            {"train.batch_size": 4, "train.accumulation": 2},
            {"train_batch_size": 64},
            "found train_batch_size: 64, but the run sets it to 16. Remove it.",
        ),
        (
            {},
            {"zero_force_ds_cpu_optimizer": True},
            "found zero_force_ds_cpu_optimizer: true, but the run sets it to false. Remove it.",
        ),
    ],
)
def test_a_config_file_of_deepspeed_is_compared(agree, tmp_path, settings, content, said):
    """Its settings are refused like those of accelerate, by their names and its path."""
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    environment = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path), "WORLD_SIZE": "2"}
    with pytest.raises(ConfigError) as refused:
        agree(settings, LAUNCHED | environment)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)


def test_a_config_file_of_deepspeed_is_kept(agree, tmp_path):
    """What agrees or is "auto" is taken, also as base64; a file that is none is refused."""
    content = {
        "zero_optimization": {"stage": 3, "overlap_comm": True, "offload_param": {"device": "cpu"}},
        "train_batch_size": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": False},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
    }
    text = base64.urlsafe_b64encode(json.dumps(content).encode()).decode()
    found = agree({}, LAUNCHED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": text})
    assert found.deepspeed_file == content
    assert (found.config.engine.zero_stage, found.config.engine.offload_param_device) == (3, "cpu")
    with pytest.raises(ConfigError, match=r"no_such\.json: found no config of DeepSpeed"):
        agree({}, LAUNCHED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "no_such.json")})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"engine": {"kind": "deepspeed"}}, "DeepSpeed is asked for and not installed"),
        ({"log": {"trackers": ["wandb"]}}, "wandb is not installed"),
    ],
    ids=["engine", "tracker"],
)
def test_what_is_not_installed_is_told_before_any_work(changes, told, tmp_path, monkeypatch):
    """The run ends with the way to install a package, before the index of its data is built."""
    monkeypatch.setattr("trainer.training.engines.accelerator.find_spec", lambda _: None)
    monkeypatch.setattr(
        "trainer.training.engines.accelerator.get_available_trackers", lambda: ["tensorboard"]
    )
    metadata = rewrite_examples(tmp_path, 4)
    files = set(tmp_path.iterdir())
    config = write_config(
        tmp_path / "config.toml", settings_of(metadata, tmp_path / "run", **changes)
    )
    with pytest.raises(ConfigError, match=told):
        train_here(config)
    assert set(tmp_path.iterdir()) == files | {config}
