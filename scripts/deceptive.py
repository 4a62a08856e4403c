"""Generated records that deceive a program which searches metadata for the borders of records.

Each shape is a worst case of its own; `write_metadata(kind="deceptive")` of scripts/synthetic.py
mixes all those whose records are small. Equal arguments give equal records.

- `borders`: texts, field names and nested objects that look like the end of one record and the
  start of the next, dozens in each record, in front of the real texts and behind them.
- `objects`: 30,000 nested objects in each record, 1.5 MB.
- `tiny`: records of a few bytes.
- `runs`: captions that are long runs of backslashes, quotes, braces, pipes or commas.
- `huge`: records of 32 MB, of texts and of nested objects in turn.
"""

import random
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, Literal, TypeAlias, get_args

Shape = Literal["borders", "objects", "tiny", "runs", "huge"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
Record: TypeAlias = dict[str, Any]

_TAGS = "1girl, solo, long_hair, looking_at_viewer, blue_eyes"
_CAPTION = "A girl with long hair looks at the viewer. The background is plain and bright. "
_BORDER = '},\n  "danbooru/1": {\n    "caption": "a", "tags": "b"},"danbooru/2":{"caption":'
_RUNS = ("\\", '"', '\\"', "{", "}", "{}", "{a|", "|", ", ", '"},', "}{", "\\\\\\")
_HUGE_BYTES = 32_000_000


def deceptive_records(seed: int = 0, shape: Shape | None = None) -> Iterator[tuple[str, Record]]:
    """Yield keys and records of a shape without end; of all small shapes in turn without one."""
    rng = random.Random(f"deceptive {shape} {seed}")
    mixed = (_borders, _tiny, _borders, _runs, _borders, _tiny)
    makers: dict[Shape, tuple[Callable[[random.Random, int], Record], ...]] = {
        "borders": (_borders,),
        "objects": (_objects,),
        "tiny": (_tiny,),
        "runs": (_runs,),
        "huge": (_huge_text, _huge_objects),
    }
    chosen = makers[shape] if shape else mixed
    for number in count():
        yield f"danbooru/{1_000_000 + number}", chosen[number % len(chosen)](rng, number)


def _texts(rng: random.Random) -> Record:
    caption = _CAPTION * rng.randint(1, 4)
    return {"caption": caption.strip(), "tags": _TAGS, "train_resolution": [832, 1216]}


def _borders(rng: random.Random, number: int) -> Record:
    record = _texts(rng)
    look_alike = {
        "caption": f"a {_BORDER}",
        "tags": "},",
        # After the value above, a search that knows nothing of strings reads `},", ": {`.
        ": {": {"tags": "b"},
        "train_resolution": [832, 1216],
    }
    nested = {f"danbooru/{n}": look_alike for n in range(rng.randint(10, 60))}
    if rng.random() < 0.5:
        record["caption"] += " " + _BORDER * rng.randint(1, 8)
    return {"regions": nested, **record} if number % 2 else {**record, "regions": nested}


def _objects(rng: random.Random, _number: int) -> Record:
    return {
        **_texts(rng),
        "objects": {f"o{n}": {"box": [n, 1, 2, 3], "label": "a"} for n in range(30_000)},
    }


def _tiny(rng: random.Random, _number: int) -> Record:
    return rng.choice(({"caption": "a"}, {"tags": "b"}, {}, {"caption": "a", "tags": "b"}))


def _runs(rng: random.Random, _number: int) -> Record:
    run = rng.choice(_RUNS)
    letters = run * (rng.randint(1_000, 8_000) // len(run))
    caption = rng.choice((letters, f"{_CAPTION}{letters}", f"{letters} {_CAPTION}"))
    return {**_texts(rng), "caption": caption}


def _huge_text(rng: random.Random, _number: int) -> Record:
    return {**_texts(rng), "source": _BORDER * (_HUGE_BYTES // len(_BORDER))}


def _huge_objects(rng: random.Random, _number: int) -> Record:
    objects = [{"label": "a", "tags": "},", ": {": {"x": n}} for n in range(_HUGE_BYTES // 50)]
    return {"objects": objects, **_texts(rng)}
