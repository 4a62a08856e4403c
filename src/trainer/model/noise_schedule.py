"""The noise schedule: how much noise the latents get at each timestep, and the velocity.

T timesteps of the schedule (1000), B batch, C latent channels, H W latent height and width.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trainer.config.settings import NoiseSettings
from trainer.families import TIMESTEPS

FIRST_BETA = 0.00085
LAST_BETA = 0.012


@dataclass(frozen=True, slots=True)
class Schedule:
    """The shares of latents and noise in a noisy picture at each timestep.

    Source: sd-scripts-facts D1 (scaled linear).
    """

    alphas_cumprod_T: Tensor
    """float32: squared share of the latents, 0 at the last timestep of a zero-terminal schedule."""
    snr_T: Tensor
    """float32: squared signal over squared noise, before any zero-terminal rescale.

    So the loss weights that depend on it stay finite.
    """

    @classmethod
    def of(cls, settings: NoiseSettings) -> Self:
        """The schedule of a run, on the CPU."""
        # Single precision, in the order of diffusers' DDPMScheduler, so that a model is sampled
        # with the numbers that it was trained with.
        betas_T = torch.linspace(FIRST_BETA**0.5, LAST_BETA**0.5, TIMESTEPS) ** 2
        alphas_cumprod_T = torch.cumprod(1 - betas_T, 0)
        snr_T = alphas_cumprod_T / (1 - alphas_cumprod_T)
        return cls(
            _zero_terminal(alphas_cumprod_T) if settings.zero_terminal_snr else alphas_cumprod_T,
            snr_T,
        )

    def to(self, device: torch.device | str) -> Self:
        """The same schedule on `device`."""
        return type(self)(self.alphas_cumprod_T.to(device), self.snr_T.to(device))

    def add_noise(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The noisy latents (B, C, H, W) at each sample's timestep."""
        signal_B111, noise_B111 = self._shares(timesteps_B)
        return signal_B111 * latents_BCHW + noise_B111 * noise_BCHW

    def velocity(self, latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
        """The target of a v-prediction (B, C, H, W). Source: arXiv 2202.00512, appendix D."""
        signal_B111, noise_B111 = self._shares(timesteps_B)
        return signal_B111 * noise_BCHW - noise_B111 * latents_BCHW

    def _shares(self, timesteps_B: Tensor) -> tuple[Tensor, Tensor]:
        alphas_cumprod_B111 = self.alphas_cumprod_T[timesteps_B].reshape(-1, 1, 1, 1)
        return alphas_cumprod_B111.sqrt(), (1 - alphas_cumprod_B111).sqrt()


def add_flow_noise(latents_BCHW: Tensor, noise_BCHW: Tensor, timesteps_B: Tensor) -> Tensor:
    """The noisy latents (B, C, H, W) of a flow: the straight line from latents to noise.

    A timestep is the share of the noise times `TIMESTEPS`. Source: model-facts 1.
    """
    sigma_B111 = (timesteps_B / TIMESTEPS).reshape(-1, 1, 1, 1)
    return sigma_B111 * noise_BCHW + (1 - sigma_B111) * latents_BCHW


def _zero_terminal(alphas_cumprod_T: Tensor) -> Tensor:
    """The schedule, shifted to end at 0 and stretched to keep its beginning.

    Source: arXiv 2305.08891, algorithm 1.
    """
    shares_T = alphas_cumprod_T.sqrt()
    first, last = shares_T[0], shares_T[-1]
    return ((shares_T - last) * (first / (first - last))) ** 2
