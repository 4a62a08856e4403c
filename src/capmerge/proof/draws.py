"""The second proof of a record: sd-scripts draws from its caption what the templates ask for.

The caption is read by sd-scripts' own grammar (`captions.wildcard`), and the texts that it gives,
with their probabilities, must be those of the templates. Of the code that wrote the record, only
the reading of the source's texts, the choice of templates and what `--fit` leaves of them are used.
"""

from collections import Counter
from collections.abc import Sequence

from capmerge.captions.fields import MARK, WEIGHTS
from capmerge.captions.merge import Merger
from capmerge.captions.record_texts import Record, RecordTexts, TextReader
from capmerge.captions.template_choice import TemplateChooser
from capmerge.captions.templates import Draw
from capmerge.captions.wildcard import has_stand_in, only_outcome
from capmerge.captions.written import read_spans
from capmerge.proof.draw_plan import DrawPlan
from capmerge.proof.drawn_texts import misread
from capmerge.proof.parsers import Pair

_MOST_PLANS = 512


class DrawProof:
    """Compares what is drawn from rewritten records with what their sources ask for."""

    def __init__(self, merger: Merger) -> None:
        options = merger.options
        self._merger, self._options = merger, options
        self._reader = TextReader(options)
        self._chooser = TemplateChooser(options)
        self._has_others = bool(options.other_fields())
        self._edits_tags = bool(options.tag_editor()) or options.underscores != "keep"
        self._plans: dict[tuple[bool, int], DrawPlan] = {}

    def problem(self, before: Record, record: Record, draws: list[Draw] | None) -> str:
        """Return how the draws of `record` differ from what its source `before` asks for; else "".

        `draws` are those that `--fit` leaves, or None without it. Raises `BrokenRecordError` for a
        record whose fields do not belong together, and `TooManyOutcomesError` if its wildcards give
        more texts than can be listed.
        """
        if draws is None and not self._has_others and self._is_plainly_right(before, record):
            return ""
        return misread(self._merger, self._merger.draws(before) if draws is None else draws, record)

    def doubtful(self, befores: Sequence[Record], pairs: Sequence[Pair]) -> list[int]:
        """Return the numbers of those records, without `--fit`, that `problem` has to look at.

        The others are as `_is_plainly_right` says. Nearly all records of a file come by here, so
        the commonest are looked at without a call: no brace is in their caption, and it is the
        lines of their plan.
        """
        if self._has_others:
            return list(range(len(pairs)))
        is_right, plans = self._is_plainly_right, self._plans
        tags_field, caption_field = self._options.tags_field, self._options.caption_field
        has_simple_lines = (
            self._options.caption_lines == "each"
            and self._options.weights != "field"
            and not (self._edits_tags or self._options.inline or self._options.caption_wildcards)
        )
        doubted: list[int] = []
        for number, (before, (_, record)) in enumerate(zip(befores, pairs, strict=True)):
            if MARK in before:
                doubted.append(number)
                continue
            if has_simple_lines:
                tags, caption = before.get(tags_field, ""), before.get(caption_field, "")
                if tags.__class__ is str and caption.__class__ is str:
                    tags, caption = tags.strip(), caption.strip()
                    lines: tuple[str, ...] = (tags, caption) if caption else (tags,)
                    if "\n" in caption:
                        lines = (tags, *filter(None, map(str.strip, caption.split("\n"))))
                    plan = plans.get((not tags, len(lines) - 1))
                    if (
                        plan
                        and plan.lines_of
                        and record[MARK] == plan.letters
                        and not ("\r" in tags or "\n" in tags or "\r" in caption)
                    ):
                        meant: str | None = "\n".join(plan.lines_of(lines))
                        # Without a brace the grammar leaves every line as it is.
                        if meant and ("{" in meant or "}" in meant):
                            meant = _doubled(meant)
                        if meant == record["caption"]:
                            continue
            if not is_right(before, record):
                doubted.append(number)
        return doubted

    def _is_plainly_right(self, before: Record, record: Record) -> bool:
        """Return whether the lines of `record`, read one by one, are the texts that are meant.

        That is so for nearly all records: no line has an intended wildcard, and there is a line for
        each draw. False means only that the record has to be looked at more closely.
        """
        caption, letters = record["caption"], record[MARK]
        tags, captions = self._texts(before)
        plan = self._plans.get((not tags, len(captions))) or self._plan(not tags, len(captions))
        drawn = texts = plan.texts(tags, captions)
        has_weights = WEIGHTS in record
        if not has_weights:
            texts = plan.repeated(drawn)
        elif record[WEIGHTS] != plan.weights:
            return False
        if letters.strip("tcb") or (caption and not letters):
            return False
        if "{" not in caption and "}" not in caption:
            # Without a brace the grammar leaves every line as it is.
            if len(texts) == len(letters) and "\n".join(texts) == caption:
                return "b" not in letters or _hold_tags(record, caption.split("\n"), letters, tags)
            lines = read = caption.split("\n") if letters else []
        elif self._options.inline:
            return len(texts) == len(letters) and _is_plain_wildcard(caption, texts)
        elif self._options.caption_wildcards:
            return False
        else:
            lines = caption.split("\n")
            known = {line: only_outcome(line) for line in dict.fromkeys(lines)}
            read = [text for line in lines if (text := known[line]) is not None]
            if has_stand_in(caption):
                # Spaces keep these and braces apart.
                read = [text.replace(" ", "") for text in read]
                texts = [text.replace(" ", "") for text in texts]
        return (
            len(lines) == len(read) == len(letters)
            and (
                read == list(texts)
                or (not has_weights and _have_equal_shares(read, texts))
                or (not has_weights and plan.is_rounded_to(read, drawn))
            )
            and ("b" not in letters or _hold_tags(record, lines, letters, tags))
        )

    def _texts(self, before: Record) -> tuple[str, Sequence[str]]:
        """Return the tags and the caption lines of a source record."""
        tags = before.get(self._options.tags_field, "")
        caption = before.get(self._options.caption_field, "")
        if (
            tags.__class__ is str
            and caption.__class__ is str
            and not (self._edits_tags or "\n" in tags or "\r" in tags or "\r" in caption)
        ):
            if "\n" not in caption:
                caption = caption.strip()
                return tags.strip(), [caption] if caption else []
            if self._options.caption_lines == "each":
                lines = [text for line in caption.split("\n") if (text := line.strip())]
                return tags.strip(), lines
        texts = self._reader.texts(before)
        return texts.tags, texts.captions

    def _plan(self, no_tags: bool, captions: int) -> DrawPlan:  # noqa: FBT001
        """Return what every record with tags or not and so many caption lines trains."""
        texts = RecordTexts("" if no_tags else "tags", [str(number) for number in range(captions)])
        draws = self._chooser.choose(texts).draws
        if len(self._plans) >= _MOST_PLANS:
            self._plans.clear()
        plan = self._plans[no_tags, captions] = DrawPlan(draws, self._merger.lines.literals)
        return plan


def _doubled(text: str) -> str | None:
    """Return `text` with doubled braces, of which the grammar makes `text` again.

    It is None for texts with the characters that it hides doubled braces behind.
    """
    return None if has_stand_in(text) else text.replace("{", "{{").replace("}", "}}")


def _is_plain_wildcard(caption: str, texts: Sequence[str]) -> bool:
    """Return whether `caption` is one in-line wildcard of these texts, with nothing escaped.

    Then the grammar draws each text equally often.
    """
    return (
        caption == "{" + "|".join(texts) + "}"
        and caption.count("{") == caption.count("}") == 1
        and caption.count("|") == len(texts) - 1 > 0
        and not has_stand_in(caption)
    )


def _have_equal_shares(texts: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether every text has the same share of both lists."""
    counts, other_counts = Counter(texts), Counter(others)
    return len(counts) == len(other_counts) and all(
        count * len(others) == other_counts[text] * len(texts) for text, count in counts.items()
    )


def _hold_tags(record: Record, lines: Sequence[str], letters: str, tags: str) -> bool:
    """Return whether the span of each line with the letter `b` holds the tags."""
    beside = [line for line, letter in zip(lines, letters, strict=True) if letter == "b"]
    spans = read_spans(record, len(beside))
    return all(
        only_outcome(line[start:end]) == tags
        for line, (start, end) in zip(beside, spans, strict=True)
    )
