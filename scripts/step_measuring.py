"""Steps of the trainer, and of a plain loop beside it, built and timed for `bench_step`.

B batch, N chunks, L 77, C channels, H W latent height and width.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.tokens.chunks import BOS_ID, CHUNK_IDS, CHUNK_TOKENS, EOS_ID
from trainer.config.load import load_config, with_rounding
from trainer.config.settings import Config
from trainer.data.batch import Batch
from trainer.data.epochs import RunSize
from trainer.families import FAMILIES
from trainer.model.attention import allowing
from trainer.model.build import build_model
from trainer.model.model import Model
from trainer.model.noise_schedule import Schedule
from trainer.model.trainable import parameter_groups
from trainer.training.loop import build_state
from trainer.training.loss import batch_loss
from trainer.training.speed.prefetch import BatchesAhead
from trainer.training.step import train_step

WARM_STEPS = 3
PLAIN_CHUNKS = 3
"""The chunks of the plain loop: 225 tokens, as much as sd-scripts reads of a caption."""
_CEILING_SIDE = {"cuda": 8192, "cpu": 1024}
_CEILING_REPEATS = 10
_WORD = 320
"""The id of some word of CLIP's vocabulary."""


@dataclass(frozen=True)
class Measured:
    """What some steps took."""

    milliseconds: float
    """The median of a whole step; on a CPU by the processor's time, which is disturbed less."""
    images_per_second: float
    peak_gib: float | None
    """The most memory of tensors at once; None on a CPU, which does not count it."""
    losses: tuple[float, ...]
    """The loss of every step, also of those before the timed ones."""
    told: str
    """What `[speed]` has chosen, in words."""


def config_of(folder: Path, settings: Mapping[str, Any], overrides: list[str]) -> Config:
    """A config of random weights with `settings` by `section.key`, and `--set` on top of them.

    As a run resolves it: with the default of stochastic rounding for its precision.
    """
    path = folder / "config.toml"
    path.write_text(
        '[model]\nfamily = "sdxl"\npath = "random"\n'
        '[[data]]\nmetadata = "none.json"\nlatents = "none"\n'
        f'[train]\noutput_dir = "{folder}"\nmax_steps = 1000000\nseed = 1\n',
        encoding="utf-8",
    )
    given = [
        f"{name}={value if isinstance(value, str) else str(value).lower()}"
        for name, value in settings.items()
    ]
    return with_rounding(load_config(path, [*given, *overrides]))


def iter_batches(config: Config, side_px: int, n_chunks: int) -> Iterator[Batch]:
    """Micro-batches of one shape without end, the same each time; page-locked for a GPU.

    Captions fill their chunks.
    """
    generator = torch.Generator().manual_seed(0)
    size, family = config.train.batch_size, FAMILIES[config.model.family]
    side = side_px // PIXELS_PER_LATENT
    row = [BOS_ID, *[_WORD] * CHUNK_TOKENS, EOS_ID]
    assert len(row) == CHUNK_IDS
    step = 0
    while True:
        for micro in range(config.train.accumulation):
            latents_BCHW, noise_BCHW = (
                torch.randn(size, family.latent_channels, side, side, generator=generator)
                for _ in range(2)
            )
            batch = Batch(
                step=step,
                epoch=0,
                micro=micro,
                latents_BCHW=latents_BCHW,
                noise_BCHW=noise_BCHW,
                input_noise_BCHW=None,
                timesteps_B=torch.randint(0, 1000, (size,), generator=generator),
                ids=tuple(torch.tensor([[row] * n_chunks] * size) for _ in family.encoders),
                size_B6=torch.tensor([[side_px, side_px, 0, 0, side_px, side_px]] * size).float()
                if family.size_conditioning
                else None,
                mask_B1HW=None,
                weights_B=torch.ones(size),
                real_samples=size * config.train.accumulation,
                text_noise_seeds=(0,) * size,
                keys=(),
                captions=(),
                counts={"samples": size},
            )
            yield batch.pin_memory() if torch.cuda.is_available() else batch
        step += 1


class Weights:
    """The random weights of a model, drawn once, from which equal models are made."""

    def __init__(self, config: Config) -> None:
        self._values = build_model(config).state_dict()

    def model(self, config: Config) -> Model:
        """A model of the config on the CPU, whose weights are its own."""
        model = build_model(config, weights=False)
        dtype = next(model.parameters()).dtype
        own = {name: value.to(dtype, copy=True) for name, value in self._values.items()}
        model.load_state_dict(own, assign=True)
        return model


ONE_SHAPE = RunSize(1, 1, 1, 1, 1, 1_000_000)
"""The size of a run whose micro-batches have one shape."""


def measure_step(
    config: Config, engine: Accelerator, weights: Weights, shape: tuple[int, int], steps: int
) -> Measured:
    """Real steps of the trainer, on micro-batches of a shape (side in px, chunks) in memory."""
    state = build_state(weights.model(config), config, engine, ONE_SHAPE)
    batches = BatchesAhead(iter_batches(config, *shape), engine.device)
    numbers = iter(range(WARM_STEPS + steps))
    found = _timed(
        lambda: train_step(state, batches, next(numbers)).loss,
        config,
        engine,
        steps,
        state.speed,
    )
    engine.free_memory()
    return found


def measure_plain(
    config: Config, engine: Accelerator, weights: Weights, side_px: int, steps: int
) -> Measured:
    """A plain loop: the same models with diffusers' defaults, 225 tokens, and torch's AdamW."""
    device = engine.device
    model = weights.model(config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": group["params"], "lr": group["lr"]}
            for group in parameter_groups(model, config)
        ]
    )
    schedule = Schedule.of(config.noise).to(device)
    batches = iter_batches(config, side_px, PLAIN_CHUNKS)
    types = {"bf16": torch.bfloat16, "fp16": torch.float16}

    def step() -> float:
        total = 0.0
        for _ in range(config.train.accumulation):
            batch = next(batches).to(device)
            noisy_BCHW = schedule.add_noise(batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B)
            with torch.autocast(
                device.type,
                types.get(config.train.precision, torch.bfloat16),
                enabled=config.train.precision in types,
            ):
                predicted_BCHW = model(noisy_BCHW, batch.timesteps_B, batch.ids, batch.size_B6)
            loss = nn.functional.mse_loss(predicted_BCHW.float(), batch.noise_BCHW)
            torch.autograd.backward(loss / config.train.accumulation)
            total += loss.item() / config.train.accumulation
        nn.utils.clip_grad_norm_(trained, config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return _timed(step, config, engine, steps, "diffusers' and torch's defaults")


def _timed(
    step: Callable[[], float], config: Config, engine: Accelerator, steps: int, told: str
) -> Measured:
    """The times of `steps` steps after some warm ones."""
    on_cuda = engine.device.type == "cuda"
    clock = _clock(engine.device)
    losses, seconds = [], []
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS and on_cuda:
            torch.cuda.reset_peak_memory_stats()
        started = clock()
        losses.append(step())
        _wait(engine.device)
        seconds.append(clock() - started)
    median = statistics.median(seconds[WARM_STEPS:])
    images = config.train.batch_size * config.train.accumulation
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None
    return Measured(median * 1e3, images / median, peak, tuple(losses), told)


def step_flops(config: Config, side_px: int, n_chunks: int) -> tuple[int, int]:
    """The FLOPs of one image, forward and backward, and the part of the text encoders.

    Counted on tensors without values, so that any size takes no memory. What gradient checkpointing
    computes twice is counted once: utilisation is about the work that the model needs.
    """
    once = config.model_copy(
        update={"model": config.model.model_copy(update={"gradient_checkpointing": False})}
    )
    model = build_model(once, weights=False).to("meta")
    batch = next(iter_batches(once, side_px, n_chunks)).to("meta")
    schedule = Schedule.of(once.noise).to("meta")
    # torch counts each of its fused kernels, but not all on tensors without values.
    with FlopCounterMode(display=False) as counter, allowing(("math",)):
        loss = batch_loss(model, batch, schedule, once.noise, once.loss)
        torch.autograd.backward(loss.value)
    unet = sum(counter.get_flop_counts()[f"{type(model).__name__}.unet"].values())
    total = counter.get_total_flops()
    size = once.train.batch_size
    return total // size, (total - unet) // size


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """The FLOPs per second of a large matrix product, the best of some runs."""
    side = _CEILING_SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    clock, best = _clock(device), float("inf")
    for _ in range(_CEILING_REPEATS):
        _wait(device)
        started = clock()
        product: Tensor = one @ other
        _wait(device)
        best = min(best, clock() - started)
    assert product.shape == (side, side)
    return float(2 * side**3 / best)


def _clock(device: torch.device) -> Callable[[], float]:
    return time.perf_counter if device.type == "cuda" else time.process_time


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
