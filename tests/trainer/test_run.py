import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from builders.config import LEAST, write

import trainer

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(trainer.__file__).parents[1]), "COLUMNS": "100"}
HEAVY = "{'torch', 'transformers', 'diffusers', 'accelerate', 'numpy', 'tqdm'}"
WITHOUT_TRAINING = """
import sys, types
from trainer.errors import LatentsError

def train(config, name, **options):
    print(config.train.max_steps, config.train.seed, options)
    {end}

def show(config, ranks, name):
    print("shown:", config.train.seed, ranks)

sys.modules["trainer.training.loop"] = types.SimpleNamespace(train=train)
sys.modules["trainer.training.dry_run"] = types.SimpleNamespace(show=show)
from trainer.run import main
main()
"""
"""The command line with the loop and the dry run replaced by functions that only print."""


def python(*arguments):
    """The result of a Python process."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )


def run(*arguments):
    """The result of the command line."""
    return python("-m", "trainer.run", *arguments)


def run_without_training(end, *arguments):
    """The result of the command line with a loop that only runs `end`, a line of Python."""
    return python("-c", WITHOUT_TRAINING.format(end=end), *arguments)


@pytest.fixture
def config(tmp_path):
    """A valid config file."""
    return write(tmp_path / "config.toml", LEAST)


def test_help_names_every_option():
    """`--help` names all options and the example to start from."""
    shown = run("--help")
    assert shown.returncode == 0
    assert {"--set", "--dry-run", "--ranks", "--resume", "--allow-change"} <= set(
        re.findall(r"--[\w-]+", shown.stdout)
    )
    assert "examples/tiny_sd1.toml" in shown.stdout


def test_the_command_line_loads_nothing_heavy(config):
    """Neither the command line nor reading a config imports torch or another heavy package."""
    code = (
        "import sys, trainer.run; from trainer.config.load import load_config; "
        f"load_config({str(config)!r}); "
        f"print(sorted({HEAVY} & sys.modules.keys()))"
    )
    assert python("-c", code).stdout == "[]\n"


def test_mistakes_in_the_config_are_exit_2(config):
    """All mistakes go to standard error, one per line and without a traceback."""
    shown = run(config, "--set", "optimizer.learing_rate=1", "--set", "train.batch_size=0")
    assert (shown.returncode, shown.stdout) == (2, "")
    assert sorted(shown.stderr.splitlines()) == [
        (
            "--set optimizer.learing_rate=1: unknown key `learing_rate` in [optimizer]. "
            "Did you mean `learning_rate`?"
        ),
        (
            "--set train.batch_size=0: `train.batch_size` is 0, "
            "expected a whole number from 1 to 8192."
        ),
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.toml"], "none.toml: no such file. Give the path of a config file"),
        (
            ["c", "--allow-change"],
            "--allow-change has no effect without --resume. Leave it out, or add --resume latest.",
        ),
        (
            ["c", "--dry-run", "--resume", "latest"],
            "--dry-run starts no training, so --resume and --allow-change have no effect with it.",
        ),
        (["c", "--dry-run", "--allow-change"], "--dry-run starts no training"),
        (["c", "--ranks", "4"], "--ranks has no effect without --dry-run"),
        (["c", "--dry-run", "--ranks", "0"], "0 is not in the range x>=1"),
        ([], "found no CONFIG, expected the path of a config file"),
        (["--resume", "latest"], "--resume latest: found no CONFIG that tells the folder"),
        (["--resume", "none"], "--resume none: found no CONFIG and no saved config there"),
        (["c", "--frobnicate"], "--frobnicate"),
    ],
)
def test_a_command_that_cannot_be_carried_out_is_exit_2(arguments, said):
    """A wrong command line or a missing file is reported without a traceback."""
    shown = run(*arguments)
    assert (shown.returncode, shown.stdout) == (2, "")
    assert said in shown.stderr
    assert "Traceback" not in shown.stderr


def test_what_the_loop_is_given(config):
    """The loop gets the config with its overrides, `--resume` and `--allow-change`.

    Drawing a seed is left to the loop.
    """
    first = run_without_training("return 0", config, "--set", "train.max_steps=7")
    assert (first.returncode, first.stdout) == (
        0,
        "7 None {'resume': None, 'allow_change': False}\n",
    )
    second = run_without_training("return 0", config, "--resume", "latest", "--allow-change")
    assert (second.returncode, second.stdout) == (
        0,
        "10 None {'resume': 'latest', 'allow_change': True}\n",
    )


def test_what_the_dry_run_is_given(config):
    """`--dry-run` shows the config and trains nothing."""
    shown = run_without_training("return 0", config, "--dry-run", "--set", "train.seed=4")
    assert (shown.returncode, shown.stdout) == (0, "shown: 4 None\n")
    shown = run_without_training("return 0", config, "--dry-run", "--ranks", "8")
    assert (shown.returncode, shown.stdout) == (0, "shown: None 8\n")


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("return 143", 143, ""),
        ('raise LatentsError("a.npz: broken.")', 1, "a.npz: broken.\n"),
        ("raise KeyboardInterrupt", 130, "interrupted.\n"),
    ],
)
def test_what_comes_of_the_loop_is_the_exit_code(config, end, code, said):
    """The loop's own code, a user's mistake and Ctrl-C each have their own exit code."""
    shown = run_without_training(end, config)
    assert (shown.returncode, shown.stderr) == (code, said)


def test_a_bug_shows_its_traceback(config):
    """Any other exception is raised with its traceback."""
    shown = run_without_training('return {}["gone"]', config)
    assert shown.returncode == 1
    assert shown.stderr.startswith("Traceback")
    assert shown.stderr.endswith("KeyError: 'gone'\n")


def test_a_closed_pipe_is_no_bug(config):
    """A closed pipe ends the run without a message."""
    code = WITHOUT_TRAINING.format(end="print('x' * 1_000_000)")
    with subprocess.Popen(
        [sys.executable, "-c", code, config],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    ) as writer:
        assert writer.stdout.read(1) == b"1"
        writer.stdout.close()
        assert writer.stderr.read() == b""
        assert writer.wait() == 141
