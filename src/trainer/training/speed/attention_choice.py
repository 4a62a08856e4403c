"""Which kernels compute the attention: as `speed.attention` asks, or the fastest on this card."""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.tokens.chunks import CHUNK_TOKENS
from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.families import FAMILIES
from trainer.model.attention import (
    AttentionShape,
    Kernel,
    allowing,
    encoder_shapes,
    unet_shapes,
    use_in_encoder,
    use_in_unet,
    use_package_in_unet,
)
from trainer.model.model import Model
from trainer.training.engines.accelerator import from_rank_0

FUSED: tuple[Kernel, ...] = ("flash", "cudnn", "efficient")
"""The kernels that are measured, in the order that decides between equals."""
_ON_A_CPU = ("flash", "math")
_PACKAGES = {
    # Setting: module, function, and what to install.
    "xformers": ("xformers.ops", "memory_efficient_attention", "xformers"),
    "flash-attention": ("flash_attn", "flash_attn_func", "flash-attn"),
}
_EQUAL = 1.05
"""Times closer than this count as equal, so that noise decides nothing at the next start."""
_WARM, _TIMED = 3, 7
_USUAL_CHUNKS = 3
"""The chunks that are measured where captions have no limit; 225 tokens are sd-scripts' limit."""
_TYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "full_bf16": torch.bfloat16,
}

Times = Mapping[Kernel, Mapping[AttentionShape, float]]
"""Milliseconds of each kernel for the shapes that it takes."""


def choose_attention(model: Model, config: Config, engine: Accelerator) -> str:
    """Set how the attention of `model` is computed, and return the choice in words.

    Every rank has to call this: rank 0 measures, and all take what it has found. Raises
    `ConfigError` for kernels that cannot be used here and packages that are not installed.
    """
    asked, device = config.speed.attention, engine.device
    if asked in _PACKAGES:
        use_package_in_unet(model.unet, _package(asked, config, device))
        if device.type == "cuda":
            _use_in_encoders(model, encoders := _order(model, config, engine, "text"))
            return f"attention: U-Net {asked}, text encoders {encoders[0]}"
        return f"attention: U-Net {asked}"
    if device.type != "cuda":
        if asked == "auto":
            return f"attention: chosen by torch, on {device.type}"
        if asked not in _ON_A_CPU:
            raise ConfigError(
                f'speed.attention = "{asked}": found the device {device.type}, expected a CUDA '
                'device, which alone has this kernel. Set it to "auto".'
            )
    orders = [_order(model, config, engine, part) for part in ("unet", "text")]
    use_in_unet(model.unet, orders[0])
    _use_in_encoders(model, orders[1])
    return f"attention: U-Net {orders[0][0]}, text encoders {orders[1][0]}"


def _use_in_encoders(model: Model, order: tuple[Kernel, ...]) -> None:
    for _, encoder in model.text_encoders():
        use_in_encoder(encoder, order)


def _package(asked: str, config: Config, device: torch.device) -> Callable[..., Tensor]:
    """The attention function of a package, tried on a small shape."""
    module, function, install = _PACKAGES[asked]
    try:
        attend: Callable[..., Tensor] = getattr(import_module(module), function)
    except (ImportError, AttributeError, OSError) as error:
        raise ConfigError(
            f'speed.attention = "{asked}": {module} cannot be imported ({error}). Install it (pip '
            f'install {install}), or set speed.attention to "auto", which needs no package.'
        ) from error
    tokens_BTHD = torch.randn(1, 64, 2, 64, device=device, dtype=_TYPES[config.train.precision])
    tokens_BTHD.requires_grad_()
    try:
        torch.autograd.backward(attend(tokens_BTHD, tokens_BTHD, tokens_BTHD).sum())
    except Exception as error:  # another package may raise anything about its arguments
        raise ConfigError(
            f'speed.attention = "{asked}": it cannot train on {device.type} with train.precision = '
            f'"{config.train.precision}" ({_in_short(error)}), expected a CUDA device, and for '
            'flash-attention bf16 or fp16. Set speed.attention to "auto".'
        ) from error
    return attend


def _order(model: Model, config: Config, engine: Accelerator, part: str) -> tuple[Kernel, ...]:
    """The kernels for the U-Net or the text encoders in the order of preference, on all ranks."""
    asked = config.speed.attention
    if asked == "math" or engine.device.type != "cuda":
        assert asked in _ON_A_CPU
        return ("math",) if asked == "math" else ("flash", "math")
    found: tuple[tuple[Kernel, ...], str] = from_rank_0(
        engine,
        _measured_order(model, config, engine.device, part) if engine.is_main_process else ((), ""),
    )
    order, problem = found
    if problem:
        raise ConfigError(problem)
    return order


def _measured_order(
    model: Model, config: Config, device: torch.device, part: str
) -> tuple[tuple[Kernel, ...], str]:
    """The order by measured time, beginning with the kernel that is asked for, or a problem."""
    shapes, backward = _shapes(model, config, part)
    asked = config.speed.attention
    dtype = _TYPES[config.train.precision]
    times: Times = {
        kernel: {
            shape: milliseconds
            for shape in shapes
            if (milliseconds := _time(kernel, shape, dtype, device, backward=backward)) is not None
        }
        for kernel in FUSED
    }
    order = rank_kernels(times, shapes)
    if asked in FUSED and part == "unet" and asked not in order:
        return (), (
            f'speed.attention = "{asked}": this kernel takes none of the shapes of the U-Net on '
            f'{torch.cuda.get_device_name(device)} with train.precision = "'
            f'{config.train.precision}". Set it to "auto".'
        )
    if asked in order:
        order = (asked, *(kernel for kernel in order if kernel != asked))
    return order, ""


def rank_kernels(times: Times, shapes: Counter[AttentionShape]) -> tuple[Kernel, ...]:
    """The kernels that take any of the shapes, the fastest for all of them together first.

    Where a kernel cannot take a shape, the fastest other one is counted, as the order falls back
    to it. `math`, which takes every shape, is the last resort. Times within 5 % of the fastest
    count as equal; then the order of `FUSED` decides.
    """
    able = [kernel for kernel in times if times[kernel]]
    fastest = {
        shape: min(found[shape] for found in times.values() if shape in found)
        for shape in shapes
        if any(shape in found for found in times.values())
    }
    totals = {
        kernel: sum(
            count * times[kernel].get(shape, fastest.get(shape, 0.0))
            for shape, count in shapes.items()
        )
        for kernel in able
    }
    best = min(totals.values(), default=0.0)
    rest = sorted(
        able, key=lambda kernel: 0.0 if totals[kernel] <= _EQUAL * best else totals[kernel]
    )
    return (*rest, "math")


def _shapes(model: Model, config: Config, part: str) -> tuple[Counter[AttentionShape], bool]:
    """The shapes of a part for pictures of the family's own size, and whether it has gradients."""
    family, text = FAMILIES[config.model.family], config.text
    side = family.side_px // PIXELS_PER_LATENT
    n_chunks = 1 if text.chunking == "crop" else _USUAL_CHUNKS
    if text.chunking != "crop" and text.max_tokens != "unlimited":
        n_chunks = text.max_tokens // CHUNK_TOKENS
    batch = config.train.batch_size
    if part == "unet":
        return unet_shapes(model.unet, batch, side, side, n_chunks * CHUNK_TOKENS + 2), True
    shapes: Counter[AttentionShape] = Counter()
    for _, encoder in model.text_encoders():
        shapes += encoder_shapes(encoder, batch * n_chunks)
    return shapes, any(encoder.training for _, encoder in model.text_encoders())


def _time(
    kernel: Kernel,
    shape: AttentionShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    backward: bool,
) -> float | None:
    """The median time of an attention layer in milliseconds; None if the kernel cannot take it."""
    batch, heads, width, queries, keys, causal = shape

    def tokens(count: int) -> Tensor:
        made = torch.randn(batch, heads, count, width, device=device, dtype=dtype)
        return made.requires_grad_(backward)

    query, key, value = tokens(queries), tokens(keys), tokens(keys)
    times: list[float] = []
    with warnings.catch_warnings(), suppress(RuntimeError):
        # Torch warns of each reason, and then raises, when no allowed kernel takes the shape.
        warnings.simplefilter("ignore")
        for _ in range(_WARM + _TIMED):
            start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
            start.record()
            with allowing((kernel,)):
                out: Any = scaled_dot_product_attention(query, key, value, is_causal=causal)
            if backward:
                out.backward(out.detach())
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    if not times:
        return None
    return statistics.median(times[_WARM:])


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
