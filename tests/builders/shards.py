"""Folders of 16 shards for the tests of runs over shards."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from builders.metadata import as_jsonl, make_records

SHARDS = 16
RECORDS = make_records(SHARDS * 40)


def shard_name(number: int, ending: str = "jsonl") -> str:
    """The name of a shard."""
    return f"part-{number:02d}.{ending}"


def parts(records: Mapping[str, Any] = RECORDS) -> list[dict[str, Any]]:
    """The records of each shard; the last ones are longer."""
    items, size = list(records.items()), len(records) // SHARDS
    ends = [size * number + (number * number) % 7 for number in range(SHARDS)] + [len(items)]
    ends[0] = 0
    return [dict(items[start:end]) for start, end in pairwise(ends)]


def make_shards(folder: Path, records: Mapping[str, Any] = RECORDS) -> Path:
    """A folder `shards` of JSON lines, and beside it all of them in one file `joined.jsonl`."""
    shards = folder / "shards"
    shards.mkdir()
    for number, part in enumerate(parts(records)):
        (shards / shard_name(number)).write_bytes(as_jsonl(part))
    joined = [path.read_bytes() for path in sorted(shards.iterdir())]
    (folder / "joined.jsonl").write_bytes(b"".join(joined))
    return shards


def joined_outputs(out: Path, pattern: str = "part-*.jsonl") -> bytes:
    """The bytes of all outputs in order."""
    paths = [path for path in sorted(out.glob(pattern)) if "rejects" not in path.name]
    return b"".join(path.read_bytes() for path in paths)


def manifest(out: Path) -> dict[str, Any]:
    """The manifest of a run."""
    found: dict[str, Any] = json.loads((out / "manifest.json").read_bytes())
    return found
