"""What DeepSpeed saved, by the names of parameters, read without DeepSpeed.

Each rank of DeepSpeed saves its part of long vectors, in which the parameters that it trains lie
one after the other; ZeRO-3 divides each parameter. Here such parts are joined, one parameter at a
time: the files are mapped, so what is not asked for takes no memory. Source of the layout:
DeepSpeed 0.19, `runtime/engine.py`, `runtime/zero/stage_1_and_2.py`, `stage3.py`,
`utils/zero_to_fp32.py`.
"""

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

_SHARDED_WEIGHTS = 3
"""The stage of ZeRO from which on no rank has whole weights."""
_RANK = re.compile(r"zero_pp_rank_(\d+)_")
_SAFE = re.compile(
    r"torch\.(Size|device|\w+Storage|[a-z]+\d+)|torch\._utils\._rebuild_\w+|"
    r"torch\.nn\.parameter\.Parameter|torch\._tensor\._rebuild_from_type_v2|torch\.Tensor|"
    r"collections\.(OrderedDict|defaultdict)|_codecs\.encode|"
    r"builtins\.(set|frozenset|slice|object)|copyreg\._reconstructor"
)
"""What tensors and plain values are made of."""


class _StandIn(SimpleNamespace):
    """An object of one of DeepSpeed's classes, with its values alone."""

    def __init__(self, *values: Any) -> None:
        super().__init__(values=values)


class _Unpickler(pickle.Unpickler):
    """Reads tensors and plain values; whatever else a file names gets a stand-in."""

    def find_class(self, module: str, name: str) -> Any:
        if _SAFE.fullmatch(f"{module}.{name}"):
            return super().find_class(module, name)
        return _StandIn


_PICKLE = SimpleNamespace(
    __name__="pickle",
    Unpickler=_Unpickler,
    load=pickle.load,
    UnpicklingError=pickle.UnpicklingError,
)


def _read(path: Path) -> dict[str, Any]:
    content = torch.load(
        path,
        map_location="cpu",
        mmap=True,
        weights_only=False,
        pickle_module=_PICKLE,
    )
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no state")  # noqa: TRY004 -- of the file
    return content


class _Piece(NamedTuple):
    """Where a part of a parameter lies; the parts of one follow each other."""

    rank: int
    vector: int
    """The number of the vector among those of its rank."""
    start: int
    size: int


class DeepSpeedFiles:
    """The weights in the precision in which they step, and the state of the optimizer.

    `trained` are the names of the parameters that were trained, in the order of the optimizer's
    groups, which stage 0 alone does not save. Raises `OSError`, or any of the errors of a file that
    is no such state: `ValueError`, `KeyError`, `RuntimeError`, `EOFError`, `UnpicklingError`.
    """

    def __init__(self, folder: Path, trained: Sequence[str]) -> None:
        if (folder / "offloaded_tensors").exists():
            raise ValueError(
                "it lay on an NVMe disk, which DeepSpeed alone reads: resume the run to its end, "
                "which writes the model"
            )
        self._models = [_read(path) for path in _by_rank(folder.glob("*_model_states.pt"))]
        if not self._models:
            raise ValueError(f"found no *_model_states.pt in {folder.name}")
        shards = [
            _read(path)["optimizer_state_dict"]
            for path in _by_rank(folder.glob("*_optim_states.pt"))
        ]
        self._shapes: dict[str, torch.Size] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        self._vectors: list[list[Tensor]]
        """For each rank the vectors with its parts of the weights."""
        self._kept: list[list[dict[str, Any]]]
        """For each of the vectors, what the optimizer keeps for it."""
        self._sizes: list[list[int]]
        """The numbers of each vector, with those that fill it up and are not saved."""
        if not shards:
            self._read_whole(self._models[0]["optimizer"], trained)
        elif shards[0]["zero_stage"].values[0] == _SHARDED_WEIGHTS:
            self._read_divided_weights(shards)
        else:
            self._read_divided_vectors(shards)
        self.options: Sequence[Mapping[str, Any]] = _options(
            shards[0] if shards else self._models[0]["optimizer"]
        )

    def _read_whole(self, state: dict[str, Any], trained: Sequence[str]) -> None:
        """Stage 0: rank 0 saved all of it, and of 16-bit weights those in float32 besides."""
        inner = _inner(state)
        module = self._models[0]["module"]
        copies = [one for group in state.get("fp32_groups", ()) for one in group]
        numbers = [number for group in inner["param_groups"] for number in group["params"]]
        if len(numbers) != len(trained):
            raise ValueError(
                f"found {len(numbers):,} trained parameters, expected {len(trained):,}"
            )
        self._vectors = [copies or [module[name] for name in trained]]
        self._kept = [[inner["state"].get(number, {}) for number in numbers]]
        self._sizes = [[vector.numel() for vector in self._vectors[0]]]
        for number, name in enumerate(trained):
            self._shapes[name] = module[name].shape
            self._pieces[name] = [_Piece(0, number, 0, module[name].numel())]

    def _read_divided_vectors(self, shards: list[dict[str, Any]]) -> None:
        """Stages 1 and 2: the vector of each group is divided, wherever a parameter ends."""
        self._check_ranks(shards, max(shards[0]["partition_count"]))
        self._vectors = [shard["single_partition_of_fp32_groups"] for shard in shards]
        self._kept = [_kept(shard) for shard in shards]
        self._sizes = [
            [
                vector.numel() + filling
                for vector, filling in zip(vectors, shard["group_paddings"], strict=True)
            ]
            for vectors, shard in zip(self._vectors, shards, strict=True)
        ]
        for shapes in self._models[0]["param_shapes"]:
            self._shapes |= shapes
        for rank, shard in enumerate(shards):
            for vector, mapped in enumerate(shard["param_slice_mappings"]):
                for name, place in mapped.items():
                    piece = _Piece(rank, vector, place.start, place.numel)
                    self._pieces.setdefault(name, []).append(piece)

    def _read_divided_weights(self, shards: list[dict[str, Any]]) -> None:
        """Stage 3: each rank has an equal part of each parameter; the last one ends with zeros."""
        ranks = shards[0]["partition_count"]
        self._check_ranks(shards, ranks)
        self._vectors = [shard["fp32_flat_groups"] for shard in shards]
        self._kept = [_kept(shard) for shard in shards]
        self._sizes = [[vector.numel() for vector in vectors] for vectors in self._vectors]
        for vector, shapes in enumerate(self._models[0]["param_shapes"]):
            start = 0
            for name, shape in shapes.items():
                self._shapes[name] = shape
                size = -(-shape.numel() // ranks)
                self._pieces[name] = [
                    _Piece(rank, vector, start, max(0, min(size, shape.numel() - rank * size)))
                    for rank in range(ranks)
                ]
                start += size

    def _check_ranks(self, shards: list[dict[str, Any]], ranks: int) -> None:
        if len(shards) != ranks:
            raise ValueError(f"found the parts of {len(shards)} ranks, expected those of {ranks}")

    def names(self) -> Iterator[str]:
        """The names of all weights, trained or not, and of the buffers."""
        return iter(self._models[0]["module"])

    def weight(self, name: str) -> Tensor:
        """A weight whole, in float32 if it was trained."""
        if name in self._pieces:
            return self._joined(name, self._vectors)
        parts = [
            model["frozen_param_fragments"][name]
            for model in self._models
            if name in (model["frozen_param_fragments"] or ())
        ]
        if not parts:
            return self._of_module(name)
        shape = self._models[0]["frozen_param_shapes"][name]
        return torch.cat([part.flatten() for part in parts])[: shape.numel()].view(shape)

    def _of_module(self, name: str) -> Tensor:
        found = self._models[0]["module"][name]
        assert isinstance(found, Tensor)
        return found

    def kept(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps for a parameter, by the optimizer's names.

        Tensors with a number for each weight have the shape of the parameter. Raises `ValueError`
        for those of other shapes, which belong to a rank's part of a vector.
        """
        if name not in self._pieces:
            return {}
        first, *_ = self._pieces[name]
        found: dict[str, Any] = {}
        for slot, value in self._kept[first.rank][first.vector].items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                found[slot] = value
                continue
            if value.numel() != self._sizes[first.rank][first.vector]:
                raise ValueError(
                    f"{slot} of {name} has not one number for each weight, so only the ranks and "
                    "the engine that saved it can go on with it"
                )
            found[slot] = self._joined(
                name, [[one.get(slot) for one in kept] for kept in self._kept]
            )
        return found

    def _joined(self, name: str, vectors: Sequence[Sequence[Any]]) -> Tensor:
        parts = [
            vectors[piece.rank][piece.vector].flatten()[piece.start : piece.start + piece.size]
            for piece in self._pieces[name]
        ]
        joined = torch.cat(parts).detach()  # the vectors of stage 3 were trained
        if joined.numel() != self._shapes[name].numel():
            raise ValueError(
                f"{name} has {joined.numel():,} numbers, expected {self._shapes[name].numel():,}"
            )
        return joined.view(self._shapes[name])


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    def rank(path: Path) -> int:
        found = _RANK.search(path.name)
        return int(found[1]) if found else 0

    return sorted(paths, key=rank)


def _inner(state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of torch's optimizer, inside of that of an optimizer of DeepSpeed."""
    for name in ("base_optimizer_state", "optimizer_state_dict"):
        if name in state:
            return dict(state[name])
    return dict(state)


def _kept(shard: dict[str, Any]) -> list[dict[str, Any]]:
    inner = _inner(shard)
    numbers = [number for group in inner["param_groups"] for number in group["params"]]
    return [inner["state"].get(number, {}) for number in numbers]


def _options(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each group of the optimizer, such as its rate."""
    return [
        {name: value for name, value in group.items() if name != "params"}
        for group in _inner(state)["param_groups"]
    ]
