"""The work of a filter on each block: the records that are kept, and why the others are not."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from capmerge.captions.presence import numbers_without
from capmerge.commands.filter_lengths import AlternativeLengths, Lengths
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.metadata.codec import Pair
from capmerge.metadata.encoding import to_json
from capmerge.metadata.format import Format
from capmerge.metadata.key_bytes import key_bytes
from capmerge.metadata.raw_records import Origin, Passage, iter_raw
from capmerge.metadata.work import Chunk, NamedCounts
from capmerge.tokens.families import TokenizerFamily

if TYPE_CHECKING:
    from capmerge.files.digest_set import DigestSet
    from capmerge.index.latent_stems import LatentStems

Reason = tuple[str, str]
"""What a record fails by, which is counted, and the same in the words of this record."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a record must be like to be kept; None for what does not matter."""

    latents: "LatentStems | None" = None
    require: Sequence[str] = ()
    """Fields that it must have."""
    min_tokens: int | None = None
    """The least tokens that each of its alternatives may have."""
    max_tokens: int | None = None
    family: TokenizerFamily = "sd1"
    keys: "DigestSet | None" = None
    exclude: "DigestSet | None" = None

    @property
    def counts_tokens(self) -> bool:
        """True if tokens have to be counted."""
        return self.min_tokens is not None or self.max_tokens is not None


class Filter:
    """The work on each block; its streams are "records", and "dropped" with a line for each."""

    def __init__(self, name: str, layout: FileLayout, wanted: Wanted, out: Format) -> None:
        self._name, self._layout, self._wanted, self._out = name, layout, wanted, out
        self._origin, self._passage = Origin(name, layout), Passage(out)
        self._lengths = AlternativeLengths(wanted.family) if wanted.counts_tokens else None
        self.counts = NamedCounts()
        self._forget()

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """Note the records of a block."""
        self._data = data
        for starts, ends, pairs in iter_raw(self._name, self._layout, block, data):
            self._starts += [start - block.start for start in starts]
            self._ends += [end - block.start for end in ends]
            self._pairs += pairs
        yield from ()

    def flush(self) -> Iterator[Chunk]:
        """The records that are kept, and a line of JSON for each of the others."""
        data, starts, ends, pairs = self._data, self._starts, self._ends, self._pairs
        self._forget()
        if not pairs:
            return
        keys = [key for key, _ in pairs]
        reasons = self._reasons(keys, [record for _, record in pairs])
        lines = []
        if reasons:
            kept = [
                data[start:end]
                for number, (start, end) in enumerate(zip(starts, ends, strict=True))
                if number not in reasons
            ]
            body = self._passage.copied(self._origin, kept)
            for number, found in sorted(reasons.items()):
                self.counts.block.update(kind for kind, _ in found)
                texts = [text for _, text in found]
                lines.append(to_json({"key": keys[number], "reasons": texts}) + "\n")
        else:
            body = self._passage.copied_run(self._origin, data, starts, ends)
        self.counts.block["records"] += len(keys)
        self.counts.block["kept"] += len(keys) - len(lines)
        if body:
            yield from (("records", part) for part in self._out.parts(body))
        if lines:
            yield "dropped", "".join(lines).encode()

    def _forget(self) -> None:
        self._data = b""
        self._starts, self._ends = list[int](), list[int]()
        self._pairs = list[Pair]()

    def _reasons(self, keys: list[str], records: list[Any]) -> dict[int, list[Reason]]:
        """The reasons why records are dropped, by their numbers."""
        wanted = self._wanted
        reasons = defaultdict[int, list[Reason]](list)
        for listed, is_right, text in (
            (wanted.keys, True, "not among --keys"),
            (wanted.exclude, False, "among --exclude"),
        ):
            if listed is not None:
                are_listed = listed.contains(list(map(key_bytes, keys)))
                for number, is_listed in enumerate(are_listed):
                    if is_listed != is_right:
                        reasons[number].append((text, text))
        if wanted.latents:
            for number, has_file in enumerate(wanted.latents.have(keys)):
                if not has_file:
                    place = " in the folder, which the key leads out of" * (has_file is None)
                    reasons[number].append(("no latents", f"no latents{place}"))
        for name in wanted.require:
            for number in numbers_without(records, name):
                reasons[number].append((f"no {name}", f"no {name}"))
        # The records are changed where tokens are counted, so that comes last.
        if self._lengths:
            for number, lengths in enumerate(self._lengths.measure(records)):
                for reason in self._too_short_or_long(lengths):
                    reasons[number].append(reason)
        return reasons

    def _too_short_or_long(self, lengths: Lengths | str) -> Iterator[Reason]:
        if isinstance(lengths, str):
            yield "cannot be counted", f"cannot be counted: {lengths}"
            return
        least, most = self._wanted.min_tokens, self._wanted.max_tokens
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        if least is not None and shortest < least:
            text = f"an alternative of {shortest} tokens, expected at least {least}"
            yield "too few tokens", text
        if most is not None and longest > most:
            text = f"an alternative of {longest} tokens, expected at most {most}"
            yield "too many tokens", text
