"""The moving average of the trained weights, which often serves better than the last weights.

After each optimizer step, average = decay x average + (1 - decay) x weights, in float32. Every rank
keeps the same averages, because all have the same weights; nothing is exchanged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.config.settings import Config, EmaSettings
from trainer.errors import ConfigError, ResumeError
from trainer.training.optimizer_classes import find_class, is_of_bitsandbytes

EMA_FILE = "ema.safetensors"
"""The averages in the folder of a saved state, by the names of the parameters, in float32."""


def check_ema(config: Config) -> None:
    """Raise `ConfigError` if the run keeps an average and its optimizer does so itself."""
    name = config.optimizer.name
    if config.ema.decay and not is_of_bitsandbytes(name) and hasattr(find_class(name), "eval"):
        raise ConfigError(
            f"ema.decay = {config.ema.decay:g}: optimizer.name = {name} keeps an average of the "
            "weights itself, which is what the model is saved with, expected an optimizer without "
            "one. Set ema.decay = 0, or choose another optimizer."
        )


class Ema:
    """The averages of the parameters that `model` trains; they begin as the weights are now.

    They are kept beside the weights, or with `ema.device = "cpu"` in main memory, to which each
    step then copies the weights.
    """

    def __init__(self, model: nn.Module, settings: EmaSettings) -> None:
        self._settings = settings
        self._weights = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._averages = {
            name: weight.detach().to(
                "cpu" if settings.device == "cpu" else weight.device, torch.float32, copy=True
            )
            for name, weight in self._weights.items()
        }
        # Weights of another device or type pass through this buffer one by one. Into page-locked
        # memory a GPU copies several times faster.
        pairs = list(zip(self._weights.values(), self._averages.values(), strict=True))
        self._passage = torch.empty(
            max(
                (weight.numel() for weight, average in pairs if not _alike(weight, average)),
                default=0,
            ),
            device=pairs[0][1].device,
            pin_memory=pairs[0][0].is_cuda and not pairs[0][1].is_cuda,
        )

    def decay_at(self, step: int) -> float:
        """The decay after optimizer step `step`, from 0; it grows evenly over the warm-up."""
        warmup = self._settings.warmup_steps
        return self._settings.decay * (min(1.0, step / warmup) if warmup else 1.0)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take the weights after optimizer step `step`, from 0, into the averages."""
        share = 1 - self.decay_at(step)
        for name, average in self._averages.items():
            average.lerp_(self._beside(average, self._weights[name].detach()), share)

    def _beside(self, average: Tensor, weight: Tensor) -> Tensor:
        """The weight on the device and in the type of its average."""
        if _alike(weight, average):
            return weight
        return self._passage[: weight.numel()].view_as(average).copy_(weight)

    @contextmanager
    @torch.no_grad()
    def in_use(self) -> Iterator[None]:
        """Inside the context, the model has the averages as its weights.

        Afterwards weights and averages are bit for bit as before. They change places one by one,
        which takes no memory on the device; only weights in bf16 are kept in main memory meanwhile.
        """
        kept: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            if weight.dtype != torch.float32:
                kept[name] = weight.detach().to("cpu", copy=True)
                weight.copy_(self._averages[name])
            else:
                _exchange(weight, self._averages[name])
        try:
            yield
        finally:
            for name, weight in self._weights.items():
                if name in kept:
                    weight.copy_(kept.pop(name))
                else:
                    _exchange(weight, self._averages[name])

    def weights(self) -> dict[str, Tensor]:
        """The averages in float32, by the names of their parameters."""
        return dict(self._averages)

    def save(self, folder: Path) -> None:
        """Write the averages into the folder of a state; only one rank has to."""
        save_file(self._averages, folder / EMA_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> bool:
        """Go on with the averages of the state in `folder`, whose weights are loaded already.

        False if it has none: then they begin as the weights are now. Raises `ResumeError` when they
        cannot be read or are those of other parameters.
        """
        path = folder / EMA_FILE
        if not path.exists():
            for name, average in self._averages.items():
                average.copy_(self._weights[name])
            return False
        try:
            with safe_open(path, "pt") as stored:
                found = {name: stored.get_slice(name).get_shape() for name in stored.keys()}  # noqa: SIM118
                expected = {name: [*average.shape] for name, average in self._averages.items()}
                if found != expected:
                    names = [*dict.fromkeys((*expected, *found))]
                    other = next(name for name in names if found.get(name) != expected.get(name))
                    raise ResumeError(
                        f"{path}: found other averages than of the weights that this run trains; "
                        f"the first is {other}: found {found.get(other)}, expected "
                        f"{expected.get(other)}. Train the same parts, or name another state."
                    )
                for name, average in self._averages.items():
                    average.copy_(stored.get_tensor(name))
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
