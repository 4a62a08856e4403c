"""Tags as one line of text, without line breaks and, if asked, without underscores."""

import itertools
import re
from functools import lru_cache

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
    if "_" not in tags:
        return tags
    return ",".join(map(_spaced_tag, tags.split(","))).strip()


@lru_cache(maxsize=1 << 16)  # a data set's tags are a few ten thousand, repeated by the million
def _spaced_tag(tag: str) -> str:
    emoticon = not any(a.isalnum() and b.isalnum() for a, b in itertools.pairwise(tag))
    return tag if emoticon else tag.replace("_", " ")
