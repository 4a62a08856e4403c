import errno
import multiprocessing
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from builders.plans import FIXED, opened, rows_of, samples_of

from capmerge.errors import OutputError
from trainer.data import plan_files
from trainer.data.plan_files import drop_old_plans
from trainer.errors import LatentsError


def bytes_of(folder):
    """The bytes of the only plan file in `folder`."""
    (path,) = folder.glob("*.plan")
    return path.read_bytes()


def test_the_same_question_gives_the_same_bytes(tmp_path):
    """Two machines that share nothing build identical files."""
    opened(tmp_path / "a"), opened(tmp_path / "b")
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.mark.parametrize("other", [{"seed": 2}, {"epoch": 1}, {"global_batch_size": 5}], ids=str)
def test_another_seed_epoch_or_size_is_another_order(tmp_path, other):
    """Plans of another seed, epoch or batch size have their own files and batches."""
    assert samples_of(opened(tmp_path)) != samples_of(opened(tmp_path, **other))
    assert len(list(tmp_path.glob("*.plan"))) == 2


@pytest.mark.parametrize("what", ["fingerprint", "repeats", "usable", "chunks"])
def test_other_data_is_another_file(tmp_path, what):
    """A plan is never used for other columns than its own."""
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
    """A damaged file under the name of a plan is replaced by the plan."""
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
    """Opening a plan a second time only maps the file and does not count the columns."""
    opened(tmp_path)
    monkeypatch.setattr(plan_files, "_build", None)
    monkeypatch.setattr(plan_files, "bucket_sizes", None)
    opened(tmp_path)


def _open_in_child(folder, barrier, answers):
    build = plan_files._build

    def noted(*arguments):
        with (folder / "built").open("a") as file:
            file.write("x")
        build(*arguments)

    plan_files._build = noted
    barrier.wait()
    answers.put(samples_of(opened(folder)))


def test_processes_that_come_together_build_once(tmp_path):
    """Three processes at once get the same plan, which only one of them builds."""
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
    """A full disk is one error that leaves nothing behind.

    Space is reserved before anything is written, so that the process is not killed.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        with pytest.raises(
            OutputError,
            match=r"epoch-00000000-\w+\.plan: cannot write the order of epoch 0: "
            r"File too large\. Free some disk space",
        ):
            opened(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.lock"]
    opened(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="reserves room on Linux alone")
def test_room_is_reserved_before_writing(tmp_path):
    """Disk space is reserved before a file is written through a memory map.

    On a full disk, filling a sparse file would kill the process instead of raising an error.
    """
    with (tmp_path / "file").open("w+b") as file:
        plan_files._reserve(file.fileno(), 1_000_000)
    assert (tmp_path / "file").stat().st_size == 1_000_000
    assert (tmp_path / "file").stat().st_blocks * 512 >= 1_000_000


def test_a_disk_that_fills_up_later_leaves_room_for_the_plans(tmp_path, monkeypatch):
    """Room is held while epochs are to come, and plans in it are those of an empty disk.

    A disk that is full gives no file more bytes than it has.
    """
    expected = [opened(tmp_path / "other", epoch=epoch)._path.read_bytes() for epoch in range(4)]
    reserve = plan_files._reserve

    def full(descriptor, size_bytes):
        if os.fstat(descriptor).st_size < size_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        reserve(descriptor, size_bytes)

    found = [opened(tmp_path, hold_room=True)._path.read_bytes()]
    monkeypatch.setattr(plan_files, "_reserve", full)
    for epoch in range(1, 4):
        found.append(opened(tmp_path, epoch=epoch, hold_room=epoch < 3)._path.read_bytes())
        assert not (tmp_path / "room").exists()
        drop_old_plans(tmp_path, epoch, hold_room=epoch < 3)
    assert found == expected
    assert [path.name[:14] for path in sorted(tmp_path.glob("*[!k]"))] == [
        *("epoch-00000003", "other")
    ]
    with pytest.raises(OutputError, match="No space left on device"):
        opened(tmp_path, epoch=4)


def test_no_usable_record_leaves_no_file(tmp_path):
    """The `LatentsError` is raised unchanged, and no half-built file remains."""
    with pytest.raises(LatentsError, match="none of the 1 records"):
        opened(tmp_path, [rows_of([(512, 512, 1, False)])])
    assert [path.name for path in tmp_path.iterdir()] == ["plan.lock"]


def test_plans_of_old_epochs_are_removed(tmp_path):
    """Plans of old epochs and remains of killed builds are removed, and nothing else."""
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
    # An open plan can still be read.
    assert samples_of(kept)


MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from trainer.data.buckets import SetRows
from trainer.data.plan_files import open_plan
width, height = (np.memmap(path, dtype=np.uint32, mode="r") for path in sys.argv[2:])
status = open("/proc/self/status").read().splitlines()
private = int(next(line for line in status if line.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (private + 40_000_000,) * 2)
sets = [SetRows(width, height, None, 1, None)]
folder = Path(sys.argv[1])
open_plan(folder, seed=1, epoch=0, global_batch_size=1, sets=sets, fingerprint="")
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="limits and counts private memory as Linux does"
)
def test_building_takes_bounded_private_memory(tmp_path):
    """Building a plan of three million records takes at most 40 MB of private memory.

    Sorting all keys at once would take twice that.
    """
    np.full(3_000_000, 512, dtype=np.uint32).tofile(tmp_path / "column")
    column = str(tmp_path / "column")
    subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path), column, column], check=True)
    assert len(bytes_of(tmp_path)) <= 16 * 3_000_000
