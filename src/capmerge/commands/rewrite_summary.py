"""What a finished rewrite tells the user: a short table, what to mind, and the settings sd-scripts needs."""

from dataclasses import dataclass
from typing import Any

from capmerge.captions.tally import Tally
from capmerge.errors import printable

_PARAGRAPHS_WORTH_ADVICE = 0.01

SD_SCRIPTS_NEEDS = (
    "enable_wildcard = true (else only the first line is trained, with braces doubled)",
    "no --cache_text_encoder_outputs (it would train all lines glued together)",
)


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run: its counts, and how long it took."""

    tally: Tally
    read_bytes: int
    written_bytes: int
    seconds: float
    dataset_config: str | None = None
    """Name of the dataset config that was written."""

    def as_dict(self) -> dict[str, Any]:
        """The numbers by name, for `--summary FILE`."""
        return {
            **self.tally.as_dict(),
            "lines_per_record": round(self._lines_per_record, 3),
            "read_bytes": self.read_bytes,
            "written_bytes": self.written_bytes,
            "seconds": round(self.seconds, 3),
            "megabytes_per_second": round(self._megabytes_per_second, 1),
        }

    def text(self) -> str:
        """The table and the advice for a terminal."""
        tally = self.tally
        rows = [
            ("records", f"{tally.records:,}"),
            ("rewritten", f"{tally.rewritten:,}"),
            ("  tags and caption", f"{tally.kinds['both']:,}"),
            ("  tags only", f"{tally.kinds['tags_only']:,}"),
            ("  caption only", f"{tally.kinds['caption_only']:,}"),
            ("  empty", f"{tally.kinds['empty']:,}"),
            ("rejected", f"{tally.rejected:,}"),
            *([("passed through", f"{tally.passed:,}")] if tally.passed else []),
            *([("left out by --fit", f"{tally.fit_left_out:,}")] if tally.fit_left_out else []),
            *([("cut by --fit", f"{tally.fit_cut:,}")] if tally.fit_cut else []),
            ("lines a record", f"{self._lines_per_record:.2f}"),
            ("bytes read", f"{self.read_bytes:,}"),
            ("bytes written", f"{self.written_bytes:,}"),
            ("seconds", f"{self.seconds:.2f}"),
            ("MB/s", f"{self._megabytes_per_second:,.0f}"),
        ]
        table = "\n".join(f"{name:<18} {value:>16}" for name, value in rows)
        return "\n".join([table, *(f"note: {note}" for note in self._notes()), *self._settings()])

    def _settings(self) -> list[str]:
        lines = ["", "sd-scripts needs for this file:", *(f"  {need}" for need in SD_SCRIPTS_NEEDS)]
        return (
            [*lines, f"  both are in {printable(self.dataset_config)}"]
            if self.dataset_config
            else lines
        )

    def _notes(self) -> list[str]:
        tally = self.tally
        notes = []
        if tally.image_size_added:
            notes.append(
                f"image_size = train_resolution was added to {_records(tally.image_size_added)}. It is right only beside legacy <stem>.npz "
                "latents. Beside <stem>_WxH_sdxl.npz use --no-image-size (and absolute keys, else image_size must be the picture's own)."
            )
        if tally.captions and tally.paragraphs > _PARAGRAPHS_WORTH_ADVICE * tally.captions:
            notes.append(
                f"blank lines stand between paragraphs in {_records(tally.paragraphs)}, and each paragraph became an alternative. "
                "If they belong together: --caption-lines join."
            )
        if tally.special_tokens:
            notes.append(
                f"a literal <|endoftext|> or <|startoftext|> stands in {_records(tally.special_tokens)}: it trains as the real token."
            )
        if tally.capped:
            notes.append(
                f"the weights of {_records(tally.capped)} do not fit into 64 lines and were rounded. --weights field keeps them exact."
            )
        if tally.inline_as_lines:
            notes.append(
                f"{_records(tally.inline_as_lines)} with text that an in-line wildcard cannot hold got lines instead."
            )
        if tally.fit_too_long:
            notes.append(
                f"{tally.fit_too_long:,} alternatives are longer than --fit asks for and were kept: nothing shorter was there to train."
            )
        if tally.rejected:
            notes.append(
                f"{_records(tally.rejected)} could not be merged: left out, and listed whole with the reason."
            )
        return notes

    @property
    def _lines_per_record(self) -> float:
        return self.tally.lines / max(1, self.tally.rewritten)

    @property
    def _megabytes_per_second(self) -> float:
        return self.read_bytes / 1e6 / max(1e-9, self.seconds)


def _records(count: int) -> str:
    """A number of records in words."""
    return "1 record" if count == 1 else f"{count:,} records"
