"""The statistics document: the content of `<stem>.stats.json`.

Tables, figures and pages are drawn from it alone. `docs/stats.md` names every key. Within version 1
a key may be added; none is renamed, removed or given another meaning.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import capmerge
from capmerge.captions.fields import STYLES
from capmerge.captions.size import SIZE_FIELDS, WIDTH_AND_HEIGHT
from capmerge.captions.tags import spaced
from capmerge.captions.tally import by_name
from capmerge.captions.templates import MergeOptions
from capmerge.stats.counts import CaptionStats
from capmerge.stats.lengths import Distribution, LengthStats, LimitEffect
from capmerge.tokens.chunks import CHUNK_TOKENS
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import ONE_CHUNK, T5_IDS, TokenizerFamily

Document = dict[str, Any]
MOST_FREQUENT = 100
_LIMITS = (CHUNK_TOKENS, 2 * CHUNK_TOKENS, 3 * CHUNK_TOKENS)
"""The values that sd-scripts takes for --max_token_length.

Families of `ONE_CHUNK` take only the first.
"""
STYLE_WORDS = {"tags": "tags", "caption": "caption", "both": "tags and caption"}
"""The names of `fields.STYLES` in words for a reader."""
_T5_LIMITS = sorted(set(T5_IDS.values()))
"""The T5 lengths for any family with a T5: both are in use, as FLUX schnell has that of SD3."""
LOSS = Fraction(1, 100)
"""A recommended max length drops less than this share of the tokens."""


def build_document(
    stats: CaptionStats,
    *,
    source: str,
    merge: MergeOptions,
    family: TokenizerFamily,
    counter: TokenCounter,
    t5: TokenCounter | None,
    duplicates: dict[str, Any],
    loops: dict[str, Any],
) -> Document:
    """Return the document of a finished run."""
    lines = stats.all_lines()
    distribution = lines.distribution()
    limits = [
        distribution.limit_effect(limit)
        for limit in (_LIMITS[:1] if family in ONE_CHUNK else _LIMITS)
    ]
    tags, resolutions = stats.tag_counts.counts, stats.resolutions.counts
    return {
        "schema": "capmerge.stats",
        "version": 1,
        "capmerge": capmerge.__version__,
        "source": source,
        "options": {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(merge).items()
        },
        "family": family,
        "tokenizer": counter.tokenizer.name,
        "records": {"counted": stats.records.counted, **by_name(stats.records)},
        "lengths": {
            "tags": stats.tags.as_json(),
            "captions": stats.captions.as_json(),
            "lines": lines.as_json(),
        },
        "styles": _styles(stats, distribution),
        "chunks": [
            {"chunks": chunks, "texts": texts, "share": share}
            for chunks, (texts, share) in distribution.grouped(CHUNK_TOKENS).items()
        ],
        "limits": [effect._asdict() for effect in limits],
        "advice": _advice(distribution, limits),
        "t5": _t5(stats.t5_lines, _T5_LIMITS, t5),
        "wildcards": _wildcards(stats),
        "tags": None if tags is None else _most_frequent(stats, tags),
        "underscores": _underscores(tags, counter, stats.tags),
        "duplicates": duplicates,
        "loops": loops,
        "resolutions": None if resolutions is None else _resolutions(resolutions),
        "size_fields": {
            name.replace(" ", "_"): stats.size_fields[name]
            for name in (*SIZE_FIELDS, WIDTH_AND_HEIGHT)
        },
        "literals": dict(sorted(stats.literals.items())),
    }


def _styles(stats: CaptionStats, every: Distribution) -> dict[str, Any]:
    styles = {}
    for letter, name in STYLES.items():
        written = stats.lines[letter].as_json()
        distribution = stats.lines[letter].distribution()
        share = (
            Fraction(distribution.weight, distribution.unit) / Fraction(every.weight, every.unit)
            if every.weight
            else Fraction(0)
        )
        styles[name] = {"share": float(share), **written}
    return styles


def _advice(distribution: Distribution, limits: list[LimitEffect]) -> dict[str, Any]:
    """Return the smallest max length that drops less than `LOSS` of the tokens, with a sentence."""
    if not distribution.lengths:
        return {
            "max_tokens": None,
            "dropped_share": 0.0,
            "text": "There is no text, so any max length will do.",
        }
    for effect in limits:
        if effect.dropped_share < LOSS:
            return {
                "max_tokens": effect.limit,
                "dropped_share": effect.dropped_share,
                "text": f"A max length of {effect.limit} is the smallest that loses under 1 %: "
                f"it drops {percent(effect.dropped_share)} of the tokens "
                f"and cuts {percent(effect.share)} of the alternatives.",
            }
    largest = limits[-1]
    chunks = range(-(-distribution.lengths[-1] // CHUNK_TOKENS) + 1)
    enough = CHUNK_TOKENS * bisect_left(
        chunks,
        True,
        key=lambda count: distribution.limit_effect(CHUNK_TOKENS * count).dropped_share < LOSS,
    )
    return {
        "max_tokens": None,
        "dropped_share": largest.dropped_share,
        "text": f"Even a max length of {largest.limit}, the largest for this family, drops "
        f"{percent(largest.dropped_share)} of the tokens; {enough:,} would lose under 1 %.",
    }


def _t5(lines: LengthStats, limits: list[int], t5: TokenCounter | None) -> dict[str, Any] | None:
    if t5 is None:
        return None
    special = getattr(t5.tokenizer, "n_special", 0)
    distribution = lines.distribution()
    return {
        "tokenizer": t5.tokenizer.name,
        "lengths": lines.as_json(),
        "limits": [
            {
                **distribution.limit_effect(limit - special)._asdict(),
                "limit": limit,
                "room_tokens": limit - special,
            }
            for limit in limits
        ],
    }


def _wildcards(stats: CaptionStats) -> dict[str, Any]:
    found = stats.wildcards
    count = max(1, found.alternatives)
    return {
        "alternatives": found.alternatives,
        "not_listed": found.not_listed,
        "mean_longest": found.longest_sum / count,
        "mean_shortest": found.shortest_sum / count,
        "mean": float(found.mean_sum / count),
    }


def _most_frequent(stats: CaptionStats, tags: Counter[str]) -> dict[str, Any]:
    records = max(1, stats.records.kinds["both"] + stats.records.kinds["tags_only"])
    return {
        "occurrences": tags.total(),
        "distinct": len(tags),
        "long": stats.tag_counts.long,
        "most_frequent": [
            {"tag": tag, "texts": count, "share": count / records}
            for tag, count in _most_first(tags)[:MOST_FREQUENT]
        ],
    }


def _resolutions(resolutions: Counter[str]) -> list[dict[str, Any]]:
    return [
        {"resolution": resolution, "records": count}
        for resolution, count in _most_first(resolutions)
    ]


def _most_first(counts: Counter[str]) -> list[tuple[str, int]]:
    """Return the counts, greatest first and equal ones by text, whatever the order of counting."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _underscores(
    tags: Counter[str] | None, counter: TokenCounter, lengths: LengthStats
) -> dict[str, Any] | None:
    """Return the tokens that spaces instead of underscores would save.

    Tags are counted one by one, each with the comma that follows it: the sum over the tags of a
    text is what the text would save.
    """
    if tags is None:
        return None
    underscored = [tag for tag in tags if spaced(tag) != tag]
    before = counter.count_tokens([tag + "," for tag in underscored])
    after = counter.count_tokens([spaced(tag) + "," for tag in underscored])
    saved = sum((a - b) * tags[tag] for tag, a, b in zip(underscored, before, after, strict=True))
    tokens = lengths.distribution().summary()["tokens"]
    return {
        "tags": sum(tags[tag] for tag in underscored),
        "saved_tokens": saved,
        "share": saved / tokens if tokens else 0.0,
    }


def percent(share: float) -> str:
    """Return a share as a percentage with one or two decimals, never rounded to 0 % or 100 %."""
    if share == 0:
        return "0 %"
    if 0 < share < 0.0001:
        return "under 0.01 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{share:.2%}".replace("%", " %") if share < 0.1 else f"{share:.1%}".replace("%", " %")
