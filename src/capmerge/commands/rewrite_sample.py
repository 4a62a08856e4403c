"""What the first records of a source say about the output of its rewrite: its size, and why.

The sample is rewritten and thrown away before the run begins, so that a disk which is too small is
told in the first second.
"""

import shutil
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.captions.size import size_of
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError, is_rewritten, read_written
from capmerge.commands.merge_blocks import BlockMerger, OnError
from capmerge.errors import OutputError, printable
from capmerge.files.source import Source
from capmerge.metadata.blocks import FileLayout
from capmerge.metadata.format import Format
from capmerge.metadata.pieces import iter_source

# A pipe cannot be read twice, so the bytes of the sample stay in memory.
_SAMPLE_RECORDS, _SAMPLE_BYTES = 1000, 8 << 20


class Sample(NamedTuple):
    """An estimate from the first records for the rest."""

    growth: float
    """Output bytes over input bytes."""
    repeats: float
    """Bytes of repeated lines over input bytes."""
    resolutions: set[tuple[int, int]]
    """The [width, height] of the latents in px."""


def take_sample(
    source: Source, layout: FileLayout, merge: MergeOptions, on_error: OnError, out: Format
) -> Sample:
    """The estimate from the first records of `source`.

    They are `_SAMPLE_RECORDS` records, fewer when they are long. They are rewritten and thrown
    away, and the run reads them again.
    """
    merger = BlockMerger(source.name, layout, merge, on_error, out)
    records, read_bytes, written_bytes, repeated_bytes = 0, 0, 0, 0
    resolutions = set()
    for piece in iter_source(source, layout, keep=True):
        body, _ = merger.rewrite(piece)
        records += len(piece.records.pairs)
        read_bytes += len(piece.data)
        written_bytes += sum(map(len, out.parts(body)))
        for _, record in piece.records.pairs:
            # Only the size of the latents: an image's own size has sides that are no bucket's, and
            # sd-scripts refuses the steps that it would give.
            size = size_of(record) if isinstance(record, dict) else None
            if size and size[2] == "train_resolution":
                resolutions.add(size[:2])
            repeated_bytes += _repeated_bytes(record)
        if records >= _SAMPLE_RECORDS or read_bytes >= _SAMPLE_BYTES:
            break
    read_bytes = max(1, read_bytes)
    return Sample(written_bytes / read_bytes, repeated_bytes / read_bytes, resolutions)


def _repeated_bytes(record: Any) -> int:
    """The bytes of the lines of a rewritten record that repeat an earlier one."""
    if not is_rewritten(record):
        return 0
    with suppress(BrokenRecordError):  # one that was passed through
        lines = Counter(read_written(record).lines)
        return sum(
            (times - 1) * len(line.encode("utf-8", "surrogatepass"))
            for line, times in lines.items()
        )
    return 0


def growth_warning(sample: Sample, merge: MergeOptions) -> str:
    """The warning for an output that will be much larger than its source, with the main reason."""
    start = f"the output will be about {sample.growth:.1f} times as large as the input, because "
    if sample.repeats < (sample.growth - 1) / 2:
        return f"{start}its lines and the fields that are added hold more text than the records."
    use = "--layout lines with --weights field" if merge.inline else "--weights field"
    return f"{start}weights repeat lines. Use {use} to store them as numbers instead."


def check_room(target: Path, source: Source, growth: float) -> None:
    """Raise `OutputError` when the disk has less room than the output will take."""
    if source.path is None or source.total_bytes is None:
        return
    total, _, free = shutil.disk_usage(target.parent)
    needed = source.total_bytes * growth
    # Some network file systems report 0 bytes in all; there the run is simply tried.
    if needed > free and total:
        raise OutputError(
            f"{printable(str(target))}: found {free / 1e9:,.2f} GB free, but the output will take "
            f"about {needed / 1e9:,.2f} GB. Make room, choose another -o, or one that ends in .zst."
        )
