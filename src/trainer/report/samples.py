"""The samples of a run on its page: some of their sets, as small pictures that the page holds."""

import io
import json
import re
import warnings
from base64 import b64encode
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.html_page import text_html
from trainer.training.run_folder import SAMPLES_FILE, SAMPLES_FOLDER, check_regular

SAMPLES_STYLE = """\
.pictures { display: flex; flex-wrap: wrap; gap: 1rem; margin: .5rem 0 1.5rem; }
figure { margin: 0; max-width: 100%; } figcaption { color: var(--pale); font-size: .85rem; }
figure img { display: block; max-width: 100%; height: auto; }
.prompt { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
"""
_MOST_SETS = 6
_MOST_PROMPTS = 12
_MOST_NOTES = 20
_LONGEST_PROMPT = 2000
_SIDE_PX = 320
_QUALITY = 85
_LARGEST_BYTES = 1 << 20
_MOST_PIXELS = 1 << 26
"""A picture of more is not opened."""
_SHOWN_SETTINGS = ("width", "height", "seed", "steps", "guidance")


class Samples(NamedTuple):
    """The samples that the page shows."""

    prompts: dict[str, list[tuple[int, str]]]
    """(step, picture as a data URL) by the head of the prompt, which is HTML."""
    n_shown: int
    n_sets: int
    """Sets of pictures that the page shows, and that there are."""
    notes: list[str]
    """What is missing or damaged, as sentences."""


def read_samples(folder: Path) -> Samples:
    """The samples in the folder of a run: at most `_MOST_SETS` sets, from the first to the last.

    What is missing or damaged is left out and noted.
    """
    sets = sorted(
        (int(number[1]), path)
        for path in (folder / SAMPLES_FOLDER).glob("step-*")
        if (number := re.fullmatch(r"step-([0-9]{1,10})", path.name))
    )
    last = max(1, min(len(sets), _MOST_SETS) - 1)
    chosen = [sets[number * (len(sets) - 1) // last] for number in range(last + 1)] if sets else []
    found = Samples({}, len(dict.fromkeys(chosen)), len(sets), [])
    for step, path in dict.fromkeys(chosen):
        _read_set(found, step, path)
    del found.notes[_MOST_NOTES:]
    return found


def _read_set(found: Samples, step: int, folder: Path) -> None:
    name = f"{SAMPLES_FOLDER}/{folder.name}/{SAMPLES_FILE}"
    try:
        check_regular(folder / SAMPLES_FILE)
        with (folder / SAMPLES_FILE).open("rb") as file:
            text = file.read(_LARGEST_BYTES).decode("utf-8")
        lines = [json.loads(line) for line in text.splitlines()[:_MOST_PROMPTS]]
    except (OSError, ValueError, RecursionError) as error:
        found.notes.append(f"{name}: cannot be read ({error}).")
        return
    for line in lines:
        file_name = line.get("file") if isinstance(line, dict) else None
        # Nothing but a picture in this very folder.
        if not isinstance(file_name, str) or not re.fullmatch(r"[0-9]{1,6}\.png", file_name):
            found.notes.append(f"{name}: found a line that names no picture beside it.")
            continue
        try:
            picture = _small_picture(folder / file_name)
        except (OSError, ValueError, SyntaxError, Warning) as error:
            shown = f"{SAMPLES_FOLDER}/{folder.name}/{file_name}"
            found.notes.append(f"{shown}: the picture cannot be read ({error}).")
        else:
            found.prompts.setdefault(_prompt_html(line), []).append((step, picture))


def _small_picture(path: Path) -> str:
    """The picture with sides of at most `_SIDE_PX`, as a data URL.

    Raises `OSError`, `ValueError`, `SyntaxError` or a warning when it cannot be read.
    """
    from PIL import Image

    check_regular(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > _MOST_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels are too many")
            small = picture.convert("RGB")
    small.thumbnail((_SIDE_PX, _SIDE_PX))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + b64encode(written.getvalue()).decode("ascii")


def _prompt_html(line: dict[str, Any]) -> str:
    """The prompt of a picture and its settings, which are the same in all its sets."""
    prompt = _text_of(line.get("prompt")) or "(an empty prompt)"
    settings = [f"{name} {_text_of(line[name])}" for name in _SHOWN_SETTINGS if name in line]
    if negative := _text_of(line.get("negative_prompt")):
        settings.append(f"negative prompt: {negative}")
    return (
        f'<p class="prompt">{text_html(prompt)}</p>'
        f'<p class="note">{text_html(", ".join(settings))}</p>'
    )


def _text_of(value: Any) -> str:
    return "" if value is None else str(value)[:_LONGEST_PROMPT]


def samples_html(samples: Samples) -> str:
    """The section of the samples, or "" if there are none."""
    if not samples.prompts:
        return ""
    parts = ['<section class="full"><h2>Samples</h2>']
    for head, pictures in samples.prompts.items():
        figures = "".join(
            f'<figure><img src="{picture}" alt="sample of step {step}">'
            f"<figcaption>step {step:,}</figcaption></figure>"
            for step, picture in pictures
        )
        parts.append(f'{head}<div class="pictures">{figures}</div>')
    note = (
        f"{samples.n_shown:,} of {samples.n_sets:,} sets of pictures, with at most "
        f"{_MOST_PROMPTS} pictures each, scaled down to {_SIDE_PX} pixels along the longer side. "
        f"The folder {SAMPLES_FOLDER} has all of them at full size."
    )
    return "\n".join([*parts, f'<p class="note">{text_html(note)}</p></section>'])
