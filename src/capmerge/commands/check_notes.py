"""The notes of a check of latents: what was found in each file, for a check that goes on.

They are lines of JSON in the order of the records, behind a line that says what was checked. A new
check reads the old notes as it goes, and writes all of them anew.
"""

import json
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from capmerge.errors import OutputError, printable

if TYPE_CHECKING:
    from capmerge.index.latent_check import CheckedFile, Known

_OLD, _NEW, _JOINED = "checked", "checked.new", "checked.joined"
_LINES_PER_FLUSH = 256


def line_of(entry: dict[str, Any]) -> bytes:
    """Return an entry as a line of JSON."""
    return json.dumps(entry).encode() + b"\n"


def has_notes(work: Path) -> bool:
    """Return whether a check has begun to write notes in the folder `work`."""
    return any((work / name).exists() for name in (_OLD, _NEW))


class CheckNotes:
    """The notes in the folder `work`, of a check that `about` describes.

    Notes of another check are dropped. Raises `OutputError` when they cannot be written.
    """

    def __init__(self, work: Path, about: dict[str, Any]) -> None:
        self._work, self._about = work, {"check": 1, **about}
        self._join()
        self._old = self._read(_OLD)
        self._ahead = next(self._old, None)
        self._record = -1
        self._of_record: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO = (work / _NEW).open("wb")
        self._lines = 0
        self._put(self._about)

    def known(self, record: int, file: str) -> "Known | None":
        """Return what is known of a file. Must be called in the order of the records."""
        from capmerge.index.latent_check import Known

        if record != self._record:
            self._record, self._of_record = record, {}
            while self._ahead is not None and self._ahead[0] <= record:
                if self._ahead[0] == record:
                    self._of_record[self._ahead[1]["file"]] = self._ahead[1]
                self._ahead = next(self._old, None)
        entry = self._of_record.get(file)
        if entry is None:
            return None
        return Known(entry["size"], entry["changed_ns"], entry["fault"], entry["problem"])

    def write(self, record: int, file: "CheckedFile") -> None:
        """Note a file, except one that could not be read, which may go better the next time."""
        answer = file.answer
        if answer.fault == "unreadable":
            return
        self._put(
            {
                "record": record,
                "file": str(file.place),
                "size": answer.size,
                "changed_ns": answer.changed_ns,
                "fault": answer.fault,
                "problem": answer.problem,
            }
        )

    def remove(self) -> None:
        """Remove the notes of a check that is done."""
        self._file.close()
        for name in (_OLD, _NEW):
            (self._work / name).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._old.close()
        self._file.close()

    def _put(self, entry: dict[str, Any]) -> None:
        try:
            self._file.write(line_of(entry))
            self._lines += 1
            if self._lines % _LINES_PER_FLUSH == 0:
                self._file.flush()
        except OSError as error:
            raise OutputError(
                f"{printable(str(self._work))}: cannot write, {error.strerror}. "
                "Free some space, or choose another disk for the report."
            ) from error

    def _join(self) -> None:
        """Make one file of the notes of the last check and those that it had not come to yet."""
        last = -1
        with (self._work / _JOINED).open("wb") as joined:
            joined.write(line_of(self._about))
            for name in (_NEW, _OLD):
                for record, entry in self._read(name):
                    if record >= last if name == _NEW else record > last:
                        joined.write(line_of(entry))
                        last = record if name == _NEW else last
        (self._work / _JOINED).replace(self._work / _OLD)
        (self._work / _NEW).unlink(missing_ok=True)

    def _read(self, name: str) -> Generator[tuple[int, dict[str, Any]]]:
        """Yield the notes in a file with their records; a line that was cut off ends them."""
        try:
            with (self._work / name).open("rb") as file:
                if file.readline() != line_of(self._about):
                    return
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    entry = json.loads(line)
                    yield entry["record"], entry
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return
