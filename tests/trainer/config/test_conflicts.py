import inspect

import pytest
from builders.config import load
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from capmerge.toml import to_toml
from trainer.config.load import resolved_toml
from trainer.config.rules import RULES
from trainer.config.settings import CaptionSettings, Config, ScheduleArguments
from trainer.errors import ConfigError

ALWAYS = frozenset(
    f"{section}.{key}"
    for section, keys in {
        "model": "family path vae latent_channels latent_scale latent_shift gradient_checkpointing",
        "data": "metadata latents index resolution repeats flip alpha_mask on_missing "
        "allow_outside",
        "text": "chunking embedding_noise",
        "noise": "prediction min_timestep max_timestep",
        "loss": "kind",
        "optimizer": "name learning_rate text_learning_rate arguments schedule clip_grad_norm "
        "fused_backward",
        "train": "output_dir max_steps max_epochs seed batch_size accumulation workers precision "
        "on_nonfinite",
        "speed": "attention channels_last compile",
        "engine": "kind check_ranks_every_steps",
        "ema": "decay",
        "validation": "records share",
        "checkpoint": "every_steps every_epochs every_minutes keep",
        "export": "formats dtype",
        "samples": "prompts",
        "log": "every_steps samples trackers",
        "cache": "images metadata output vae vae_precision resolution bucket_steps upscale "
        "exif_rotation alpha_mask flip latents dtype suffix batch_size workers",
    }.items()
    for key in keys.split()
)
"""Settings that every combination reads; a new setting belongs here or into a rule."""

ASKED = {
    "model.size": "tiny",
    "model.variant": "fp16",
    "model.train_only": ["conv_in.*"],
    "model.freeze": ["conv_in.*"],
    "caption.pick": "random",
    "caption.shuffle": True,
    "caption.keep_tokens": 1,
    "caption.separator": ",",
    "caption.keep_tokens_separator": "|||",
    "caption.secondary_separator": ";;;",
    "caption.tag_dropout_rate": 0.5,
    "caption.token_warmup_steps": 5,
    "caption.token_warmup_min": 2,
    "caption.sentences": True,
    "caption.dropout_rate": 0.5,
    "caption.dropout_every_epochs": 2,
    "text.max_tokens": 150,
    "text.dynamic_chunks": True,
    "text.clip_skip": 2,
    "text.random_caption_rate": 0.5,
    "text.word_repeat_rate": 0.5,
    "noise.zero_terminal_snr": True,
    "noise.offset": 0.1,
    "noise.multires_iterations": 3,
    "noise.multires_discount": 0.3,
    "noise.input_perturbation": 0.1,
    "noise.timestep_sampling": "uniform",
    "noise.timestep_mean": -0.2,
    "noise.timestep_std": 1.0,
    "noise.shift": 1.0,
    "loss.huber_c": 0.1,
    "loss.huber_schedule": "constant",
    "loss.huber_scale": 2,
    "loss.min_snr_gamma": 5,
    "loss.debiased": True,
    "loss.contrastive": 0.05,
    "loss.v_like_noise": True,
    "loss.v_pred_like": 0.5,
    "optimizer.text2_learning_rate": 1e-5,
    "samples.every_steps": 10,
    "optimizer.warmup_steps": 2,
    "optimizer.schedule_arguments.num_cycles": 2,
    "optimizer.schedule_arguments.power": 2,
    "optimizer.schedule_arguments.lr_end": 1e-8,
    "optimizer.schedule_arguments.f_min": 0.5,
    "optimizer.schedule_arguments.f_max": 0.5,
    "optimizer.schedule_arguments.step_rules": "1:5,0.1",
    "optimizer.stochastic_rounding": True,
    "export.title": "A model",
    "validation.every_steps": 5,
    "ema.warmup_steps": 5,
    "ema.device": "gpu",
    "log.project": "trainer",
    "cache.seed": 5,
    "cache.bucket_min": 256,
    "cache.bucket_max": 1024,
    "cache.metadata_output": "meta_lat.json",
    "engine.zero_stage": 2,
    "engine.offload_optimizer_device": "cpu",
    "engine.offload_optimizer_nvme_path": "a/folder",
    "engine.offload_param_device": "cpu",
    "engine.offload_param_nvme_path": "a/folder",
    "engine.zero3_init_flag": True,
    "engine.zero3_save_16bit_model": True,
    "engine.fp16_master_weights_and_gradients": True,
}
"""A value of each setting in a rule that asks for something, even if it is the default."""

ELSEWHERE = {
    "validation.records": 5,
    "validation.share": 0.5,
    "ema.decay": 0.9,
    "model.family": {"text.clip_skip": "sd1", "optimizer.text2_learning_rate": "sdxl"},
    "model.path": "a/folder",
    "optimizer.learning_rate": 1e-4,
    "caption.shuffle": True,
    "caption.tag_dropout_rate": 0.5,
    "caption.token_warmup_steps": 5,
    "caption.secondary_separator": ";;;",
    "caption.dropout_rate": 0.5,
    "caption.dropout_every_epochs": 2,
    "text.random_caption_rate": 0.5,
    "text.chunking": "kohya",
    "text.max_tokens": 300,
    "noise.multires_iterations": 3,
    "noise.timestep_sampling": "logit_normal",
    "noise.prediction": {
        "loss.v_like_noise": "v",
        "loss.v_pred_like": "epsilon",
        "noise.zero_terminal_snr": "v",
        "noise.offset": "epsilon",
        "noise.multires_iterations": "epsilon",
        "noise.input_perturbation": "v",
        "loss.min_snr_gamma": "v",
        "loss.debiased": "epsilon",
        "noise.timestep_sampling": "flow",
        "noise.timestep_mean": "flow",
        "noise.timestep_std": "flow",
        "noise.shift": "flow",
        "loss.contrastive": "flow",
    },
    "loss.kind": "huber",
    "loss.huber_schedule": "constant",
    "optimizer.schedule": "cosine",
    "export.formats": ["diffusers", "single"],
    "samples.prompts": [{"prompt": "a hat"}],
    "log.trackers": ["tensorboard"],
    "cache.latents": "sample",
    "cache.upscale": True,
    "cache.metadata": "meta_cap.json",
    "engine.kind": "deepspeed",
    "engine.zero_stage": 3,
    "engine.offload_optimizer_device": "nvme",
    "engine.offload_param_device": "nvme",
    "train.precision": {
        "optimizer.stochastic_rounding": "full_bf16",
        "engine.zero3_save_16bit_model": "fp16",
        "engine.fp16_master_weights_and_gradients": "fp16",
    },
}
"""A value of each cause with which a setting has its effect, if the rule itself names none."""

CASES = [
    pytest.param(rule, setting, id=f"{setting}-{'-'.join([*rule.when, *rule.unless])}")
    for rule in RULES
    for setting in rule.settings
]


def causes(rule, setting):
    """Settings with which a rule says that `setting` has no effect."""
    found = {
        cause: list(values[0]) if values[0] == () else values[0]
        for cause, values in rule.when.items()
    }
    found |= {
        cause: {"model.path": "a/folder", "optimizer.schedule": "constant_with_warmup"}[cause]
        for cause in rule.unless
    }
    if setting.startswith("model.") and "optimizer.learning_rate" in rule.when:
        found["optimizer.text_learning_rate"] = 1e-5  # else nothing would train at all
    return found


def lines_of(folder, settings, *overrides):
    """The lines of the error about a config; none when it loads."""
    try:
        load(folder, settings, *overrides)
    except ConfigError as refused:
        return str(refused).splitlines()
    return []


def said_by(rule, setting, lines):
    """The lines in which the rule refuses the setting."""
    return [
        line for line in lines if f"`{setting}` has no effect with" in line and rule.instead in line
    ]


@pytest.mark.parametrize(("rule", "setting"), CASES)
def test_a_setting_without_effect_is_refused(tmp_path, rule, setting):
    """Each rule refuses each of its settings by name, and only if the setting is given."""
    assert said_by(rule, setting, lines_of(tmp_path, causes(rule, setting))) == []
    (line,) = said_by(
        rule, setting, lines_of(tmp_path, causes(rule, setting) | {setting: ASKED[setting]})
    )
    assert line.startswith(f"{tmp_path}/config.toml: `{setting}`")
    assert all(f"`{cause} = " in line for cause in (*rule.when, *rule.unless))


@pytest.mark.parametrize(("rule", "setting"), CASES)
def test_a_setting_on_the_command_line_is_refused_there(tmp_path, rule, setting):
    """A setting without effect that `--set` gives is named as `--set` gave it."""
    override = f"{setting}={to_toml(ASKED[setting])}"
    (line,) = said_by(rule, setting, lines_of(tmp_path, causes(rule, setting), override))
    assert line.startswith(f"--set {override}: `{setting}`")


@pytest.mark.parametrize(("rule", "setting"), CASES)
def test_a_setting_with_effect_is_taken(tmp_path, rule, setting):
    """With another value of any one cause, the rule accepts the setting."""
    for cause in (*rule.when, *rule.unless):
        other = rule.unless[cause][0] if cause in rule.unless else ELSEWHERE[cause]
        mended = causes(rule, setting) | {
            cause: other[setting] if isinstance(other, dict) else other
        }
        assert said_by(rule, setting, lines_of(tmp_path, mended | {setting: ASKED[setting]})) == []


def settings_of(section, prefix):
    """All settings in a section, including those of the tables in it."""
    for name, info in section.model_fields.items():
        if info.annotation is CaptionSettings:
            continue  # [data.caption] holds the settings of [caption]
        if info.annotation is ScheduleArguments:
            yield from (
                f"{prefix}.{name}.{argument}" for argument in ScheduleArguments.__annotations__
            )
        else:
            yield f"{prefix}.{name}"


def all_settings():
    """Every setting of a config, named `section.key`."""
    for name, info in Config.model_fields.items():
        section = info.annotation.__args__[0] if name == "data" else info.annotation
        yield from settings_of(section, name)


def test_every_setting_is_thought_about():
    """Each setting is either always read or in a rule, never both and never neither."""
    ruled = {setting for rule in RULES for setting in rule.settings}
    assert ruled & ALWAYS == set()
    assert sorted(ruled | ALWAYS) == sorted(all_settings())
    assert sorted(ruled) == sorted(ASKED)


RULES_OF = {setting: rule for rule in RULES for setting in rule.settings}


def test_schedule_arguments_are_those_of_diffusers():
    """Each schedule has exactly the arguments, and warm-up, that its function takes."""
    for kind, function in TYPE_TO_SCHEDULER_FUNCTION.items():
        takes = set(inspect.signature(function).parameters) - {
            "optimizer",
            "last_epoch",
            "num_training_steps",
        }
        ours = (
            set()
            if kind.value in RULES_OF["optimizer.warmup_steps"].when["optimizer.schedule"]
            else {"num_warmup_steps"}
        )
        for argument in ScheduleArguments.__annotations__:
            if (
                kind.value
                in RULES_OF[f"optimizer.schedule_arguments.{argument}"].unless["optimizer.schedule"]
            ):
                ours.add(argument)
        assert takes == ours, kind


@pytest.mark.parametrize(
    "off",
    [
        {"caption.keep_tokens": 0},
        {"caption.sentences": False},
        {"loss.v_pred_like": 0},
        {"caption.keep_tokens_separator": ""},
    ],
)
def test_turning_off_what_is_off_is_no_mistake(tmp_path, off):
    """A value that asks for nothing is taken in every combination."""
    load(tmp_path, off)


def test_a_data_set_alone_gives_a_caption_setting_its_effect(tmp_path):
    """A setting of `[caption]` is accepted if one data set that inherits it uses it."""
    load(tmp_path, {"caption.keep_tokens": 1, "data.caption": {"shuffle": True}})
    more = ("data.1.metadata=b.json", "data.1.latents=b")
    load(tmp_path, {"caption.keep_tokens": 1}, *more, "data.1.caption.shuffle=true")
    with pytest.raises(
        ConfigError,
        match=r"^[^\n]*: `caption.keep_tokens` has no effect with `caption.shuffle = false`[^\n]*$",
    ):
        load(tmp_path, {"caption.keep_tokens": 1}, *more)


def test_a_data_set_is_told_of_its_own_settings(tmp_path):
    """A setting of `[data.caption]` without effect in its own set is refused by its own name.

    That another data set would use it does not matter.
    """
    more = (
        "data.1.metadata=b.json",
        "data.1.latents=b",
        "data.1.caption.keep_tokens=2",
        "data.1.caption.shuffle=false",
    )
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, {"caption.shuffle": True}, *more)
    assert str(refused.value) == (
        "--set data.1.caption.keep_tokens=2: `data.1.caption.keep_tokens` has no effect with "
        "`data.1.caption.shuffle = false`, `caption.tag_dropout_rate = 0.0` and "
        "`caption.token_warmup_steps = 0.0`. Remove it, or set one of these three."
    )


def test_a_text_setting_needs_one_data_set_that_uses_it(tmp_path):
    """Replacing captions is refused only if every data set drops all of its captions."""
    dropped = {"data.caption": {"dropout_rate": 1}, "text.word_repeat_rate": 0.1}
    with pytest.raises(
        ConfigError,
        match=r"`text.word_repeat_rate` has no effect with `data.0.caption.dropout_rate = 1.0`",
    ):
        load(tmp_path, dropped)
    load(tmp_path, dropped, "data.1.metadata=b.json", "data.1.latents=b")


def test_resolved_config_leaves_out_what_has_no_effect(tmp_path):
    """The resolved config names such a setting in a comment, since the value would be refused."""
    assert "\n# huber_c = 0.1 has no effect here\n" in resolved_toml(load(tmp_path))
    assert "\nhuber_c = 0.1\n" in resolved_toml(load(tmp_path, {"loss.kind": "huber"}))
