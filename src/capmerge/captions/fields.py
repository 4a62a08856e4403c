"""The fields that a rewrite adds to a record.

sd-scripts ignores them; `verify`, `stats` and the trainer read them.
"""

MARK = "capmerge"
"""The last field of a rewritten record: one letter per line (or option of an in-line wildcard).

The letters are `t` for tags only, `c` for caption only and `b` for both; the field is `""` when
`caption` is `""`. Its presence says that the record is rewritten.
"""
STYLES = {"t": "tags", "c": "caption", "b": "both"}
"""The name of each letter's style."""
TAG_SPANS = "capmerge_tags"
"""The field with the [start, end) of the tags in each `b` line, in code points as written."""
WEIGHTS = "capmerge_weights"
"""The field that `--weights field` writes: one whole number per line, in order."""
