"""The fast path of the merge, for nearly all records of any file.

It writes what `merge.Merger` writes, from the `shapes` of the records. The loop over a block's
records is written out flat, because a rewrite spends its time there outside the JSON library. The
few records that need care are left to the general rule; a test compares the two.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.like_names import has_like_names, note_like_names
from capmerge.captions.line_template import Template
from capmerge.captions.record_texts import has_special_token, replaces_unread, split_lines
from capmerge.captions.shapes import Shape, Shapes
from capmerge.captions.size import is_size
from capmerge.captions.tags import one_line, spaced
from capmerge.captions.tally import Tally, count_sizes
from capmerge.captions.templates import Draw, MergeOptions
from capmerge.captions.wildcard import escape, has_brace, has_stand_in

# The names of fields are remembered for records that lack a text, if they are so few and short.
_MOST_LETTERS, _MOST_KNOWN = 200, 256

Fitted: TypeAlias = tuple[Shape, list[str]]
"""The shape of the draws that `--fit` left in a record, and the line of each."""


class Drawn(NamedTuple):
    """The draws of one record."""

    shape: Shape
    tags: str
    captions: list[str]
    lines: list[str]
    """The line of each draw."""

    @property
    def can_be_cut(self) -> bool:
        """True if nothing depends on the texts but the lines, and these are as they are drawn."""
        return not (self.shape.spanned or any(map(has_brace, self.lines)))

    def draws(self) -> list[Draw]:
        """Return the draws themselves."""
        return self.shape.draws.of(self.tags, self.captions)


class FastMerge:
    """Merges records in place and counts them in `tally`.

    `literals` returns the fixed texts of a template, and `reserved` are fields that a record must
    not have besides the usual ones.
    """

    def __init__(
        self,
        options: MergeOptions,
        literals: Callable[[Template], list[str]],
        reserved: Iterable[str],
        tally: Tally,
    ) -> None:
        self._options, self._tally = options, tally
        self._reserved = frozenset(reserved)
        self._shapes = Shapes(options, literals)
        self._merged: list[Shape] = []
        self._unlike: set[tuple[str, ...]] = set()
        editor = options.tag_editor()
        self._edit = editor.edit if editor else None
        self._never_escapes = options.caption_wildcards or any(
            map(has_stand_in, _literal_texts(options))
        )
        self._fields_touch = any("" in template.literals[1:-1] for template in options.templates())

    @staticmethod
    def serves(options: MergeOptions) -> bool:
        """Return whether the fast path gives the right result under these options.

        Their literal texts must need no escaping, and templates must name only tags and caption.
        """
        if options.other_fields() or (options.fit_tokens and options.inline):
            return False
        return not any(char in text for text in _literal_texts(options) for char in "{}|")

    def merge_all(
        self,
        records: Iterable[Any],
        drawn: list[Drawn] | None = None,
        fitted: Sequence[Fitted | None] | None = None,
    ) -> list[int]:
        """Merge `records` in place; return the numbers of those that need care.

        These are not touched. The draws of each merged record are added to `drawn`. `fitted` are
        what `--fit` has made of the draws of each record, or None where they fit.
        """
        options, tally, shapes = self._options, self._tally, self._shapes
        tags_field, caption_field = options.tags_field, options.caption_field
        other_fields = (tags_field, caption_field) != ("tags", "caption")
        edit, spaces = self._edit, options.underscores == "space"
        adds_image_size = options.image_size is not False
        reserved, merged = self._reserved, self._merged
        two_lines = shapes.two_lines if drawn is None and fitted is None else None
        others: list[int] = []
        bare, unlike = shapes.bare, self._unlike
        each, first = options.caption_lines == "each", options.caption_lines == "first"
        sized = paragraphs = 0
        for number, record in enumerate(records):
            # A record that cannot be merged, or that an earlier run has rewritten, needs care.
            if (
                record.__class__ is not dict
                or MARK in record
                or TAG_SPANS in record
                or WEIGHTS in record
                or (reserved and not reserved.isdisjoint(record))
            ):
                others.append(number)
                continue
            tags, caption = record.get(tags_field), record.get(caption_field)
            if tags.__class__ is not str or caption.__class__ is not str:
                if not (_is_text(tags) and _is_text(caption)):
                    others.append(number)
                    continue
                tags, caption = tags or "", caption or ""

            # The texts, with their braces doubled.
            tags, caption = tags.strip(), caption.strip()
            if "\n" in tags or "\r" in tags:
                tags = one_line(tags)
            edited = None
            if edit:
                edited = edit(tags)
                tags = edited.text
            if spaces:
                tags = spaced(tags)
            both = f"{tags}\n{caption}"
            if "{" in both or "}" in both:
                if self._needs_care(tags, caption):
                    others.append(number)
                    continue
                both = escape(both)
                tags, _, caption = both.partition("\n")

            # The lines that are written. Only lines of the same length can be equal.
            several = "\n" in caption or "\r" in caption
            if two_lines and tags and caption and tags != caption and not several:
                shape, captions, written, spans = two_lines, [caption], both, None
            else:
                captions = [caption] if caption else []
                if several:
                    parts = split_lines(caption) if "\r" in caption else caption.split("\n")
                    captions = [*filter(None, map(str.strip, parts))]
                    if each:
                        paragraphs += len(captions) < len(parts)
                    else:
                        captions = captions[:1] if first else [" ".join(captions)]
                shape = shapes[len(captions) if tags else ~len(captions)]
                found = [tags, *captions] if tags and bare else shape.lines(tags, captions)
                if drawn is not None:
                    drawn.append(Drawn(shape, tags, captions, found))
                elif fitted is not None and (changed := fitted[number]):
                    shape, found = changed
                if len(set(map(len, found))) < len(found) and len(set(found)) < len(found):
                    shape = shapes.of_equal(shape, found)
                repeated = shape.repeated(found) if shape.repeated else found
                written = "\n".join(repeated)
                spans = shape.spans(tags, captions) if shape.spanned else None
                if shape.is_wildcard:
                    # A wildcard cannot hold a pipe, so then its alternatives are lines, too.
                    if "|" in written:
                        tally.inline_as_lines += 1
                    else:
                        written = "{" + "|".join(repeated) + "}"
            merged.append(shape)

            # What the source was like.
            if "|" in both and "<|" in both:
                tally.special_tokens += any(map(has_special_token, (tags, *captions)))
            if edited is not None:
                tally.count_edits(edited.dropped, edited.replaced)
                tally.all_tags_dropped += bool(edited.dropped) and not tags
            if (not tags or not caption) and tuple(record) not in unlike:
                has_tags = bool(tags or (edited and edited.dropped))
                self._note_like_names(record, tags=has_tags, caption=bool(caption))
            if other_fields:
                tally.replaced += replaces_unread(record, options)

            # The fields.
            record.pop("tags", None)
            record["caption"] = written
            resolution = record.get("train_resolution")
            if "image_size" in record or not is_size(resolution):
                count_sizes(record, tally)
            elif adds_image_size:
                record["image_size"] = resolution
                sized += 1
            if shape.weights:
                record[WEIGHTS] = shape.weights
            if spans:
                record[TAG_SPANS] = spans
            record[MARK] = shape.letters
        tally.image_size_added += sized
        tally.paragraphs += paragraphs
        return others

    def keep(self, one: Drawn, kept: list[int]) -> Fitted:
        """Return some of the draws of a record, which take over the shares of the others."""
        return self._shapes.of_kept(one.shape, kept), [one.lines[number] for number in kept]

    def count(self) -> None:
        """Count the shapes of the records that were merged since the last call."""
        for shape, count in Counter(self._merged).items():
            self._tally.kinds[shape.kind] += count
            self._tally.count_repeats(count, shape.repeats)
        self._merged.clear()

    def _note_like_names(self, record: dict[str, Any], *, tags: bool, caption: bool) -> None:
        """Call `note_like_names`; it need not be called again for other fields of these names."""
        note_like_names(record, self._options, self._tally, tags=tags, caption=caption)
        short = sum(map(len, record)) <= _MOST_LETTERS
        if short and not has_like_names(record, self._options):
            if len(self._unlike) >= _MOST_KNOWN:
                self._unlike.clear()
            self._unlike.add(tuple(record))

    def _needs_care(self, tags: str, caption: str) -> bool:
        """Return whether these texts, which hold braces, need more than to double them.

        They do where braces may meet a stand-in for them that is in another text, or the braces of
        an in-line wildcard.
        """
        if self._never_escapes:
            return True
        inline = self._options.inline
        if (inline or self._fields_touch) and has_stand_in(f"{tags}{caption}"):
            return True
        starts, ends = {tags[:1], caption[:1]}, {tags[-1:], caption[-1:]}
        return inline and ("\n" in caption or "\r" in caption or "{" in starts or "}" in ends)


def _literal_texts(options: MergeOptions) -> list[str]:
    of_templates = [text for template in options.templates() for text in template.literals]
    return [options.prefix, options.suffix, options.tags_prefix, *of_templates]


def _is_text(value: object) -> bool:
    return value is None or value.__class__ is str
