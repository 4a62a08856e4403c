import multiprocessing
import pickle
import resource
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.errors import OutputError
from capmerge.rng import Chance, SampleId
from trainer.data import plan as plan_module
from trainer.data.buckets import SetRows
from trainer.data.plan import count_epoch, deal, drop_old_plans, open_plan
from trainer.data.shuffle import hash_of
from trainer.errors import LatentsError


def rows_of(records, *, chunks=True, repeats=1, usable=True):
    """Rows from (width, height, chunk count, usable) of each record."""
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


RECORD = st.tuples(
    st.sampled_from([512, 640, 768]), st.sampled_from([512, 768]), st.integers(1, 3), st.booleans()
)


@st.composite
def some_sets(draw):
    """One to three data sets of any small size, with at least one usable record."""
    chunks = draw(st.booleans())
    sets = [
        rows_of(
            draw(st.lists(RECORD, max_size=40)),
            chunks=chunks,
            repeats=draw(st.integers(1, 3)),
            usable=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return [*sets, rows_of([(512, 512, 1, True)], chunks=chunks)]


FIXED = [
    rows_of(
        [(512, 512 + 256 * (number % 2), 1 + number % 3, number % 7 > 0) for number in range(50)],
        repeats=2,
    )
]


def opened(folder, sets=FIXED, *, seed=1, epoch=0, global_batch_size=4, fingerprint="f"):
    """The plan in `folder`."""
    return open_plan(
        folder,
        seed=seed,
        epoch=epoch,
        global_batch_size=global_batch_size,
        sets=sets,
        fingerprint=fingerprint,
    )


def samples_of(plan):
    """Each batch as a list of (data set, record, repeat)."""
    batches = [plan.batch(place) for place in range(plan.steps)]
    return [list(zip(*(column.tolist() for column in batch[:3]), strict=True)) for batch in batches]


def bytes_of(folder):
    """The one plan file in `folder`."""
    (path,) = folder.glob("*.plan")
    return path.read_bytes()


@settings(deadline=None)
@given(
    sets=some_sets(),
    global_batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_has_each_sample_once_in_pure_batches(sets, global_batch_size, seed, epoch):
    """Every usable record of every set and repeat once; a batch of one bucket; only the last of a bucket short."""
    with tempfile.TemporaryDirectory() as folder:
        plan = opened(
            Path(folder), sets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        )
        batches = [plan.batch(place) for place in range(plan.steps)]
        found = Counter(sample for batch in samples_of(plan) for sample in batch)
    expected = {
        (dataset, record, repeat)
        for dataset, rows in enumerate(sets)
        for record, repeat in product(range(len(rows.width)), range(rows.repeats))
        if rows.usable is None or rows.usable[record]
    }
    assert found == dict.fromkeys(expected, 1)
    sizes = {}
    for batch in batches:
        for dataset, record in zip(batch.dataset.tolist(), batch.record.tolist(), strict=True):
            rows = sets[dataset]
            chunks = None if rows.chunks is None else rows.chunks[record]
            assert (batch.width, batch.height, batch.chunks) == (
                rows.width[record],
                rows.height[record],
                chunks,
            )
        sizes.setdefault((batch.width, batch.height, batch.chunks), []).append(len(batch.record))
    for found_sizes in sizes.values():
        assert sorted(found_sizes)[1:] == [global_batch_size] * (len(found_sizes) - 1)
        assert 1 <= min(found_sizes) <= global_batch_size
    assert (len(sizes), plan.steps) == count_epoch(sets, global_batch_size)


@settings(deadline=None, max_examples=30)
@given(
    sets=some_sets(),
    global_batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_the_plan_is_what_its_definition_says(sets, global_batch_size, seed, epoch):
    """Another program that follows the words of the module finds the same batches."""
    numbered = [
        (dataset, record, repeat)
        for dataset, rows in enumerate(sets)
        for repeat, record in product(range(rows.repeats), range(len(rows.width)))
    ]

    def in_order(numbers, purpose):
        key = Chance(SampleId(seed, epoch, "")).below(2**64, purpose)
        return sorted(
            numbers, key=lambda number: hash_of(np.array([number], dtype=np.uint64), key)[0]
        )

    buckets = {}
    for number, (dataset, record, _) in enumerate(numbered):
        rows = sets[dataset]
        if rows.usable is None or rows.usable[record]:
            kind = (
                rows.width[record],
                rows.height[record],
                0 if rows.chunks is None else rows.chunks[record],
            )
            buckets.setdefault(kind, []).append(number)
    batches = []
    for kind in sorted(buckets):
        members = in_order(buckets[kind], "order of samples")
        batches += [
            members[at : at + global_batch_size] for at in range(0, len(members), global_batch_size)
        ]
    expected = [
        [numbered[number] for number in batches[batch]]
        for batch in in_order(range(len(batches)), "order of batches")
    ]
    with tempfile.TemporaryDirectory() as folder:
        plan = opened(
            Path(folder), sets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        )
        assert samples_of(plan) == expected


def test_a_plan_never_changes(tmp_path):
    """A run that is resumed by a later release trains the same batches."""
    rows = rows_of([(512, 512, 1, True)] * 5 + [(768, 512, 1, True)] * 4)
    plan = opened(tmp_path, [rows], seed=2**63 - 1, epoch=3, global_batch_size=2)
    assert [[record for _, record, _ in batch] for batch in samples_of(plan)] == [
        [7, 5],
        [6, 8],
        [3, 4],
        [1],
        [2, 0],
    ]


def test_the_same_question_gives_the_same_bytes(tmp_path):
    """Two machines that share nothing build the same file."""
    opened(tmp_path / "a"), opened(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 1}, {"global_batch_size": 5}], ids=str)
def test_another_seed_epoch_or_size_is_another_order(tmp_path, other):
    """Both files stand side by side, with different batches."""
    assert samples_of(opened(tmp_path)) != samples_of(opened(tmp_path, **other))
    assert len(list(tmp_path.glob("*.plan"))) == 2


@pytest.mark.parametrize("what", ["fingerprint", "repeats", "usable", "chunks"])
def test_other_data_is_another_file(tmp_path, what):
    """A plan is never taken for that of other columns."""
    opened(tmp_path)
    (rows,) = FIXED
    others = {
        "repeats": rows._replace(repeats=3),
        "usable": rows._replace(usable=None),
        "chunks": rows._replace(chunks=None),
    }
    opened(tmp_path, [others.get(what, rows)], fingerprint="g" if what == "fingerprint" else "f")
    assert len(list(tmp_path.glob("*.plan"))) == 2


@pytest.mark.parametrize(
    "damage", ["empty", "half a header", "cut off", "a byte more", "a flipped bit", "another plan"]
)
def test_a_damaged_plan_is_built_again(tmp_path, damage):
    """Whatever stands under its name, what is opened is the plan."""
    expected = samples_of(opened(tmp_path))
    (path,) = tmp_path.glob("*.plan")
    whole = path.read_bytes()
    opened(tmp_path / "other", epoch=1)
    flipped = whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]
    path.write_bytes(
        {
            "empty": b"",
            "half a header": whole[:40],
            "cut off": whole[:-4],
            "a byte more": whole + b"\0",
            "a flipped bit": flipped,
            "another plan": bytes_of(tmp_path / "other"),
        }[damage]
    )
    assert samples_of(opened(tmp_path)) == expected
    assert path.read_bytes() == whole


def test_a_sound_plan_is_not_built_again(tmp_path, monkeypatch):
    """Opening a second time only maps the file, and does not look at the columns' sizes."""
    opened(tmp_path)
    monkeypatch.setattr(plan_module, "_build", None)
    monkeypatch.setattr(plan_module, "bucket_sizes", None)
    opened(tmp_path)


def test_a_plan_pickles_as_its_path(tmp_path):
    """A copy in another process maps the same file."""
    plan = opened(tmp_path)
    sent = pickle.dumps(plan)
    assert len(sent) < 500
    assert samples_of(pickle.loads(sent)) == samples_of(plan)


@pytest.mark.parametrize("place", [-1, 10**6])
def test_a_step_outside_the_epoch_is_refused(tmp_path, place):
    """The error says which steps there are."""
    with pytest.raises(IndexError, match=f"found step {place} of the epoch, expected 0 to "):
        opened(tmp_path).batch(place)


def _open_in_child(folder, barrier, answers):
    build = plan_module._build

    def noted(*arguments):
        with (folder / "built").open("a") as file:
            file.write("x")
        build(*arguments)

    plan_module._build = noted
    barrier.wait()
    answers.put(samples_of(opened(folder)))


def test_processes_that_come_together_build_once(tmp_path):
    """Three processes at once get the same plan, which one of them built."""
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    children = [
        context.Process(target=_open_in_child, args=(tmp_path, barrier, answers)) for _ in range(3)
    ]
    for child in children:
        child.start()
    plans = [answers.get(timeout=30) for _ in children]
    for child in children:
        child.join()
    assert plans == [samples_of(opened(tmp_path))] * 3
    assert (tmp_path / "built").read_text() == "x"
    assert not list(tmp_path.glob("*.tmp"))


def test_a_full_disk_is_one_message_and_leaves_nothing(tmp_path):
    """Room is taken before anything is written, so that the process is not killed; the next try, with room, succeeds."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(
            OutputError,
            match=r"epoch-00000000-\w+\.plan: cannot write the order of epoch 0, File too large\. Free some room",
        ):
            opened(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.lock"]
    opened(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves room on Linux alone")
def test_room_is_reserved_before_writing(tmp_path):
    """A sparse file would be filled while it is mapped, where a full disk is a killed process and no error."""
    with (tmp_path / "file").open("w+b") as file:
        plan_module._reserve(file.fileno(), 1_000_000)
    assert (tmp_path / "file").stat().st_size == 1_000_000
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1_000_000


def test_no_usable_record_leaves_no_file(tmp_path):
    """The error of the data comes through, and no half-built file stays."""
    with pytest.raises(LatentsError, match="none of 1 records"):
        opened(tmp_path, [rows_of([(512, 512, 1, False)])])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.lock"]


def test_plans_of_old_epochs_are_removed(tmp_path):
    """The folder of a run does not grow; what a killed build left goes too, and nothing else."""
    for epoch in range(3):
        opened(tmp_path, epoch=epoch)
    (tmp_path / "epoch-00000001-ab.plan.xyz.tmp").touch()
    (tmp_path / "epoch-1-notes.txt").touch()
    kept = opened(tmp_path, epoch=1)
    drop_old_plans(tmp_path, 2)
    assert [path.name[:14] for path in sorted(tmp_path.iterdir())] == [
        "epoch-00000002",
        "epoch-1-notes.",
        "plan.lock",
    ]
    assert samples_of(kept)  # an open one can still be read


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from trainer.data.buckets import SetRows
from trainer.data.plan import open_plan
width, height = (np.memmap(path, dtype=np.uint32, mode="r") for path in sys.argv[2:])
private = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (private + 40_000_000,) * 2)
open_plan(Path(sys.argv[1]), seed=1, epoch=0, global_batch_size=1, sets=[SetRows(width, height, None, 1, None)], fingerprint="")
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="limits and counts private memory as Linux does"
)
def test_building_takes_bounded_private_memory(tmp_path):
    """Three million records of one bucket in single batches: 40 MB at most, where sorting all keys at once would take twice that."""
    np.full(3_000_000, 512, dtype=np.uint32).tofile(tmp_path / "column")
    column = str(tmp_path / "column")
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), column, column], check=True)
    assert len(bytes_of(tmp_path)) <= 16 * 3_000_000


@given(
    ranks=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    data=st.data(),
)
def test_dealing_is_even_and_whole(ranks, accumulation, batch_size, data):
    """Each sample once with weight 1; every slice at least one slot; slices differ by one at most, and fit a micro-batch."""
    n_samples = data.draw(st.integers(1, ranks * accumulation * batch_size))
    dealt = deal(n_samples, ranks=ranks, accumulation=accumulation, batch_size=batch_size)
    slices = [slots for of_ranks in dealt for slots in of_ranks]
    assert (len(dealt), {len(of_ranks) for of_ranks in dealt}) == (accumulation, {ranks})
    assert [place for slots in slices if slots.weight for place in slots.places] == list(
        range(n_samples)
    )
    real = [len(slots.places) if slots.weight else 0 for slots in slices]
    assert max(real) - min(real) <= 1
    assert max(real) <= batch_size
    assert all(
        len(slots.places) == 1 and 0 <= slots.places[0] < n_samples
        for slots in slices
        if not slots.weight
    )


def test_too_many_samples_are_not_dealt():
    """A batch of another global batch size is a bug of the caller."""
    for n_samples in (0, 5):
        with pytest.raises(
            ValueError,
            match=f"found {n_samples} samples, expected 1 to 1 ranks x 2 micro-steps x 2",
        ):
            deal(n_samples, ranks=1, accumulation=2, batch_size=2)
