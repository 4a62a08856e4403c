import json
import signal
import subprocess
import sys

import pytest
import torch
from builders.ranks import run_ranks, started
from builders.runs import (
    ENVIRONMENT,
    metrics_of,
    rewrite_examples,
    settings_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

STEPS = 4
WEIGHTS = ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def write(metadata):
    """A function that writes the config of a run with a global batch of 4 into a folder.

    The run goes to `run` in the folder, and compares its ranks after each step.
    """

    def write(folder, engine, **train):
        changes = {
            "engine": {"check_ranks_every_steps": 1, **engine},
            "train": {"batch_size": 1, "accumulation": 2, "max_steps": STEPS, **train},
        }
        return write_config(folder / "c.toml", settings_of(metadata, folder / "run", **changes))

    return write


@pytest.fixture(scope="module")
def one_rank(write, tmp_path_factory):
    """The folder of a run on one rank with micro-batches of 4 samples, without an engine."""
    folder = tmp_path_factory.mktemp("one_rank")
    assert train_here(write(folder, {}, batch_size=4, accumulation=1)) == 0
    return folder / "run"


def patched(patch):
    """The arguments of Python that run the trainer with a change of its code."""
    return ("-c", f"{START}\n{patch}\nmain()")


START = """
import os
import torch
import trainer.training.active_run as active_run
import trainer.training.loop as loop
import trainer.training.step as step
from trainer.run import main
"""
COUNTED = """
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

def prepared(*arguments):
    model, optimizer = prepare(*arguments)
    model.register_comm_hook(None, counted)
    return model, optimizer

def counted(state, bucket):
    if bucket.is_last():
        print("gradients are exchanged", flush=True)
    return allreduce_hook(torch.distributed.group.WORLD, bucket)

prepare = loop.prepare
loop.prepare = prepared
"""
"""DDP that tells each of its exchanges of gradients."""
DIVIDED = {
    "zero_optimization": {"stage": "auto", "stage3_param_persistence_threshold": 0},
    "gradient_accumulation_steps": "auto",
    "train_micro_batch_size_per_gpu": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
}
"""A config of DeepSpeed with which stage 3 divides small weights, too."""


def assert_same_training(run, expected):
    """Fail unless two runs have equal numbers up to rounding, and equal rates and samples."""
    for one, other in zip(metrics_of(run), metrics_of(expected), strict=True):
        assert sorted(one["keys"]) == sorted(other["keys"])
        assert one["lr_unet"] == other["lr_unet"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
    for part in WEIGHTS:
        found, wanted = load_file(run / "model" / part), load_file(expected / "model" / part)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)


def test_ddp_exchanges_gradients_once_per_step(write, one_rank, tmp_path):
    """Two ranks train what one trains, and exchange gradients at the last micro-batch alone."""
    config = write(tmp_path, {"kind": "ddp"})
    ends = run_ranks(tmp_path, config, python=patched(COUNTED))
    for ended in ends:
        assert ended.code == 0, ended.output
        assert ended.output.count("gradients are exchanged") == STEPS
    assert "; engine: DDP on 2 ranks; " in ends[0].output
    assert_same_training(tmp_path / "run", one_rank)


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        ({"zero_stage": 0}, "DeepSpeed ZeRO-0"),
        ({"zero_stage": 1}, "DeepSpeed ZeRO-1"),
        ({}, "DeepSpeed ZeRO-2"),
        ({"offload_optimizer_device": "cpu"}, "DeepSpeed ZeRO-2, optimizer in cpu"),
        ({"zero_stage": 3}, "DeepSpeed ZeRO-3"),
    ],
)
def test_deepspeed_trains_what_one_rank_trains(write, one_rank, tmp_path, engine, named):
    """Two ranks of DeepSpeed train what one rank with twice the batch trains, at each stage."""
    config = write(tmp_path, {"kind": "deepspeed", **engine})
    env = {}
    if engine.get("zero_stage") == 3:
        path = tmp_path / "deepspeed.json"
        path.write_text(json.dumps(DIVIDED), encoding="utf-8")
        env = {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path),
        }
    ends = run_ranks(tmp_path, config, env=env)
    assert [ended.code for ended in ends] == [0, 0], ends
    assert f"; engine: {named} on 2 ranks; " in ends[0].output
    assert_same_training(tmp_path / "run", one_rank)
    *_, last = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    times = json.loads(last)["ranks"]
    assert {name: len(values) for name, values in times.items()} == {
        "seconds": 2,
        "data_wait": 2,
        "rank_wait": 2,
    }
    assert min(times["rank_wait"]) >= 0


BROKEN = """
def broken(*arguments):
    loss = batch_loss(*arguments)
    broken.calls += 1
    # The second micro-batch of the second step.
    return loss._replace(value=loss.value * float("nan")) if broken.calls == 4 else loss

broken.calls = 0
batch_loss, step.batch_loss = step.batch_loss, broken
"""


@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_leaves_out_a_broken_step(write, tmp_path, stage):
    """A gradient that is not finite changes nothing, as without DeepSpeed.

    The run goes on with the weights and the optimizer state of before that step.
    """
    runs = []
    for engine in ({}, {"kind": "deepspeed", "zero_stage": stage}):
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        (ended,) = run_ranks(folder, write(folder, engine), ranks=1, python=patched(BROKEN))
        assert ended.code == 0, ended.output
        assert "WARNING: step 2 was skipped" in ended.output
        runs.append(folder / "run")
        assert [line.get("skipped", False) for line in metrics_of(runs[-1])] == [
            False,
            True,
            False,
            False,
        ]
    for run in runs:
        lines = metrics_of(run)
        lines[1].update(loss=1.0, grad_norm=1.0)  # they are null
        kept = [json.dumps(line) for line in lines]
        (run / "metrics.jsonl").write_text("\n".join(kept) + "\n", encoding="utf-8")
    assert_same_training(runs[1], runs[0])


SWALLOWED = """
def prepared(*arguments):
    model, optimizer = prepare(*arguments)
    model.optimizer.step = lambda *_, **__: None  # ZeRO's, which calls that of torch
    return model, optimizer

prepare, loop.prepare = loop.prepare, prepared
"""


def test_a_step_that_deepspeed_swallows_is_a_bug(write, tmp_path):
    """A step that DeepSpeed tells of and that no weight took ends the run, and is not counted."""
    config = write(tmp_path, {"kind": "deepspeed"})
    (ended,) = run_ranks(tmp_path, config, ranks=1, python=patched(SWALLOWED))
    assert ended.code == 1, ended.output
    assert "RuntimeError: DeepSpeed tells of a step that it did not pass on to" in ended.output
    assert not metrics_of(tmp_path / "run")


IN_FP16 = """
os.environ["DS_ACCELERATOR"] = "cpu"
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

CPU_Accelerator.is_fp16_supported = lambda _: True  # slow, but right

def large(*arguments):
    large.calls += 1
    loss = batch_loss(*arguments)
    return loss._replace(value=loss.value * 1e6) if large.calls == 4 else loss

large.calls = 0
batch_loss, step.batch_loss = step.batch_loss, large
"""


def test_deepspeed_scales_the_losses_of_fp16(write, tmp_path):
    """A step that overflows fp16 is left out and told, with the scale as without DeepSpeed."""
    config = write(tmp_path, {"kind": "deepspeed", "zero_stage": 3}, precision="fp16")
    (ended,) = run_ranks(tmp_path, config, ranks=1, python=patched(IN_FP16))
    assert ended.code == 0, ended.output
    assert "step 2 was skipped: its gradients overflow fp16 with a loss scale of" in ended.output
    lines = metrics_of(tmp_path / "run")
    assert [line["loss_scale"] for line in lines] == [65536, 65536, 32768, 32768]
    assert [line.get("skipped", False) for line in lines] == [False, True, False, False]
    assert lines[0]["grad_norm"] == pytest.approx(1.28, abs=0.1)


EXACT = """
def prepared(engine, config, model, optimizer):
    weights = [weight.detach().clone() for weight in model.parameters()]
    result = prepare(engine, config, model, optimizer)
    from deepspeed.utils import safe_get_full_fp32_param
    pairs = zip(model.parameters(), weights, strict=True)
    exact = [torch.equal(safe_get_full_fp32_param(one), other) for one, other in pairs]
    print(f"exact: {all(exact)}, {next(model.parameters()).dtype}", flush=True)
    return result

prepare, loop.prepare = loop.prepare, prepared
"""


@pytest.mark.parametrize("stage", [2, 3])
def test_the_weights_that_deepspeed_steps_begin_exact(write, tmp_path, stage):
    """With bf16, what is stepped begins as the float32 weights of the model, not as bf16.

    The process has no launcher, which DeepSpeed would need.
    """
    config = write(tmp_path, {"kind": "deepspeed", "zero_stage": stage}, precision="bf16")
    done = subprocess.run(
        [sys.executable, *patched(EXACT), str(config)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exact: True, torch.bfloat16" in done.stdout
    assert f"engine: DeepSpeed ZeRO-{stage} on one rank; " in done.stderr


def test_weights_in_bf16_are_rounded_by_deepspeed_that_a_launcher_asks_for(write, tmp_path):
    """With "auto", the default of stochastic rounding is that of the engine which trains.

    DeepSpeed compiles nothing on a CPU.
    """
    config = write(tmp_path, {}, precision="full_bf16", max_steps=1)
    cache = tmp_path / "extensions"
    launcher = {"ACCELERATE_USE_DEEPSPEED": "true", "TORCH_EXTENSIONS_DIR": str(cache)}
    (ended,) = run_ranks(tmp_path, config, ranks=1, env=launcher)
    assert ended.code == 0, ended.output
    assert "engine: DeepSpeed ZeRO-2 on one rank; " in ended.output
    resolved = (tmp_path / "run/config.toml").read_text(encoding="utf-8")
    assert "stochastic_rounding = false" in resolved
    assert 'kind = "auto"' in resolved
    assert not cache.exists()


UNEQUAL = """
def stepped(*arguments):
    result = train_step(*arguments)
    if os.environ["RANK"] == "1" and arguments[2] == 1:
        weight = arguments[0].bare_model.unet.conv_out.bias
        with torch.no_grad():
            weight[-1] += torch.finfo(weight.dtype).eps * weight[-1].abs()
    return result

train_step, active_run.train_step = step.train_step, stepped
"""


def test_ranks_with_other_weights_end(write, tmp_path):
    """A weight of one rank that is off by its last bit ends the run, and is named."""
    with started(tmp_path, write(tmp_path, {}), python=patched(UNEQUAL)) as group:
        ends = group.wait()
    assert [ended.code for ended in ends] == [1, 1], ends
    assert "Traceback" not in "".join(ended.output for ended in ends)
    assert "step 2: 1 of the " in ends[0].output
    assert "of rank 1 are not those of rank 0; the first is unet.conv_out.bias." in ends[0].output


def test_a_killed_rank_ends_the_other_under_deepspeed(write, tmp_path):
    """When a rank of DeepSpeed is killed, the other ends with an error within a minute."""
    run = tmp_path / "run"
    config = write(tmp_path, {"kind": "deepspeed", "zero_stage": 3}, max_steps=100_000)
    with started(tmp_path, config) as group:
        group.wait_until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run))
        group.send(1, signal.SIGKILL)
        (ended,) = group.wait(0, seconds=60)
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    assert "rank 0: lost another process of the run (" in ended.output


NO_BATCH = """
from trainer.errors import LatentsError

def batches(self):
    for number, batch in enumerate(iter_batches(self)):
        if number == 5 and os.environ["RANK"] == "1":
            raise LatentsError("a file is broken")
        yield batch

iter_batches = active_run.ActiveRun._iter_batches
active_run.ActiveRun._iter_batches = batches
"""


def test_an_error_of_one_rank_ends_all_under_deepspeed(write, tmp_path):
    """A rank of ZeRO-3 without data stays in step with the other until both have saved."""
    config = write(tmp_path, {"kind": "deepspeed", "zero_stage": 3})
    ends = run_ranks(tmp_path, config, python=patched(NO_BATCH))
    assert [ended.code for ended in ends] == [1, 1], ends
    assert "a file is broken" in ends[1].output
    assert "An error of rank 1 ends all 2 processes of the run." in ends[0].output
    assert (tmp_path / "run/checkpoints/step-00000002/state.json").exists()


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  zero_stage: 1
  gradient_accumulation_steps: 2
  gradient_clipping: 1.0
mixed_precision: 'no'
machine_rank: 0
num_machines: 1
num_processes: 2
main_process_port: 0
use_cpu: false
"""


def launch(folder, config):
    """Train by `accelerate launch` with the config `accelerate.yaml` in the folder."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            str(folder / "accelerate.yaml"),
            "-m",
            "trainer.run",
            str(config),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_accelerate_launch_chooses_the_engine(write, one_rank, tmp_path):
    """The config of accelerate says what trains; where it contradicts, both files are named."""
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE, encoding="utf-8")
    config = write(tmp_path, {})
    done = launch(tmp_path, config)
    assert done.returncode == 0, done.stderr
    assert "; engine: DeepSpeed ZeRO-1 on 2 ranks; " in done.stderr
    assert_same_training(tmp_path / "run", one_rank)
    refused = launch(tmp_path, write(tmp_path, {"zero_stage": 3}))
    assert refused.returncode != 0
    assert (
        f"{config}: `engine.zero_stage = 3`, but zero_stage: 1 in {tmp_path}/accelerate.yaml. "
    ) in refused.stderr
