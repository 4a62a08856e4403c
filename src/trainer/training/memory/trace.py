"""What a training step allocates, found by taking one with tensors that have shapes but no values.

The real model, loss and backward pass run on torch's `meta` device, where nothing is computed and
no memory is needed. What CUDA would do otherwise is brought in: the types of autocast, and the
attention that keeps no matrix of all pairs. Knows no engine, no ranks and no optimizer.
"""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

META = torch.device("meta")

_IN_LOW_PRECISION = frozenset(
    {"linear", "conv2d", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "einsum"}
)
_IN_FLOAT32 = {
    "cuda": frozenset(
        {"layer_norm", "group_norm", "softmax", "exp", "pow", "sum", "interpolate", "rsqrt"}
    ),
    "cpu": frozenset({"interpolate"}),
}
"""The functions that autocast computes in its type, and in float32 on each device.

Only those that the models of the families call. Source: torch's ATen/autocast_mode.h.
"""


class StepBytes(NamedTuple):
    """Bytes of one micro-batch on the device, besides the weights."""

    saved: int
    """What the forward pass keeps for the backward pass, the copies of weights by autocast too."""
    peak: int
    """The most at any moment of both passes, what is saved and the gradients among it."""
    largest: int
    """The largest single tensor that is made."""


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that counts the bytes of the tensors that are made in it and still alive.

    A tensor that was made outside counts for nothing, also when it is changed or viewed inside.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.largest = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function of torch, and count the memory of its results."""
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                storage = result.untyped_storage()
                if key_of(storage) not in self._sizes:
                    self._add(storage, 0 if _changes_or_views(func) else storage.nbytes())
        return results

    def _add(self, storage: torch.UntypedStorage, size: int) -> None:
        key = key_of(storage)
        self._sizes[key] = size
        weakref.finalize(storage, self._free, key)
        self.live += size
        self.largest = max(self.largest, size)
        self.peak = max(self.peak, self.live)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key)


def key_of(storage: torch.UntypedStorage) -> int:
    """A number that a storage has as long as it lives, and no other has meanwhile."""
    key: int = storage._cdata  # noqa: SLF001 -- torch has no public name for it
    return key


@cache
def _changes_or_views(function: Any) -> bool:
    """True if the results of a function of torch have the memory of its arguments."""
    return any(result.alias_info is not None for result in function._schema.returns)  # noqa: SLF001


@dataclass(frozen=True, slots=True)
class Rules:
    """How the device computes that a trace stands for."""

    device: str = "cuda"
    autocast: torch.dtype | None = None
    """The type of autocast, or None without it."""


class _AsOn(TorchFunctionMode):
    """A context in which functions of torch treat meta tensors as a device would its own."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self._device, self._low = rules.device, rules.autocast
        self._casts: dict[int, Tensor] = {}
        self.keeps_casts = False

    def forget_casts(self) -> None:
        """Drop the copies of weights, as autocast does at the end of its context."""
        self._casts.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call the function of torch, with the arguments that it would get on the device."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            return self._attention(*self._cast(args, self._low), **self._cast(kwargs, self._low))
        if self._low and name in _IN_LOW_PRECISION:
            args, kwargs = self._cast(args, self._low), self._cast(kwargs, self._low)
        elif self._low and name in _IN_FLOAT32[self._device]:
            args, kwargs = self._cast(args, torch.float32), self._cast(kwargs, torch.float32)
        return func(*args, **kwargs)

    def _cast(self, values: Any, dtype: torch.dtype | None) -> Any:
        """The arguments with all floating tensors in `dtype`; as they are if that is None."""
        return tree_map(lambda value: self._one_cast(value, dtype), values) if dtype else values

    def _one_cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        is_kept = self.keeps_casts and value.is_leaf and value.requires_grad and dtype == self._low
        if not is_kept:
            return value.to(dtype)
        if id(value) not in self._casts:
            self._casts[id(value)] = value.to(dtype)
        return self._casts[id(value)]

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # noqa: FBT001, FBT002 -- the signature of torch
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        """Attention by a kernel that keeps its inputs, its result and one number per query.

        All kernels but the plain one do, which torch takes for nothing else either.
        """
        ops: Any = torch.ops.aten
        if self._device == "cpu":
            results = ops._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        elif attn_mask is None and query.dtype != torch.float32:
            results = ops._scaled_dot_product_flash_attention(  # noqa: SLF001
                query, key, value, dropout_p, is_causal, scale=scale
            )
        else:
            needs_sums = query.requires_grad or key.requires_grad or value.requires_grad
            results = ops._scaled_dot_product_efficient_attention(  # noqa: SLF001
                query, key, value, attn_mask, needs_sums, dropout_p, is_causal, scale=scale
            )
        attended: Tensor = results[0]
        return attended


def trace_step(
    loss_of: Callable[[], Tensor],
    model: nn.Module,
    rules: Rules,
    *,
    keeps_gradients: bool,
) -> StepBytes:
    """The bytes of a forward and a backward pass of `model`, whose weights are on `META`.

    `loss_of` runs the forward pass and returns the loss. With `keeps_gradients` the gradients stay,
    and count from when they are made; else each is dropped once it is complete.
    """
    trained: list[Any] = [one for one in model.parameters() if one.requires_grad]
    hooks = [
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
        for parameter in ([] if keeps_gradients else trained)
    ]
    with _AsOn(rules) as mode, LiveBytes() as live:
        mode.keeps_casts = True
        loss = loss_of()
        mode.keeps_casts = False
        mode.forget_casts()
        gc.collect()  # the outputs of transformers hold each other
        saved = live.live
        _run_backward(loss)
    for hook in hooks:
        hook.remove()
    for parameter in trained:
        parameter.grad = None
    return StepBytes(saved, live.peak, live.largest)


def _run_backward(loss: Tensor) -> None:
    """Run the backward pass with the modes of this thread on.

    `loss.backward()` and `torch.autograd.backward` turn the innermost mode off, and what gradient
    checkpointing computes again would be computed without it.
    """
    engine: Any = torch.autograd.Variable._execution_engine  # noqa: SLF001
    arguments = ((loss,), (torch.ones_like(loss),), False, False, ())
    engine.run_backward(*arguments, allow_unreachable=True, accumulate_grad=True)


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
