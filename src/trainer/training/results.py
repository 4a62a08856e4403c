"""The models that a run ends with: gathered a tensor at a time, and written by rank 0."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from trainer.errors import NonFiniteError
from trainer.model.save import save_model, without_wrappers
from trainer.model.save_single import save_single_file
from trainer.training.engines.asked_tensors import AskedTensors, led_by_rank_0
from trainer.training.optimizer.stepping import weights_for_use
from trainer.training.run_folder import EMA_FILE, EMA_FOLDER, MODEL_FOLDER, SINGLE_FILE
from trainer.training.step import TrainState

_WEIGHT, _AVERAGE = "weight", "average"


def write_results(
    state: TrainState,
    step: int,
    fingerprint: str,
    say: Callable[..., None],
    *,
    may_be_broken: bool,
) -> None:
    """Write the trained model and its moving average in the formats of `[export]`.

    For all ranks. What an earlier end of the run wrote in other formats is set aside. Raises
    `NonFiniteError` for weights that `may_be_broken` and are.
    """
    masters, ema = state.masters, state.ema

    def make(wanted: str) -> Tensor:
        kind, name = wanted.split(" ", 1)
        if kind == _AVERAGE:
            assert ema is not None
            return ema.whole(name)
        if masters.is_divided and state.config.engine.zero3_save_16bit_model:
            return masters.whole_as_computed(name)
        return masters.whole(name)

    with weights_for_use(state.optimizer), led_by_rank_0(state.engine, make) as ask:
        if ask is None:
            return
        names = without_wrappers(state.bare_model.state_dict())
        tensors = AskedTensors(names, lambda name: ask(f"{_WEIGHT} {name}"))
        if may_be_broken and not all(bool(each.isfinite().all()) for each in tensors.values()):
            raise NonFiniteError(
                f"step {step:,}: the weights are not finite any more, so no model is written. The "
                f"states in {state.config.train.output_dir} from before the skipped steps are "
                "kept. Lower the learning rate, then --resume the path of one of them with "
                "--allow-change."
            )
        models: list[tuple[Mapping[str, Tensor], str, str, str]] = [
            (tensors, MODEL_FOLDER, SINGLE_FILE, "trained model")
        ]
        if ema:
            averages: Any = AskedTensors(ema.names(), lambda name: ask(f"{_AVERAGE} {name}"))
            averaged = ChainMap(averages, cast("Any", tensors))
            models.append((averaged, EMA_FOLDER, EMA_FILE, "its moving average"))
        written = [
            name for model in models for name in _write(state, *model, step, fingerprint, say)
        ]
    for path in _set_aside(state.config.train.output_dir, written):
        say(f"{path}: an earlier end of this run wrote it, and this one does not")


def _write(
    state: TrainState,
    tensors: Mapping[str, Tensor],
    folder_name: str,
    file_name: str,
    what: str,
    step: int,
    fingerprint: str,
    say: Callable[..., None],
) -> Iterator[str]:
    """Write a model, which is `what` for people; the names of what is written."""
    config, model = state.config, state.shapes()
    if "diffusers" in config.export.formats:
        folder = config.train.output_dir / folder_name
        missing = save_model(model, tensors, folder, config)
        say(f"{what}: {folder}" + "".join(f"; it has no {part}" for part in missing))
        yield folder_name
    if "single" in config.export.formats:
        file = config.train.output_dir / file_name
        notes = save_single_file(model, tensors, file, config, step=step, fingerprint=fingerprint)
        say(f"{what}: {file}", *(f"{file_name}: {note}" for note in notes))
        yield file_name


def _set_aside(output_dir: Path, written: list[str]) -> Iterator[Path]:
    """Rename the models of earlier ends of the run that were not replaced; their new paths.

    They would be taken for those of this end: an average that is not kept any more, or a file of a
    format that is not asked for any more.
    """
    for name in (MODEL_FOLDER, SINGLE_FILE, EMA_FOLDER, EMA_FILE):
        path = output_dir / name
        if name in written or not path.exists():
            continue
        numbers = count(1)
        while (older := path.with_name(f"{path.stem}.{next(numbers)}{path.suffix}")).exists():
            pass
        yield path.rename(older)
