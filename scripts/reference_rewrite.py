"""The reference of `bench_rewrite`: ijson (yajl2_c) + orjson in one process, with the project's own merge. To stdout."""

import sys
from itertools import islice
from pathlib import Path

import ijson
import orjson

from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions


def main(source: Path, lines: tuple[str, ...]) -> None:
    """Rewrite `source`."""
    merger = Merger(MergeOptions(lines=lines))
    write = sys.stdout.buffer.write
    separator = b"{\n"
    with source.open("rb") as file:
        pairs = ijson.get_backend("yajl2_c").kvitems(file, "")
        while batch := list(islice(pairs, 256)):
            merger.merge_all([record for _, record in batch])
            for key, record in batch:
                write(separator + orjson.dumps({key: record}, option=orjson.OPT_INDENT_2)[2:-2])
                separator = b",\n"
    write(b"\n}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), tuple(sys.argv[2:]))
