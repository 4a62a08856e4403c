"""The report on a run as one HTML page: its curves, its samples, and what was trained with what.

The page is drawn from the files of the run folder alone, while the run goes on or long after it,
without torch, a GPU, the model or the data.
"""

import time
from collections.abc import Iterator
from html import escape
from importlib.metadata import version
from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import write_whole
from capmerge.html_page import generator_line, page_html, section_html, text_html
from trainer.report.charts import CHART_STYLE, COLOURS, Axis, Form, Line, chart
from trainer.report.curves import MOST_BINS, Curve
from trainer.report.run_files import RunFiles, read_run
from trainer.report.samples import SAMPLES_STYLE, samples_html
from trainer.report.tables import percent, run_sections, short
from trainer.report.validation import validation_lines
from trainer.training.run_folder import MODEL_FOLDER

REPORT_FILE = "report.html"
_KIND = "training run"
_NEAR_BYTES = 4096
_STYLE = (
    CHART_STYLE
    + SAMPLES_STYLE
    + """\
details pre { overflow-x: auto; font-size: 13px; line-height: 1.4; }
details { margin-top: 2rem; } summary { cursor: pointer; font-weight: 600; }
td.long { min-width: 12rem; }
.left-out { border-left: 4px solid var(--limit); padding: .1rem 1rem; }
"""
)


def write_report(folder: Path, output: Path | None, *, force: bool, command: str) -> list[str]:
    """Write the report on the run in `folder`, and return lines that say where and what it lacks.

    It is `report.html` in the folder unless `output` is given. A report that was written before is
    replaced, another file only with `force`. Raises `UsageError` when the folder is not that of a
    run or the page cannot be written there.
    """
    target = output or folder / REPORT_FILE
    try:
        run = read_run(folder)
        _check_target(target, force=force)
    except OSError as error:
        raise UsageError(
            f"{printable(str(folder))}: cannot be read ({error.strerror}), expected the folder of "
            "a run. Check the name and its permissions."
        ) from error
    write_whole(target, report_html(run, command))
    return [*run.notes, f"written: {printable(str(target))}"]


def _check_target(target: Path, *, force: bool) -> None:
    shown = printable(str(target))
    if target.suffix.lower() not in (".html", ".htm"):
        raise UsageError(
            f"-o {shown}: expected a name that ends in .html, the format that is written there. "
            "Give such a name."
        )
    if not target.parent.is_dir():
        raise UsageError(
            f"-o {shown}: there is no folder {printable(str(target.parent))}. Create it first, or "
            "choose another one."
        )
    if target.exists() and not target.is_file():
        raise UsageError(f"-o {shown}: found no file, expected one. Choose another name.")
    if target.exists() and not force and not _is_ours(target):
        raise UsageError(
            f"{shown}: the file exists, and is no report on a run. Use --force to replace it, or "
            "choose another name with -o."
        )


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return generator_line(_KIND).encode() in file.read(_NEAR_BYTES)


def report_html(run: RunFiles, command: str) -> str:
    """The whole page of a run; `command` is the command line that its footer shows."""
    name = run.folder.resolve().name
    sections = "\n".join(
        [*_charts(run), samples_html(run.samples), *map(section_html, run_sections(run))]
    )
    left_out = "".join(f"<p>{text_html(note)}</p>" for note in run.notes)
    body = "\n".join(
        [
            f'<p class="advice">{text_html(_in_brief(run))}</p>',
            *([f'<div class="left-out">{left_out}</div>'] if left_out else []),
            f'<div class="sections">\n{sections}\n</div>',
            *_config_texts(run),
            _footer(run, command),
        ]
    )
    return page_html(_KIND, f"{name}: a training run", body, style=_STYLE, pictures=True)


def _in_brief(run: RunFiles) -> str:
    """How far the run is, and what its loss did, in two sentences."""
    curves, last = run.curves, run.fact("size", "max_steps")
    if not curves.lines:
        return "No step has been logged yet."
    text = f"Step {curves.last_step:,} is the last one so far."
    if isinstance(last, int) and last > 0:
        done = "" if _is_complete(run, last) else "not "
        text = f"Step {curves.last_step:,} of {last:,}: the run is {done}complete."
    if "loss" in curves.curves and (means := curves.curves["loss"].mean_of_ends()):
        first, end = means
        text += (
            f" The mean loss was {first:.4g} over the first tenth of the logged steps and "
            f"{end:.4g} over the last."
        )
    return text


def _is_complete(run: RunFiles, last: int) -> bool:
    """True if the run has reached its end, whose step need not be logged."""
    every = run.setting("log.every_steps")
    left = last - run.curves.last_step
    is_last_logged = left < (every if isinstance(every, int) else 1)
    return left <= 0 or (is_last_logged and (run.folder / MODEL_FOLDER).is_dir())


def _charts(run: RunFiles) -> Iterator[str]:
    """The charts of metrics.jsonl and validation.jsonl, each as a section of the page."""
    curves = run.curves.curves
    if loss := curves.get("loss"):
        note = _loss_note(loss, run.curves.not_finite)
        yield _chart(run, "Loss", _raw_and_smoothed(loss), loss.width, short, note=note)
    yield from _validation_charts(run)
    if rates := run.curves.rates():
        lines = [
            _mean_line(part, number % COLOURS, curve)
            for number, (part, curve) in enumerate(rates.items())
        ]
        width = max(curve.width for curve in rates.values())
        yield _chart(run, "Learning rates", lines, width, short, axis="zero")
    if norm := curves.get("grad_norm"):
        note = "The norm of the whole gradient before it is clipped."
        yield _chart(run, "Gradient norm", _raw_and_smoothed(norm), norm.width, short, note=note)
    moving = "Each value is that of the 100 steps before it."
    if speed := curves.get("samples_per_second"):
        lines, title = [_mean_line("", 2, speed)], "Samples per second"
        yield _chart(run, title, lines, speed.width, short, axis="zero", note=moving)
    if wait := curves.get("data_wait"):
        lines, title = [_mean_line("", 1, wait)], "Waiting for data"
        note = f"The share of the time in which training waited for its data. {moving}"
        yield _chart(run, title, lines, wait.width, percent, axis="zero", note=note)


def _validation_charts(run: RunFiles) -> Iterator[str]:
    titles = {
        "loss": "Validation loss",
        "quantiles": "Held-out loss by timestep quantile",
        "styles": "Held-out loss by caption style",
    }
    for kind, title in titles.items():
        if lines := validation_lines(run.validations, kind):
            dashed = any(line.kind == "dashed" for line in lines)
            note = "Dashed: the moving average of the weights (EMA)." if dashed else ""
            width = run.validations.width()
            yield _chart(run, title, lines, width, short, axis="range", note=note)


def _chart(
    run: RunFiles,
    title: str,
    lines: list[Line],
    width: int,
    form: Form,
    *,
    axis: Axis = "spikes",
    note: str = "",
) -> str:
    """A chart as a section of the page; each of its points stands for `width` steps."""
    steps = (run.curves.first_step - 1, max(run.curves.last_step, run.validations.last_step))
    picture = chart(f"{title} over the steps", lines, steps, form, axis)
    thinned = f" Each point stands for {width:,} steps." if width > 1 else ""
    notes = text_html((note + thinned).strip())
    return f'<section><h2>{text_html(title)}</h2>{picture}<p class="note">{notes}</p></section>'


def _raw_and_smoothed(curve: Curve) -> list[Line]:
    """The values of a curve, and their moving mean."""
    bins = curve.bins()
    smoothed = curve.smoothed()
    if curve.width > 1:
        label = f"lowest to highest of {curve.width:,} steps"
        raw = Line(
            label, 0, [(one.step, one.mean) for one in bins], [(one.low, one.high) for one in bins]
        )
    else:
        kind = "raw" if smoothed else "line"
        raw = Line("each logged step", 0, [(one.step, one.mean) for one in bins], kind=kind)
    return [raw, *([Line("moving mean", 0, smoothed)] if smoothed else [])]


def _mean_line(label: str, colour: int, curve: Curve) -> Line:
    return Line(label, colour, [(one.step, one.mean) for one in curve.bins()])


def _loss_note(loss: Curve, not_finite: int) -> str:
    note = ""
    if loss.smoothed():
        points = 2 * Curve.reach(len(loss.bins())) + 1
        steps = f"{points * loss.width:,} steps" if loss.width > 1 else f"{points:,} logged steps"
        note = f"The moving mean is over {steps} around each one. "
    note += (
        "The loss of a step depends most on the timesteps that were drawn for it, so single values "
        "say little."
    )
    if not_finite:
        note += f" In {not_finite:,} logged steps, the loss or the gradient was not finite."
    return note


def _config_texts(run: RunFiles) -> Iterator[str]:
    """The newest config, folded up."""
    for name, text, _ in run.configs[-1:]:
        lines = "\n".join(escape(printable(line)) for line in text.splitlines())
        summary = f"The whole config ({text_html(name)})"
        yield f"<details><summary>{summary}</summary><pre>{lines}</pre></details>"


def _footer(run: RunFiles, command: str) -> str:
    made = f"Made by capmerge {version('capmerge')} on {time.strftime('%Y-%m-%d', time.gmtime())}"
    thinned = (
        f"A curve has at most {MOST_BINS:,} points. A longer run is drawn in stretches of equally "
        "many steps, of which the page has the mean, and for the loss and the gradient norm also "
        "the lowest and the highest value."
    )
    lines = [f"{made} from the files in {run.folder}.", thinned, f"Command: {command}"]
    return "<footer>" + "\n".join(f"<p>{text_html(line)}</p>" for line in lines) + "</footer>"
