"""DeepSpeed as the engine of a run: its config, and a step with it.

It knows DeepSpeed's own names. That package takes two seconds to import, so it is imported, by
accelerate, in runs alone that ask for it.
"""

import json
import math
import os
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin
from torch import Tensor
from torch.nn import Module, Parameter

from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.training.engines.torch_step import Taken
from trainer.training.optimizer.stepping import clip_gradients

PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16", "full_bf16": "bf16"}
"""What accelerate calls the precision in which DeepSpeed computes, by `train.precision`."""


def prepare_process(*, has_device: bool) -> None:
    """Set what DeepSpeed reads from the environment, where a launcher has not set it.

    Without a launcher the run has this process alone. Without a device, tensors are on the CPU; by
    `cpu=True` accelerate would leave out DeepSpeed without a word.
    """
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    # With this list of its own settings accelerate would refuse any other source of them.
    # `launcher.agreed` has compared each of them with the config.
    os.environ.pop("ACCELERATE_CONFIG_DS_FIELDS", None)
    # DeepSpeed 0.19 calls what torch 2.13 has under another name since, on each rank.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
    if not has_device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
        # On its first run on a CPU, DeepSpeed would compile sums in shared memory of its own. That
        # takes minutes, and if it is killed meanwhile, all later runs wait for the lock that it
        # leaves. gloo does the same work.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False


def build_plugin(config: Config, file: Mapping[str, Any]) -> DeepSpeedPlugin:
    """What accelerate needs to know to start DeepSpeed as `[engine]` says.

    `file` is the config of DeepSpeed that the launcher names, which does not contradict `config`;
    what it says besides is kept. Raises `ConfigError` for what accelerate refuses in it.
    """
    content = _merged(_merged(_DEFAULTS, _without_auto(file)), _asked_of(config))
    try:
        return DeepSpeedPlugin(hf_ds_config=content, zero3_init_flag=config.engine.zero3_init_flag)
    except ValueError as error:
        raise ConfigError(f"accelerate refuses the settings of DeepSpeed: {error}") from error


def iter_overruled(file: Mapping[str, Any], path: str, config: Config, ranks: int) -> Iterator[str]:
    """What a config file of DeepSpeed at `path` has otherwise than the run will set it."""
    train = config.train
    ours = {**_asked_of(config), "train_batch_size": train.batch_size * train.accumulation * ranks}
    values = dict(_leaves(ours))
    for name, value in _leaves(_without_auto(file)):
        if values.get(name) not in (None, value):
            yield (
                f"{path}: found {name}: {json.dumps(value)}, but the run sets it to "
                f"{json.dumps(values[name])}. Remove it."
            )


def _leaves(table: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a table and of those in it, by `section.key`."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{start}{key}.")
        else:
            yield f"{start}{key}", value


def _asked_of(config: Config) -> dict[str, Any]:
    """What the config of a run asks of DeepSpeed, as DeepSpeed's own config has it."""
    engine, train = config.engine, config.train
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": config.optimizer.clip_grad_norm,
        "zero_allow_untested_optimizer": True,
        # Its own Adam has to be compiled where the run starts, so it is taken only where it alone
        # can do what is asked.
        "zero_force_ds_cpu_optimizer": engine.fp16_master_weights_and_gradients,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "offload_optimizer": _device(
                engine.offload_optimizer_device, engine.offload_optimizer_nvme_path
            ),
            "offload_param": _device(engine.offload_param_device, engine.offload_param_nvme_path),
            "stage3_gather_16bit_weights_on_model_save": engine.zero3_save_16bit_model,
        },
        "fp16": {
            "enabled": train.precision == "fp16",
            "fp16_master_weights_and_grads": engine.fp16_master_weights_and_gradients,
        },
        "bf16": {
            "enabled": train.precision in ("bf16", "full_bf16"),
            "bf16_master_weights_and_grads": train.precision == "full_bf16",
            "bf16_optimizer_states": train.precision == "full_bf16",
        },
    }


BUCKET = 200_000_000
"""Numbers in the buffer through which gradients are reduced: 0.4 GB in 16 bits.

DeepSpeed would take 1 GB.
"""
_DEFAULTS: dict[str, Any] = {
    # As torch does where DeepSpeed does not scale the losses.
    "fp16": {"initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1},
    "zero_optimization": {"reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
}
"""What DeepSpeed does where its config file says nothing."""


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables in one; where both have a value, that of `other`."""
    both = {**one, **other}
    for key in one.keys() & other.keys():
        if isinstance(one[key], Mapping) and isinstance(other[key], Mapping):
            both[key] = _merged(one[key], other[key])
    return both


def _without_auto(file: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config file that say something."""
    return {
        key: _without_auto(value) if isinstance(value, Mapping) else value
        for key, value in file.items()
        if value != "auto"
    }


def name_of(stage: int, optimizer_device: str, weights_device: str) -> str:
    """What the engine is, for people: `DeepSpeed ZeRO-3, optimizer in cpu, weights in nvme`."""
    parts = [f"DeepSpeed ZeRO-{stage}"]
    for what, device in (("optimizer", optimizer_device), ("weights", weights_device)):
        parts += [] if device == "none" else [f"{what} in {device}"]
    return ", ".join(parts)


def name_of_plugin(plugin: DeepSpeedPlugin) -> str:
    """The name of the engine that a plugin starts."""
    zero = plugin.deepspeed_config["zero_optimization"]
    devices = [
        (zero.get(key) or {}).get("device", "none")
        for key in ("offload_optimizer", "offload_param")
    ]
    return name_of(zero["stage"], *devices)


def _device(device: str, nvme_path: str) -> dict[str, Any]:
    return {"device": device, "nvme_path": nvme_path or None}


def divide_early(plugin: DeepSpeedPlugin, model: Module, precision: str) -> None:
    """With `engine.zero3_init_flag`, divide the weights of a model on the CPU among the ranks.

    Otherwise each device holds all of them for a moment, when the engine is prepared.
    """
    if not plugin.zero3_init_flag:
        return
    import deepspeed

    dtype = _DTYPES.get(precision)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if dtype else parameter.data
    # accelerate has a copy of the config without its "auto".
    deepspeed.zero.Init(module=model, config_dict_or_path=plugin.dschf.config, dtype=dtype)


_DTYPES = {"bf16": torch.bfloat16, "full_bf16": torch.bfloat16, "fp16": torch.float16}
"""The type of the weights with which DeepSpeed computes, where that is not float32."""


@contextmanager
def exact_masters(config: Config, model: Module) -> Iterator[None]:
    """A context for the preparation of a model, after which it steps weights as exact as its own.

    For computation in 16 bits, DeepSpeed rounds the weights first and then makes of these the
    float32 ones that are stepped: a model in float32 would begin with an error of up to 0.4 %.
    """
    engine = config.engine
    on_disk = "nvme" in (engine.offload_optimizer_device, engine.offload_param_device)
    if config.train.precision not in ("bf16", "fp16") or on_disk or engine.zero3_init_flag:
        yield
        return
    exact = {
        parameter: parameter.detach() for parameter in model.parameters() if parameter.requires_grad
    }
    yield
    from deepspeed.utils import safe_set_full_fp32_param

    for parameter, weight in exact.items():
        safe_set_full_fp32_param(parameter, weight.to(parameter.device, torch.float32))


def gathered(
    *parameters: Parameter, modifier_rank: int | None = None
) -> AbstractContextManager[Any]:
    """A context in which weights that stage 3 has divided are whole; others are so anyway.

    What `modifier_rank` changes in them, all ranks have afterwards.
    """
    divided = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not divided:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(  # type: ignore[no-any-return]
        divided, modifier_rank=modifier_rank
    )


def register_shared_reads(model: Module) -> None:
    """Tell stage 3 of the weights that a module reads of another one before that is passed.

    CLIP's embeddings look at the table of positions for its length. A weight that is just being
    gathered for the next pass would have none.
    """
    import deepspeed

    for module in model.modules():
        positions = getattr(module, "position_embedding", None)
        if isinstance(positions, Module) and hasattr(positions.weight, "ds_id"):
            deepspeed.zero.register_external_parameter(module, positions.weight)


class DeepSpeedStep:
    """The passes and the step of DeepSpeed's engine, which clips and leaves out steps by itself."""

    has_begun = False

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        # At stage 3 each module gathers its weights from all ranks as it is passed.
        self.can_repeat_pass = int(engine.zero_optimization_stage()) < 3
        self._steps = 0
        engine.basic_optimizer.register_step_post_hook(self._count)
        self._trained = [p for p in engine.module.parameters() if p.requires_grad]
        # At stage 0 in fp32 its optimizer is that of torch, which knows no broken gradients.
        self._checks_gradient = hasattr(engine.optimizer, "overflow")
        if engine.fp16_enabled():
            # A scale of 1 that overflows is a broken gradient as in any other precision.
            engine.optimizer.loss_scaler.raise_error_at_min_scale = False

    def _count(self, *_: Any) -> None:
        self._steps += 1

    @contextmanager
    def passes(self, *, last: bool) -> Iterator[None]:
        """A context for the two passes of a micro-batch; `last` is the last one of its step."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, averaged over the ranks after the last pass of a step."""
        # The loss is a share of the whole step's mean already.
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, sums: Tensor) -> Taken:
        """Read the sums back, and let DeepSpeed clip and step.

        It leaves out the step by itself, on all ranks alike, if the gradient is not finite. Raises
        `RuntimeError` when a step that it tells of did not reach the optimizer.
        """
        values = tuple(sums.tolist())
        if values[-1] > 0:
            return Taken(False, math.nan, values, None)
        scale = self._engine.optimizer.loss_scale if self._engine.fp16_enabled() else None
        norm: float | None = None
        if not self._checks_gradient:
            norm = clip_gradients(self._trained, 0).item()
            if not math.isfinite(norm):
                self._engine.zero_grad()
                return Taken(False, norm, values, scale)
        steps = self._steps
        self._engine.step()
        if not self._engine.was_step_applied():
            return Taken(False, math.inf, values, scale)
        if self._steps == steps:
            raise RuntimeError(
                "DeepSpeed tells of a step that it did not pass on to the optimizer: the weights "
                "are as before. This is a bug."
            )
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        return Taken(True, norm, values, scale)
