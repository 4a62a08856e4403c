"""Fields whose names are like `caption` or `tags`, where a record may hold its text instead."""

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from capmerge.captions.tally import LikeField, Tally
from capmerge.captions.templates import MergeOptions
from capmerge.errors import quoted

_MOST_NAMES = 64
_LONGEST_KNOWN = 200  # characters; longer names are not remembered
_WORDS = re.compile(r"[a-z]+|[A-Z]+(?![a-z])|[A-Z][a-z]*")
_LIKE = {
    "caption": frozenset({"caption", "text", "txt", "prompt", "description", "desc"}),
    "tags": frozenset({"tag", "keyword"}),
}


def note_like_names(
    record: dict[str, Any], options: MergeOptions, tally: Tally, *, tags: bool, caption: bool
) -> None:
    """Count fields with a text that are named like what a record lacks (`caption`, `tags`).

    `tags` and `caption` say which of the two it has. Of many different names, the first 64 in the
    order of the alphabet are kept, so that any split of the file gives the same counts.
    """
    if tags and caption:
        return
    for name, value in record.items():
        for what in _likes(name, options):
            if not (tags if what == "tags" else caption) and _holds_text(value):
                tally.like_named[what, name] += 1
    keep_few_names(tally)


def has_like_names(record: dict[str, Any], options: MergeOptions) -> bool:
    """Return whether `note_like_names` may count something in records with these fields."""
    return any(_likes(name, options) for name in record)


def _likes(name: str, options: MergeOptions) -> tuple[str, ...]:
    if name in (options.tags_field, options.caption_field):
        return ()
    return _like(name) if len(name) <= _LONGEST_KNOWN else _like.__wrapped__(name)


@lru_cache(maxsize=4096)
def _like(name: str) -> tuple[str, ...]:
    """Return which of `caption` and `tags` a field is named like."""
    words = {word.lower().removesuffix("s") for word in _WORDS.findall(name)}
    return tuple(what for what, like in _LIKE.items() if words & like)


def keep_few_names(tally: Tally) -> None:
    """Forget names that cannot be among the first 64, once there are twice as many."""
    if len(tally.like_named) > 2 * _MOST_NAMES:
        for like in sorted(tally.like_named)[_MOST_NAMES:]:
            del tally.like_named[like]


def like_name_notes(tally: Tally) -> Iterator[str]:
    """The notes on records whose text stands under another name, the most frequent first."""
    kept: list[LikeField] = sorted(tally.like_named)[:_MOST_NAMES]
    for what, name in sorted(kept, key=lambda like: -tally.like_named[like])[:5]:
        count = tally.like_named[what, name]
        records = "1 record has" if count == 1 else f"{count:,} records have"
        option = "--caption-field" if what == "caption" else "--tags-field"
        yield (
            f"{records} no {what} but a text in the field {quoted(name)}. "
            f"Use {option} {quoted(name)} to read it."
        )


def _holds_text(value: Any) -> bool:
    """Return whether a value is a string with text, or a list of strings with some."""
    texts = value if isinstance(value, list) else [value]
    return all(isinstance(text, str) for text in texts) and any(text.strip() for text in texts)
