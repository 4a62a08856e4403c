"""A record's size in px, and the field that it comes from.

Statistics, the index and the dataset config all take it from here.
"""

from typing import Any, TypeAlias

SIZE_FIELDS = ("train_resolution", "image_size")
"""The fields that are read, in this order: the size of the latents, then that of the image."""
MOST_PX = (1 << 32) - 1
"""The longest side that counts as a size, because the index stores sides in 32 bits."""


Size: TypeAlias = tuple[int, int, str]
"""Width and height in px, and the one of `SIZE_FIELDS` that they come from.

It is a plain tuple, because there is one for every record and a named tuple takes three times as
long to make.
"""


def size_of(record: dict[str, Any]) -> Size | None:
    """Return the first of `SIZE_FIELDS` that is two integers from 1 to `MOST_PX`, or else None.

    Integers are meant as JSON has them: 512.0 and true do not count.

    >>> size_of({"train_resolution": [512.0, 512], "image_size": [640, 480]})
    (640, 480, 'image_size')
    """
    for field in SIZE_FIELDS:
        size = record.get(field)
        if size.__class__ is list and len(size) == 2:
            width, height = size
            if (
                width.__class__ is int
                and height.__class__ is int
                and 0 < width <= MOST_PX
                and 0 < height <= MOST_PX
            ):
                return width, height, field
    return None
