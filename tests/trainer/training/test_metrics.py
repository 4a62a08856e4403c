import json
import math
import subprocess
import sys

import pytest
import torch
from builders.metrics import write_steps

from capmerge.errors import OutputError
from trainer.training.loss_plot import save_loss_plot
from trainer.training.metrics import (
    MetricsFile,
    Recent,
    cut_back,
    peak_memory_bytes,
    progress_fields,
)


def lines_of(path):
    """The lines of a metrics file as values; every one has to be whole."""
    text = path.read_text(encoding="ascii")
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def steps_of(path):
    """The steps of a metrics file."""
    return [line["step"] for line in lines_of(path)]


def test_a_line_is_there_when_write_returns(tmp_path):
    """Each line can be read before the file is closed, whatever characters a caption holds."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.write(step=1, loss=0.5, keys=["\ud83d/ü.png"], captions=["line\u2028one\n{猫}"])
    assert lines_of(path) == [
        {"step": 1, "loss": 0.5, "keys": ["\ud83d/ü.png"], "captions": ["line\u2028one\n{猫}"]}
    ]
    file.write(step=2, loss=0.25)
    assert path.read_text().splitlines()[1] == '{"step": 2, "loss": 0.25}'
    file.close()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_lacks_is_null(tmp_path, value):
    """A loss or norm that is not finite leaves the line valid JSON."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    file.write(step=1, loss=value, grad_norm=value, more={"norm": value})
    file.close()
    assert lines_of(path) == [{"step": 1, "loss": None, "grad_norm": None, "more": {"norm": None}}]


def test_lone_surrogates_survive_a_resume(tmp_path):
    """A line with a lone surrogate is kept when the file is cut back, and drawn."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, after_step=0)
    for step in (1, 2):
        file.write(step=step, loss=0.5, captions=["\ud83d half"])
    file.close()
    cut_back(path, 1)
    assert lines_of(path) == [{"step": 1, "loss": 0.5, "captions": ["\ud83d half"]}]
    assert save_loss_plot(path, tmp_path / "loss.png") == ""


def test_a_resumed_run_goes_on_behind_its_step(tmp_path):
    """Lines past the resumed step are removed before new ones follow; others keep their bytes."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 9))
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:5])
    file = MetricsFile(path, after_step=5)
    assert path.read_bytes() == kept
    file.write(step=6, loss=0.0)
    file.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 4, "lo',
        b'{"step": 4, "loss": 1}',
        b'\xff\x00{"step"\n',
        b'"step"\n',
        b"\n",
        b'{"loss": 1}\n',
        b'{"step": ' + b"[" * 100_000 + b"\n",
    ],
)
def test_a_broken_line_is_removed(tmp_path, tail):
    """Partial lines and lines that are not of a step are removed; whole lines stay."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    cut_back(path, 100)
    assert path.read_bytes() == whole


def test_nothing_to_remove_leaves_the_file_alone(tmp_path):
    """A file that ends at the resumed step is not rewritten, and nothing is left beside it."""
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [1, 2, 3])
    before = path.stat()
    cut_back(path, 3)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there_is_a_message(tmp_path):
    """A file that cannot be opened is an error that names it."""
    with pytest.raises(OutputError, match=r"none.metrics\.jsonl: cannot write"):
        MetricsFile(tmp_path / "none" / "metrics.jsonl", after_step=0)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from trainer.training.metrics import MetricsFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
file = MetricsFile(Path(sys.argv[1]), after_step=0)
file.write(step=1, loss=1.0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
print(file.write(step=2, loss=1.0, keys=["k" * 200]))
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(file.write(step=3, loss=1.0))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files")
def test_a_full_disk_costs_a_line(tmp_path):
    """A line that does not fit is given up whole, with the reason, and the next one is intact."""
    path = tmp_path / "metrics.jsonl"
    found = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(path)], capture_output=True, text=True, check=True
    )
    problem, none = found.stdout.splitlines()
    assert problem.startswith(f"{path}: cannot write, ")
    assert none == ""
    assert steps_of(path) == [1, 3]


def test_recent_steps():
    """Speed over all ranks, share of waiting and shares of events cover the last 100 steps."""
    recent = Recent()
    assert recent.speed() == {"samples_per_second": 0, "data_wait": 0}
    assert recent.event_shares() == {}
    for _ in range(3):
        recent.add({"samples": 1000, "flipped": 1000}, 100.0, 100.0)
    for step in range(100):
        counts = {
            "samples": 4,
            "tokens": 90,
            "dropped_tokens": 9,
            "wider_batches": 1,
            "flipped": 2,
            "random_caption": int(step < 4),
        }
        recent.add(counts, 0.5, 0.125)
    assert recent.speed() == {"samples_per_second": 8, "data_wait": 0.25}
    assert recent.speed(ranks=4)["samples_per_second"] == 32
    assert recent.event_shares() == {"flipped": 0.5, "random_caption": 0.01}


def test_fields_of_the_progress_bar():
    """The progress bar shows known numbers in few characters, and leaves unknown ones out."""
    line = {"step": 3, "loss": 0.12345, "lr_unet": 1e-5, "lr_text_encoder": 1e-6, "grad_norm": 1.0}
    speed = {"samples_per_second": 12.345, "data_wait": 0.034, "memory_bytes": 2_500_000_000}
    assert progress_fields(line | speed, {"caption_dropped": 0.1, "random_caption": 0.012}) == {
        "loss": "0.123",
        "lr": "1e-05",
        "samples/s": "12.3",
        "wait": "3%",
        "mem": "2.5 GB",
        "caption_dropped": "10%",
        "random_caption": "1.2%",
    }
    assert progress_fields({"loss": math.nan, "memory_bytes": 0}, {}) == {"loss": "nan"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell")
def test_peak_memory_is_in_bytes():
    """The peak is plausible for a process with torch, and rises with the memory taken."""
    before = peak_memory_bytes(torch.device("cpu"))
    assert 50e6 < before < 1e12
    taken = bytearray(before // 2)
    taken[::1024] = b"x" * len(taken[::1024])
    assert peak_memory_bytes(torch.device("cpu")) > before
