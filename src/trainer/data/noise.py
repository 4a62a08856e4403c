"""What is drawn for one sample: noise and timestep. Knows no schedule, no model and no loss.

C latent channels, H W latent height and width.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from capmerge.rng import Chance
from trainer.config.settings import NoiseSettings


def draw_noise(
    latents_CHW: Tensor, chance: Chance, settings: NoiseSettings
) -> tuple[Tensor, Tensor | None]:
    """The noise of one sample that its target is made of, and its input's where input perturbation makes that another.

    Both (C, H, W) float32 on CPU; of `latents_CHW` only the shape matters. A pure function of
    the sample's identity and the settings, for one version of torch, whose generator on CPU tells
    2**32 seeds apart. Offset and levels add up; the levels' sum is divided by its standard
    deviation over this sample alone, where sd-scripts takes the whole batch's: a sample's noise
    must not depend on its neighbours. Source: sd-scripts-facts D2.
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
    """Noise with coarser noise on it, level i from 0 smaller by (2 to 4)**i and weaker by discount**i; standard deviation 1.

    Writes into `noise_CHW`.
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
    """The timestep of one sample, each in [`min_timestep`, `max_timestep`) as likely as the others.

    Raises `ValueError` when there is none between them.
    """
    return settings.min_timestep + chance.below(
        settings.max_timestep - settings.min_timestep, "timestep"
    )
