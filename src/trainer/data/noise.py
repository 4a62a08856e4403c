"""The random draws of one sample: its noise and its timestep.

How much noise a timestep stands for is the matter of the model's noise schedule, not of this
module. Shape suffixes: C latent channels, H W latent height and width.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from capmerge.rng import Chance
from trainer.config.settings import NoiseSettings


def draw_noise(
    latents_CHW: Tensor, chance: Chance, settings: NoiseSettings
) -> tuple[Tensor, Tensor | None]:
    """The noise of the target of one sample, and the noise of its input where that differs.

    Input perturbation makes the two differ; otherwise the second one is None. Both are (C, H, W)
    float32 on the CPU; only the shape of `latents_CHW` is used. The result is a pure function of
    the sample's identity and the settings, for one version of torch, whose generator on the CPU
    distinguishes 2**32 seeds. Offset and levels add up. The sum of the levels is divided by its
    standard deviation over this sample alone, where sd-scripts uses the whole batch: the noise of
    a sample must not depend on its neighbours. Source: sd-scripts-facts D2.
    """
    generator = torch.Generator().manual_seed(chance.below(1 << 63, "noise"))
    noise_CHW = torch.randn(latents_CHW.shape, generator=generator)
    if settings.offset:
        noise_CHW += settings.offset * torch.randn(latents_CHW.shape[0], 1, 1, generator=generator)
    if settings.multires_iterations:
        noise_CHW = _add_levels_(noise_CHW, settings, generator)
    if not settings.input_perturbation:
        return noise_CHW, None
    return noise_CHW, noise_CHW + settings.input_perturbation * torch.randn(
        latents_CHW.shape, generator=generator
    )


def _add_levels_(noise_CHW: Tensor, settings: NoiseSettings, generator: torch.Generator) -> Tensor:
    """The noise with coarser noise added to it, normalised to standard deviation 1.

    Level i, counted from 0, is smaller by (2 to 4)**i and weaker by discount**i. Writes into
    `noise_CHW`.
    """
    _, height, width = noise_CHW.shape
    for level in range(settings.multires_iterations):
        shrink = float(torch.rand((), generator=generator) * 2 + 2) ** level
        level_height, level_width = max(1, int(height / shrink)), max(1, int(width / shrink))
        coarse_CHW = torch.randn(noise_CHW.shape[0], level_height, level_width, generator=generator)
        if level:
            coarse_CHW = interpolate(coarse_CHW[None], size=(height, width), mode="bilinear")[0]
        noise_CHW.add_(coarse_CHW, alpha=settings.multires_discount**level)
        if level_height == 1 or level_width == 1:
            break
    return noise_CHW / noise_CHW.std()


def draw_timestep(chance: Chance, settings: NoiseSettings) -> int:
    """The timestep of one sample, uniform in [`min_timestep`, `max_timestep`).

    Raises `ValueError` when the range is empty.
    """
    return settings.min_timestep + chance.below(
        settings.max_timestep - settings.min_timestep, "timestep"
    )
