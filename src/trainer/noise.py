"""Noise: the schedule, what is added to the latents, and what is drawn for one sample. Knows no model and no loss.

T timesteps of the schedule (1000), B batch, C latent channels, H W latent height and width.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from capmerge.chance import Chance
from trainer.settings import NoiseSettings

TIMESTEPS = 1000
FIRST_BETA = 0.00085
LAST_BETA = 0.012


@dataclass(frozen=True, slots=True)
class Schedule:
    """How much of latents and noise a noisy picture holds at each timestep. Source: sd-scripts-facts D1 (scaled linear)."""

    alphas_cumprod_T: Tensor
    """float32: the squared share of the latents; 0 at the last timestep of a zero-terminal schedule."""
    snr_T: Tensor
    """float32: squared signal over squared noise, of the schedule before the zero-terminal rescale: weights made of it stay finite."""

    @classmethod
    def of(cls, settings: NoiseSettings) -> Self:
        """The schedule of a run, on CPU."""
        # Single precision, in the order of diffusers' DDPMScheduler: a model is sampled with the numbers it was trained with.
        betas_T = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS) ** 2
        alphas_cumprod_T = torch.cumprod(1 - betas_T, 0)
        snr_T = alphas_cumprod_T / (1 - alphas_cumprod_T)
        return cls(_zero_terminal(alphas_cumprod_T) if settings.zero_terminal_snr else alphas_cumprod_T, snr_T)

    def to(self, device: torch.device | str) -> Self:
        """The same on `device`."""
        return type(self)(self.alphas_cumprod_T.to(device), self.snr_T.to(device))

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The noisy latents (B, C, H, W) at each sample's timestep."""
        signal_B111, noise_B111 = self._shares(timesteps_B)
        return signal_B111 * latents_BCHW + noise_B111 * noise_BCHW

    def velocity(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """What a v-prediction aims at (B, C, H, W). Source: arXiv 2202.00512, appendix D."""
        signal_B111, noise_B111 = self._shares(timesteps_B)
        return signal_B111 * noise_BCHW - noise_B111 * latents_BCHW

    def _shares(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod_B111 = self.alphas_cumprod_T[timesteps_B].reshape(-1, 1, 1, 1)
        return alphas_cumprod_B111.sqrt(), (1 - alphas_cumprod_B111).sqrt()


def _zero_terminal(alphas_cumprod_T: Tensor) -> Tensor:
    """The schedule shifted to end at 0 and stretched to keep its beginning. Source: arXiv 2305.08891, algorithm 1."""
    shares_T = alphas_cumprod_T.sqrt()
    first, last = shares_T[0], shares_T[-1]
    return ((shares_T - last) * (first / (first - last))) ** 2


def draw_noise(latents_CHW: Tensor, chance: Chance, settings: NoiseSettings) -> tuple[Tensor, Tensor | None]:
    """The noise of one sample that its target is made of, and its input's where input perturbation makes that another.

    Both (C, H, W) float32 on CPU; of `latents_CHW` only the shape matters.
    A pure function of `chance`'s five fields and the settings, for one version of torch, whose generator on CPU tells 2**32 seeds apart.
    Offset and levels add up; the levels' sum is divided by its standard deviation over this sample alone, where sd-scripts takes
    the whole batch's: a sample's noise must not depend on its neighbours. Source: sd-scripts-facts D2.
    """
    generator = torch.Generator().manual_seed(chance.below(1 << 63, "noise"))
    noise_CHW = torch.randn(latents_CHW.shape, generator=generator)
    if settings.offset:
        noise_CHW += settings.offset * torch.randn(latents_CHW.shape[0], 1, 1, generator=generator)
    if settings.multires_iterations:
        noise_CHW = _add_levels_(noise_CHW, settings, generator)
    if not settings.input_perturbation:
        return noise_CHW, None
    return noise_CHW, noise_CHW + settings.input_perturbation * torch.randn(latents_CHW.shape, generator=generator)


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
    return settings.min_timestep + chance.below(settings.max_timestep - settings.min_timestep, "timestep")
