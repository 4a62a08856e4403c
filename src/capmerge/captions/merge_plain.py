"""The fast path for plain records: tags and a caption of one line each, no braces or pipes.

Nearly every record of a real file is plain. The result of `merge.Merger` for such a record is
prepared in advance, and the loop over a block's records is written out flat, because a rewrite
spends its time there outside the JSON library. Any record that is not plain is left to the general
rule; a test compares the two.
"""

from collections.abc import Callable, Iterable
from typing import Any

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.line_counts import rounded_counts, weights_fit, whole_weights
from capmerge.captions.line_template import Template
from capmerge.captions.size import is_size
from capmerge.captions.tag_edits import NOTHING_EDITED
from capmerge.captions.tags import spaced
from capmerge.captions.tally import Tally, count_sizes
from capmerge.captions.templates import MergeOptions, shares_of


class PlainMerge:
    """Merges plain records in place and counts them in `tally`."""

    def __init__(
        self,
        options: MergeOptions,
        literals: Callable[[Template], list[str]],
        reserved: Iterable[str],
        tally: Tally,
    ) -> None:
        templates = options.templates()
        by_field = options.weights == "field"
        shares = shares_of(templates)
        weights = whole_weights(shares)
        self._tally = tally
        self._rounded = not by_field and not weights_fit(weights, len(templates))
        self._off_ppm = 0
        counts = [1] * len(templates) if by_field else weights
        if self._rounded:
            # A plain record has one line for each template.
            counts, self._off_ppm = rounded_counts(list(enumerate(shares)))
        self._reserved = frozenset(reserved)
        self._weights = weights if by_field else None
        self._spaces = options.underscores == "space"
        self._editor = options.tag_editor()
        self._fields = options.tags_field, options.caption_field
        self._adds_image_size = options.image_size is not False
        self._letters = "".join(
            template.style * count for template, count in zip(templates, counts, strict=True)
        )
        self._lines = [(template.fields, *_three(literals(template))) for template in templates]
        self._repeats = [number for number, count in enumerate(counts) for _ in range(count)]
        self._inline = options.inline
        bare = self._lines == [
            (("tags",), "", "", ""),
            (("caption",), "", "", ""),
        ] and self._repeats == [0, 1]
        # The default options: this takes half the time of `_merge`.
        self._two_lines = bare and not self._spaces and not options.inline

    @staticmethod
    def serves(options: MergeOptions) -> bool:
        """Return whether the fast path gives the right result under these options.

        Their literal texts must hold no brace or pipe, so that nothing needs escaping, templates
        must name only tags and caption, and with `--fit` the alternatives must be separate lines.
        """
        if options.other_fields() or (options.fit_tokens and options.inline):
            return False
        literals = [
            options.prefix,
            options.suffix,
            options.tags_prefix,
            *(literal for template in options.templates() for literal in template.literals),
        ]
        return not any(char in literal for literal in literals for char in "{}|")

    def merge_all(self, records: Iterable[Any]) -> list[int]:
        """Merge the plain ones among `records` in place; return the numbers of the others.

        The others are not touched.
        """
        others: list[int] = []
        reserved, letters, weights, adds_image_size = (
            self._reserved,
            self._letters,
            self._weights,
            self._adds_image_size,
        )
        two_lines = self._two_lines
        edit = self._editor.edit if self._editor else None
        edited = NOTHING_EDITED
        tags_field, caption_field = self._fields
        other_tags, other_caption = tags_field != "tags", caption_field != "caption"
        tally = self._tally
        sized = 0
        number = -1
        for record in records:
            number += 1
            if record.__class__ is not dict or not record.keys().isdisjoint(reserved):
                others.append(number)
                continue
            if (other_tags and "tags" in record) or (other_caption and "caption" in record):
                others.append(number)
                continue
            tags, caption = record.get(tags_field), record.get(caption_field)
            if tags.__class__ is not str or caption.__class__ is not str:
                others.append(number)
                continue
            tags, caption = tags.strip(), caption.strip()
            if edit:
                if "\n" in tags or "\r" in tags:
                    others.append(number)
                    continue
                edited = edit(tags)
                tags = edited.text
            both = f"{tags}\n{caption}"
            if (
                not tags
                or not caption
                or "\n" in tags
                or "\n" in caption
                or "{" in both
                or "}" in both
                or "|" in both
                or "\r" in both
            ):
                others.append(number)
                continue
            if two_lines:
                if tags == caption:
                    others.append(number)
                    continue
                spans: list[list[int]] = []
            else:
                merged = self._merge(tags, caption)
                if merged is None:
                    others.append(number)
                    continue
                both, spans = merged
            if edited is not NOTHING_EDITED:
                tally.count_edits(edited.dropped, edited.replaced)
            if not other_tags:
                del record["tags"]
            record["caption"] = both
            resolution = record.get("train_resolution")
            if "image_size" in record or not is_size(resolution):
                count_sizes(record, tally)
            elif adds_image_size:
                record["image_size"] = resolution
                sized += 1
            if weights:
                record[WEIGHTS] = weights
            if spans:
                record[TAG_SPANS] = spans
            record[MARK] = letters
        count = number + 1 - len(others)
        self._tally.kinds["both"] += count
        self._tally.lines += count * len(letters)
        if self._rounded and count:
            self._tally.count_rounded(count, 0, self._off_ppm, self._off_ppm)
        self._tally.image_size_added += sized
        return others

    def _merge(self, tags: str, caption: str) -> tuple[str, list[list[int]]] | None:
        """Return the `caption` value and the tag spans for any templates.

        Returns None when two templates give the same line, which the general rule has to join.
        """
        if self._spaces:
            tags = spaced(tags)
        lines: list[str] = []
        spans: list[list[int] | None] = []
        for fields, before, between, after in self._lines:
            span = None
            if fields == ("tags",):
                line = f"{before}{tags}{after}"
            elif fields == ("caption",):
                line = f"{before}{caption}{after}"
            elif fields == ("tags", "caption"):
                line = f"{before}{tags}{between}{caption}{after}"
                span = [len(before), len(before) + len(tags)]
            else:
                line = f"{before}{caption}{between}{tags}{after}"
                start = len(before) + len(caption) + len(between)
                span = [start, start + len(tags)]
            if line in lines:
                return None
            lines.append(line)
            spans.append(span)
        repeated = [lines[number] for number in self._repeats]
        written = "{" + "|".join(repeated) + "}" if self._inline else "\n".join(repeated)
        return written, [span for number in self._repeats if (span := spans[number])]


def _three(literals: list[str]) -> tuple[str, str, str]:
    """Return the texts before, between and after the fields; between is "" for one field."""
    return literals[0], literals[1] if len(literals) > 2 else "", literals[-1]
