"""The model of a run: one `nn.Module`, so that one wrapper of DDP or DeepSpeed holds all of it.

Decides which part runs with gradients.

B batch, N chunks, L 77, T joined length, D text width, P pooled width, C H W latents.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from trainer.config.settings import TextSettings
from trainer.families import FamilyName
from trainer.model.text_encoders import add_noise, encode, encoder_rules

PARTS = ("unet", "text_encoder", "text_encoder_2")
"""The parts of a model, as a diffusers folder names them."""


class Model(nn.Module):
    """A U-Net and its text encoders.

    The parameters are named `unet.*`, `text_encoder.*` and, for SDXL, `text_encoder_2.*`. A part
    without a parameter to train stays in eval mode, and a text encoder without one runs without
    gradients.
    """

    def __init__(
        self,
        unet: nn.Module,
        text_encoders: Sequence[nn.Module],
        family: FamilyName,
        text: TextSettings,
    ) -> None:
        super().__init__()
        self.family = family
        self.unet = unet
        self.text_encoder = text_encoders[0]
        self.text_encoder_2 = text_encoders[1] if len(text_encoders) > 1 else None
        self._rules = encoder_rules(family, text.clip_skip)
        self._chunking = text.chunking
        self._embedding_noise = text.embedding_noise

    def parts(self) -> dict[str, nn.Module]:
        """U-Net and text encoders by name, in the order of `PARTS`."""
        return {name: part for name in PARTS if (part := getattr(self, name)) is not None}

    def text_encoders(self) -> list[tuple[str, nn.Module]]:
        """The text encoders by name, in the order of the family's tokenizers."""
        return [(name, part) for name, part in self.parts().items() if name != "unet"]

    def train(self, mode: bool = True) -> "Model":  # noqa: FBT001, FBT002 - torch's signature
        """Switch to training mode, except for the parts that are frozen."""
        super().train(mode)
        for part in self.parts().values():
            part.train(mode and _is_trained(part))
        return self

    def forward(
        self,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        ids: tuple[Tensor, ...],
        size_B6: Tensor | None = None,
        text_noise_seeds: Sequence[int] | None = None,
    ) -> Tensor:
        """The U-Net's prediction, (B, C, H, W) float32.

        `ids` are (B, N, L) int64, one tensor for each text encoder; (1, N, L) is one text for all
        samples, which is encoded once. `size_B6` is float32: original
        height and width, crop top and left, target height and width in pixels, for SDXL alone,
        whose U-Net embeds them itself. `text_noise_seeds` are only read if the run adds noise to
        the text states, which it does in training mode alone.
        """
        hidden_BTD, pooled_BP = self.encode_text(ids)
        if len(hidden_BTD) < len(noisy_BCHW):
            hidden_BTD = hidden_BTD.expand(len(noisy_BCHW), -1, -1)
            pooled_BP = None if pooled_BP is None else pooled_BP.expand(len(noisy_BCHW), -1)
        if self._embedding_noise and self.training:
            assert text_noise_seeds is not None
            hidden_BTD = add_noise(hidden_BTD, text_noise_seeds, self._embedding_noise)
        return self.predict(noisy_BCHW, timesteps_B, hidden_BTD, pooled_BP, size_B6)

    def encode_text(self, ids: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """The text states that the U-Net sees (B, T, D), and the pooled vector (B, P) for SDXL."""
        states: list[Tensor] = []
        pooled_BP = None
        for (_, encoder), rule, ids_BNL in zip(self.text_encoders(), self._rules, ids, strict=True):
            # In training mode `train` has looked at the parameters, of which there are hundreds.
            needs_grad = encoder.training if self.training else _is_trained(encoder)
            with torch.set_grad_enabled(torch.is_grad_enabled() and needs_grad):
                hidden_BTD, pooled_BP = encode(encoder, ids_BNL, rule, self._chunking)
            states.append(hidden_BTD)
        return torch.cat(states, dim=2), pooled_BP

    def predict(
        self,
        noisy_BCHW: Tensor,
        timesteps_B: Tensor,
        hidden_BTD: Tensor,
        pooled_BP: Tensor | None,
        size_B6: Tensor | None,
    ) -> Tensor:
        """The U-Net's prediction (B, C, H, W) float32 for text states that are encoded already."""
        dtype = cast("Any", self.unet).conv_in.weight.dtype
        added = None if pooled_BP is None else {"text_embeds": pooled_BP, "time_ids": size_B6}
        (prediction_BCHW,) = self.unet(
            noisy_BCHW.to(dtype),
            timesteps_B,
            hidden_BTD.to(dtype),
            added_cond_kwargs=added,
            return_dict=False,
        )
        return cast("Tensor", prediction_BCHW).float()


def _is_trained(part: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in part.parameters())
