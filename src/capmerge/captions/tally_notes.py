"""The notes on the counts of a run that `rewrite`, `stats` and `preview` share."""

from collections import Counter
from collections.abc import Iterator

from capmerge.captions.like_names import like_name_notes
from capmerge.captions.tally import Tally
from capmerge.captions.templates import MergeOptions
from capmerge.errors import quoted

_MOST_NAMED = 5


def missing_text_notes(tally: Tally) -> Iterator[str]:
    """Yield notes on records that lack a text which the options ask for."""
    yield from like_name_notes(tally)
    for name, count in sorted(tally.lacking_fields.items()):
        records = "every record" if count == tally.rewritten > 1 else _records(count)
        yield (
            f"the templates that name the field {quoted(name)} were left out for {records}, "
            "for want of a text in it."
        )


def tag_notes(tally: Tally, options: MergeOptions) -> Iterator[str]:
    """Yield notes on the tags of a whole file that were dropped and replaced."""
    editor = options.tag_editor()
    for option, did, to_do, entries, counts in (
        ("--drop-tags", "dropped", "drop", editor.drops, tally.dropped_tags),
        ("--replace-tags", "replaced", "replace", editor.replaces, tally.replaced_tags),
    ):
        if counts:
            total = counts.total()
            tags = "1 tag" if total == 1 else f"{total:,} tags"
            yield f"{option} {did} {tags}: {_most_frequent(counts)}."
        unused = [entry for entry in entries if entry not in counts]
        if unused:
            yield (
                f"{option} had nothing to {to_do} for {len(unused):,} of its {len(entries):,} "
                f"tags: {_joined([quoted(entry, longest=40) for entry in unused])}."
            )
    if tally.all_tags_dropped:
        yield f"--drop-tags left no tags in {_records(tally.all_tags_dropped)}."


def _most_frequent(counts: Counter[str]) -> str:
    """The tags that were met most often, with their numbers."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return _joined([f"{quoted(tag, longest=40)} ({count:,})" for tag, count in ranked])


def _joined(shown: list[str]) -> str:
    """The first few of some texts, and how many more there are."""
    more = len(shown) - _MOST_NAMED
    return ", ".join(shown[:_MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _records(count: int) -> str:
    return "1 record" if count == 1 else f"{count:,} records"
