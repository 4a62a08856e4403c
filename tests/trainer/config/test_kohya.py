"""Tests of the table of sd-scripts' options, and of the configs that are made of its arguments."""

import json
import re
import tomllib

import pytest
from builders.paths import DATA, ROOT

from trainer.config.kohya import LEFT_OUT, LORA_SETTINGS, REFUSED, SETTINGS
from trainer.config.kohya_arguments import SCRIPTS, Arguments, read_arguments
from trainer.config.kohya_convert import convert
from trainer.config.load import load_config
from trainer.config.settings import Config, DataSettings
from trainer.errors import ConfigError
from trainer.from_sd_scripts import app

OPTIONS = json.loads((DATA / "sd_scripts_options.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "from-sd-scripts.md").read_text(encoding="utf-8")
OF_DATASET_CONFIGS = {
    *("metadata_file", "image_dir", "num_repeats", "batch_size", "network_multiplier"),
    *("prior_loss_weight", "class_tokens", "custom_attributes", "is_reg"),
    *("validation_split", "validation_seed"),
}
DATA_TOML = """
[general]
enable_wildcard = true
shuffle_caption = true
[[datasets]]
resolution = 1024
batch_size = 3
[[datasets.subsets]]
metadata_file = "a.json"
image_dir = "a"
num_repeats = 2
[[datasets.subsets]]
metadata_file = "b.json"
image_dir = "b"
keep_tokens = 1
"""
LEAST = "--pretrained_model_name_or_path m --in_json a.json --train_data_dir l --output_dir out"


@pytest.fixture
def convert_text(tmp_path, monkeypatch):
    """A function that gives the config made of a file of this text, and its comments."""
    monkeypatch.chdir(tmp_path)

    def convert_text(text, family=None, name="train.sh"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        written = convert(read_arguments(tmp_path / name), family, name)
        (tmp_path / "out.toml").write_text(written, encoding="utf-8")
        return load_config(tmp_path / "out.toml"), written

    return convert_text


# The table.


def test_every_option_is_in_the_table_once():
    """Each option of the real parsers is a setting, left out or refused; nothing else is there."""
    tables = [SETTINGS, LEFT_OUT, REFUSED]
    known = [option for table in tables for option in table]
    assert len(known) == len(set(known))
    real = {option for script in SCRIPTS for option in OPTIONS[script]}
    assert set(known) == real | OF_DATASET_CONFIGS
    assert not LORA_SETTINGS.keys() & set(known)


def test_every_setting_of_the_table_is_one():
    """Each name on the right of the table is a setting of a config."""
    for option, setting in (SETTINGS | LORA_SETTINGS).items():
        section, key = setting.split(".")
        annotation = Config.model_fields[section].annotation
        assert key in (DataSettings if section == "data" else annotation).model_fields, option


def test_the_page_holds_the_table():
    """docs/from-sd-scripts.md lists every option with its setting or its reason."""
    found = {
        option: right.strip("`")
        for left, right in re.findall(r"^\| (`.*?`) \| (.*) \|$", PAGE, re.MULTILINE)
        for option in re.findall(r"`(\w+)`", left)
    }
    assert found == SETTINGS | LEFT_OUT | REFUSED


# Conversion.


def test_a_command_becomes_a_config(convert_text, tmp_path):
    """A shell command with a dataset config becomes a config that trains the same."""
    (tmp_path / "data.toml").write_text(DATA_TOML)
    config, text = convert_text(
        "#!/bin/bash\n# my run --seed 9\nsource venv/bin/activate\n"
        "accelerate launch --num_processes 2 --mixed_precision bf16 \\\n  'sd/sdxl_train.py' \\\n"
        '  --pretrained_model_name_or_path "models/my base" --dataset_config=data.toml \\\n'
        "  --output_dir out --output_name mine --in_json other.json --max_train_steps 2000 \\\n"
        "  --learning_rate 1e-5 --train_text_encoder --learning_rate_te2 0 \\\n"
        "  --optimizer_type adamw8bit --optimizer_args weight_decay=0.1 'betas=0.9,0.99' \\\n"
        "  --lr_scheduler cosine_with_restarts --lr_scheduler_num_cycles 3 \\\n"
        "  --lr_warmup_steps 5% --lr_scheduler_power 2 --mixed_precision bf16 \\\n"
        "  --v_parameterization \\\n"
        "  --noise_offset 0.05 --multires_noise_discount 0.3 --xformers --cache_latents \\\n"
        "  --max_token_length 150 --log_with all --huggingface_token x \\\n"
        "  --seed 42 > log.txt 2>&1 && echo done\n"
    )
    assert (config.model.family, config.model.path) == ("sdxl", "models/my base")
    assert [str(data.metadata) for data in config.data] == ["a.json", "b.json"]
    assert [data.repeats for data in config.data] == [2, 1]
    assert config.caption.shuffle
    assert [config.caption_of(number).keep_tokens for number in (0, 1)] == [0, 1]
    assert str(config.train.output_dir) == "out/mine"
    assert (config.train.max_steps, config.train.seed, config.train.batch_size) == (2000, 42, 3)
    assert (config.train.precision, config.text.max_tokens) == ("bf16", 150)
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.text_learning_rate) == (1e-5, 1e-5)
    assert (optimizer.text2_learning_rate, optimizer.name) == (0, "AdamW8bit")
    assert optimizer.arguments == {"weight_decay": 0.1, "betas": [0.9, 0.99]}
    assert (optimizer.schedule_arguments, optimizer.warmup_steps) == ({"num_cycles": 3}, 100)
    assert (config.noise.prediction, config.noise.offset) == ("v", 0.05)
    assert config.log.trackers == ("tensorboard", "wandb")
    assert "# - xformers: the fastest kernel of torch is measured and used; speed.attent" in text
    for option in ("in_json", "lr_scheduler_power"):
        assert f"# - {option}: it has no effect in sd-scripts beside the other options\n" in text
    assert "# - noise.multires_discount has no effect with" in text
    assert "# - resolution: a bucket is the size of the cached latents\n" in text


@pytest.mark.parametrize(
    ("given", "fuses"),
    [
        ("--max_grad_norm 0 --full_bf16 --mixed_precision fp16", True),
        ("--max_grad_norm 0", True),
        ("", False),
        ("--max_grad_norm 0 --gradient_accumulation_steps 2", False),
        ("--max_grad_norm 0 --mixed_precision fp16", False),
        ("--max_grad_norm 0 --deepspeed", False),
    ],
)
def test_steps_in_the_backward_pass_are_converted_where_they_can_be(convert_text, given, fuses):
    """fused_backward_pass becomes the setting, or a comment that says what it would need."""
    config, text = convert_text(
        f"python sdxl_train.py {LEAST} --fused_backward_pass --optimizer_type Lion {given}"
    )
    assert config.optimizer.fused_backward == fuses
    assert (config.train.on_nonfinite == "stop") == fuses
    assert ("# - fused_backward_pass: optimizer.fused_backward, which saves" in text) != fuses
    assert ("# - full_bf16: sd-scripts rounds weights to the" in text) == ("full_bf16" in given)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("AdamW8bit", "AdamW8bit"),
        ("PagedAdamW8bit", "PagedAdamW8bit"),
        ("bitsandbytes.optim.AdamW8bit", "AdamW8bit"),
        ("Lion", "Lion"),
        ("Lion8bit", "Lion8bit"),
        ("AdaFactor --optimizer_args relative_step=False", "Adafactor"),
        ("pytorch_optimizer.CAME", "CAME"),
        ("AdamWScheduleFree", "ScheduleFreeAdamW"),
    ],
)
def test_optimizers_that_save_memory_have_their_names_here(convert_text, asked, name):
    """What sd-scripts calls a lean optimizer, in its spelling, is the class of that name."""
    config, _ = convert_text(f"python sdxl_train.py {LEAST} --optimizer_type {asked}")
    assert config.optimizer.name == name


def test_defaults_of_sd_scripts_are_written(convert_text):
    """What is not given is what sd-scripts takes for it, in a config file as in a command."""
    least = (
        '[a]\npretrained_model_name_or_path = "m"\nin_json = "a.json"\ntrain_data_dir = "l"\n'
        '[b]\noutput_dir = "out"\nv2 = {}\nxformers = false\nseed = 1\n'
    )
    for v2, family in (("true", "sd2"), ("false", "sd1")):
        config, text = convert_text(
            least.format(v2), family="sd1" if v2 == "false" else None, name="c.toml"
        )
        assert config.model.family == family
        assert (config.optimizer.learning_rate, config.train.max_steps) == (2e-6, 1600)
        assert (config.text.max_tokens, config.train.batch_size) == (75, 1)
        assert config.optimizer.text_learning_rate == 0
        assert "xformers" not in text


def test_a_command_names_a_config_file(convert_text, tmp_path):
    """Options of the command replace those of the file that `--config_file` names."""
    (tmp_path / "base.toml").write_text("learning_rate = 1e-4\nmax_train_epochs = 3\n")
    config, _ = convert_text(f"python fine_tune.py --config_file base {LEAST} --learning_rate 3e-6")
    assert config.optimizer.learning_rate == 3e-6
    assert (config.train.max_steps, config.train.max_epochs) == (None, 3)


def test_a_batch_file_of_windows_is_read(convert_text):
    """In a batch file, `^` continues a line and a backslash stands for itself."""
    config, text = convert_text(
        "@echo off\r\nREM sdxl_train.py\r\naccelerate launch fine_tune.py ^\r\n"
        "  --pretrained_model_name_or_path=C:\\models\\a --in_json a.json --alpha_mask ^\r\n"
        "  --train_data_dir l --output_dir out --clip_skip 2\r\npause\r\n",
        name="train.bat",
    )
    assert (config.model.family, config.model.path) == ("sd1", "C:\\models\\a")
    assert config.text.clip_skip == 2
    assert not config.data[0].alpha_mask
    assert "# - alpha_mask: it has no effect in sd-scripts" in text


def test_options_of_saving_and_samples_are_converted(convert_text):
    """The model is saved as asked for; samples without prompts leave no empty section."""
    config, text = convert_text(
        f"python sdxl_train.py {LEAST} --save_model_as safetensors --save_precision float "
        "--metadata_title Mine --sample_every_n_steps 50 --sample_prompts p.txt"
    )
    assert config.export.model_dump() == {"formats": ("single",), "dtype": "fp32", "title": "Mine"}
    assert "[samples]" not in text
    assert "# - sample_prompts: pictures are made of [[samples.prompts]]" in text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--block_lr 1,2", "block_lr: parts of the U-Net have one rate"),
        ("--color_aug --caption_prefix x", "caption_prefix: it adds to some alternatives only"),
        ("--perlin_noise 3", "perlin_noise: not an option of fine_tune.py"),
        ("--optimizer_type MyAdam", "optimizer_type: MyAdam has no counterpart here"),
        ("--optimizer_type a.b.C", "optimizer_type: a.b.C has no counterpart here"),
        ("--optimizer_type adafactor", "Adafactor with relative_step, its default"),
        ("--optimizer_args decay", "optimizer_args: found decay, expected name=value"),
        ("--optimizer_args a={1}", "optimizer_args: found a={1}, expected name=value"),
        ("--lr_scheduler inverse_sqrt", '`optimizer.schedule` is "inverse_sqrt", expected'),
        ("--lr_warmup_steps 0.1 --max_train_epochs 2", "lr_warmup_steps: 0.1 is a share"),
        ("--lr_warmup_steps x%", '`optimizer.warmup_steps` is "x%", expected'),
        ("--save_precision fp8", "save_precision: found fp8, expected float, fp16, bf16"),
        ("--save_model_as x", "save_model_as: found x, expected ckpt, safetensors, diffusers"),
        ("--mixed_precision fp8", "mixed_precision: found fp8, expected no, fp16 or bf16"),
        ("--zero_terminal_snr", "`noise.zero_terminal_snr = true` does not work with"),
        ("--seed $SEED", "found $SEED, a variable of the shell"),
        ("--dataset_config", "dataset_config: found no path"),
        ("--seed 'x", "not a command line: No closing quotation"),
    ],
)
def test_what_cannot_be_converted_is_named(convert_text, text, named):
    """Each option that would train something else, or is none, is refused by name."""
    with pytest.raises(ConfigError) as refused:
        convert_text(f"python fine_tune.py {LEAST} {text}")
    assert named in str(refused.value)
    assert str(refused.value).startswith("train.sh: ") or "/train.sh: " in str(refused.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "Add --family sd1, sd2 or sdxl."),
        ("python train_network.py --seed 1", "found the script train_network.py, expected"),
        ("python fine_tune.py\npython sdxl_train.py", "found 2 commands that train, expected one"),
        ("echo hello", "found echo before any option, expected options"),
        ("fine_tune.py --output_dir out", "found no in_json, or metadata_file in a dataset config"),
        (f"fine_tune.py {LEAST[: LEAST.index('--out')]}", "found no `output_dir` in [train]"),
    ],
)
def test_what_is_no_command_is_refused(convert_text, text, named):
    """A file without one command that trains such models says what is missing in it."""
    with pytest.raises(ConfigError, match=re.escape(named)):
        convert_text(text)


def test_a_dataset_config_alone_is_told(convert_text, tmp_path):
    """A dataset config in place of the arguments, or one without data sets, is named as such."""
    with pytest.raises(ConfigError, match="a dataset config of sd-scripts, expected the arguments"):
        convert_text(DATA_TOML, name="data.toml")
    (tmp_path / "empty.toml").write_text("datasets = [3]\n")
    with pytest.raises(ConfigError, match=r"empty.toml: found no \[\[datasets\]\]"):
        convert_text("python fine_tune.py --dataset_config empty.toml")


@pytest.mark.parametrize("value", [True, 3, -0.5, 10**30, "x", "", [], ["x=1"], [[1]], {"a": 1}])
def test_a_value_of_any_kind_ends_in_a_message(value):
    """Options of any type and value give a config or a message, and never a traceback."""
    least = {"in_json": "a", "train_data_dir": "b", "output_dir": "c"}
    least["pretrained_model_name_or_path"] = "m"
    for option in (*SETTINGS, *LEFT_OUT, *REFUSED):
        arguments = Arguments("sdxl_train.py", {**least, option: value}, [])
        try:
            written = convert(arguments, None, "x")
        except ConfigError:
            continue
        assert tomllib.loads(written)["model"]["family"] in ("sdxl", "sd2"), option


@pytest.mark.usefixtures("convert_text")
def test_the_command_writes_a_file_or_prints(tmp_path, capsys):
    """The config goes to standard output, or to a new file; mistakes have their exit codes."""
    (tmp_path / "t.sh").write_text(f"python fine_tune.py {LEAST}")
    codes = []
    for arguments in ([], ["-o", "c.toml"], ["-o", "c.toml"], ["--family", "sdxl"]):
        with pytest.raises(SystemExit) as ended:
            app(["t.sh", *arguments])
        codes.append(ended.value.code)
        if not arguments:
            printed = capsys.readouterr().out
    assert codes == [0, 0, 2, 0]
    assert (tmp_path / "c.toml").read_text() == printed
    assert 'family = "sd1"' in printed
    assert 'family = "sdxl"' in capsys.readouterr().out


def test_deepspeed_becomes_the_engine(convert_text):
    """--deepspeed and its options become [engine]; without it, they have no effect there either."""
    options = "--zero_stage 3 --offload_param_device nvme --offload_param_nvme_path /fast"
    config, _ = convert_text(f"accelerate launch fine_tune.py {LEAST} --deepspeed {options}\n")
    engine = config.engine
    assert (engine.kind, engine.zero_stage) == ("deepspeed", 3)
    assert (engine.offload_param_device, engine.offload_param_nvme_path) == ("nvme", "/fast")
    assert engine.offload_optimizer_device == "none"
    config, text = convert_text(f"accelerate launch fine_tune.py {LEAST} {options}\n")
    assert not config.engine.model_fields_set
    assert "# - zero_stage: it has no effect in sd-scripts beside the other options\n" in text


def test_what_changes_the_speed_alone(convert_text):
    """--torch_compile is kept; a kernel of attention is left to the measurement on the card."""
    options = "--torch_compile --dynamo_backend inductor --sdpa"
    config, text = convert_text(f"accelerate launch fine_tune.py {LEAST} {options}\n")
    assert config.speed.model_dump() == {
        "attention": "auto",
        "channels_last": None,
        "compile": True,
    }
    assert "# - sdpa: the fastest kernel of torch is measured and used; " in text
    assert "# - dynamo_backend: " in text


def test_deepspeed_rounds_weights_in_bf16_as_there(convert_text):
    """The note that rounding differs is for runs without DeepSpeed."""
    line = f"accelerate launch fine_tune.py {LEAST} --full_bf16 --mixed_precision bf16"
    assert "# - full_bf16: sd-scripts rounds weights" in convert_text(f"{line}\n")[1]
    assert "# - full_bf16: " not in convert_text(f"{line} --deepspeed\n")[1]


def test_what_deepspeed_cannot_do_is_refused(convert_text):
    """Options of DeepSpeed that would end a run at its start are told at the conversion."""
    with pytest.raises(ConfigError, match="fp16_master_weights_and_gradients = true` needs"):
        convert_text(
            f"fine_tune.py {LEAST} --deepspeed --mixed_precision fp16 "
            "--fp16_master_weights_and_gradients\n"
        )
