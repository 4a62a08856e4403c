"""The Python interface of capmerge: what its commands do, as functions with types.

`capmerge` itself hands these on. The errors are those of `capmerge.errors`, all of them subclasses
of `CapmergeError`, with messages that say where the problem is and what to do about it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from capmerge.captions.draw import Drawn, Pick
from capmerge.captions.draw import draw_line as draw_line_of
from capmerge.captions.templates import MergeOptions as MergeOptions  # noqa: PLC0414  # handed on
from capmerge.commands.merge_blocks import OnError
from capmerge.commands.receipt import load_receipt
from capmerge.commands.rewrite import Outcome, RewriteOptions, rewrite
from capmerge.commands.set_fields import set_fields as set_fields_of
from capmerge.commands.verify import Verified, verify
from capmerge.errors import DataError
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.codec import Stray
from capmerge.metadata.format import Format
from capmerge.metadata.opened import open_metadata
from capmerge.metadata.pieces import iter_pairs, place_of
from capmerge.proof.parquet import read_rows
from capmerge.rng import SampleId
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import TokenizerFamily
from capmerge.tokens.load import load_readers

FileName = str | PathLike[str]


def rewrite_file(
    source: FileName,
    target: FileName,
    merge: MergeOptions | None = None,
    *,
    on_error: OnError = "stop",
    jobs: int = 1,
    force: bool = False,
    index: bool = False,
    latents: FileName | None = None,
) -> Outcome:
    """Rewrite the metadata file `source` into `target` and its side files; return the counts.

    The format follows the ending of `target`: .json, .jsonl, or either with .gz or .zst. With
    `on_error` "skip", records that cannot be merged are left out and listed in `target` +
    ".rejects.jsonl".
    `jobs` worker processes give the same bytes for any number; they are forked on Linux, so keep
    the default of 1 in a program that runs threads. `index` also writes the
    trainer's index. `latents` is the folder of the cached latents, whose names decide whether
    `image_size` is added by default and what the dataset config says.

    Raises `UsageError` for options or names that cannot work (`target` exists and not `force`),
    `DataError` for a damaged source, `OutputError` when the disk is full or not writable; then
    nothing new is there.
    """
    out = Path(target)
    options = RewriteOptions(
        out,
        Format.choose(None, out),
        merge or MergeOptions(),
        on_error,
        jobs,
        force=force,
        index=index,
        latents=None if latents is None else Path(latents),
    )
    with open_metadata(fspath(source)) as opened:
        return rewrite(opened, options)


def verify_files(
    source: FileName,
    target: FileName,
    merge: MergeOptions | None = None,
    *,
    on_error: OnError = "stop",
    jobs: int = 1,
) -> Verified:
    """Prove record by record that `target` is `source` rewritten; return what was proven.

    Neither file is read by the parsers that a rewrite uses. `jobs` is the number of worker
    processes; they are forked on Linux, so keep the default of 1 in a program that runs threads.
    The options are those of the receipt beside `target`. If `merge` is given, it and `on_error`
    are the options instead: "skip" for a rewrite that left out what it could not merge.

    Raises `DataError` at the first difference, `UsageError` when a file or the receipt is missing.
    """
    used, skips = (merge, on_error == "skip") if merge else load_receipt(Path(target))
    with (
        open_metadata(fspath(source), read_rows) as opened,
        open_metadata(fspath(target), read_rows) as written,
    ):
        return verify(
            opened, written, used, skips=skips, max_record_bytes=MAX_RECORD_BYTES, jobs=jobs
        )


def iter_records(path: FileName) -> Iterator[tuple[str, Any]]:
    """Yield the key and the value of each record of a .json, .jsonl or .parquet file.

    The first two may be compressed with gzip or zstd.
    The file may have any size; only a few megabytes of it are in memory. Values are what Python's
    `json` makes of them: integers of any size, NaN and lone surrogates included. Records with
    equal keys are all yielded, in their order; of a field that a record has twice, the last counts.

    Raises `UsageError` when the file cannot be opened, `DataError` with the place of damage, also
    after records were yielded.
    """
    with open_metadata(fspath(path)) as source:
        layout = read_layout(source, MAX_RECORD_BYTES, may_be_empty=True)
        for piece, number, (key, record) in iter_pairs(source, layout):
            if isinstance(record, Stray):
                place = place_of(source.name, layout, piece, number)
                raise DataError(source.name, place, None, record.problem, "Fix the line.")
            yield key, record


def set_fields(
    source: FileName,
    target: FileName,
    fields_of: Callable[[int, str], Mapping[str, Any] | None],
    *,
    force: bool = False,
) -> int:
    """Write the metadata file `source` to `target` with fields of its records set; count them.

    `fields_of` takes the number of a record, from 0, and its key, and returns the fields to set,
    or None for none: texts, whole numbers below 2**63, true, false, and lists of these. A field
    that is there already keeps its place, others come last. All other fields and the order of the
    records stay, in one pass and in memory that does not grow with the file. A record that is not
    an object is written as it is. `target` has the kind of `source`, .json or .jsonl, and may end
    in .gz; it appears whole or not at all.

    Raises `UsageError` when the source cannot be opened, and for a target of another kind or, if
    not `force`, one that exists; `DataError` for a damaged source; `OutputError` when the disk is
    full or not writable; and what `fields_of` raises.
    """
    with open_metadata(fspath(source)) as opened:
        return set_fields_of(opened, Path(target), fields_of, force=force)


def count_tokens(texts: Iterable[str], family: TokenizerFamily = "sd1") -> list[int]:
    """Return how many CLIP tokens each text has, without BOS and EOS and before any cut.

    The counts are those of sd-scripts' tokenizer for the model `family`. The first call in a
    process takes about 0.2 s to read the vocabulary, which comes from a package, not a network.

    >>> count_tokens(["a red hat", ""])
    [3, 0]

    Raises `TypeError` for a single string, whose letters would be counted one by one.
    """
    if isinstance(texts, str):
        raise TypeError(
            "expected a list of texts, found a single string. Write count_tokens([text])[0]."
        )
    return list(_counter(family).count_tokens(list(texts)))


@cache
def _counter(family: TokenizerFamily) -> TokenCounter:
    return TokenCounter(load_readers(family)[0])


def draw_line(
    caption: str,
    key: str,
    *,
    seed: int,
    epoch: int,
    dataset: int = 0,
    repeat: int = 0,
    weights: Sequence[int] | None = None,
    pick: Pick = "random",
) -> Drawn:
    r"""Return the alternative of a rewritten caption that the trainer draws; `.text` is the line.

    It is a function of the arguments alone: `key` is the record's key, `epoch` counts from 0,
    `dataset` is the number of the `[[data]]` section, and `weights` is the record's
    `capmerge_weights`, if it has that field.

    >>> draw_line("1girl\na {red|blue} hat", "a.png", seed=7, epoch=0, pick="cycle").text
    'a blue hat'

    Raises `ValueError` when `weights` are not one whole number per line, or all 0.
    """
    sample = SampleId(seed, epoch, key, dataset, repeat)
    return draw_line_of(caption, sample, weights=weights, pick=pick)
