"""The tables of the page of a run: its numbers, what was trained, and with which settings."""

from collections.abc import Iterator
from typing import Any

from capmerge.html_page import Section
from capmerge.toml import to_toml
from trainer.report.run_files import RunFiles
from trainer.report.validation import validation_section
from trainer.training.metrics import NO_EVENTS

_LONGEST_VALUE = 300
_MOST_ROWS = 200
_MOST_PARAMETERS = 10**15


def run_sections(run: RunFiles) -> Iterator[Section]:
    """All tables, in the order of the page."""
    yield Section("The run", ("", ""), [*_run_rows(run)])
    if run.validations.last:
        yield validation_section(run.validations)
    settings = [*_setting_rows(run)]
    if settings:
        yield Section("Settings at a glance", ("", ""), settings)
    trained = run.fact("trained")
    if isinstance(trained, dict) and trained:
        yield Section(
            "What was trained",
            ("part", "parameters", "trained", "learning rate"),
            [*_trained_rows(run, trained)],
        )
    counts = run.curves.counts
    if samples := counts["samples"]:
        events = sorted(name for name in counts.keys() - NO_EVENTS if counts[name])
        yield Section(
            "What happened to the samples",
            ("", "samples", "share"),
            [
                ("trained", f"{samples:,}", "100 %"),
                *(
                    (
                        event.replace("_", " "),
                        f"{counts[event]:,}",
                        f"{100 * counts[event] / samples:.1f} %",
                    )
                    for event in events
                ),
            ],
            note=f"Counted in the logged steps of the first process. Their captions have "
            f"{counts['tokens']:,} tokens, {counts['dropped_tokens']:,} of which were dropped.",
        )
    changed = [*_changed_rows(run)]
    if changed:
        yield Section(
            "Settings that changed when the run was resumed",
            ("setting", "before", "after", "until then in"),
            changed[:_MOST_ROWS],
            note=f"{len(changed) - _MOST_ROWS:,} more are left out."
            if len(changed) > _MOST_ROWS
            else "",
        )


def _run_rows(run: RunFiles) -> Iterator[tuple[str, str]]:
    curves = run.curves
    size = run.fact("size")
    size = size if isinstance(size, dict) else {}
    yield "steps", _of(curves.last_step, size.get("max_steps"))
    per_epoch = size.get("steps_per_epoch")
    if isinstance(per_epoch, int) and per_epoch > 0:
        yield "epochs", f"{curves.last_step / per_epoch:,.2f}"
    for name, label in (
        ("records", "records"),
        ("samples_per_epoch", "samples per epoch"),
        ("buckets", "buckets"),
        ("global_batch_size", "samples per step"),
    ):
        if isinstance(size.get(name), int):
            yield label, f"{size[name]:,}"
    if "loss" in curves.curves:
        yield "last loss", short(curves.curves["loss"].bins()[-1].mean)
    if curves.skipped:
        yield "skipped steps", f"{curves.skipped:,}"
    for name, label, form in (
        ("samples_per_second", "samples per second", short),
        ("data_wait", "waiting for data", percent),
    ):
        if name in curves.curves:
            yield f"{label}, mean", form(curves.curves[name].mean())
    if curves.rank_waits:
        rank = max(range(len(curves.rank_waits)), key=curves.rank_waits.__getitem__)
        most = percent(curves.rank_waits[rank])
        yield "waiting for other ranks", f"{most} on rank {rank}, the most of all at the end"
    if curves.peak_memory_bytes:
        yield "peak memory", f"{curves.peak_memory_bytes / 1e9:.2f} GB"
    versions = run.fact("versions")
    for name in ("torch", "diffusers", "transformers"):
        if isinstance(versions, dict) and isinstance(versions.get(name), str):
            yield name, _cut(versions[name])


def _of(step: int, last: Any) -> str:
    return f"{step:,} of {last:,}" if isinstance(last, int) else f"{step:,}"


_RATES = {
    "unet": "learning_rate",
    "text_encoder": "text_learning_rate",
    "text_encoder_2": "text2_learning_rate",
}
"""The setting of `[optimizer]` that holds the rate of a part."""


def _trained_rows(run: RunFiles, trained: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for part, counts in trained.items():
        match counts:
            case [int(n_trained), int(n_all)] if (
                0 <= n_trained <= n_all and 0 < n_all < _MOST_PARAMETERS
            ):
                rate = run.setting(f"optimizer.{_RATES.get(part, part)}")
                yield (
                    part,
                    f"{n_all:,}",
                    f"{100 * n_trained / n_all:.1f} %",
                    _value(rate) if n_trained else "frozen",
                )


_NAMED = (
    *("model.family", "model.path", "model.train_only", "model.freeze", "noise.prediction"),
    *("noise.zero_terminal_snr", "loss.kind", "loss.min_snr_gamma", "text.chunking"),
    *("text.max_tokens", "optimizer.name", "optimizer.schedule", "train.precision", "train.seed"),
)
"""The settings that tell one run from another at a glance."""


def _setting_rows(run: RunFiles) -> Iterator[tuple[str, str]]:
    number = 0
    while (metadata := run.setting(f"data.{number}.metadata")) is not None:
        repeats = run.setting(f"data.{number}.repeats")
        yield f"data.{number}", f"{_value(metadata)}, repeats {_value(repeats)}"
        number += 1
        if number == _MOST_ROWS:
            break
    for name in _NAMED:
        value = run.setting(name)
        if value or name == "train.seed":
            yield name, _value(value)


def _changed_rows(run: RunFiles) -> Iterator[tuple[str, ...]]:
    for (name, _, before), (_, _, after) in zip(run.configs, run.configs[1:], strict=False):
        for setting in dict.fromkeys((*before, *after)):
            if before.get(setting) != after.get(setting):
                yield setting, _value(before.get(setting)), _value(after.get(setting)), name


def _value(value: Any) -> str:
    """A setting as TOML shows it, texts without quotes; an empty text for one that is not set."""
    if value is None:
        return ""
    if isinstance(value, str):
        return _cut(value)
    try:
        return _cut(to_toml(value))
    except (TypeError, ValueError):  # a date, say, which no setting holds
        return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def short(value: float) -> str:
    """A value with four digits."""
    return f"{value:.4g}"


def percent(value: float) -> str:
    """A share as a percentage with four digits."""
    return f"{100 * value:.4g} %"
