"""The moving average of the trained weights, which often serves better than the last weights.

After each optimizer step, average = decay x average + (1 - decay) x weights, in float32. The
weights are those that the optimizer steps: under DeepSpeed the float32 ones of which it makes
16-bit weights. Every rank averages what it keeps of them; nothing is exchanged until the averages
are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.config.settings import Config, EmaSettings
from trainer.errors import ConfigError, ResumeError
from trainer.model.tensor_file import ReadTensors, new_tensor, write_tensors
from trainer.training.engines.asked_tensors import led_by_rank_0
from trainer.training.engines.masters import Masters
from trainer.training.optimizer.classes import find_class, is_of_bitsandbytes

EMA_FILE = "ema.safetensors"
"""The averages in the folder of a saved state, by the names of the parameters, in float32."""


def check_ema(config: Config) -> None:
    """Raise `ConfigError` if the run cannot keep the average that it asks for.

    Its optimizer may do so itself, or have its weights on a disk.
    """
    if config.ema.decay and config.engine.offload_optimizer_device == "nvme":
        raise ConfigError(
            f"ema.decay = {config.ema.decay:g}: the weights to average lie on a disk with "
            'engine.offload_optimizer_device = "nvme", where only a step of DeepSpeed reads them, '
            'expected "cpu" or "none". Set it, or ema.decay = 0.'
        )
    name = config.optimizer.name
    if config.ema.decay and not is_of_bitsandbytes(name) and hasattr(find_class(name), "eval"):
        raise ConfigError(
            f"ema.decay = {config.ema.decay:g}: optimizer.name = {name} keeps an average of the "
            "weights itself, which is what the model is saved with, expected an optimizer without "
            "one. Set ema.decay = 0, or choose another optimizer."
        )


class Ema:
    """The averages of the weights that are trained; they begin as the weights are now.

    Each rank keeps the averages of its own parts, beside them, or with `ema.device = "cpu"` in main
    memory, to which each step then copies the weights.
    """

    def __init__(self, masters: Masters, settings: EmaSettings) -> None:
        self._masters, self._settings = masters, settings
        self._parts = {part.name: part for part in masters.parts}
        self._averages = {
            # Saved as they lie, also where the weights have their channels last.
            name: weight.to(
                "cpu" if settings.device == "cpu" else weight.device,
                torch.float32,
                copy=True,
                memory_format=torch.contiguous_format,
            )
            for name, weight in self._weights()
        }
        # Weights of another device or type pass through this buffer one by one. Into page-locked
        # memory a GPU copies several times faster.
        pairs = [(weight, self._averages[name]) for name, weight in self._weights()]
        self._passage = torch.empty(
            max(
                (weight.numel() for weight, average in pairs if not _alike(weight, average)),
                default=0,
            ),
            device=pairs[0][1].device,
            pin_memory=pairs[0][0].is_cuda and not pairs[0][1].is_cuda,
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """The parts of this rank by name, as they are now."""
        for name, part in self._parts.items():
            yield name, part.of(part.vector.detach())

    def decay_at(self, step: int) -> float:
        """The decay after optimizer step `step`, from 0; it grows evenly over the warm-up."""
        warmup = self._settings.warmup_steps
        return self._settings.decay * (min(1.0, step / warmup) if warmup else 1.0)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step `step`, from 0, into the averages."""
        share = 1 - self.decay_at(step)
        for name, weight in self._weights():
            average = self._averages[name]
            average.lerp_(self._beside(average, weight), share)

    def _beside(self, average: Tensor, weight: Tensor) -> Tensor:
        """The weight on the device and in the type of its average."""
        if _alike(weight, average):
            return weight
        return self._passage[: weight.numel()].view_as(average).copy_(weight)

    @contextmanager
    @torch.no_grad()
    def in_use(self) -> Iterator[None]:
        """Inside the context, the model has the averages as its weights; for all ranks alike.

        Afterwards weights and averages are bit for bit as before. They change places one by one,
        which takes no memory on the device; only weights in bf16 are kept in main memory meanwhile.
        """
        kept: dict[str, Tensor] = {}
        for name, weight in self._weights():
            if weight.dtype != torch.float32:
                kept[name] = weight.to("cpu", copy=True)
                weight.copy_(self._averages[name])
            else:
                _exchange(weight, self._averages[name])
        self._masters.to_model()
        try:
            yield
        finally:
            for name, weight in self._weights():
                if name in kept:
                    weight.copy_(kept.pop(name))
                else:
                    _exchange(weight, self._averages[name])
            self._masters.to_model()

    def names(self) -> list[str]:
        """The names of the parameters that are averaged."""
        return [*self._averages]

    def whole(self, name: str) -> Tensor:
        """An average in float32; for all ranks alike, because it may have to be gathered."""
        return self._masters.joined(self._parts[name], self._averages[name])

    def save(self, folder: Path) -> None:
        """Write the averages into the folder of a state: rank 0 writes, and all ranks take part."""
        with led_by_rank_0(self._masters.engine, self.whole) as ask, ReadTensors() as reader:
            if ask:
                tensors = [
                    new_tensor(name, "F32", self._masters.shape(name), partial(ask, name))
                    for name in self._averages
                ]
                write_tensors(folder / EMA_FILE, tensors, {}, reader)

    @torch.no_grad()
    def load(self, folder: Path) -> bool:
        """Go on with the averages of the state in `folder`, whose weights are loaded already.

        False if it has none: then they begin as the weights are now. Raises `ResumeError` when they
        cannot be read or are those of other parameters.
        """
        path = folder / EMA_FILE
        if not path.exists():
            for name, weight in self._weights():
                self._averages[name].copy_(weight)
            return False
        try:
            with safe_open(path, "pt") as stored:
                found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
                expected = {name: [*self._masters.shape(name)] for name in self._averages}
                if found != expected:
                    names = [*dict.fromkeys((*expected, *found))]
                    other = next(name for name in names if found.get(name) != expected.get(name))
                    raise ResumeError(
                        f"{path}: found other averages than of the weights that this run trains; "
                        f"the first is {other}: found {found.get(other)}, expected "
                        f"{expected.get(other)}. Train the same parts, or name another state."
                    )
                for name, average in self._averages.items():
                    average.copy_(self._parts[name].cut(stored.get_tensor(name)))
        except (OSError, SafetensorError) as error:
            raise ResumeError(
                f"{path}: the averages of the weights cannot be read ({error}). Name another state."
            ) from error
        return True


def _alike(weight: Tensor, average: Tensor) -> bool:
    return weight.dtype == average.dtype and weight.device == average.device


def _exchange(one: Tensor, other: Tensor) -> None:
    """Let two tensors change their values, also between devices."""
    before = one.detach().to(other.device, copy=True)
    one.copy_(other)
    other.copy_(before)
