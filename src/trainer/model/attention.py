"""How the attention of a model is computed: by kernels of torch in order, or by another package.

Sets what is chosen, and tells the shapes that it is chosen for. The gradients are computed by the
same kernels, also when gradient checkpointing computes a block again in the backward pass.

B batch, T tokens, H heads, D width of a head, C channels.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from capmerge.tokens.chunks import CHUNK_IDS

Kernel = Literal["flash", "cudnn", "efficient", "math"]
KERNELS: dict[Kernel, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""The kernels of torch's scaled dot product attention; only math takes every shape."""


class AttentionShape(NamedTuple):
    """The shape of the queries and keys of an attention layer."""

    batch: int
    heads: int
    width: int
    """Of a head."""
    queries: int
    keys: int
    causal: bool = False


def allowing(order: Sequence[Kernel]) -> AbstractContextManager[Any]:
    """A context in which attention is computed by the first kernel of `order` that can."""
    return sdpa_kernel([KERNELS[name] for name in order], set_priority=True)


class _InOrder(AttnProcessor2_0):
    """The attention of diffusers by torch's kernels, in a given order."""

    def __init__(self, order: Sequence[Kernel]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._order = tuple(order)

    def __call__(self, *arguments: Any, **named: Any) -> Tensor:
        with allowing(self._order):
            states: Tensor = super().__call__(*arguments, **named)
        return states


class _ByPackage:
    """The attention of diffusers by a function (B, T, H, D) x 3 -> (B, T, H, D)."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        self._attend = attend

    def __call__(
        self,
        attention: Any,
        states_BTC: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        assert attention_mask is None, "no model of these families masks its attention"
        context_BTC = states_BTC if encoder_hidden_states is None else encoder_hidden_states
        query_BTHD, key_BTHD, value_BTHD = (
            layer(tokens).unflatten(2, (attention.heads, -1))
            for layer, tokens in (
                (attention.to_q, states_BTC),
                (attention.to_k, context_BTC),
                (attention.to_v, context_BTC),
            )
        )
        out_BTC = self._attend(query_BTHD, key_BTHD, value_BTHD).flatten(2)
        for layer in attention.to_out:
            out_BTC = layer(out_BTC)
        return out_BTC


def use_in_unet(unet: nn.Module, order: Sequence[Kernel]) -> None:
    """Compute the attention of a U-Net by the first kernel of `order` that takes its shape."""
    for _, layer in _layers(unet):
        layer.set_processor(_InOrder(order))


def use_package_in_unet(
    unet: nn.Module, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> None:
    """Compute the attention of a U-Net by a function of queries, keys and values (B, T, H, D)."""
    for _, layer in _layers(unet):
        layer.set_processor(_ByPackage(attend))


def use_in_encoder(encoder: Any, order: Sequence[Kernel]) -> None:
    """Compute the attention of a text encoder by the first kernel of `order` that takes it."""

    def forward(*arguments: Any, **named: Any) -> Any:
        with allowing(order):
            return sdpa_attention_forward(*arguments, **named)

    # By their first letters: a name with "flash" in it means another package to transformers.
    name = "sdpa_" + "".join(kernel[0] for kernel in order)
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    encoder.set_attn_implementation(name)


def unet_shapes(
    unet: Any, batch: int, height: int, width: int, text_tokens: int
) -> Counter[AttentionShape]:
    """The shapes of a U-Net's attention for latents of (height, width), and how often they come."""
    levels = len(unet.down_blocks)
    shapes: Counter[AttentionShape] = Counter()
    for name, layer in _layers(unet):
        # down_blocks.1.attentions.0..., mid_block.attentions.0..., up_blocks.1.attentions.0...
        place, number, *_ = name.split(".")
        level = (
            levels - 1
            if place == "mid_block"
            else int(number)
            if place == "down_blocks"
            else levels - 1 - int(number)
        )
        queries = -(-height // 2**level) * -(-width // 2**level)
        head_width = layer.to_q.out_features // layer.heads
        keys = text_tokens if layer.is_cross_attention else queries
        shapes[AttentionShape(batch, layer.heads, head_width, queries, keys)] += 1
    return shapes


def encoder_shapes(encoder: Any, chunks: int) -> Counter[AttentionShape]:
    """The shapes of a text encoder's attention for so many chunks, and how often they come."""
    config = encoder.config
    width = config.hidden_size // config.num_attention_heads
    shape = AttentionShape(
        chunks, config.num_attention_heads, width, CHUNK_IDS, CHUNK_IDS, causal=True
    )
    return Counter({shape: config.num_hidden_layers})


def _layers(unet: nn.Module) -> list[tuple[str, Any]]:
    """The attention layers of a U-Net by name."""
    return [(name, part) for name, part in unet.named_modules() if isinstance(part, Attention)]
