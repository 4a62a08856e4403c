"""The fields that a rewrite adds to a record. sd-scripts ignores them; `verify`, `stats` and the trainer read them."""

MARK = "capmerge"
"""Last field of a rewritten record: one letter a line (or option of an in-line wildcard).

`t` tags only, `c` caption only, `b` both; `""` when `caption` is `""`. Its presence says that the
record is rewritten.
"""
STYLES = {"t": "tags", "c": "caption", "b": "both"}
"""Letter -> the style's name."""
TAG_SPANS = "capmerge_tags"
"""For each `b`, the [start, end) of its tag part in code points of the line as written."""
WEIGHTS = "capmerge_weights"
"""For `--weights field`: one whole number a line, in their order."""
