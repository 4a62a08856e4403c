import gc
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import fields
from functools import partial
from itertools import chain, count
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from capmerge.captions.size import MOST_PX
from capmerge.errors import DataError, WorkerError
from capmerge.tokens.chunks import CHUNK_IDS, Chunker
from capmerge.tokens.load import load_clip
from trainer.data.batch import Sample
from trainer.data.buckets import SetRows
from trainer.data.latents import with_way_out
from trainer.data.loader import build_loader
from trainer.data.micro_batches import Loaded, Share
from trainer.data.plan_files import open_plan
from trainer.errors import LatentsError

# The machine may have only one core.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
KOHYA = Chunker((load_clip("sd1"),), "kohya", 3)
SDXL = Chunker((load_clip("sd1"), load_clip("sdxl_g")), "a1111", None)
ONE = Share(rank=0, ranks=1, batch_size=4, accumulation=1)
SIDES = [64, 128]


def caption_of(record):
    """A caption of 1 to 200 tokens, and therefore of 1 to 3 chunks."""
    return " ".join(["cat"] * (1 + record * 37 % 200))


def rows_of(n_records, *, chunks=False, repeats=1):
    """The columns of records that alternate between two sizes, with their chunk counts."""
    side = np.array([SIDES[record % 2] for record in range(n_records)], dtype=np.uint32)
    counts = np.array([len(KOHYA.cut(caption_of(record)).filled) for record in range(n_records)])
    return SetRows(side, side, counts if chunks else None, repeats, None)


class Maker(NamedTuple):
    """A maker of cheap samples that depend on the whole request and can fail as real ones do."""

    chunker: Chunker = KOHYA
    missing: frozenset = frozenset()
    """The (data set, record) of the records without latents."""
    fails: tuple = ()
    """The error that the sample of record 5 raises; empty for none."""
    kills: bool = False
    """True when the sample of record 5 kills its process."""
    longer: bool = False
    """True when captions have one chunk more than the index says."""
    masked: tuple = ()
    """The data sets with masks."""

    def __call__(self, request):
        """The sample of `request`."""
        dataset, record, repeat, epoch, step = request
        if record == 5 and self.fails:
            raise self.fails[0]
        if record == 5 and self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if (dataset, record) in self.missing:
            raise LatentsError(
                f"latents/{dataset}/{record}.npz: found no such file, expected cached latents."
            )
        side = SIDES[record % 2] // 8
        caption = caption_of(record) + " dog" * 75 * self.longer
        value = float(((dataset * 1000 + record) * 10 + repeat) * 100 + epoch)
        return Sample(
            dataset=dataset,
            record=record,
            repeat=repeat,
            key=f"{dataset}/{record}",
            caption=caption,
            style="t",
            cut=self.chunker.cut(caption),
            latents_CHW=torch.full((4, side, side), value),
            noise_CHW=torch.full((4, side, side), -value),
            input_noise_CHW=None,
            timestep=step,
            size_conditioning=(float(side), 1.0, 2.0, 3.0, 4.0, float(record))
            if len(self.chunker.tokenizers) > 1
            else None,
            mask_HW=torch.full((side, side), 0.5) if dataset in self.masked else None,
            text_noise_seed=record,
            events=("flipped",) if record % 2 else (),
        )


@pytest.fixture
def load(tmp_path):
    """A function that builds a loader over plans in a temporary folder."""

    def build(
        sets,
        maker=None,
        *,
        share=ONE,
        start_step=0,
        max_steps=None,
        workers=0,
        on_missing="stop",
        chunker=KOHYA,
        open_epoch=None,
        contrasts=False,
    ):
        plan_of = partial(_open_epoch, tmp_path, sets, share.global_batch_size)
        steps = plan_of(0).steps
        return build_loader(
            maker or Maker(chunker),
            open_epoch or plan_of,
            sets,
            chunker,
            share=share,
            on_missing=[on_missing] * len(sets),
            steps_per_epoch=steps,
            start_step=start_step,
            max_steps=steps if max_steps is None else max_steps,
            workers=workers,
            contrasts=contrasts,
        )

    return build


def _open_epoch(folder, sets, global_batch_size, epoch):
    return open_plan(
        folder, seed=7, epoch=epoch, global_batch_size=global_batch_size, sets=sets, fingerprint=""
    )


def same(one, other):
    """True when two batches are equal in every field, bit for bit."""

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, tuple):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return all(equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))


def all_same(some, others):
    """True when two sequences of batches are equal and not empty."""
    some, others = list(some), list(others)
    return len(some) == len(others) > 0 and all(map(same, some, others))


def test_an_epoch_trains_each_sample_once_in_order_of_steps(load):
    """Every sample has weight 1 once, in ascending order of step and micro-batch.

    Tensors, keys and captions belong together.
    """
    batches = list(load([rows_of(23, repeats=2), rows_of(4)], share=Share(0, 1, 2, 3)))
    n_steps = batches[-1].step + 1
    assert [(batch.step, batch.micro) for batch in batches] == [
        (step, micro) for step in range(n_steps) for micro in range(3)
    ]
    expected = [f"0/{record}" for record in range(23)] * 2 + [f"1/{record}" for record in range(4)]
    assert sorted(chain(*(batch.keys for batch in batches))) == sorted(expected)
    assert sum(batch.weights_B.sum().item() for batch in batches) == 50
    for batch in batches:
        real = int(batch.weights_B.sum())
        records = [int(key.split("/")[1]) for key in batch.keys]
        assert batch.captions == tuple(caption_of(record) for record in records)
        assert (batch.latents_BCHW[:real, 0, 0, 0] // 1000 % 1000).tolist() == records
        assert torch.equal(batch.noise_BCHW, -batch.latents_BCHW)
        assert batch.timesteps_B.tolist() == [batch.step] * len(batch.weights_B)
        assert (batch.size_B6, batch.mask_B1HW, batch.input_noise_BCHW) == (None, None, None)
        assert batch.counts["samples"] == real
        assert batch.counts.get("flipped", 0) == sum(record % 2 for record in records)
        assert batch.counts["tokens"] == sum(1 + record * 37 % 200 for record in records)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(load, workers):
    """Worker processes give the same batches as the training process, across epochs."""
    sets = [rows_of(13, repeats=2), rows_of(5)]
    share = Share(0, 1, 2, 2)
    assert all_same(
        load(sets, share=share, max_steps=25),
        load(sets, share=share, max_steps=25, workers=workers),
    )


def test_resuming_at_any_step_gives_the_rest(load):
    """Resuming at any step of two and a half epochs gives the remaining batches."""
    sets, share = [rows_of(13, repeats=2)], Share(0, 1, 2, 2)
    whole = list(load(sets, share=share, max_steps=20))
    assert whole[-1].epoch == 2
    for step in range(20):
        assert all_same(whole[2 * step :], load(sets, share=share, start_step=step, max_steps=20))
    assert all_same(
        whole[2 * 11 :], load(sets, share=share, start_step=11, max_steps=20, workers=2)
    )
    assert list(load(sets, share=share, start_step=20, max_steps=20)) == []


@pytest.mark.parametrize(
    ("ranks", "batch_size", "accumulation"), [(1, 1, 4), (1, 2, 2), (2, 1, 2), (4, 1, 1), (2, 2, 1)]
)
def test_ranks_and_accumulation_only_slice(load, ranks, batch_size, accumulation):
    """Ranks and micro-steps together train the samples of one undivided batch, in order."""
    sets = [rows_of(27)]
    whole = list(load(sets, share=ONE))
    of_ranks = [
        list(load(sets, share=Share(rank, ranks, batch_size, accumulation)))
        for rank in range(ranks)
    ]
    for batch in whole:
        dealt = [
            of_ranks[rank][batch.step * accumulation + micro]
            for micro in range(accumulation)
            for rank in range(ranks)
        ]
        assert tuple(chain(*(part.keys for part in dealt))) == batch.keys
        real = [part.latents_BCHW[part.weights_B == 1] for part in dealt]
        assert torch.equal(torch.cat(real), batch.latents_BCHW)
        assert {part.real_samples for part in dealt} == {len(batch.keys)}


@pytest.mark.parametrize(("ranks", "batch_size", "accumulation"), [(1, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_samples_to_contrast_with_follow_the_plan(load, ranks, batch_size, accumulation):
    """Each sample gets the flow of the next one in the global batch, however that is divided.

    The last one gets that of the first, also where another rank trains it; a sample alone in its
    batch gets none. A sample without latents has its replacement there too.
    """
    sets, maker = [rows_of(26)], Maker(missing=frozenset({(0, 7), (0, 20)}))
    options = {"maker": maker, "on_missing": "skip", "contrasts": True}
    alone = 0
    of_ranks = [
        list(load(sets, share=Share(rank, ranks, batch_size, accumulation), **options))
        for rank in range(ranks)
    ]
    for batch in load(sets, share=ONE, **options):
        flows_BCHW = batch.noise_BCHW - batch.latents_BCHW
        parts = [
            of_ranks[rank][batch.step * accumulation + micro]
            for micro in range(accumulation)
            for rank in range(ranks)
        ]
        if len(batch.keys) == 1:
            assert all(part.other_flow_BCHW is None for part in (batch, *parts))
            alone += 1
            continue
        assert torch.equal(batch.other_flow_BCHW, flows_BCHW.roll(-1, dims=0))
        real = [part.other_flow_BCHW[part.weights_B == 1] for part in parts]
        assert torch.equal(torch.cat(real), batch.other_flow_BCHW)
        assert batch.counts["samples"] == len(batch.keys)
    assert alone == 2
    share = Share(0, ranks, batch_size, accumulation)
    assert all_same(of_ranks[0], load(sets, share=share, workers=2, **options))


def test_a_short_batch_fills_empty_places_with_weight_0(load):
    """Of five samples on two ranks and two micro-steps, the last one leaves three places.

    They are filled with a sample of weight 0.
    """
    of_ranks = [list(load([rows_of(10)], share=Share(rank, 2, 1, 2))) for rank in range(2)]
    short = [batch for batches in of_ranks for batch in batches if batch.real_samples == 1]
    assert len(short) == 2 * 4  # both sizes
    for batch in short:
        first = batch.micro == 0 and any(batch is mine for mine in of_ranks[0])
        assert batch.weights_B.tolist() == [float(first)]
        assert len(batch.keys) == len(batch.captions) == batch.counts["samples"] == int(first)
        assert len(batch.latents_BCHW) == len(batch.text_noise_seeds) == 1
        if not first:
            assert set(batch.counts.values()) == {0}


@pytest.mark.parametrize("workers", [0, 3])
def test_ranks_pass_batches_of_one_shape_in_step(load, workers):
    """In each micro-step all ranks have as many samples of one size, also of a short batch.

    So every rank makes the same passes, which ranks that exchange weights in them (ZeRO-3) need.
    """
    sets = [rows_of(23, chunks=True), rows_of(7, chunks=True)]
    of_ranks = [list(load(sets, share=Share(rank, 3, 2, 2), workers=workers)) for rank in range(3)]
    passes = [
        [(batch.step, batch.micro, batch.latents_BCHW.shape, batch.ids[0].shape) for batch in mine]
        for mine in of_ranks
    ]
    assert passes[0] == passes[1] == passes[2]
    assert len({shape for _, _, shape, _ in passes[0]}) > 1
    assert any(batch.real_samples < 12 for batch in of_ranks[0])


def test_dynamic_chunks_are_the_buckets(load):
    """Every caption of a batch needs the chunks of its bucket, and no token is dropped."""
    batches = list(load([rows_of(60, chunks=True)]))
    assert {batch.ids[0].shape[1] for batch in batches} == {1, 2, 3}
    for batch in batches:
        assert {len(KOHYA.cut(caption).filled) for caption in batch.captions} == {
            batch.ids[0].shape[1]
        }
        assert (batch.counts["wider_batches"], batch.counts["dropped_tokens"]) == (0, 0)


def test_a_longer_caption_makes_its_batch_wider(load):
    """A caption longer than its bucket widens the batch, up to the limit.

    Wider batches and dropped tokens are both counted.
    """
    batches = list(load([rows_of(60, chunks=True)], Maker(longer=True)))
    for batch in batches:
        needed = {len(KOHYA.cut(caption).filled) for caption in batch.captions}
        (of_bucket,) = {n - 1 for n in needed}
        assert batch.ids[0].shape[1] == min(of_bucket + 1, 3)
        assert batch.counts["wider_batches"] == (of_bucket < 3)
        dropped = (
            sum(len(caption.split()) - 225 for caption in batch.captions) if of_bucket == 3 else 0
        )
        assert batch.counts["dropped_tokens"] == dropped
    assert {batch.counts["wider_batches"] for batch in batches} == {0, 1}


def test_without_dynamic_chunks_all_batches_are_as_wide_as_the_limit(load):
    """Every batch has two chunks, and the tokens beyond them are dropped and counted."""
    chunker = KOHYA._replace(max_chunks=2)
    for batch in load([rows_of(30)], chunker=chunker):
        assert batch.ids[0].shape == (len(batch.keys), 2, CHUNK_IDS)
        assert batch.counts["dropped_tokens"] == sum(
            max(0, len(caption.split()) - 150) for caption in batch.captions
        )
        assert batch.counts["wider_batches"] == 0


def test_unlimited_without_dynamic_chunks_takes_what_the_batch_needs(load):
    """A batch is as wide as its longest caption, with ids for each of two tokenizers."""
    batches = list(load([rows_of(30)], Maker(SDXL), chunker=SDXL))
    assert len({batch.ids[0].shape[1] for batch in batches}) > 1
    for batch in batches:
        longest = max(len(SDXL.cut(caption).filled) for caption in batch.captions)
        assert [ids.shape for ids in batch.ids] == [(len(batch.keys), longest, CHUNK_IDS)] * 2
        assert not torch.equal(*batch.ids)  # they differ in their padding
        assert [f"0/{record:.0f}" for record in batch.size_B6[:, 5].tolist()] == list(batch.keys)
        assert batch.counts["dropped_tokens"] == 0


def test_crop_is_one_chunk(load):
    """Cropping gives one chunk whatever the limit is, and drops the rest."""
    chunker = KOHYA._replace(chunking="crop")
    for batch in load([rows_of(30)], Maker(chunker), chunker=chunker):
        assert batch.ids[0].shape[1] == 1
        assert batch.counts["dropped_tokens"] == sum(
            max(0, len(caption.split()) - 75) for caption in batch.captions
        )


def test_masks_of_one_data_set_are_ones_in_the_others(load):
    """A batch of both data sets has a mask for every sample."""
    batches = list(load([rows_of(6), rows_of(6)], Maker(masked=(1,))))
    for batch in batches:
        if batch.mask_B1HW is None:
            assert all(key.startswith("0/") for key in batch.keys)
        else:
            assert batch.mask_B1HW.shape == (len(batch.keys), 1, *batch.latents_BCHW.shape[2:])
            assert batch.mask_B1HW[:, 0, 0, 0].tolist() == [
                0.5 if key.startswith("1/") else 1.0 for key in batch.keys
            ]
    assert any(
        batch.mask_B1HW is not None and batch.mask_B1HW[:, 0, 0, 0].unique().numel() == 2
        for batch in batches
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_missing_latents_are_replaced_by_the_next_of_the_bucket(load, caplog, workers):
    """The next record of the bucket replaces one without latents.

    Each replacement is counted; each file is warned about once in two epochs.
    """
    sets, missing = [rows_of(10)], frozenset({(0, 4), (0, 6)})
    n_steps = len(load(sets))
    with caplog.at_level(logging.WARNING):
        batches = list(
            load(
                sets,
                Maker(missing=missing),
                on_missing="skip",
                workers=workers,
                max_steps=2 * n_steps,
            )
        )
    for epoch in range(2):
        keys = sorted(key for batch in batches if batch.epoch == epoch for key in batch.keys)
        assert keys == sorted(f"0/{8 if record in (4, 6) else record}" for record in range(10))
    assert sum(batch.counts.get("replaced", 0) for batch in batches) == 4
    why = "latents/0/{}.npz: found no such file, expected cached latents. Trained in its place: 0/8"
    assert sorted(caplog.messages) == [why.format(4), why.format(6)]


def test_replacements_are_the_same_on_resuming(load):
    """Replacements depend only on the files, so a resumed run makes the same ones."""
    sets, maker = [rows_of(20)], Maker(missing=frozenset({(0, 3), (0, 4), (0, 19)}))
    whole = list(load(sets, maker, on_missing="skip", max_steps=12))
    assert all_same(whole[7:], load(sets, maker, on_missing="skip", start_step=7, max_steps=12))


def test_a_bucket_without_any_latents_is_an_error(load):
    """The error names the data set, the bucket, the number of tries and the first file."""
    maker = Maker(missing=frozenset((1, record) for record in range(0, 10, 2)))
    with pytest.raises(LatentsError) as caught:
        list(load([rows_of(3), rows_of(10)], maker, on_missing="skip"))
    assert str(caught.value).startswith(
        "data.1, bucket 64 x 64: found no latents for 5 records in a row, expected one to train"
    )
    assert ".npz: found no such file, expected cached latents." in str(caught.value)


def test_a_large_bucket_is_not_searched_to_its_end(load):
    """A missing folder is an error after a hundred files, not after twelve million."""
    maker = Maker(missing=frozenset((0, record) for record in range(1000)))
    with pytest.raises(LatentsError, match="found no latents for 100 records in a row"):
        list(load([rows_of(1000)], maker, on_missing="skip"))


ERRORS = [
    LatentsError("latents/0/5.npz: found no such file, expected cached latents."),
    DataError("m.json", 7, "b/42", "found a list, expected a string.", "Mend it."),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", ERRORS, ids=["latents", "data"])
def test_an_error_of_the_user_crosses_processes_unchanged(load, error, workers):
    """A user's error keeps its class and message, and the batches before it arrive.

    The message about a latents file gets the ways out.
    """
    batches, expected = [], list(load([rows_of(10)]))
    with pytest.raises(type(error)) as caught:
        batches.extend(load([rows_of(10)], Maker(fails=(error,)), workers=workers))
    told = with_way_out(error) if isinstance(error, LatentsError) else error
    assert (type(caught.value), str(caught.value)) == (type(told), str(told))
    n_before = next(place for place, batch in enumerate(expected) if "0/5" in batch.keys)
    assert n_before == 0 or all_same(expected[:n_before], batches)


def test_a_bug_in_a_worker_shows_its_traceback(load):
    """An error that is a bug keeps the traceback of the worker."""
    with pytest.raises(
        ZeroDivisionError, match=r'(?s)Traceback.*test_loader\.py", line \d+, in __call__'
    ) as caught:
        list(load([rows_of(10)], Maker(fails=(ZeroDivisionError("bug"),)), workers=1))
    # The frames hold torch's iterator, which takes five seconds to close in the garbage collector.
    traceback.clear_frames(caught.tb)


def kill_one(before):
    """Kill a worker that was started since `before`, as the kernel does when memory is short."""
    worker = min(set(multiprocessing.active_children()) - before, key=lambda one: one.pid)
    os.kill(worker.pid, signal.SIGKILL)
    # Wait until it has ended, and leave its status to torch.
    os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_worker_is_started_anew(load, caplog, workers):
    """A killed worker changes no batch: new workers go on with the same ones, and it is told."""
    expected = list(load([rows_of(120)]))
    before = set(multiprocessing.active_children())
    batches = iter(load([rows_of(120)], workers=workers))
    taken = []
    for place in range(len(expected)):
        if place in (3, 4, 11):
            # It is noticed only when a batch is asked for: a step would be cut in two otherwise.
            kill_one(before)
        taken.append(next(batches))
    assert list(batches) == []
    assert all_same(taken, expected)
    assert len([line for line in caplog.messages if line.endswith("started anew.")]) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="torch's own way carries all elsewhere")
@pytest.mark.parametrize("side", [200_000, MOST_PX])
def test_a_size_beyond_all_memory_ends_no_loading(load, caplog, side):
    """Where a record's size asks for more memory than there is, batches cross in torch's own way.

    The record itself is never reached here; its latents would have another size.
    """
    small = rows_of(8)
    sides = np.append(small.width, np.uint32(side))
    whole = load([SetRows(sides, sides, None, 1, None)], share=ONE._replace(batch_size=8192))
    batches = load(
        [SetRows(sides, sides, None, 1, None)], share=ONE._replace(batch_size=8192), workers=1
    )
    assert all_same([next(iter(batches))], [next(iter(whole))])
    (line,) = caplog.messages
    assert line.startswith("WARNING: data loading: found no shared memory of ")


def test_restarts_that_are_long_past_do_not_count(load, monkeypatch):
    """Only the restarts of the last ten minutes count, so a run of days may have many."""
    hours = count(step=3600)
    clock = SimpleNamespace(monotonic=lambda: next(hours))
    monkeypatch.setattr("trainer.data.loader.time", clock)
    expected = list(load([rows_of(60)]))
    before = set(multiprocessing.active_children())
    batches = iter(load([rows_of(60)], workers=1))
    taken = []
    for place in range(len(expected)):
        if place in range(1, 6):
            kill_one(before)
        taken.append(next(batches))
    assert all_same(taken, expected)
    batches.close()


def test_workers_that_are_always_killed_are_a_clear_error(load, caplog):
    """Workers that are killed whenever they start, as when memory is short, are one clear error.

    Three are started anew before.

    The error does not hold torch's iterator, which would make torch raise the error again whenever
    any process ends.
    """
    # Drop iterators that the errors of other tests held.
    gc.collect()
    with pytest.raises(
        WorkerError,
        match=r"^data loading: DataLoader worker \(pid.* too little memory: lower train\.workers",
    ) as caught:
        list(load([rows_of(10)], Maker(kills=True), workers=1))
    assert len(caplog.messages) == 3
    assert caught.value.__context__ is None
    assert not [
        thing for thing in gc.get_objects() if type(thing) is _MultiProcessingDataLoaderIter
    ]


@pytest.fixture
def two_workers(load):
    """An iterator over 30 batches, its first four batches, and its two running workers."""
    before = set(multiprocessing.active_children())
    batches = iter(load([rows_of(120)], workers=2))
    taken = [next(batches) for _ in range(4)]
    return taken, batches, list(set(multiprocessing.active_children()) - before)


def test_signals_to_all_processes_leave_the_workers_alive(load, two_workers):
    """Workers ignore Ctrl-C and SIGTERM from other processes than their parent.

    The training process needs them to finish its step before it stops.
    """
    taken, batches, workers = two_workers
    assert len(workers) == 2
    for name in ("-INT", "-TERM", "-TERM"):
        subprocess.run(["kill", name, *(str(worker.pid) for worker in workers)], check=True)
    assert all_same([*taken, *batches], load([rows_of(120)]))
    # The workers end with the last batch.
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells who sent a signal")
def test_workers_obey_their_own_process(two_workers):
    """Workers end at a signal from their own training process.

    It sends one when an error keeps the loader from being closed; otherwise it would wait for ever.
    """
    _, batches, (worker, other) = two_workers
    worker.terminate()
    worker.join(10)
    assert (worker.exitcode, other.is_alive()) == (0, True)
    batches.close()


def test_loading_leaves_the_random_state_alone(load):
    """Loading draws nothing from torch's global generator, also with workers."""
    before = torch.get_rng_state()
    list(load([rows_of(10)], workers=1))
    assert torch.equal(before, torch.get_rng_state())


def test_torch_pins_every_tensor_of_a_batch(load, monkeypatch):
    """Torch's `pin_memory` reaches every tensor of a batch.

    With CUDA, torch's loader applies it to everything that crosses from the workers.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = next(iter(load([rows_of(10)], Maker(SDXL), chunker=SDXL)))
    result, replaced = pin_memory(Loaded(batch, [((0, 1), "line")]))
    assert replaced == [((0, 1), "line")]
    for name in ("latents_BCHW", "noise_BCHW", "timesteps_B", "size_B6", "weights_B"):
        assert torch.equal(getattr(result, name), getattr(batch, name) + 1)
    assert all(
        torch.equal(ids, before + 1) for ids, before in zip(result.ids, batch.ids, strict=True)
    )
    assert (result.step, result.keys, result.mask_B1HW) == (batch.step, batch.keys, None)


def test_the_next_plan_is_built_ahead(load, tmp_path):
    """A thread builds the next plan once, in the second half of an epoch.

    No plan is built that no step needs.
    """
    sets, asked = [rows_of(40)], []
    n_steps = len(load(sets))

    def open_epoch(epoch):
        asked.append((epoch, threading.current_thread() is threading.main_thread()))
        return _open_epoch(tmp_path, sets, ONE.global_batch_size, epoch)

    for batch in load(sets, open_epoch=open_epoch, max_steps=3 * n_steps):
        if batch.step == n_steps // 2 - 1:
            assert asked == [(0, True)]
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(10)
    assert sorted(asked) == [(0, True), (1, False), (1, True), (2, False), (2, True)]
