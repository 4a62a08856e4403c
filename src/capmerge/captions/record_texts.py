"""The texts of a source record: its tags, its caption lines, and other fields that templates name.

Each text comes out stripped, and on one line. Nothing is escaped here.
"""

import re
from typing import Any, NamedTuple, TypeAlias

from capmerge.captions.tags import one_line, spaced
from capmerge.captions.templates import NO_OTHERS, MergeOptions, Others
from capmerge.errors import quoted
from capmerge.tokens.vocabulary import BOS, EOS

Record: TypeAlias = dict[str, Any]

_SPECIAL_TOKEN = re.compile("|".join(map(re.escape, (BOS, EOS))), re.IGNORECASE)
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_JSON_NAMES = {
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def copy_of(record: Any) -> Any:
    """Return a copy that stays as it is when a merge changes `record`.

    A shallow copy is enough, because the merge only adds, replaces and removes fields.
    """
    return dict(record) if isinstance(record, dict) else record


class UnmergeableError(ValueError):
    """Raised for a record that cannot be merged; the message says what was found and expected.

    `hint` names an option with which the record can be merged; "" where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RecordTexts(NamedTuple):
    """The texts of one record."""

    tags: str
    """The tags as one line; "" when there are none."""
    captions: list[str]
    """The caption lines, as `--caption-lines` asks; empty when there is no caption."""
    others: Others = NO_OTHERS
    """The texts of the other fields that templates name; a missing or empty one is not in it."""
    dropped: tuple[str, ...] = ()
    """The entries of `--drop-tags`, once for each tag that was dropped."""
    replaced: tuple[str, ...] = ()
    """The old tags of `--replace-tags`, once for each tag that was replaced."""


class TextReader:
    """Reads the texts of records under one set of options."""

    def __init__(self, options: MergeOptions) -> None:
        self._options = options
        self._other_fields = options.other_fields()
        self._editor = options.tag_editor()

    def texts(self, record: Record) -> RecordTexts:
        """Return the texts of `record`.

        Raises `UnmergeableError` for a field whose value is no text.
        """
        tags = self._tags(record)
        dropped: tuple[str, ...] = ()
        replaced: tuple[str, ...] = ()
        if self._editor:
            tags, dropped, replaced = self._editor.edit(tags)
        if self._options.underscores == "space":
            tags = spaced(tags)
        captions, others = self._captions(record), self._others(record)
        return RecordTexts(tags, captions, others, dropped, replaced)

    def has_paragraphs(self, record: Record) -> bool:
        """Return whether caption lines were split at a blank line between two lines of text."""
        if self._options.caption_lines != "each":
            return False
        return any(
            not line.strip()
            for caption in self._texts_of(record, self._options.caption_field)
            for line in split_lines(caption)
        )

    def _tags(self, record: Record) -> str:
        found = self._texts_of(record, self._options.tags_field)
        return ", ".join(map(one_line, found))

    def _captions(self, record: Record) -> list[str]:
        """Each string of a list is a caption of its own."""
        found = self._texts_of(record, self._options.caption_field)
        return [line for caption in found for line in self._lines_of(caption)]

    def _lines_of(self, caption: str) -> list[str]:
        """Return the lines of one stripped caption as `caption_lines` asks."""
        if "\n" not in caption and "\r" not in caption:
            return [caption]
        lines = _stripped_lines(caption)
        match self._options.caption_lines:
            case "each":
                return lines
            case "join":
                return [" ".join(lines)]
            case "first":
                return lines[:1]

    def _texts_of(self, record: Record, name: str) -> list[str]:
        """Return the stripped texts of a field for tags or captions, those of a list with `lists`.

        There are none when the field is absent, null or blank.
        """
        if self._options.lists:
            return _texts(record.get(name), name)
        value = record.get(name)
        if isinstance(value, list) and all(isinstance(text, str) for text in value):
            hint = "Use --lists to read a list of strings as alternatives or tags."
            raise UnmergeableError(f"{quoted(name)} is a list, expected a string.", hint)
        if value is not None and not isinstance(value, str):
            raise UnmergeableError(f"{quoted(name)} is {json_name(value)}, expected a string.")
        return [text] if value and (text := value.strip()) else []

    def _others(self, record: Record) -> Others:
        if not self._other_fields:
            return NO_OTHERS
        found = ((name, other_text(record, name)) for name in self._other_fields)
        return {name: text for name, text in found if text}


def other_text(record: Record, name: str) -> str:
    """Return a field other than tags and caption as one line; "" when it is missing or empty.

    A list of strings is joined by ", ", and the lines of a string by spaces.
    """
    texts = _texts(record.get(name), name)
    return ", ".join(" ".join(_stripped_lines(text)) for text in texts)


def json_name(value: object) -> str:
    """Return the JSON name of the type of `value`: "a list", "an object" ..."""
    return _JSON_NAMES.get(type(value), "a string")


def _texts(value: Any, name: str) -> list[str]:
    """Return the stripped texts of a string or a list of strings; none for null."""
    if value is None:
        return []
    if isinstance(value, str):
        return [text] if (text := value.strip()) else []
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [text for listed in value if (text := listed.strip())]
    mixed = "a list that holds something else than strings"
    found = mixed if isinstance(value, list) else json_name(value)
    raise UnmergeableError(f"{quoted(name)} is {found}, expected a string or a list of strings.")


def split_lines(text: str) -> list[str]:
    """Return the lines of `text` as they are, blank ones too."""
    return _LINE_BREAK.split(text) if "\r" in text else text.split("\n")


def _stripped_lines(text: str) -> list[str]:
    """Return the lines of `text` that are not blank, stripped."""
    return [stripped for line in split_lines(text) if (stripped := line.strip())]


def has_special_token(text: str) -> bool:
    """Return whether `text` holds a literal `<|startoftext|>` or `<|endoftext|>`."""
    return "<|" in text and _SPECIAL_TOKEN.search(text) is not None


def replaces_unread(record: Record, options: MergeOptions) -> bool:
    """Return whether a merge replaces `caption` or `tags` without having read them.

    That is so where an option names another field to read from.
    """
    return bool(
        (options.tags_field != "tags" and record.get("tags"))
        or (options.caption_field != "caption" and record.get("caption"))
    )
