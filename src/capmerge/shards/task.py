"""The work on one shard: the rewrite of a single file, its checksum, and the mark that it is done.

The mark is written last, when everything else is in its place. So whatever ends a task, a shard
with a mark is complete, and one without is done again from the start.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import capmerge
from capmerge.commands.convert import ConvertOptions, convert
from capmerge.commands.rewrite import Outcome, RewriteOptions, rewrite
from capmerge.errors import CapmergeError, DataError, in_words, printable
from capmerge.files.atomic import AtomicFile, side_path
from capmerge.files.scratch import ScratchFolder
from capmerge.metadata.format import PARQUET, SIDE_FILES, Format
from capmerge.metadata.opened import open_metadata
from capmerge.shards.job import (
    Failure,
    Job,
    captions_name,
    counts_name,
    failure_name,
    keys_name,
    open_place,
)
from capmerge.shards.manifest import write_mark
from capmerge.shards.places import Place
from capmerge.stats.key_hashes import KeyHashes
from capmerge.stats.parts import stats_as_json, tally_as_json

_READ_BYTES = 1 << 20


def run_task(
    job: Job, names: Iterable[str], done: Callable[[str], None] | None = None
) -> list[Failure]:
    """Rewrite the shards with these names; returns those that failed, while the others are done.

    `done` is told the name of each shard that is done or failed.
    """
    failures = []
    for name in names:
        try:
            rewrite_shard(job, name)
        except (CapmergeError, OSError) as error:
            place = open_place(job.source).full_name(name)
            message = str(error)
            if isinstance(error, OSError):
                message = f"{printable(place)}: {in_words(error)}. Check the disk."
            failures.append(Failure(name, message))
            with suppress(CapmergeError):  # the message is returned in any case
                open_place(job.out).write(failure_name(name), message.encode(errors="replace"))
        if done:
            done(name)
    return failures


def rewrite_shard(job: Job, name: str) -> None:
    """Rewrite one shard. Raises what `rewrite` raises, and `DataError` for a changed shard."""
    shards, out = open_place(job.source), open_place(job.out)
    _check_unchanged(job, shards, name)
    with shards.fetched(name) as source, out.written(name) as target:
        with out.written(keys_name(name)) as key_file, AtomicFile(key_file) as keys:
            outcome = _rewritten(job, source, target, shards.full_name(name), keys)
            keys.publish()
            files = {keys_name(name): key_file.stat().st_size}
        output = {"bytes": target.stat().st_size, "crc32": _checksum(target)}
    # Another program may have written to the shard since it was opened.
    _check_unchanged(job, shards, name)
    files |= _write_counts(out, name, outcome)
    mark = {
        "capmerge": capmerge.__version__,
        "source": job.fingerprints[name],
        "output": output,
        "files": files,
        "counts": {"read_bytes": outcome.read_bytes, "written_bytes": output["bytes"]},
        "repeated": outcome.repeated._asdict(),
        "tally": tally_as_json(outcome.tally),
    }
    write_mark(out, name, mark)


def _check_unchanged(job: Job, shards: Place, name: str) -> None:
    expected, found = job.fingerprints[name], shards.fingerprint(name)
    if found != expected:
        raise DataError(
            shards.full_name(name),
            None,
            None,
            f"the shard changed since the run began (found {_shown(found)}, expected "
            f"{_shown(expected)}).",
            "Run again when nothing writes to it.",
        )


def _shown(fingerprint: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fingerprint.items())


def _rewritten(job: Job, path: Path, target: Path, name: str, keys: AtomicFile) -> Outcome:
    """Rewrite the file `path`, which messages call `name`, to `target`."""
    if target.suffix.lower() != PARQUET:
        return _rewrite(job, path, target, name, keys)
    # A rewrite writes JSON, which holds whatever Parquet does.
    with ScratchFolder(target) as scratch:
        middle = scratch.path / "middle.json"
        outcome = _rewrite(job, path, middle, name, keys)
        with open_metadata(str(middle)) as source:
            convert(source, ConvertOptions(target, None, force=True))
        for suffix in SIDE_FILES:
            side, here = side_path(middle, suffix), side_path(target, suffix)
            if side.exists():
                side.replace(here)
            else:  # of an earlier run
                here.unlink(missing_ok=True)
    return outcome


def _rewrite(job: Job, path: Path, target: Path, name: str, keys: AtomicFile) -> Outcome:
    with open_metadata(str(path)) as source:
        source.name = name
        options = RewriteOptions(
            target,
            Format.choose(None, target),
            job.merge,
            job.on_error,
            force=True,
            stats=job.stats,
            shard_keys=KeyHashes(keys),
            max_record_bytes=job.max_record_bytes,
        )
        return rewrite(source, options)


def _write_counts(out: Place, name: str, outcome: Outcome) -> dict[str, int]:
    """Write what the statistics of all shards are made of, if they were asked for.

    Returns the bytes of the files by their names.
    """
    if not outcome.gathered:
        return {}
    gathered = outcome.gathered
    counts = {
        "stats": stats_as_json(gathered.stats),
        "loops": {"count": gathered.loops.count, "first": gathered.loops.keys},
    }
    contents = {
        captions_name(name): gathered.caption_hashes,
        counts_name(name): gzip.compress(json.dumps(counts).encode(), 1, mtime=0),
    }
    for file, content in contents.items():
        out.write(file, content)
    return {file: len(content) for file, content in contents.items()}


def _checksum(path: Path) -> str:
    """The CRC-32 of a file, as eight hexadecimal digits."""
    found = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            found = zlib.crc32(data, found)
    return f"{found:08x}"
