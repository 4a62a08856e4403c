import pytest
import torch
from accelerate.state import AcceleratorState
from builders.model import ALL_TRAINED, make_config, make_ids
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.data.batch import Batch
from trainer.data.epochs import RunSize
from trainer.model.build import build_model
from trainer.model.noise_schedule import Schedule
from trainer.training.engines import torch_step
from trainer.training.engines.accelerator import build_engine
from trainer.training.engines.launcher import agreed
from trainer.training.loop import build_state
from trainer.training.loss import batch_loss
from trainer.training.optimizer.stepping import clip_gradients
from trainer.training.speed.prefetch import BatchesAhead
from trainer.training.step import train_step

# What is read on the CPU: a number of a tensor, or a shape that depends on numbers.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "is_nonzero")
SETTINGS = {
    "text": {"embedding_noise": 0.1},
    "loss": {"min_snr_gamma": 5.0, "kind": "huber", "debiased": True},
    "optimizer": ALL_TRAINED,
    "model": {"gradient_checkpointing": True},
}


class Reads(TorchDispatchMode):
    """Notes the operations in its context that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        """Note the operation if it reads, and do it."""
        if function.name().split("::")[1].split(".")[0] in WAITING:
            self.found.append(function.name())
        return function(*arguments, **(named or {}))


def batches(count):
    """Batches of SDXL with a mask, page-locked where there is a GPU."""
    for step in range(count):
        batch = Batch(
            step=step,
            epoch=0,
            micro=0,
            latents_BCHW=torch.randn(2, 4, 16, 8),
            noise_BCHW=torch.randn(2, 4, 16, 8),
            input_noise_BCHW=None,
            timesteps_B=torch.tensor([1, 900]),
            ids=make_ids("sdxl", ["a cat", "a hat"], 2),
            size_B6=torch.ones(2, 6),
            mask_B1HW=torch.ones(2, 1, 16, 8),
            weights_B=torch.ones(2),
            real_samples=2,
            text_noise_seeds=(1, 2),
            keys=(),
            captions=(),
            counts={"samples": 2, "replaced": 0},
        )
        yield batch.pin_memory() if torch.cuda.is_available() else batch


def test_loss_and_gradient_read_nothing():
    """From a batch to the norm of its gradient, no value of a tensor is asked for."""
    config = make_config("sdxl", **SETTINGS)
    model = build_model(config)
    schedule = Schedule.of(config.noise)
    with Reads() as reads:
        loss = batch_loss(model, next(batches(1)), schedule, config.noise, config.loss)
        loss.value.backward()
        clip_gradients(model.parameters(), 1.0)
    assert reads.found == []
    with Reads() as reads:
        loss.value.item()
    assert reads.found == ["aten::_local_scalar_dense"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_once_for_the_gpu(monkeypatch):
    """Besides the one reading of the numbers of a step, nothing waits for the device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = make_config("sdxl", **SETTINGS, train={"precision": "bf16"})
    engine = build_engine(agreed(config, "the config"))
    size = RunSize(1, 1, 1, 2, 9, 9)
    state = build_state(build_model(config), config, engine, size)
    loader = BatchesAhead(batches(4), engine.device)
    guarded = torch_step.guarded_step

    def allowed(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return guarded(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    train_step(state, loader, 0)
    monkeypatch.setattr(torch_step, "guarded_step", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            assert train_step(state, loader, step).taken
    finally:
        torch.cuda.set_sync_debug_mode("default")
