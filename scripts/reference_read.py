"""The reference of `bench_verify`: ijson (yajl2_c) reads SOURCE once, and orjson dumps each value.

.venv/bin/python scripts/reference_read.py SOURCE

It is one process, compares nothing, and shares no code with the project.
"""

import sys
from pathlib import Path

import ijson
import orjson


def main(source: Path) -> None:
    """Read `source` and throw the dumped values away."""
    with source.open("rb") as file:
        for _, record in ijson.get_backend("yajl2_c").kvitems(file, "", use_float=True):
            orjson.dumps(record)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
