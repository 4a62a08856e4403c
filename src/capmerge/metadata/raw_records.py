"""The records of a source as their bytes, and how these bytes pass into an output.

`join`, `split` and `filter` change no record, so they copy its bytes: nothing is decoded to be
written again, and nothing can be lost in between. What is written again, because the output has
another format, goes through `codec` and `encoding`, as in a rewrite.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import Block, FileLayout, Kind
from capmerge.metadata.codec import Records, Stray, decode
from capmerge.metadata.encoding import encode, to_json
from capmerge.metadata.format import FRAMINGS, WRITTEN, Format, reserved_fields
from capmerge.metadata.offsets import PlacedRecords, iter_batches

_BETWEEN: dict[Kind, bytes] = {"json": b",", "jsonl": b"\n"}


def iter_raw(name: str, layout: FileLayout, block: Block, data: bytes) -> Iterator[PlacedRecords]:
    """The records of a block with the offsets of their bytes, some at a time.

    Raises `MiscutError` as `iter_batches`, and `DataError` for a line that is no record with a key.
    """
    for batch in iter_batches(name, layout, block, data):
        if layout.kind == "jsonl":
            for start, (_, record) in zip(batch.starts, batch.pairs, strict=True):
                if record.__class__ is Stray:
                    raise DataError(name, start, None, record.problem, "Fix or remove the line.")
        yield batch


class Origin(NamedTuple):
    """The source of some records, and what is put before their keys."""

    name: str
    layout: FileLayout
    prefix: str = ""

    @property
    def kind(self) -> Kind:
        """The kind of the source."""
        return self.layout.kind

    def decode(self, texts: Sequence[bytes]) -> Records:
        """The records with these bytes, with their keys as the output has them."""
        return self.decode_run(_BETWEEN[self.kind].join(texts))

    def decode_run(self, text: Buffer) -> Records:
        """The records in these bytes, which are those of consecutive records."""
        records = decode(text, self.kind, last=False)
        if not self.prefix:
            return records
        pairs = [(self.prefix + key, record) for key, record in records.pairs]
        return Records(pairs, records.exact, records.doubled)


class Passage:
    """Turns the bytes of records into the bytes that the output `out` has for them."""

    def __init__(self, out: Format) -> None:
        self._out = out
        self._separator = FRAMINGS[out.kind].separator + FRAMINGS[out.kind].indent
        self._reserved = reserved_fields(out)

    def copied(self, origin: Origin, texts: Sequence[bytes]) -> Buffer:
        """The records of `origin` with these bytes, as `encoding.encode` would give them.

        They keep their bytes where the output has the format of the source. Raises `DataError`
        for a record that the format cannot hold.
        """
        if not texts:
            return b""
        if origin.kind != self._out.kind or (origin.prefix and origin.kind == "jsonl"):
            return self.encoded(origin.name, origin.decode(texts))
        if origin.kind == "jsonl":
            return self._separator.join([text.strip(b" \t\r") for text in texts])
        if origin.prefix:
            # A key's bytes stay as they are behind the prefix, too.
            opening = to_json(origin.prefix).encode()[:-1]
            texts = [opening + text[1:] for text in texts]
        return FRAMINGS["json"].indent + self._separator.join(texts)

    def copied_run(
        self, origin: Origin, data: bytes, starts: Sequence[int], ends: Sequence[int]
    ) -> Buffer:
        """Consecutive records as `copied` gives them; in `data` they have these offsets.

        They are copied at once where the output separates records as the source does.
        """
        if not starts:
            return b""
        kind, written = origin.kind, WRITTEN[self._out.kind]
        run = memoryview(data)[starts[0] : ends[-1]]
        between = len(run) - (sum(ends) - sum(starts))
        if (
            kind == self._out.kind
            and not origin.prefix
            and origin.layout.separator == written.separator
            and between == (len(starts) - 1) * len(self._separator)
            and not (kind == "jsonl" and b"\r" in data)
        ):
            return FRAMINGS[kind].indent + bytes(run) if FRAMINGS[kind].indent else run
        return self.copied(
            origin, [data[start:end] for start, end in zip(starts, ends, strict=True)]
        )

    def encoded(self, name: str, records: Records) -> Buffer:
        """The records as the output writes them; `name` is the source that an error names."""
        if self._out.kind == "jsonl":
            for key, record in records.pairs:
                self._check_line(name, key, record)
        return encode(records, self._out.kind)

    def joined(self, parts: Sequence[Buffer]) -> bytes:
        """The bytes of several runs of records as one."""
        return FRAMINGS[self._out.kind].separator.join(filter(None, parts))

    def _check_line(self, name: str, key: str, record: object) -> None:
        if not isinstance(record, dict):
            problem = "the record is not an object, expected one as a line of JSONL holds it."
            raise DataError(name, None, key, problem, "Write a .json file.")
        for field in self._reserved:
            if field in record:
                problem = f'found a field "{field}", which is the key of a record in JSONL.'
                raise DataError(name, None, key, problem, "Write a .json file.")
