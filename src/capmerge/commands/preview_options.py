"""The options of a preview, and the combinations of them that cannot be carried out."""

from dataclasses import dataclass, field
from typing import Literal

from capmerge.captions.draw import Pick
from capmerge.captions.templates import MergeOptions
from capmerge.errors import UsageError
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import Format
from capmerge.tokens.chunks import CHUNK_TOKENS, Splitting, count_chunks
from capmerge.tokens.families import ONE_CHUNK, TokenizerFamily

Selection = Literal["first", "random", "longest"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """The training sample whose draw is shown, without its key, and how its line is picked.

    Raises `UsageError` for numbers out of range.
    """

    seed: int
    epoch: int
    dataset: int = 0
    repeat: int = 0
    pick: Pick = "random"

    def __post_init__(self) -> None:
        for name, value in (
            ("seed", self.seed),
            ("epoch", self.epoch),
            ("dataset", self.dataset),
            ("repeat", self.repeat),
        ):
            if not 0 <= value < 1 << 63:
                raise UsageError(
                    f"--{name} {value}: expected a whole number from 0 to {(1 << 63) - 1}."
                )


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """The options of a preview: which records are shown, and how their captions are cut.

    Raises `UsageError` for combinations that cannot be carried out.
    """

    merge: MergeOptions = field(default_factory=MergeOptions)
    keys: tuple[str, ...] = ()
    """The keys of the records that are shown; if empty, `count` records are."""
    count: int = 5
    selection: Selection = "first"
    """Which records are shown: the first, random ones by `seed`, or those with the most tokens."""
    seed: int = 0
    family: TokenizerFamily = "sd1"
    chunking: Splitting = "kohya"
    max_tokens: int | None = None
    """None is 225 for kohya, no limit for a1111, and one chunk for a family that crops."""
    tokenizer: str | None = None
    """The path of another CLIP tokenizer, or of a T5 tokenizer for a family that has one."""
    sampling: Sampling | None = None
    out: Format | None = None
    """The format of the output, whose reserved fields a record cannot have; None for any format."""
    max_record_bytes: int = MAX_RECORD_BYTES

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            count_chunks(self.max_tokens)
        one_chunk = self.family in ONE_CHUNK
        if one_chunk and self.max_tokens not in (None, CHUNK_TOKENS):
            raise UsageError(
                f"--max-tokens {self.max_tokens}: CLIP reads {CHUNK_TOKENS} tokens of a caption "
                f"with --family {self.family}. Leave --max-tokens out."
            )
        if one_chunk and self.chunking == "a1111":
            raise UsageError(
                "--chunking a1111: captions are not cut into chunks with --family "
                f"{self.family}. Leave one of them out."
            )
