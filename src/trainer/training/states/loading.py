"""A saved state taken over by a run, whatever engine and however many ranks saved it.

A state of the same layout is loaded by the engine that saved it, which is exact. Any other one is
read whole, a weight at a time, and each rank takes its part of the weights and of what the
optimizer keeps for them.
"""

from typing import Any

from trainer.errors import ResumeError
from trainer.training.engines.masters import innermost
from trainer.training.states.checkpoint import SavedState, load_state
from trainer.training.states.saved_tensors import is_of_deepspeed, saved_tensors
from trainer.training.step import TrainState

_PLAIN: dict[str, Any] = {"engine": "torch"}
"""The layout of one process and of DDP: the first rank saves all, for any number of them."""


def layout_of(state: TrainState) -> dict[str, Any]:
    """Which engine trains, and what decides how it divides its states."""
    if state.masters.stage is None:
        return _PLAIN
    zero = state.engine.deepspeed_plugin.deepspeed_config["zero_optimization"]
    offload = {
        name: (zero.get(name) or {}).get("device") or "none"
        for name in ("offload_optimizer", "offload_param")
    }
    return {
        "engine": "deepspeed",
        "zero_stage": state.masters.stage,
        "ranks": state.engine.num_processes,
        "precision": state.config.train.precision,
        "masters": "fp16" if state.config.engine.fp16_master_weights_and_gradients else "own",
        **offload,
    }


def load_into(state: TrainState, saved: SavedState) -> list[str]:
    """Load a state into a run; the change of layout, as lines to show.

    Every rank has to call this. Raises `ResumeError` when the state is damaged or does not fit.
    """
    layout = layout_of(state)
    was = saved.layout or ({} if is_of_deepspeed(saved.folder) else _PLAIN)
    state.scaling.load(saved.loss_scale)
    state.masters.set_loss_scale(saved.loss_scale)
    if was == layout:
        load_state(state.engine, saved)
        return []
    if state.masters.is_swapped or "nvme" in was.values():
        raise ResumeError(
            f"{saved.folder}: found a state of {_shown(was)}, and this run is one of "
            f"{_shown(layout)}. What lies on an NVMe disk goes on with the same [engine] and ranks "
            "alone, expected those. Set them as they were. The model at the end of a run can begin "
            "a new one with any [engine]."
        )
    masters = state.masters
    is_same_optimizer = state.config.optimizer.name == saved.identity.get("optimizer.name")
    trained = [part.name for part in masters.parts]
    with saved_tensors(saved.folder, trained) as tensors:
        masters.load(
            tensors.weight,
            tensors.kept if is_same_optimizer else lambda _: {},
            tensors.options
            if is_same_optimizer
            else [{} for _ in innermost(state.optimizer).param_groups],
        )
    line = f"the state of {_shown(was)} was divided anew for {_shown(layout)}"
    if was.get("engine") != layout["engine"] and state.config.train.precision in ("bf16", "fp16"):
        line += ", which rounds in other places while it computes in 16 bits"
    return [line]


def _shown(layout: dict[str, Any]) -> str:
    """A layout for people, such as `DeepSpeed ZeRO-2 on 4 ranks in bf16`."""
    if layout == _PLAIN:
        return "DDP or one device"
    if not layout:
        return "DeepSpeed"
    offload = "".join(
        f", {name.removeprefix('offload_')} in {layout[name]}"
        for name in ("offload_optimizer", "offload_param")
        if layout.get(name, "none") != "none"
    )
    ranks = layout.get("ranks")
    return (
        f"DeepSpeed ZeRO-{layout.get('zero_stage')} on {ranks} rank{'s' * (ranks != 1)} in "
        f"{layout.get('precision')}{offload}"
    )
