"""The references of `bench_toolbox`: what people write for these chores, with `json` alone.

.venv/bin/python scripts/reference_toolbox.py split SOURCE FOLDER PARTS
.venv/bin/python scripts/reference_toolbox.py filter SOURCE OUT
.venv/bin/python scripts/reference_toolbox.py union OUT FILE FILE PREFIX
.venv/bin/python scripts/reference_toolbox.py fields OUT FILE CAPTIONS

They share no code with the project. They load whole files, check nothing, and leave a broken file
behind when they are killed.
"""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any


def load(path: str) -> dict[str, Any]:
    """The whole file as a dict."""
    with Path(path).open(encoding="utf-8") as file:
        records: dict[str, Any] = json.load(file)
    return records


def dump(records: dict[str, Any], path: str | Path) -> None:
    """Write a file as sd-scripts does."""
    with Path(path).open("w", encoding="utf-8") as file:
        json.dump(records, file, indent=2)


def split(source: str, folder: str, parts: str) -> None:
    """Split into so many parts of equal counts."""
    records, count = load(source), int(parts)
    items, size = iter(records.items()), -(-len(records) // count)
    Path(folder).mkdir(exist_ok=True)
    for number in range(count):
        dump(dict(islice(items, size)), Path(folder) / f"part-{number}.json")


def keep(source: str, out: str) -> None:
    """Keep the records that have tags and a caption."""
    records = load(source).items()
    dump({key: one for key, one in records if one.get("tags") and one.get("caption")}, out)


def union(out: str, first: str, second: str, prefix: str) -> None:
    """Put two files together, the second with a prefix before its keys."""
    records = load(first)
    records.update((prefix + key, record) for key, record in load(second).items())
    dump(records, out)


def fields(out: str, first: str, captions: str) -> None:
    """Take the captions from a second file."""
    records, others = load(first), load(captions)
    for key, record in records.items():
        record.pop("caption", None)
        if key in others and "caption" in others[key]:
            record["caption"] = others[key]["caption"]
    dump(records, out)


if __name__ == "__main__":
    chore, *arguments = sys.argv[1:]
    {"split": split, "filter": keep, "union": union, "fields": fields}[chore](*arguments)
