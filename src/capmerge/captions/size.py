"""A record's sizes in px, and the fields that they come from.

Statistics, the index and the dataset config all take them from here.
"""

from typing import Any, Literal, TypeAlias, TypeGuard

SIZE_FIELDS = ("train_resolution", "image_size")
"""The fields that hold a size as a list: that of the latents, and that of the picture."""
WIDTH_AND_HEIGHT = "width and height"
"""The name of the two fields that sd-scripts reads the size of the picture from in JSON lines."""
MOST_PX = (1 << 24) - 1
"""The longest side that counts as a size, because the trainer's buckets hold sides in 24 bits."""


_ALL_FIELDS = frozenset((*SIZE_FIELDS, "width", "height"))

Size: TypeAlias = tuple[int, int, str]
"""Width and height in px, and the one of `SIZE_FIELDS`, or `WIDTH_AND_HEIGHT`, that they come from.

It is a plain tuple, because there is one for every record and a named tuple takes three times as
long to make.
"""


def size_of(record: dict[str, Any]) -> Size | None:
    """Return the size of a record's latents (`train_resolution`), else that of its picture.

    Only two integers from 1 to `MOST_PX` are a size; 512.0 and true are none. The size of the
    picture is `width` and `height`, else `image_size`, as in sd-scripts (PR #2328).

    >>> size_of({"train_resolution": [512.0, 512], "image_size": [640, 480]})
    (640, 480, 'image_size')
    """
    size = record.get("train_resolution")
    if is_size(size):
        return size[0], size[1], "train_resolution"
    if has_no_size_field(record):
        return None
    size = [record.get("width"), record.get("height")]
    if is_size(size):
        return size[0], size[1], WIDTH_AND_HEIGHT
    size = record.get("image_size")
    return (size[0], size[1], "image_size") if is_size(size) else None


def is_size(value: Any) -> TypeGuard[list[int]]:
    """Return whether a value is a size: a list of two integers from 1 to `MOST_PX`."""
    if value.__class__ is not list or len(value) != 2:
        return False
    width, height = value
    return width.__class__ is height.__class__ is int and 0 < width <= MOST_PX >= height > 0


def has_no_size_field(record: dict[str, Any]) -> bool:
    """Return whether a record has none of the fields that a size may be in."""
    return _ALL_FIELDS.isdisjoint(record)


def wrong_size(record: dict[str, Any]) -> bool:
    """Return whether one of `SIZE_FIELDS` holds something else than a size or null."""
    return any(
        record.get(field) is not None and not is_size(record[field]) for field in SIZE_FIELDS
    )


SizesOf = Literal["latents", "picture"]


def sizes_of(record: dict[str, Any]) -> SizesOf | None:
    """Return what the sizes of a record are: those of its latents alone, or of its picture too.

    The picture's own size is an `image_size` that differs from `train_resolution` or stands alone,
    and without both a `width` and `height`, as sd-scripts reads them in JSON lines. None means that
    the record has no size. Source: sd-scripts-facts F.

    >>> sizes_of({"train_resolution": [256, 256], "image_size": [547, 466]})
    'picture'
    """
    latents, picture = record.get("train_resolution"), record.get("image_size")
    if is_size(latents):
        return "picture" if is_size(picture) and picture != latents else "latents"
    if is_size(picture) or is_size([record.get("width"), record.get("height")]):
        return "picture"
    return None


def picture_size(record: dict[str, Any]) -> tuple[int, int] | None:
    """Return the size of the picture itself by the rule of `size_of`; None if it is not known.

    >>> picture_size({"image_size": [640, 480]}), picture_size({"width": 9, "height": 8})
    ((640, 480), (9, 8))
    """
    size = size_of({**record, "train_resolution": None})
    return size[:2] if size else None
