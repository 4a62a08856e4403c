"""Data sets as columns, and their plans."""

import numpy as np

from trainer.data.buckets import SetRows
from trainer.data.plan_files import open_plan


def rows_of(records, *, chunks=True, repeats=1, usable=True):
    """The columns of records given as (width, height, chunk count, usable)."""
    width, height, n_chunks, mask = (
        (np.array(column) for column in zip(*records, strict=True))
        if records
        else [np.zeros(0, dtype=int)] * 4
    )
    return SetRows(
        width.astype(np.uint32),
        height.astype(np.uint32),
        n_chunks if chunks else None,
        repeats,
        mask.astype(bool) if usable else None,
    )


FIXED = [
    rows_of(
        [(512, 512 + 256 * (number % 2), 1 + number % 3, number % 7 > 0) for number in range(50)],
        repeats=2,
    )
]


def opened(
    folder, sets=FIXED, *, seed=1, epoch=0, global_batch_size=4, fingerprint="f", hold_room=False
):
    """The plan of `sets` from its file in `folder`, built if it is missing."""
    return open_plan(
        folder,
        seed=seed,
        epoch=epoch,
        global_batch_size=global_batch_size,
        sets=sets,
        fingerprint=fingerprint,
        hold_room=hold_room,
    )


def samples_of(plan):
    """The batches of a plan, each as a list of (data set, record, repeat)."""
    batches = [plan.batch(place) for place in range(plan.steps)]
    return [list(zip(*(column.tolist() for column in batch[:3]), strict=True)) for batch in batches]
