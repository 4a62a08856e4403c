"""The counts of one shard as JSON, so that those of many shards add up in another process.

All of them are exact: whole numbers, and fractions as two of them. Reading back what was written
gives the same counts, so the sum over shards is that of one file that holds all their records.
"""

from collections import Counter
from dataclasses import fields
from fractions import Fraction
from typing import Any, TypeVar

from capmerge.captions.tally import Most, Tally
from capmerge.stats.counts import BoundedCounter, CaptionStats, RecordCounts, Wildcards
from capmerge.stats.lengths import LengthStats

_Counts = TypeVar("_Counts", Tally, RecordCounts, Wildcards)
_LENGTHS = ("tags", "captions", "t5_lines")
_BOUNDED = ("tag_counts", "resolutions")
_COUNTERS = ("size_fields", "literals")


def tally_as_json(tally: Tally) -> dict[str, Any]:
    """The counts of a merge, as `tally_from_json` reads them."""
    return _as_json(tally)


def tally_from_json(written: dict[str, Any]) -> Tally:
    """The counts that `tally_as_json` wrote."""
    return _from_json(Tally(), written)


def stats_as_json(stats: CaptionStats) -> dict[str, Any]:
    """The counts of captions, as `stats_from_json` reads them."""
    stats.count_tags()
    return {
        "records": _as_json(stats.records),
        "wildcards": _as_json(stats.wildcards),
        "lines": {letter: lines.as_json() for letter, lines in stats.lines.items()},
        **{name: getattr(stats, name).as_json() for name in _LENGTHS},
        **{name: _bounded_as_json(getattr(stats, name)) for name in _BOUNDED},
        **{name: dict(getattr(stats, name)) for name in _COUNTERS},
    }


def stats_from_json(written: dict[str, Any]) -> CaptionStats:
    """The counts that `stats_as_json` wrote."""
    stats = CaptionStats()
    _from_json(stats.records, written["records"])
    _from_json(stats.wildcards, written["wildcards"])
    stats.lines = {
        letter: LengthStats.from_json(lines) for letter, lines in written["lines"].items()
    }
    for name in _LENGTHS:
        setattr(stats, name, LengthStats.from_json(written[name]))
    for name in _BOUNDED:
        _read_bounded(getattr(stats, name), written[name])
    for name in _COUNTERS:
        getattr(stats, name).update(written[name])
    return stats


def _as_json(counts: _Counts) -> dict[str, Any]:
    return {field.name: _value_as_json(getattr(counts, field.name)) for field in fields(counts)}


def _value_as_json(value: Any) -> Any:
    if isinstance(value, Counter):  # a key may be a pair of names
        return [[list(key) if isinstance(key, tuple) else key, n] for key, n in value.items()]
    return [value.numerator, value.denominator] if isinstance(value, Fraction) else int(value)


def _from_json(counts: _Counts, written: dict[str, Any]) -> _Counts:
    """Set the counts of `counts` to what `_as_json` wrote, and return them."""
    for field in fields(counts):
        before, value = getattr(counts, field.name), written[field.name]
        if isinstance(before, Counter):
            value = Counter({tuple(k) if isinstance(k, list) else k: n for k, n in value})
        elif isinstance(before, Fraction):
            value = Fraction(*value)
        elif isinstance(before, Most):
            value = Most(value)
        setattr(counts, field.name, value)
    return counts


def _bounded_as_json(counter: BoundedCounter) -> dict[str, Any]:
    counts = counter.counts
    return {"counts": None if counts is None else dict(counts), "long": counter.long}


def _read_bounded(counter: BoundedCounter, written: dict[str, Any]) -> None:
    counter.long = written["long"]
    counter.overflowed = written["counts"] is None
    counter.update(Counter(written["counts"] or {}))
