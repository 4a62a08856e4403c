"""Tags as one line of text, without line breaks and, if asked, without underscores."""

import itertools
import re

_MOST_KNOWN = 1 << 16
_LONGEST_KNOWN = 200  # characters; longer texts between commas are no tags
_NOT_BEHIND_TWO = re.compile(r"_(?<![0-9A-Za-z][0-9A-Za-z]_)")
# Because of the look-behind, a long run of spaces without a line break is tried once, not from each
# of its characters.
_LINE_BREAK = re.compile(r"(?<![ \t,])[ \t,]*+[\r\n][ \t,\r\n]*")


def one_line(tags: str) -> str:
    r"""Return stripped `tags` on one line: breaks with commas and spaces around become ", ".

    >>> one_line("1girl, solo,\n smile")
    '1girl, solo, smile'
    """
    return _LINE_BREAK.sub(", ", tags).strip() if "\n" in tags or "\r" in tags else tags


def spaced(tags: str) -> str:
    """Return stripped `tags` with spaces for underscores; emoticons keep theirs.

    >>> spaced("long_hair, ^_^, |_|, cat_(animal)")
    'long hair, ^_^, |_|, cat (animal)'

    An emoticon is recognised by its shape: Danbooru's (`^_^`, `o_o`, `<|>_<|>`, `(o)_(o)`, `||_||`
    ...) never have two letters or digits side by side, and its other tags with an underscore always
    do.
    """
    # Right behind two letters or digits, an underscore belongs to no emoticon, nor do the others of
    # that tag. Mostly all are such.
    if not _NOT_BEHIND_TWO.search(tags):
        return tags.replace("_", " ").strip()
    return ",".join(map(_SPACED.__getitem__, tags.split(","))).strip()


class _SpacedTags(dict[str, str]):
    """Tags with spaces, remembered: those of a data set are some ten thousand, each used often."""

    def __missing__(self, tag: str) -> str:
        emoticon = not any(a.isalnum() and b.isalnum() for a, b in itertools.pairwise(tag))
        text = tag if emoticon else tag.replace("_", " ")
        if len(tag) <= _LONGEST_KNOWN:
            if len(self) >= _MOST_KNOWN:
                self.clear()
            self[tag] = text
        return text


_SPACED = _SpacedTags()
