"""The reference of `bench_rewrite`: ijson (yajl2_c) + orjson in one process, to standard output.

.venv/bin/python scripts/reference_rewrite.py SOURCE

It shares no code with the project. Its merge is the least that a rewrite must do: the tags become
one line and each line of the caption another, braces are doubled, and the line of the tags is
repeated so that tags and caption are drawn equally often.

It does not join equal lines, limit their number, take line breaks out of tags, put a space between
U+2985 and a brace, add fields (`image_size`, `capmerge`) or check anything. Nor does it keep what
ijson's C backend loses: a lone first half of a surrogate pair becomes "?", and a lone second half,
an integer of more than 64 bits and NaN are errors. It reads only a file that is one object.
"""

import sys
from itertools import islice
from pathlib import Path
from typing import Any

import ijson
import orjson


def merge(record: dict[str, Any]) -> None:
    """Replace `tags` and `caption` of a record by a `caption` of lines, in place."""
    tags = (record.pop("tags", None) or "").strip()
    lines = [line.strip() for line in (record.get("caption") or "").split("\n")]
    lines = [line for line in lines if line]
    if tags:
        lines = [tags] * max(1, len(lines)) + lines
    record["caption"] = "\n".join(lines).replace("{", "{{").replace("}", "}}")


def main(source: Path) -> None:
    """Rewrite `source`."""
    write = sys.stdout.buffer.write
    separator = b"{\n"
    with source.open("rb") as file:
        pairs = ijson.get_backend("yajl2_c").kvitems(file, "", use_float=True)
        while batch := list(islice(pairs, 256)):
            for key, record in batch:
                merge(record)
                write(separator + orjson.dumps({key: record}, option=orjson.OPT_INDENT_2)[2:-2])
                separator = b",\n"
    write(b"\n}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
