"""The examples for real machines fit the cards that their names promise, and load in accelerate."""

import re
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_simple_launcher_cmd_env
from builders.runs import rewrite_examples, run

from trainer.config.load import load_config
from trainer.training.engines.launcher import agreed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = {
    "sdxl_4x24gb_zero2": "accelerate_4x24gb_zero2",
    "sdxl_1x80gb": "accelerate_1x80gb",
    "sd15_1x24gb": "accelerate_1x24gb",
    "sdxl_1x24gb": "accelerate_1x24gb",
}
"""The config of accelerate that each example names, both without their endings."""
GIB = 2**30


def ranks_and_bytes(name):
    """The cards that the name of an example promises, and the bytes of each."""
    count, gigabytes = re.search(r"_(\d)x(\d+)gb", name).groups()
    return int(count), int(gigabytes) * 10**9


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Settings that give an example the example data, and random weights of the full size."""
    return [
        f"data.0.metadata={rewrite_examples(tmp_path_factory.mktemp('data'))}",
        f"data.0.latents={EXAMPLES / 'latents'}",
        "model.path=random",
        "model.size=full",
    ]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_fits_its_card(name, data):
    """The dry run estimates less than the card has, and what the head of the example says."""
    ranks, card = ranks_and_bytes(name)
    settings = [word for setting in data for word in ("--set", setting)]
    shown = run(EXAMPLES / f"{name}.toml", "--dry-run", "--ranks", str(ranks), *settings)
    assert shown.returncode == 0, shown.stderr
    assert f"x {ranks} (ranks)" in shown.stdout
    (usual,) = re.findall(r"usual for \w+, it would be ([\d.]+) GiB", shown.stdout)
    head = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")
    assert f"memory  {usual} GiB" in head
    assert float(usual) * GIB < card


@pytest.mark.parametrize("name", CONFIGS)
def test_an_example_and_its_accelerate_config_agree(name):
    """The config of accelerate starts the cards of the name, and what it says, the example says."""
    file = EXAMPLES / f"{CONFIGS[name]}.yaml"
    head = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8")
    assert f"--config_file examples/{file.name} -m trainer.run examples/{name}.toml" in head
    parsed = launch_command_parser().parse_args(["--config_file", str(file), "-m", "trainer.run"])
    arguments, defaults, _ = _validate_launch_command(parsed)
    assert arguments.num_processes == ranks_and_bytes(name)[0]
    # As `accelerate launch` does before it starts the processes.
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    prepare = (
        prepare_deepspeed_cmd_env if arguments.use_deepspeed else prepare_simple_launcher_cmd_env
    )
    _, environment = prepare(arguments)
    config = load_config(EXAMPLES / f"{name}.toml", [])
    launched = agreed(config, name, environment)
    assert launched.uses_deepspeed == arguments.use_deepspeed == ("zero" in name)
    assert launched.config == config
