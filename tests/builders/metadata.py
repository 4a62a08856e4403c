"""Metadata files for the end-to-end tests, and the command that these tests run.

This module also works out, without the package, what the default options make of a record.
"""

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from builders import preloaded

COMMAND = [sys.executable, "-m", "capmerge"]
HANG_SECONDS = 60
TEMPORARY_ENDING = ".capmerge-tmp"
# fmt: off
_WORDS = (
    "silver", "hair", "umbrella", "platform", "猫", "signal", "quiet", "café", "rain", "coat",
    "bakery", "smile", "^_^", "night_sky", "long_hair", "solo", "1girl",
)
# fmt: on


class Finished(NamedTuple):
    """The exit code and the output of a command that has ended."""

    code: int
    out: bytes
    err: str


def run(*arguments: str | Path, stdin: bytes = b"", fails: int = 0, **options: Any) -> Finished:
    """Run `capmerge` with `arguments`; it must exit with `fails` and never show a traceback."""
    words = list(map(str, arguments))
    if options.keys() <= {"cwd", "env"}:
        done = preloaded.run("capmerge", *words, stdin=stdin, timeout=HANG_SECONDS, **options)
    else:
        done = subprocess.run(
            [*COMMAND, *words],
            input=stdin,
            capture_output=True,
            timeout=HANG_SECONDS,
            check=False,
            **options,
        )
    err = done.stderr.decode("utf-8", "replace")
    assert "Traceback" not in err, err
    assert done.returncode == fails, (done.returncode, done.stdout[-2000:], err[-2000:])
    return Finished(done.returncode, done.stdout, err)


def run_shell(script: str, *arguments: str | Path, **options: Any) -> Finished:
    """Run a bash `script` with pipefail off; `CAPMERGE` is the command, `$1` ... the arguments."""
    text = f'CAPMERGE() {{ {_quoted(COMMAND)} "$@"; }}\n{script}'
    command = ["bash", "-c", text, "bash", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, timeout=HANG_SECONDS, check=False, **options
    )
    return Finished(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


def _quoted(words: list[str]) -> str:
    return " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)


def make_records(
    count: int, *, seed: int = 1, nested: bool = False, exotic: bool = True
) -> dict[str, Any]:
    """A number of records of about 700 bytes, of all kinds that can be merged.

    `nested` gives each record two sibling objects, so that some bytes look like the end of a record
    but are not. `exotic` mixes in values that only the standard library reads and writes.
    """
    rng = random.Random(seed)
    records: dict[str, Any] = {}
    for number in range(count):
        record: dict[str, Any] = {
            "train_resolution": [rng.choice((128, 192, 256)), rng.choice((128, 192, 256))]
        }
        if number % 11:
            record["tags"] = ", ".join(rng.choices(_WORDS, k=25))
        if number % 7:
            record["caption"] = " ".join(rng.choices(_WORDS, k=40)).capitalize() + "."
        if number % 13 == 5:
            record["caption"] = "First line {of|two}.\n\nSecond {line."
        if nested:
            record["meta"] = {"id": number, "box": {"x": 1, "y": {"z": number}}}
            record["more"] = {"score": {"value": number / 4}, "flags": {}}
        if exotic and number % 501 == 250:
            record |= {
                "huge": 10**30,
                "zero": -0.0,
                "nothing": None,
                "infinite": float("inf"),
                "half": "\ud83d",
                "": {"": []},
            }
        records[f"danbooru/{1_000_000 + number}"] = record
    return records


def big_file_records(megabytes: int) -> dict[str, Any]:
    """Plain records that take about that many megabytes as JSON with indent=2."""
    return make_records(megabytes * 1400, exotic=False)


def as_jsonl(records: Mapping[str, Any], *, ascii_only: bool = True) -> bytes:
    """The records as the tagger writes JSON lines."""
    lines = (
        json.dumps({"image_path": key, **record}, ensure_ascii=ascii_only) + "\n"
        for key, record in records.items()
    )
    return "".join(lines).encode()


def as_indent_2(records: Mapping[str, Any]) -> bytes:
    """The records as the merge scripts write them."""
    return json.dumps(records, indent=2).encode()


def as_indent_4(records: Mapping[str, Any]) -> bytes:
    """The records as the tagger writes them: raw UTF-8, lone surrogates as escapes."""
    text = json.dumps(records, indent=4, ensure_ascii=False)
    return "".join(
        f"\\u{ord(char):04x}" if "\ud800" <= char <= "\udfff" else char for char in text
    ).encode()


def as_compact(records: Mapping[str, Any]) -> bytes:
    """The records on one line without a space."""
    return json.dumps(records, separators=(",", ":")).encode()


LAYOUTS: dict[str, Callable[[Mapping[str, Any]], bytes]] = {
    "indent=2": as_indent_2,
    "indent=4": as_indent_4,
    "compact": as_compact,
    "jsonl": as_jsonl,
}


def rewritten(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as the default options rewrite it, worked out here without the package."""
    tags = (record.get("tags") or "").strip()
    captions = [line.strip() for line in (record.get("caption") or "").splitlines() if line.strip()]
    repeats = len(captions) if tags and captions else 1
    lines = [tags] * repeats + captions if tags else captions
    letters = ["t"] * repeats + ["c"] * len(captions) if tags else ["c"] * len(captions)
    merged = {name: value for name, value in record.items() if name != "tags"}
    merged["caption"] = "\n".join(line.replace("{", "{{").replace("}", "}}") for line in lines)
    if "train_resolution" in record and "image_size" not in record:
        merged["image_size"] = record["train_resolution"]
    merged["capmerge"] = "".join(letters)
    return merged


def assert_rewritten(source: Mapping[str, Any], output: Mapping[str, Any]) -> None:
    """Fail unless `output` is `source` rewritten with the default options.

    Values, types and every order have to be equal.
    """
    expected = {key: rewritten(record) for key, record in source.items()}
    assert list(output) == list(expected)
    for key, record in expected.items():
        # repr() tells 1 from 1.0, and one order of keys from another.
        assert repr(output[key]) == repr(record)


def read_jsonl(path: Path) -> list[Any]:
    """The values in a file of JSON lines."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def temporary_files(folder: Path) -> list[str]:
    """The names of the hidden temporary files in `folder`."""
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(TEMPORARY_ENDING))


def wait_until(condition: Callable[[], Any], seconds: float = 20) -> bool:
    """True when `condition` becomes true within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return bool(condition())
