r"""The options `--drop-tags` and `--replace-tags`: single tags left out of the tags, or replaced.

A tag is the text between two commas. It matches an entry of the options in any of the spellings
that data sets use: with underscores or spaces, in capitals or small letters, with or without a
backslash before a parenthesis. The tags beside it stay as they are, to the letter.

>>> TagEditor(["long hair"], ["kitty\tcat, pet"]).edit("1girl, Long_Hair, kitty")
EditedTags(text='1girl, cat, pet', dropped=('long hair',), replaced=('kitty',))
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from capmerge.errors import UsageError, quoted

_ESCAPED = re.compile(r"\\([()])")
_NEWLINE = re.compile(r"[\r\n]")
_MOST_KNOWN = 1 << 16  # a data set's tags are a few ten thousand
_LONGEST_KNOWN = 200  # characters; longer texts between commas are no tags


_Entry = TypeVar("_Entry")


class EditedTags(NamedTuple):
    """The tags of a record after both options, and what they changed."""

    text: str
    """The tags as one line; "" when none is left."""
    dropped: tuple[str, ...] = ()
    """The entries of `--drop-tags`, once for each tag that was dropped."""
    replaced: tuple[str, ...] = ()
    """The old tags of `--replace-tags`, once for each tag that was replaced."""


NOTHING_EDITED = EditedTags("")


class _Edit(NamedTuple):
    """What becomes of one tag."""

    new: tuple[str, ...]
    """The tags that are written in its place."""
    dropped: tuple[str, ...]
    replaced: tuple[str, ...]


def spelled_alike(tag: str) -> str:
    r"""Return the form that all spellings of a tag have in common.

    >>> spelled_alike(r" Cat_\(animal\)")
    'cat (animal)'
    """
    plain = _ESCAPED.sub(r"\1", tag) if "\\" in tag else tag
    return " ".join(plain.replace("_", " ").casefold().split()) or tag.strip()


def parse_dropped(entry: str) -> str:
    """Return the tag of one entry of `--drop-tags`.

    Raises `ValueError` unless the entry is a single tag.
    """
    tag = entry.strip()
    if _NEWLINE.search(tag):
        raise ValueError("found a line break, expected one tag.")
    if "\t" in tag:
        raise ValueError(
            "found a tab, expected one tag. --replace-tags takes an old tag, a tab and a new one."
        )
    return _single(tag)


def parse_replacement(entry: str) -> tuple[str, tuple[str, ...]]:
    """Return the old tag and the new tags of one entry of `--replace-tags`.

    Raises `ValueError` unless the entry is a single tag, a tab, and one or more tags with commas.
    """
    if _NEWLINE.search(entry):
        raise ValueError("found a line break, expected one line.")
    old, *rest = entry.split("\t")
    if len(rest) != 1:
        raise ValueError(f"found {len(rest)} tabs, expected the old tag, one tab and the new tag.")
    new = tuple(tag for part in rest[0].split(",") if (tag := part.strip()))
    if not new:
        raise ValueError("found no new tag behind the tab. --drop-tags drops tags.")
    return _single(old.strip()), new


def _single(tag: str) -> str:
    if "," in tag:
        raise ValueError("found a comma, expected one tag per line.")
    if not tag:
        raise ValueError("found no tag, expected one.")
    return tag


def _parsed(option: str, entry: str, parse: Callable[[str], _Entry]) -> _Entry:
    try:
        return parse(entry)
    except ValueError as error:
        raise UsageError(f"{option}, {quoted(entry)}: {error}") from None


class _KnownEdits(dict[str, _Edit | None]):
    """What becomes of each text between two commas, remembered: tags repeat by the million."""

    def __init__(self, find: Callable[[str], _Edit | None]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, piece: str) -> _Edit | None:
        edit = self._find(piece)
        if len(piece) <= _LONGEST_KNOWN:
            if len(self) >= _MOST_KNOWN:
                self.clear()
            self[piece] = edit
        return edit


class TagEditor:
    """Drops and replaces tags as the two options ask.

    `replace_tags` come first, each tag being replaced once, and `drop_tags` then drop what they
    name. Raises `UsageError` for an entry that is no tag or no replacement, and for entries that
    contradict each other.
    """

    def __init__(self, drop_tags: Sequence[str] = (), replace_tags: Sequence[str] = ()) -> None:
        self._dropped: dict[str, str] = {}
        for entry in drop_tags:
            tag = _parsed("--drop-tags", entry, parse_dropped)
            self._dropped.setdefault(spelled_alike(tag), tag)
        self._replaced: dict[str, tuple[str, tuple[str, ...]]] = {}
        for entry in replace_tags:
            replacement = _parsed("--replace-tags", entry, parse_replacement)
            self._add(*replacement)
        self._known = _KnownEdits(self._find)

    def __bool__(self) -> bool:
        """Return whether there is anything to drop or to replace."""
        return bool(self._dropped or self._replaced)

    @property
    def drops(self) -> list[str]:
        """The tags of `--drop-tags`, as they are spelled there."""
        return list(self._dropped.values())

    @property
    def replaces(self) -> list[str]:
        """The old tags of `--replace-tags`, as they are spelled there."""
        return [old for old, _ in self._replaced.values()]

    def edit(self, tags: str) -> EditedTags:
        """Return stripped `tags` of one line after both options.

        A new tag that the record has already is not written a second time.
        """
        pieces = tags.split(",")
        known = self._known
        edits = [known[piece] for piece in pieces]
        if not any(edits):
            return EditedTags(tags)
        found = [edit for edit in edits if edit]
        present: set[str] = set()
        if any(edit.new for edit in found):
            present = {
                spelled_alike(piece)
                for piece, edit in zip(pieces, edits, strict=True)
                if edit is None
            }
        kept: list[str] = []
        for piece, edit in zip(pieces, edits, strict=True):
            if edit is None:
                kept.append(piece)
                continue
            new: list[str] = []
            for tag in edit.new:
                if (alike := spelled_alike(tag)) not in present:
                    present.add(alike)
                    new.append(tag)
            if new:
                bare = piece.strip()
                kept.append(piece.replace(bare, ", ".join(new)))
        return EditedTags(
            ",".join(kept).strip() if any(map(str.strip, kept)) else "",
            tuple(tag for edit in found for tag in edit.dropped),
            tuple(tag for edit in found for tag in edit.replaced),
        )

    def _find(self, piece: str) -> _Edit | None:
        """Return what becomes of the text between two commas; None when it stays as it is."""
        tag = piece.strip()
        if not tag:
            return None
        alike = spelled_alike(tag)
        if alike not in self._dropped and alike not in self._replaced:
            return None
        old, new = self._replaced.get(alike, ("", (tag,)))
        kept = tuple(one for one in new if spelled_alike(one) not in self._dropped)
        if kept == (tag,):
            return None
        dropped = (self._dropped[a] for one in new if (a := spelled_alike(one)) in self._dropped)
        return _Edit(kept, tuple(dropped), (old,) if old else ())

    def _add(self, old: str, new: tuple[str, ...]) -> None:
        """Add one replacement, unless it contradicts another entry."""
        alike = spelled_alike(old)
        if alike in self._dropped:
            raise UsageError(
                f"--drop-tags drops {quoted(old)}, and --replace-tags replaces it. "
                "Name it in one of them."
            )
        other, others = self._replaced.setdefault(alike, (old, new))
        if others != new:
            raise UsageError(
                f"--replace-tags replaces {quoted(other)} by {quoted(', '.join(others))} and "
                f"{quoted(old)} by {quoted(', '.join(new))}, but both are the same tag. "
                "Leave one of them out."
            )
