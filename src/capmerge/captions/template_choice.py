"""Which templates a record fills, and the draws that they give.

A record may lack tags, a caption or another field that a template names. `verify` proves a file
from these draws.
"""

from typing import NamedTuple

from capmerge.captions.line_template import Template
from capmerge.captions.record_texts import RecordTexts
from capmerge.captions.templates import Draw, MergeOptions, shares_of


class Choice(NamedTuple):
    """The draws of one record, before anything is fitted or written."""

    draws: list[Draw]
    """The draws, in the order in which they are written; their shares sum to 1."""
    lacking: tuple[str, ...]
    """The fields other than tags and caption for which templates were left out."""


class TemplateChooser:
    """Chooses among the templates of one set of options."""

    def __init__(self, options: MergeOptions) -> None:
        self._templates = options.templates()
        self._shares = shares_of(self._templates)
        self._other_fields = options.other_fields()

    def choose(self, texts: RecordTexts) -> Choice:
        """Return the draws that the templates give for the texts of a record."""
        tags, captions, others = texts.tags, texts.captions, texts.others
        templates, shares = self._templates, self._shares
        lacking: tuple[str, ...] = ()
        if not tags or not captions or len(others) < len(self._other_fields):
            lacking = tuple(name for name in self._other_fields if name not in others)
            templates = _filled(templates, texts)
            shares = shares_of(templates)
        draws = [
            Draw(template, tags, caption, share / len(lines) if len(lines) > 1 else share, others)
            for template, share in zip(templates, shares, strict=True)
            for lines in [captions if "caption" in template.fields else [""]]
            for caption in lines
        ]
        return Choice(draws, lacking)


def _filled(templates: tuple[Template, ...], texts: RecordTexts) -> tuple[Template, ...]:
    """Return the templates for a record that lacks tags, captions or another field.

    A template that names another field is left out without that field. Missing tags and a missing
    caption only vanish from a template. The text that the record has must not be lost: when no
    template is left, the tags and the caption that the templates name are written alone, and where
    the record has none of these, those that it has.
    """
    missing = [
        name for name, found in (("tags", texts.tags), ("caption", texts.captions)) if not found
    ]
    kept: list[Template] = []
    for given in templates:
        template: Template | None = given
        if any(name not in texts.others for name in given.other_fields):
            continue
        for name in missing:
            template = template and template.without(name)
        if template:
            kept.append(template)
    if kept:
        return tuple(kept)
    found = [name for name in ("tags", "caption") if name not in missing]
    named = [name for name in found if any(name in given.fields for given in templates)]
    return tuple(Template((name,), ("", "")) for name in named or found)
