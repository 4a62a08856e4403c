"""The records that `--on-error skip` left out, as OUT.rejects.jsonl lists them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capmerge.errors import DataError, quoted
from capmerge.files.atomic import side_path
from capmerge.metadata.codec import Stray
from capmerge.metadata.format import REJECTS
from capmerge.proof.difference import RUN_AGAIN

Listed = tuple[Any, ...]
"""The key and the record of a line, or the one value that stands there in their place."""


def iter_rejects(name: str) -> Iterator[Listed]:
    """Yield what each line of the rejects of the output `name` lists; nothing without that file."""
    path = side_path(Path(name), REJECTS)
    if path.exists():
        if not path.is_file():
            raise DataError(str(path), None, None, "found a folder, a pipe or a device.", RUN_AGAIN)
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    listed = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise DataError(
                        str(path), None, None, f"line {number} is not JSON ({error}).", RUN_AGAIN
                    ) from None
                if isinstance(listed, dict):
                    yield listed.get("key"), listed.get("record")
                else:
                    yield (listed,)


def wrong_reject(found: Listed | None, key: str | None, record: Any, name: str) -> DataError:
    """Return the error for `found`, a line of the rejects of `name` that is not this record.

    `found` is None where no line is left, and `key` where none may be left.
    """
    value = record.value if isinstance(record, Stray) else record
    shown = "the end of the file" if found is None else quoted(str(found))
    wanted = (
        "the end of the file"
        if key is None
        else f"{quoted(str((key, value)))}, a record that cannot be merged"
    )
    problem = f"found {shown}, expected {wanted}."
    return DataError(str(side_path(Path(name), REJECTS)), None, key, problem, RUN_AGAIN)
