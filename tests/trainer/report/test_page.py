import json
import math
import os
import re
import subprocess
import sys
from xml.etree import ElementTree as ET

import pytest
from builders.runs import ENVIRONMENT
from PIL import Image

from capmerge.errors import UsageError
from trainer.report.curves import MOST_BINS, Curve, read_curves
from trainer.report.page import write_report

CONFIG = """\
[model]
family = "sd1"
path = "<script>alert(1)</script>"
[[data]]
metadata = "meta.json"
repeats = 2
[optimizer]
learning_rate = 0.001
name = "AdamW"
"""
RUN = {
    "versions": {"torch": "2.13.0"},
    "identity": {},
    "size": {"max_steps": 200, "steps_per_epoch": 50, "records": 1234},
    "trained": {"unet": [50, 200], "text_encoder": [0, 100]},
}


def line_of(step, **changes):
    """A line of metrics.jsonl."""
    return {
        "step": step,
        "loss": 0.5 + 0.1 * math.sin(step),
        "epoch": step // 50,
        "grad_norm": 1.0,
        "lr_unet": 1e-5,
        "samples_per_second": 4.0,
        "data_wait": 0.25,
        "memory_bytes": 2_500_000_000,
        "samples": 4,
        "tokens": 100,
        "dropped_tokens": 3,
        "wider_batches": 0,
        "caption_dropped": 1,
    } | changes


def write_lines(path, lines):
    """Write objects as lines of JSON."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """The folder of a run of 200 steps."""
    run = tmp_path / "mine"
    run.mkdir()
    (run / "config.toml").write_text(CONFIG, encoding="utf-8")
    (run / "run.json").write_text(json.dumps(RUN), encoding="utf-8")
    write_lines(run / "metrics.jsonl", map(line_of, range(1, 201)))
    return run


def page_of(folder):
    """The report on a run, and the lines that were said about it."""
    said = write_report(folder, None, force=False, command="python -m trainer.report mine")
    return (folder / "report.html").read_text(encoding="utf-8"), said


def pictures_of(page):
    """The charts of a page by the title of their section, parsed."""
    found = re.findall(r"<section><h2>([^<]*)</h2>(<svg.*?</svg>)", page, re.DOTALL)
    return {title: ET.fromstring(svg) for title, svg in found}


def test_the_page_shows_the_run(folder):
    """The page has every curve, raw and smoothed losses, and what was trained with what."""
    page, said = page_of(folder)
    assert said == [f"written: {folder}/report.html"]
    pictures = pictures_of(page)
    assert list(pictures) == [
        "Loss",
        "Learning rates",
        "Gradient norm",
        "Samples per second",
        "Waiting for data",
    ]
    raw, smoothed = pictures["Loss"].findall("polyline")
    assert len(raw.get("points").split()) == len(smoothed.get("points").split()) == 200
    assert "Step 200 of 200: the run is complete." in page
    assert '<td>unet</td><td class="n">200</td><td class="n">25.0 %</td>' in page
    assert "<td>frozen</td>" in page
    for shown in ("4.00", "1,234", "2.50 GB", "2.13.0", "20,000 tokens", "AdamW"):
        assert shown in page


def test_the_page_loads_and_runs_nothing(folder):
    """Texts of the run are escaped, and the policy of the page forbids scripts and addresses."""
    page, _ = page_of(folder)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []


def test_a_long_run_is_thinned_without_losing_a_spike(folder):
    """A longer file makes no longer page; means stay exact, and the highest loss is drawn."""
    sizes = []
    for steps in (4_000, 16_000):
        lines = (line_of(step, loss=9.0 if step == 777 else 0.25) for step in range(1, steps + 1))
        write_lines(folder / "metrics.jsonl", lines)
        curve = read_curves(folder / "metrics.jsonl").curves["loss"]
        bins = curve.bins()
        assert len(bins) <= MOST_BINS
        assert sum(one.n_values for one in bins) == steps
        assert curve.mean() == pytest.approx(0.25 + 8.75 / steps)
        assert max(one.high for one in bins) == 9
        page, _ = page_of(folder)
        sizes.append(len(page))
        assert f"lowest to highest of {curve.width:,} steps" in page
        assert f"Each point stands for {curve.width:,} steps." in page
    assert max(sizes) < 300_000
    assert sizes[1] < 1.3 * sizes[0]


@pytest.mark.parametrize("steps", [[1], [1, 10**9], [5, 3, 3, 10_000], range(1, 9_000, 7)])
def test_curves_keep_every_value(steps):
    """However the steps lie, the bins hold each value once, in order and in bounded number."""
    curve = Curve()
    for step in steps:
        curve.add(step, float(step))
    bins = curve.bins()
    assert len(bins) <= MOST_BINS
    assert sum(one.n_values for one in bins) == len(steps)
    assert math.fsum(one.total for one in bins) == pytest.approx(math.fsum(steps))
    assert [one.step for one in bins] == sorted(one.step for one in bins)
    assert min(one.low for one in bins) == min(steps)


def test_the_moving_mean_is_that_of_the_steps_around():
    """At each step, the moving mean is the mean of the values within reach, fewer at the ends."""
    values = [math.cos(step) for step in range(1, 201)]
    curve = Curve()
    for step, value in enumerate(values, 1):
        curve.add(step, value)
    reach = Curve.reach(200)
    for number, (step, mean) in enumerate(curve.smoothed()):
        around = values[max(0, number - reach) : number + reach + 1]
        assert step == number + 1
        assert mean == pytest.approx(math.fsum(around) / len(around))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", None, "metrics.jsonl: there is no such file."),
        ("metrics.jsonl", b"", None),
        ("metrics.jsonl", b"[" * 100_000 + b"\n", "metrics.jsonl: 100,001 bytes are no whole"),
        ("metrics.jsonl", b'{"step": 1, "loss": null}\n{"st', "metrics.jsonl: 4 bytes are no"),
        ("metrics.jsonl", b'{"step": 0}\n{"step": true}\n', "metrics.jsonl: 27 bytes are no"),
        ("metrics.jsonl", b'{"step": 3, "loss": "x", "samples": -4, "lr_unet": []}\n', None),
        ("run.json", None, "run.json: there is no such file."),
        ("run.json", b"[1]", "run.json: found a JSON list, expected an object."),
        ("run.json", b'{"size": 3, "trained": {"unet": "x"}, "versions": [1]}', None),
        ("run.json", b"\xff", "run.json: cannot be read ("),
        ("config.toml", None, "config.toml: there is no such file."),
        ("config.toml", b"x = ", "config.toml: cannot be read ("),
        ("config.toml", b"x = " + b"[" * 100_000, "config.toml: cannot be read ("),
        ("config.toml", b"data = 3\noptimizer = [[1, {a = 1}], 2020-01-01]\n", None),
        ("validation.jsonl", b'{"step": 5, "held_out": {"raw": {"quantiles": 3}}}\n', None),
        ("validation.jsonl", b"\0", None),
    ],
)
def test_a_missing_or_damaged_file_is_told(folder, name, content, said):
    """The page is written all the same, and says itself what it lacks."""
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)
    page, (*notes, _) = page_of(folder)
    if said:
        (note,) = notes
        assert note.startswith(said)
        assert 'class="left-out"' in page
    else:
        assert notes == []
    assert "Made by capmerge" in page


def test_pipes_and_folders_are_not_read(folder):
    """A pipe, to which nobody writes, and a folder in the place of a file are told."""
    (write_samples(folder, 10, "x") / "00.png").unlink()
    os.mkfifo(folder / "samples" / "step-00000010" / "00.png")
    for name in ("metrics.jsonl", "run.json", "config.toml"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    (folder / "validation.jsonl").mkdir()
    _, (*notes, _) = page_of(folder)
    assert len(notes) == 5
    assert all("it is no regular file" in note for note in notes)


def test_a_folder_without_a_run_is_refused(tmp_path):
    """A folder that holds no run, and one that is not there, are mistakes of usage."""
    with pytest.raises(UsageError, match=r"found neither run.json nor metrics.jsonl"):
        write_report(tmp_path, None, force=False, command="")
    with pytest.raises(UsageError, match="found no folder"):
        write_report(tmp_path / "none", None, force=False, command="")
    with pytest.raises(UsageError, match="cannot be read"):
        write_report(tmp_path / ("x" * 300), None, force=False, command="")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "losses",
    [
        [5e-324],
        [1e-300, 1.0, 1e-300],
        [0.0] * 30,
        [-1.0, -2.0],
        [1e29, 1.0, 1.0],
        [0.3] * 30,
        [1e400, "x", None, True, 1e31, 0.5],
    ],
)
def test_odd_numbers_are_drawn(folder, losses):
    """Whatever the losses, the chart has only finite coordinates inside of its picture."""
    lines = [line_of(step, loss=loss) for step, loss in enumerate(losses, 1)]
    write_lines(folder / "metrics.jsonl", lines)
    page, _ = page_of(folder)
    picture = pictures_of(page)["Loss"]
    for element in picture.iter():
        for name in ("x", "y", "x1", "y1", "x2", "y2", "cx", "cy"):
            assert -1 <= float(element.get(name, 0)) <= 640
        for place in element.get("points", "").replace(",", " ").split():
            assert 0 <= float(place) <= 640


def test_hostile_names_are_escapes(folder):
    """Names in metrics with control characters and lone surrogates are shown as escapes."""
    name = "lr_<b>\ud800\x1b"
    write_lines(folder / "metrics.jsonl", [line_of(1) | {name: 1.0, f"x{name}": 3}])
    page, _ = page_of(folder)
    assert "&lt;b&gt;\\ud800\\x1b" in page
    assert "<b>" not in page


def test_only_reports_are_replaced(folder, tmp_path):
    """A report is written again; any other file only with --force, and only as HTML."""
    page_of(folder)
    page_of(folder)
    other = tmp_path / "other.html"
    other.write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="is no report on a run"):
        write_report(folder, other, force=False, command="")
    assert other.read_text(encoding="utf-8") == "mine"
    write_report(folder, other, force=True, command="")
    assert "mine: a training run" in other.read_text(encoding="utf-8")
    for wrong in (tmp_path / "page.pdf", tmp_path / "none" / "page.html", tmp_path / "d.html"):
        (tmp_path / "d.html").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match=r"^-o "):
            write_report(folder, wrong, force=True, command="")


def test_settings_that_changed_on_the_way_are_listed(folder):
    """An older config is compared with the next one, setting by setting."""
    (folder / "config.2.toml").write_text(CONFIG.replace("repeats = 2", "repeats = 3"))
    (folder / "config.10.toml").write_text(CONFIG.replace("AdamW", "Lion"))
    page, _ = page_of(folder)
    rows = re.findall(r"<td>(data\.0\.repeats|optimizer\.name)</td><td[^>]*>(\w+)</td>", page)
    assert rows[-3:] == [
        ("data.0.repeats", "3"),
        ("optimizer.name", "AdamW"),
        ("optimizer.name", "Lion"),
    ]


def test_validations_are_shown_by_quantile_and_style(folder):
    """Each quantile and style has a line for the weights and a dashed one for their average."""

    def means(loss):
        return {
            "loss": loss,
            "quantiles": {"0.25": 2 * loss, "0.75": loss / 2},
            "styles": {"tags": loss, "long": loss},
        }

    write_lines(
        folder / "validation.jsonl",
        [
            {
                "step": step,
                "held_out": {"records": 7, "raw": means(loss), "ema": means(loss + 0.01)},
                "train": {"records": 6, "raw": means(loss - 0.01), "ema": means(loss)},
                "seconds": 1.0,
                "share_of_time": 0.034,
            }
            for step, loss in ((0, 0.5), (100, 0.25), (200, 0.375))
        ],
    )
    page, _ = page_of(folder)
    pictures = pictures_of(page)
    for title, lines in (
        ("Validation loss", 4),
        ("Held-out loss by timestep quantile", 4),
        ("Held-out loss by caption style", 4),
    ):
        found = pictures[title].findall("polyline")
        assert len(found) == lines, title
        assert sum("dashed" in line.get("class") for line in found) == lines / 2
        assert all(len(line.get("points").split()) == 3 for line in found)
    assert "Validation after step 200" in page
    assert '<td>quantile 0.25</td><td class="n">0.75000</td>' in page
    assert "<td>more than 75 tokens</td>" in page
    assert "lowest after step 100: 0.25000" in page
    assert "7 records that are never trained, and of 6 that are" in page
    assert "3.4 % of the time" in page


def write_samples(folder, step, prompt, size=(64, 96)):
    """Write a set of one picture."""
    made = folder / "samples" / f"step-{step:08d}"
    made.mkdir(parents=True)
    Image.new("RGB", size, (step % 256, 9, 9)).save(made / "00.png")
    line = {"step": step, "index": 0, "file": "00.png", "prompt": prompt, "seed": 3}
    write_lines(made / "samples.jsonl", [line])
    return made


def test_samples_are_shown_small_from_the_first_to_the_last(folder):
    """Of many sets, some are shown, the first and the last among them, as data of bounded size."""
    for step in range(10, 310, 10):
        write_samples(folder, step, "<b>a hat</b>", size=(1024, 768))
    page, _ = page_of(folder)
    shown = re.findall(
        r'<img src="(data:image/jpeg;base64,[^"]*)" alt="sample of step (\d+)">', page
    )
    assert len(shown) == 6
    assert (shown[0][1], shown[-1][1]) == ("10", "300")
    assert "&lt;b&gt;a hat&lt;/b&gt;" in page
    assert "6 of 30 sets of pictures" in page
    assert len(page) < 200_000


def test_broken_samples_are_told(folder):
    """A picture that is missing, damaged or lies elsewhere is left out with a note."""
    write_samples(folder, 10, "sound")
    (write_samples(folder, 20, "cut") / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (write_samples(folder, 30, "gone") / "00.png").unlink()
    write_lines(write_samples(folder, 40, "x") / "samples.jsonl", [{"file": "../../a.png"}, 3])
    (write_samples(folder, 50, "x") / "samples.jsonl").write_bytes(b"\xff")
    page, (*notes, _) = page_of(folder)
    assert page.count("<img") == 1
    assert len(notes) == 5
    assert all(note.startswith("samples/step-000000") for note in notes)


def test_the_command_needs_no_torch(folder, tmp_path):
    """The command writes the page without importing torch; without a run it exits with 2."""
    done = report(folder, "-X", "importtime")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.endswith(f"written: {folder}/report.html\n")
    assert (
        re.findall(r"\| +(torch|transformers|diffusers|PIL|numpy)$", done.stderr, re.MULTILINE)
        == []
    )
    done = report(tmp_path)
    assert done.returncode == 2
    assert "expected the folder of a run" in done.stderr


def report(folder, *options):
    """The result of the command, in a real start of Python."""
    return subprocess.run(
        [sys.executable, *options, "-m", "trainer.report", str(folder)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
