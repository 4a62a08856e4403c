"""From token ids to the states that the U-Net sees: layer, joined chunks, pooled vector.

B batch, N chunks, L 77, T joined length, D text width, P pooled width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capmerge.tokens.chunks import EOS_ID, Chunking
from trainer.families import FAMILIES, EncoderRule, FamilyName
from trainer.model.device_copy import copy_to


def encoder_rules(family: FamilyName, clip_skip: int | None = None) -> tuple[EncoderRule, ...]:
    """One rule for each text encoder of a family.

    `clip_skip`, for SD1 alone, is the layer to take, counted from the end.
    """
    rules = FAMILIES[family].encoders
    if clip_skip is None:
        return rules
    assert family == "sd1", "config refuses clip_skip for other families"
    return (rules[0]._replace(layer=clip_skip),)


def encode(
    encoder: nn.Module, ids_BNL: Tensor, rule: EncoderRule, chunking: Chunking
) -> tuple[Tensor, Tensor | None]:
    """The joined states (B, T, D) of a batch, and the pooled vector (B, P) if the rule has one.

    `encoder` is a CLIPTextModel of transformers, with projection if the rule pools; it is called
    once for all chunks. T is 75 N + 2 for kohya and crop, 77 N for a1111.
    """
    body = encoder_body(encoder)
    n_batch, n_chunks, n_ids = ids_BNL.shape
    out = body(
        input_ids=ids_BNL.reshape(n_batch * n_chunks, n_ids),
        output_hidden_states=not (rule.layer == 1 and rule.final_norm),
    )
    if rule.layer == 1 and rule.final_norm:
        hidden = out.last_hidden_state
    else:
        hidden = out.hidden_states[-rule.layer]
        hidden = body.final_layer_norm(hidden) if rule.final_norm else hidden
    joined_BTD = join_chunks(hidden.unflatten(0, (n_batch, n_chunks)), chunking)
    if not rule.pooled:
        return joined_BTD, None
    first_BLD = out.last_hidden_state.unflatten(0, (n_batch, n_chunks))[:, 0]
    projection: Any = encoder.text_projection
    return joined_BTD, projection(_at_first_eos(first_BLD, ids_BNL[:, 0]))


def encoder_body(encoder: nn.Module) -> Any:
    """The part of a text encoder with embeddings, layers and final norm."""
    # From transformers 5 on, CLIPTextModel has no inner model.
    return getattr(encoder, "text_model", encoder)


def join_chunks(hidden_BNLD: Tensor, chunking: Chunking) -> Tensor:
    """The states of all chunks as one sequence (B, T, D).

    For a1111 whole chunks side by side, otherwise the first BOS, the 75 positions within each
    chunk, and the very last position.
    """
    if chunking == "a1111":
        return hidden_BNLD.flatten(1, 2)
    return torch.cat(
        [hidden_BNLD[:, 0, :1], hidden_BNLD[:, :, 1:-1].flatten(1, 2), hidden_BNLD[:, -1, -1:]],
        dim=1,
    )


def _at_first_eos(normed_BLD: Tensor, ids_BL: Tensor) -> Tensor:
    """The state at the first EOS (B, D), or at BOS in a chunk without EOS.

    EOS is CLIP's id: the encoder's own `eos_token_id` is 2 in many stored configs, which
    transformers reads as "the highest id".
    """
    positions_B = (ids_BL == EOS_ID).int().argmax(dim=1)
    return normed_BLD[torch.arange(len(positions_B), device=normed_BLD.device), positions_B]


def add_noise(hidden_BTD: Tensor, seeds: Sequence[int], std: float) -> Tensor:
    """The states plus Gaussian noise of standard deviation `std`.

    The noise of a sample depends on its seed alone. Source: arXiv 2305.20086.
    """
    noise = [
        torch.randn(
            hidden_BTD.shape[1:], generator=torch.Generator().manual_seed(seed), device="cpu"
        )
        for seed in seeds
    ]
    return hidden_BTD + std * copy_to(hidden_BTD.device, torch.stack(noise)).to(hidden_BTD.dtype)
