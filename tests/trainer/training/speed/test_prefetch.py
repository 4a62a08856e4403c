import pytest
import torch

from trainer.data.batch import Batch
from trainer.errors import LatentsError
from trainer.families import FAMILIES
from trainer.training.speed.prefetch import BatchesAhead

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def numbered(count, problem=None):
    """Batches that are told by their steps; the problem is raised in place of the last."""
    for step in range(count):
        if problem and step == count - 1:
            raise problem
        batch = Batch.stand_in(FAMILIES["sd1"])
        object.__setattr__(batch, "step", step)
        yield batch


def test_batches_come_in_order_fetched_or_not():
    """A batch that was fetched comes next, once, and the end comes when it is asked for."""
    batches = BatchesAhead(numbered(4), DEVICE)
    steps = [next(batches).step]
    batches.fetch()
    batches.fetch()
    steps += [next(batches).step, next(batches).step]
    batches.fetch()
    batches_left = list(batches)
    assert steps == [0, 1, 2]
    assert [batch.step for batch in batches_left] == [3]
    batches.fetch()
    assert next(batches, None) is None
    assert batches_left[0].latents_BCHW.device.type == DEVICE.type


def test_a_problem_waits_for_the_step_that_it_belongs_to():
    """What goes wrong ahead leaves the present step alone, and is raised when it is its turn."""
    batches = BatchesAhead(numbered(2, LatentsError("broken")), DEVICE)
    assert next(batches).step == 0
    assert batches.problem is None
    batches.fetch()
    assert isinstance(batches.problem, LatentsError)
    with pytest.raises(LatentsError, match="broken"):
        next(batches)
