"""Is training helping? The loss on records that are never trained, and on as many that are.

Each record is measured at the same noise and timesteps every time, with the weights as they train
and with their moving average. The ranks share the records, and rank 0 writes the results.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from capmerge.errors import CapmergeError
from capmerge.tokens.chunks import CHUNK_TOKENS
from trainer.config.settings import family_of
from trainer.data.batch import Batch
from trainer.data.datasets import DataSet
from trainer.data.held_out import HeldOut
from trainer.data.validation_batches import QUANTILES, LeftOutError, iter_validation
from trainer.training.engines.accelerator import (
    from_all_ranks,
    from_rank_0,
    problem_of_lost_rank,
    sum_over_ranks,
)
from trainer.training.loss import batch_loss
from trainer.training.metrics import iter_lines
from trainer.training.optimizer.stepping import weights_for_use
from trainer.training.run_folder import VALIDATION_FILE
from trainer.training.run_log import RunLog
from trainer.training.signals import Interrupts
from trainer.training.step import TrainState

_STYLES = {"t": "tags", "c": "caption", "b": "both"}
_LONG = "long"
"""The name of the captions of more than 75 tokens, of any style."""

_logger = logging.getLogger(__name__)


class FailedRanksError(Exception):
    """Some of several ranks met an error; all of them raise this, and may end together."""

    def __init__(self, failure: Exception | None) -> None:
        super().__init__(str(failure))
        self.failure = failure
        """The error of this rank; None if it met none."""


class Measured(NamedTuple):
    """A record that was validated."""

    place: int
    """Its place among the records to validate, in the order of the hashes of their keys."""
    style: str
    """`t`, `c` or `b`, or "" for a record without text."""
    tokens: int
    """Tokens of its caption."""
    losses: tuple[float, ...]
    """Its loss at each of `QUANTILES`."""


class Validation:
    """The validations of a run, whose results go to `log`."""

    def __init__(
        self,
        state: TrainState,
        datasets: Sequence[DataSet],
        split: HeldOut,
        log: RunLog,
        max_steps: int,
    ) -> None:
        self._state, self._datasets, self._split, self._log = state, datasets, split, log
        self._max_steps = max_steps
        self._began, self._seconds = time.monotonic(), 0.0
        self._left_out: set[int] = set()  # places that were told
        self._passes = 0
        path = state.config.train.output_dir / VALIDATION_FILE
        steps = [line["step"] for _, line in iter_lines(path)] if path.exists() else []
        self._last_step: int | None = from_rank_0(state.engine, steps[-1] if steps else None)

    def run_if_due(self, step: int, interrupts: Interrupts) -> bool:
        """Validate after step `step` if that is due and not done yet.

        False if a signal on any rank ended it: then there are no results, and the run has to stop.
        A run that is resumed there makes up for it. Raises the errors of the loader, or with
        several ranks `FailedRanksError` on all of them.
        """
        every = self._state.config.validation.every_steps
        is_due = step % every == 0 or step == self._max_steps
        if not self._split.held_out or not is_due or step == self._last_step:
            return True
        start = time.monotonic()
        measured = {}
        for name, weights in self._iter_weights():
            with weights():
                found = self._measure(interrupts)
            if found is None:
                return False
            measured[name] = found
        now = time.monotonic()
        self._seconds += now - start
        line = summary(measured, len(self._split.held_out)) | {
            "seconds": now - start,
            "share_of_time": self._seconds / (now - self._began),
        }
        self._last_step = step
        self._log.log_validation(step, line)
        return True

    def _iter_weights(self) -> Iterator[tuple[str, Callable[[], AbstractContextManager[None]]]]:
        """The weights to measure by name, as contexts in which the model has them."""
        yield "raw", lambda: weights_for_use(self._state.optimizer)
        if self._state.ema:
            yield "ema", self._state.ema.in_use

    def _measure(self, interrupts: Interrupts) -> list[Measured] | None:
        """All records, measured with the weights as they are, in order; None after a signal."""
        engine, model = self._state.engine, self._state.model
        records = (*self._split.held_out, *self._split.trained)
        places = range(engine.process_index, len(records), engine.num_processes)
        results = iter_validation(
            self._state.config, self._datasets, [records[place] for place in places]
        )
        waiting = zip(places, interrupts.bounded(iter(results)), strict=True)
        measured: list[Measured] = []
        failure: Exception | None = None
        model.eval()
        try:
            # As many rounds on every rank, with or without a record, so that all end together.
            for _ in range(-(-len(records) // engine.num_processes)):
                passes = self._passes
                try:
                    for place, result in _first(waiting):
                        measured += self._measured(place, result)
                except Exception as error:
                    # Where each pass takes all ranks, one that failed half way cannot be made up.
                    is_half = self._passes > passes and self._state.masters.is_divided
                    if engine.num_processes == 1 or problem_of_lost_rank(error) or is_half:
                        raise
                    failure = error
                if self._passes == passes and self._state.masters.is_divided:
                    self._losses(Batch.stand_in(family_of(self._state.config.model)))
                stops = self._any_rank(interrupts.signal_number is not None)
                if self._any_rank(failure is not None):
                    raise FailedRanksError(failure)
                if stops:
                    return None
        finally:
            model.train()
        return sorted(from_all_ranks(engine, measured))

    def _any_rank(self, flag: bool) -> bool:  # noqa: FBT001 -- a value, not an option
        engine = self._state.engine
        if engine.num_processes == 1:
            return flag
        return bool(sum_over_ranks(engine, torch.tensor(int(flag), device=engine.device)))

    def _measured(self, place: int, result: Batch | CapmergeError) -> Iterator[Measured]:
        """A record that was loaded; none if its latents are broken and may be so."""
        if isinstance(result, LeftOutError):
            if place not in self._left_out:
                self._left_out.add(place)
                _logger.warning("WARNING: %s It is left out of the validation.", result)
            return
        if isinstance(result, CapmergeError):
            raise result
        yield Measured(
            place,
            result.styles[0],
            result.counts["tokens"] // len(QUANTILES),
            tuple(self._losses(result)),
        )

    @torch.no_grad()
    def _losses(self, batch: Batch) -> list[float]:
        """The loss of each sample, by the model without its wrapper, which would wait for ranks.

        Where the ranks divide its weights, it is the wrapper that makes them whole, and every rank
        has to call this equally often.
        """
        self._passes += 1
        state = self._state
        with state.scaling.autocast():
            loss = batch_loss(
                state.model if state.masters.is_divided else state.bare_model,
                batch.to(state.engine.device),
                state.schedule,
                state.config.noise,
                state.config.loss,
            )
        losses: list[float] = loss.losses_B.tolist()
        return losses


def _first(items: Iterator[Any]) -> Iterator[Any]:
    """The next of the items, if there is one."""
    for item in items:
        yield item
        return


def summary(measured: dict[str, list[Measured]], held_out: int) -> dict[str, Any]:
    """The results of a validation as its line in `validation.jsonl` holds them, without times.

    `measured` are the records by the weights they were measured with, the first `held_out` of which
    were never trained.
    """
    line: dict[str, Any] = {}
    for name, is_in in (
        ("held_out", lambda one: one.place < held_out),
        ("train", lambda one: one.place >= held_out),
    ):
        chosen = {weights: list(filter(is_in, found)) for weights, found in measured.items()}
        records = chosen["raw"]
        line[name] = {
            "records": len(records),
            "styles": {style: len(found) for style, found in _by_style(records).items()},
            **{weights: _means(found) for weights, found in chosen.items()},
        }
    return line


def _by_style(records: Sequence[Measured]) -> dict[str, list[Measured]]:
    """The records by the styles of their captions; a long caption is counted as such too."""
    styles = {
        name: [one for one in records if one.style == letter] for letter, name in _STYLES.items()
    }
    return styles | {_LONG: [one for one in records if one.tokens > CHUNK_TOKENS]}


def _means(records: Sequence[Measured]) -> dict[str, Any]:
    return {
        "loss": _mean(loss for one in records for loss in one.losses),
        "quantiles": {
            str(quantile): _mean(one.losses[number] for one in records)
            for number, quantile in enumerate(QUANTILES)
        },
        "styles": {
            style: _mean(loss for one in found for loss in one.losses)
            for style, found in _by_style(records).items()
            if found
        },
    }


def _mean(losses: Iterable[float]) -> float:
    """The mean, summed exactly, so that no order of records changes it; NaN of nothing."""
    values = list(losses)
    return math.fsum(values) / len(values) if values else math.nan
