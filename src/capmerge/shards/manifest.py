"""The manifest of a run over shards, and the marks of the shards that are done.

`OUT/manifest.json` is written when a run begins, with the options and the shards as they are then,
and once more at its end, with what became of each shard and with the counts of all of them.
"""

import json
import zlib
from collections.abc import Iterable
from typing import Any

import capmerge
from capmerge.errors import DataError, UsageError, printable, quoted
from capmerge.metadata.shard_files import MANIFEST
from capmerge.shards.job import DONE, Job, as_options, marker_name
from capmerge.shards.places import Place

_SCHEMA, _VERSION = "capmerge.shards", 1
_NAMED = 3
"""How many differences a message names."""

Mark = dict[str, Any]
"""What `task` leaves behind for a shard that is done."""


def read_manifest(out: Place) -> dict[str, Any] | None:
    """The manifest of an earlier run, or None. Raises `DataError` for a file that is none."""
    (content,) = out.read([MANIFEST])
    if content is None:
        return None
    try:
        manifest = json.loads(content)
        if (manifest["schema"], manifest["version"]) == (_SCHEMA, _VERSION):
            dict(manifest["options"])
            shards_of(manifest)
            return dict(manifest)
        problem = f"version {manifest['version']} of {manifest['schema']}"
    except (ValueError, TypeError, KeyError, RecursionError):
        problem = "something else"
    raise DataError(
        out.full_name(MANIFEST),
        None,
        None,
        f"found {problem}, expected the manifest of an earlier run of this version.",
        "Choose another -o, or use --force to begin anew.",
    )


def write_manifest(
    out: Place, job: Job, marks: dict[str, Mark], totals: dict[str, Any] | None = None
) -> None:
    """Write the manifest: the options, every shard with its mark if it is done, and the totals."""
    shards = []
    for name, fingerprint in job.fingerprints.items():
        mark = marks.get(name)
        entry = {"name": name, "source": fingerprint, "output": mark and mark["output"]}
        shards.append(entry | ({"counts": mark["counts"]} if mark else {}))
    manifest = {
        "schema": _SCHEMA,
        "version": _VERSION,
        "capmerge": capmerge.__version__,
        "source": job.source,
        "options": as_options(job),
        **({} if totals is None else totals),
        "shards": shards,
    }
    out.write(MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


def check_same(out: Place, manifest: dict[str, Any], marks: dict[str, Mark], job: Job) -> None:
    """Raise `UsageError` where an earlier run had other options, or shards changed since.

    `marks` are those of that run, so a shard that is not done may have changed: it may have been
    mended. New shards are no difference either. The message names the options and the shards.
    """
    before, now = manifest["options"], as_options(job)
    options = [
        f"{name} was {_shown(before.get(name))} and is {_shown(now.get(name))}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    shards = [
        f"{printable(name)} "
        + (
            f"had {_fingerprint(mark['source'])} and has {_fingerprint(job.fingerprints[name])}"
            if name in job.fingerprints
            else "is missing"
        )
        for name, mark in marks.items()
        if job.fingerprints.get(name) != mark["source"]
    ]
    found = [
        f"{kind} changed ({'; '.join(differences[:_NAMED])}"
        + (f"; and {len(differences) - _NAMED:,} more)" if len(differences) > _NAMED else ")")
        for kind, differences in (("options", options), ("shards", shards))
        if differences
    ]
    if found:
        raise UsageError(
            f"{printable(out.full_name(MANIFEST))}: since the run that this folder is from, "
            f"{' and '.join(found)}. Give what was given then, choose another -o, or use --force "
            "to rewrite all shards anew."
        )


def shards_of(manifest: dict[str, Any]) -> list[str]:
    """The names of the shards in a manifest."""
    return [shard["name"] for shard in manifest["shards"]]


def write_mark(out: Place, name: str, mark: Mark) -> None:
    """Write the mark of a shard that is done. Raises `OutputError`."""
    out.write(marker_name(name), json.dumps(mark | {"crc32": _checksum(mark)}).encode())


def read_marks(out: Place, names: Iterable[str]) -> dict[str, Mark]:
    """The marks of the shards with these names that are done, by their names.

    A shard is not done whose output, hashes or counts have gone or have another size by now, or
    whose mark is damaged.
    """
    files = out.files()
    marked = [name for name in names if marker_name(name) in files]
    marks = {}
    for name, content in zip(marked, out.read([*map(marker_name, marked)]), strict=True):
        mark = _whole(content)
        if mark is not None:
            expected = {name: mark["output"]["bytes"], **mark["files"]}
            if all(files.get(file) == size for file, size in expected.items()):
                marks[name] = mark
    return marks


def remove_marks(out: Place) -> None:
    """Let all shards be undone, so that they are rewritten again."""
    for name in out.files():
        if name.startswith(f"{DONE}/"):
            out.remove(name)


def _whole(content: bytes | None) -> Mark | None:
    """The mark that a file holds, or None where it is damaged."""
    try:
        mark = dict(json.loads(content or b""))
        return mark if mark.pop("crc32") == _checksum(mark) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _checksum(mark: Mark) -> str:
    """The CRC-32 of what a mark says, as eight hexadecimal digits."""
    return f"{zlib.crc32(json.dumps(mark).encode()):08x}"


def _fingerprint(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else json.dumps(value)
