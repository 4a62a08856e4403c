"""The estimated memory is that of real tensors, as far as a machine without a GPU has them."""

import gc
import weakref

import pytest
import torch
from builders.model import ALL_TRAINED, make_config
from torch.utils._pytree import tree_leaves

from trainer.model.build import build_model
from trainer.model.noise_schedule import Schedule
from trainer.model.trainable import parameter_groups
from trainer.training.loss import batch_loss
from trainer.training.memory.engines import types_of
from trainer.training.memory.estimate import Shape, batch_of, estimate_memory
from trainer.training.memory.trace import META, LiveBytes, Rules, trace_step
from trainer.training.optimizer.build import build_optimizer

CPU = torch.device("cpu")
SHAPE = Shape(width=192, height=256, chunks=2)
FROZEN = {"learning_rate": 1e-4}
"""The rates of a run whose text encoders are frozen."""
OPTIMIZERS = {
    "AdamW": {},
    "AdamW amsgrad": {"amsgrad": True},
    "SGD": {"momentum": 0.9},
    "Adafactor": {},
    "Lion": {},
    "CAME": {},
    "ScheduleFreeAdamW": {},
    "Prodigy": {},
    "AdamP": {},
}
"""Arguments by name; the last two ask for values, and are measured by stand-ins."""


def config_of(family="sdxl", precision="fp32", rates=ALL_TRAINED, **model):
    """A config of a tiny model with two samples in a batch."""
    return make_config(
        family,
        model=model,
        optimizer=rates,
        train={"precision": precision, "batch_size": 2, "max_steps": 1},
    )


def loss_of(config, model, device):
    """A function that computes the loss of a micro-batch of zeros on `device`."""
    schedule, batch = Schedule.of(config.noise).to(device), batch_of(config, SHAPE, device)
    return lambda: batch_loss(model, batch, schedule, config.noise, config.loss).value


def traced_on_cpu(config):
    """The bytes of a step, traced as the CPU would take it."""
    low, autocast = types_of(config)
    model = build_model(config, weights=False).to(META, low)
    loss = loss_of(config, model, META)
    return trace_step(loss, model, Rules("cpu", autocast), keeps_gradients=True)


def saved_and_peak(config):
    """Bytes of a real step on the CPU: what it saves for the backward pass, and the most of it."""
    _, low = types_of(config)
    model, saved = build_model(config), {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor.detach()  # a result that its own node holds would never be freed

    schedule, batch = Schedule.of(config.noise), batch_of(config, SHAPE, CPU)
    outside = [*model.parameters(), *model.buffers(), schedule.alphas_cumprod_T, schedule.snr_T]
    outside += tree_leaves((batch.ids, batch.size_B6, batch.latents_BCHW))
    outside += [batch.noise_BCHW, batch.timesteps_B, batch.weights_B]
    known = {tensor.untyped_storage()._cdata for tensor in outside if tensor is not None}
    with LiveBytes() as live:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", low, enabled=low is not None),
        ):
            loss = batch_loss(model, batch, schedule, config.noise, config.loss).value
        gc.collect()  # the outputs of transformers hold each other
        alive = sum(
            size for key, (storage, size) in saved.items() if storage() and key not in known
        )
        loss.backward()
    return alive, live.peak


@pytest.mark.parametrize(
    ("family", "precision", "rates", "tolerance"),
    [
        ("sd1", "fp32", FROZEN, 0),
        ("sdxl", "fp32", ALL_TRAINED, 0),
        ("sdxl", "bf16", ALL_TRAINED, 0.01),
        ("sdxl", "full_bf16", FROZEN, 0.01),
    ],
)
def test_a_step_saves_what_the_trace_says(family, precision, rates, tolerance):
    """A forward pass on the CPU keeps, and both passes need, the traced bytes.

    In float32 to the byte. The CPU keeps the statistics of norms in bf16, the GPU in float32.
    """
    config = config_of(family, precision, rates)
    traced = traced_on_cpu(config)
    saved, peak = saved_and_peak(config)
    # The loss itself is alive, but not saved.
    assert traced.saved - 4 == pytest.approx(saved, rel=tolerance, abs=0)
    assert traced.peak == pytest.approx(peak, rel=tolerance, abs=0)


def test_gradient_checkpointing_saves_less():
    """Gradient checkpointing needs what the trace says, which is far less than without."""
    plain, checkpointed = (config_of("sdxl", gradient_checkpointing=on) for on in (False, True))
    traced = traced_on_cpu(checkpointed)
    _, peak = saved_and_peak(checkpointed)
    assert traced.peak == peak
    assert traced.peak < 0.6 * saved_and_peak(plain)[1]


def real_bytes(config):
    """Bytes of the weights, gradients and optimizer state of a tiny model after two real steps."""
    model = build_model(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameter_groups(model, config), config.optimizer, CPU)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(config, model, CPU)().backward()
        optimizer.step()
    state = {
        leaf.untyped_storage()._cdata: leaf.untyped_storage().nbytes()
        for kept in optimizer.state.values()
        for name, value in kept.items()
        # The count of steps stays on the CPU.
        for leaf in tree_leaves(value if name != "step" else [])
        if isinstance(leaf, torch.Tensor)
    }
    return (
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.grad.nbytes for parameter in trained),
        sum(state.values()),
    )


@pytest.mark.parametrize(
    ("name", "precision"),
    [*((name, "fp32") for name in OPTIMIZERS), ("AdamW", "full_bf16"), ("CAME", "full_bf16")],
)
def test_weights_gradients_and_state_are_exact(name, precision):
    """The estimate of what is there all the time is that of the real tensors, to the byte."""
    rates = FROZEN | {"name": name.split()[0], "arguments": OPTIMIZERS[name]}
    config = config_of("sd1", precision, rates, freeze=["conv_in.*", "*norm*"])
    model = build_model(config, weights=False)
    estimate = estimate_memory(config, model, 1, SHAPE)
    weights, state, *_ = estimate.lasting
    assert (weights.size, estimate.gradients.size, state.size) == real_bytes(config)
