"""The random draws of one sample: its noise and its timestep.

How much noise a timestep stands for is the matter of the model's noise schedule, not of this
module. Shape suffixes: C latent channels, H W latent height and width.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from capmerge.rng import Chance
from trainer.config.settings import NoiseSettings
from trainer.families import TIMESTEPS, resolution_shift

_SHARES = 1 << 52
"""The number of different shares that are drawn; with 0.5 added, a double holds each exactly."""
_LARGEST_SHARE = 1 - 2**-53


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


def draw_timestep(chance: Chance, settings: NoiseSettings, n_pixels: int) -> float:
    """The timestep of one sample of `n_pixels`.

    A whole number, uniform in [`min_timestep`, `max_timestep`), or `flow_timestep` of a uniform
    share. Raises `ValueError` when the range is empty.
    """
    if settings.prediction == "flow":
        share = (chance.below(_SHARES, "sigma") + 0.5) / _SHARES
        return flow_timestep(share, settings, n_pixels)
    return settings.min_timestep + chance.below(
        settings.max_timestep - settings.min_timestep, "timestep"
    )


def flow_timestep(share: float, settings: NoiseSettings, n_pixels: int) -> float:
    """The timestep, sigma x 1000, below which a `share` of all timesteps of a flow lie.

    `share` is in (0, 1), so the timesteps of evenly spaced shares are quantiles. Where the limits
    leave out a part of the distribution, the rest keeps its proportions. Source: model-facts 1.
    """
    # The shift moves a larger sigma to a larger one, so limits after it are limits before it.
    shift = resolution_shift(n_pixels) if settings.shift == "resolution" else settings.shift
    low, high = (
        limit / (shift - (shift - 1) * limit)
        for limit in (settings.min_timestep / TIMESTEPS, settings.max_timestep / TIMESTEPS)
    )
    if settings.timestep_sampling == "uniform":
        sigma = low + share * (high - low)
    else:
        normal = NormalDist(settings.timestep_mean, settings.timestep_std)
        sigma = _sigmoid(_quantile_between(share, normal, _logit(low), _logit(high)))
    timestep = TIMESTEPS * shift * sigma / (1 + (shift - 1) * sigma)
    return min(max(timestep, settings.min_timestep), settings.max_timestep)


def _quantile_between(share: float, normal: NormalDist, low: float, high: float) -> float:
    """The value below which a `share` lies of the part of `normal` between `low` and `high`."""
    if low > normal.mean:
        # Shares of the upper tail would be rounded to 1, so the lower tail is taken.
        mirrored = NormalDist(-normal.mean, normal.stdev)
        return -_quantile_between(1 - share, mirrored, -high, -low)
    below_low, below_high = normal.cdf(low), normal.cdf(high)
    below = below_low + share * (below_high - below_low)
    # 0 if the distribution lies so far above that all but none of this part is at its upper end.
    found = normal.inv_cdf(min(below, _LARGEST_SHARE)) if below else high
    return min(max(found, low), high)


def _logit(sigma: float) -> float:
    """The number whose `_sigmoid` is `sigma`, which is in [0, 1]."""
    if sigma in (0, 1):
        return -math.inf if sigma == 0 else math.inf
    return math.log(sigma) - math.log1p(-sigma)


def _sigmoid(value: float) -> float:
    """1 / (1 + exp(-value)), for a number of any size."""
    small = math.exp(-abs(value))
    return small / (1 + small) if value < 0 else 1 / (1 + small)


def timestep_at(quantile: float, settings: NoiseSettings, n_pixels: int) -> float:
    """The timestep below which the share `quantile`, in (0, 1), of all drawn timesteps lies.

    >>> timestep_at(0.125, NoiseSettings(min_timestep=200), 512 * 512)
    300
    """
    if settings.prediction == "flow":
        return flow_timestep(quantile, settings, n_pixels)
    return settings.min_timestep + int(quantile * (settings.max_timestep - settings.min_timestep))
