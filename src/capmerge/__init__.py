"""Rewrites sd-scripts metadata of any size into wildcard-ready captions.

The Python interface, loaded at its first use so that `import capmerge` costs nothing:

    rewrite_file(source, target)    rewrites a metadata file, as `capmerge rewrite` does
    verify_files(source, target)    proves that `target` is `source` rewritten
    iter_records(path)              yields the (key, record) pairs of a file of any size
    set_fields(source, target, f)   copies a file of any size with fields of its records set
    count_tokens(texts)             gives exact CLIP token counts, without torch
    draw_line(caption, key, ...)    gives the line that a seed and an epoch draw
    MergeOptions(...)               says how captions and tags are merged

Everything else is private and may change.
"""

TYPE_CHECKING = False  # as in `typing`, whose import takes longer than all of this module
if TYPE_CHECKING:
    from capmerge.api import (
        MergeOptions,
        count_tokens,
        draw_line,
        iter_records,
        rewrite_file,
        set_fields,
        verify_files,
    )

__version__ = "0.1.0"
__all__ = [
    "MergeOptions",
    "count_tokens",
    "draw_line",
    "iter_records",
    "rewrite_file",
    "set_fields",
    "verify_files",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from capmerge import api  # noqa: PLC0415  # `import capmerge` loads no sub-package

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
