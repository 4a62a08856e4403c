"""The VAE that encodes pictures, and the draw of their latents.

Shape suffixes: B pictures, C latent channels, H W height and width in px or latent positions.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capmerge.errors import printable
from capmerge.rng import Chance, SampleId
from trainer.config.settings import CacheSettings, Config
from trainer.errors import LatentsError, ModelError
from trainer.model.vae import load_vae

_PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""The types of latents as files name them."""


class Encoder:
    """A VAE on a device. Raises `ModelError` when the model has none, or a damaged one."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._cache: CacheSettings = config.cache
        vae_of = config.model.model_copy(update={"vae": config.cache.vae or config.model.vae})
        vae = load_vae(config.model_copy(update={"model": vae_of}), instead="set cache.vae")
        if vae is None:
            raise ModelError(
                f"model.path: {printable(config.model.path)} has no VAE, which makes latents of "
                "pictures. Set cache.vae to the folder or the file of one."
            )
        self.fingerprint = _fingerprint(vae)
        """A hash of the values of its weights."""
        self._device, self._dtype = device, _PRECISION[config.cache.vae_precision]
        # The method of diffusers speaks of modules that stay in float32; a VAE has none.
        self._vae: Any = torch.nn.Module.to(vae, device, self._dtype)

    def encode(
        self, pictures: Sequence[NDArray[np.uint8]], stems: Sequence[str]
    ) -> list[dict[str, NDArray[Any]]]:
        """The `latents` of each picture, and its `latents_flipped` if they are asked for.

        Pictures are (height, width, 3) of one size. Latents are (C, H, W), unscaled, in the type of
        the settings. Raises `LatentsError` for latents that are not finite, and where a GPU has
        not enough memory.
        """
        pixels_BHWC = torch.from_numpy(np.stack(pictures)).to(self._device)
        # The order of operations is that of torchvision, with which sd-scripts makes its pictures.
        pictures_BCHW = (pixels_BHWC.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
        pictures_BCHW = pictures_BCHW.to(self._dtype)
        try:
            made = {"latents": self._latents(pictures_BCHW, stems, "latents")}
            if self._cache.flip:
                flipped_BCHW = pictures_BCHW.flip(3)
                made["latents_flipped"] = self._latents(flipped_BCHW, stems, "latents flipped")
        except torch.OutOfMemoryError as error:
            count, _, height, width = pictures_BCHW.shape
            raise LatentsError(
                f"{printable(stems[0])}: not enough memory on {self._device} for {count} pictures "
                f"of {width} x {height} px. Lower cache.batch_size, or set cache.vae_precision to "
                '"bf16".'
            ) from error
        return [
            {name: self._stored(latents[number], stem) for name, latents in made.items()}
            for number, stem in enumerate(stems)
        ]

    @torch.inference_mode()
    def _latents(self, pictures_BCHW: Tensor, stems: Sequence[str], purpose: str) -> Tensor:
        """float32 latents on the CPU."""
        distribution = self._vae.encode(pictures_BCHW).latent_dist
        latents_BCHW: Tensor = distribution.mean.float().cpu()
        if self._cache.latents == "mean":
            return latents_BCHW
        deviations_BCHW: Tensor = distribution.std.float().cpu()
        shape = latents_BCHW.shape[1:]
        noise_BCHW = torch.stack([_noise(shape, self._cache.seed, stem, purpose) for stem in stems])
        return latents_BCHW + deviations_BCHW * noise_BCHW

    def _stored(self, latents_CHW: Tensor, stem: str) -> NDArray[Any]:
        stored_CHW = latents_CHW.to(_PRECISION[self._cache.dtype])
        if not torch.isfinite(stored_CHW).all():
            raise LatentsError(self._not_finite(latents_CHW, stem))
        if stored_CHW.dtype == torch.bfloat16:
            return stored_CHW.view(torch.int16).numpy().view(np.uint16)
        found: NDArray[Any] = stored_CHW.numpy()
        return found

    def _not_finite(self, latents_CHW: Tensor, stem: str) -> str:
        broken = int((~torch.isfinite(latents_CHW)).sum())
        problem = (
            f"{printable(stem)}: {broken} of {latents_CHW.numel()} numbers of its latents are NaN "
            "or infinite, expected none. "
        )
        if not broken:
            return (
                f"{printable(stem)}: its latents are too large for fp16, expected numbers up to "
                '65,504. Set cache.dtype to "fp32" or "bf16".'
            )
        if self._cache.vae_precision == "fp16":
            return problem + (
                "The VAE of SDXL overflows in fp16. Set cache.vae_precision to "
                '"bf16" or "fp32", or cache.vae to an SDXL VAE that was mended for fp16.'
            )
        return problem + "The VAE is damaged, or it is not one of this family. Set cache.vae."


def _noise(shape: torch.Size, seed: int, stem: str, purpose: str) -> Tensor:
    """The same normal noise for a seed and a stem, wherever the picture is encoded."""
    chance = Chance(SampleId(seed, epoch=0, key=stem))
    generator = torch.Generator().manual_seed(chance.below(1 << 63, purpose))
    return torch.randn(shape, generator=generator)


def _fingerprint(vae: torch.nn.Module) -> str:
    hashed = hashlib.blake2b(digest_size=16)
    for name, value in vae.named_parameters():
        hashed.update(f"{name} {tuple(value.shape)} ".encode())
        hashed.update(value.detach().contiguous().numpy().tobytes())
    return hashed.hexdigest()
