"""The counts of all shards together, which are those of one file that holds all their records.

Sums are of whole numbers and fractions. Equal captions are found by the hashes that the tasks left,
which are compared on disk.
"""

import gzip
import json
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, NamedTuple

from capmerge.captions.like_names import keep_few_names
from capmerge.captions.tally import Tally, add_counts
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.opened import open_metadata
from capmerge.metadata.pieces import iter_pairs
from capmerge.shards.job import Job, captions_name, counts_name, open_place
from capmerge.shards.manifest import Mark
from capmerge.shards.places import LocalFolder, Place
from capmerge.shards.shared_keys import KeysFound, find_keys
from capmerge.stats.collector import Sums, Tokenizers, caption_excerpt, document_of
from capmerge.stats.counts import CaptionStats
from capmerge.stats.document import Document
from capmerge.stats.duplicates import as_json, groups_of
from capmerge.stats.equal_hashes import SHOWN, each_once
from capmerge.stats.parts import stats_from_json, tally_from_json
from capmerge.stats.repeated_keys import RepeatedKeys

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from numpy.typing import NDArray


class Totals(NamedTuple):
    """The counts of all shards that are done."""

    tally: Tally
    read_bytes: int
    written_bytes: int
    repeated: RepeatedKeys
    keys: KeysFound

    def as_dict(self) -> dict[str, Any]:
        """The counts by name: those of a receipt, and the keys in more than one shard."""
        return {
            "counts": {
                **self.tally.as_dict(),
                "repeated_keys": self.repeated.records,
                "repeated_fields": self.repeated.doubled,
                "read_bytes": self.read_bytes,
                "written_bytes": self.written_bytes,
            },
            "keys_in_several_shards": {
                "keys": self.keys.shared,
                "exact": self.keys.exact,
                "first": [
                    {"key": found.key, "shards": [*found.shards]}
                    for found in self.keys.first_shared
                ],
            },
        }


def add_up(out: Place, marks: dict[str, Mark]) -> Totals:
    """The counts of all shards that have marks, in the order of the marks."""
    tally, read_bytes, written_bytes = Tally(), 0, 0
    doubled, first_doubled = 0, list[str]()
    for mark in marks.values():
        add_counts(tally, tally_from_json(mark["tally"]))
        keep_few_names(tally)
        read_bytes += mark["counts"]["read_bytes"]
        written_bytes += mark["counts"]["written_bytes"]
        doubled += mark["repeated"]["doubled"]
        first_doubled += mark["repeated"]["first_doubled"]
    keys = find_keys(out, [*marks], _scratch_beside(out))
    repeated = RepeatedKeys(keys.repeated, keys.first, doubled, tuple(first_doubled[:SHOWN]))
    return Totals(tally, read_bytes, written_bytes, repeated, keys)


def statistics(job: Job, out: Place, names: list[str], tokenizers: Tokenizers) -> Document:
    """The document of statistics of all shards, which were counted with `tokenizers`."""
    sums = _sums(out, names)
    files = out.files()
    ends = list(accumulate(files[captions_name(name)] // 8 for name in names))
    parts = each_once(_hashes(out, names), ends[-1] if ends else 0, _scratch_beside(out))
    groups = groups_of(parts)
    firsts: list[tuple[str, str] | None] = [
        _caption_at(job, names, ends, number) for _, number in groups.largest
    ]
    name = Path(job.source.rstrip("/")).name
    return document_of(name, sums, as_json(groups, firsts), job.merge, tokenizers)


def _sums(out: Place, names: list[str]) -> Sums:
    stats, loops, first = CaptionStats(), 0, list[str]()
    for content in out.read([*map(counts_name, names)]):
        counts = json.loads(gzip.decompress(content or b""))
        stats.merge(stats_from_json(counts["stats"]))
        loops += counts["loops"]["count"]
        first += counts["loops"]["first"]
    return Sums(stats, loops, tuple(first[:SHOWN]))


def _hashes(out: Place, names: list[str]) -> "Iterator[NDArray[np.int64]]":
    import numpy as np

    for content in out.read([*map(captions_name, names)]):
        yield np.frombuffer(content or b"", "<i8")


def _caption_at(job: Job, names: list[str], ends: list[int], place: int) -> tuple[str, str]:
    """The key and the start of the whole caption of the record in a place of all shards."""
    shard = bisect_right(ends, place)
    number = place - (ends[shard - 1] if shard else 0)
    with open_place(job.source).fetched(names[shard]) as path, open_metadata(str(path)) as source:
        layout = read_layout(source, job.max_record_bytes)
        for count, (_, _, (key, record)) in enumerate(iter_pairs(source, layout)):
            if count == number:
                return key, caption_excerpt(record, job.merge)
    raise AssertionError("a shard whose records were counted has lost some")


def _scratch_beside(out: Place) -> Path:
    """A path in the folder for scratch files: that of the outputs, if it is on this machine."""
    folder = out.path if isinstance(out, LocalFolder) else Path(gettempdir())
    return folder / "counts of all shards"
