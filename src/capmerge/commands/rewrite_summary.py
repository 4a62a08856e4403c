"""The text at the end of a rewrite: a table, notes, and the settings that sd-scripts needs."""

from dataclasses import dataclass

from capmerge.captions.line_counts import MOST_LINES
from capmerge.captions.tally import Tally
from capmerge.captions.tally_notes import missing_text_notes, tag_notes
from capmerge.captions.templates import MergeOptions
from capmerge.commands.latent_files import Evidence
from capmerge.errors import printable
from capmerge.stats.repeated_keys import RepeatedKeys

_PARAGRAPHS_WORTH_ADVICE = 0.01

SD_SCRIPTS_NEEDS = (
    "enable_wildcard = true (without it only the first line is trained, with braces doubled)",
    "no --cache_text_encoder_outputs (with it all lines are trained glued together)",
)


@dataclass(frozen=True, slots=True)
class Summary:
    """The counts of a finished run and the time that it took, and their text for a terminal."""

    tally: Tally
    read_bytes: int
    written_bytes: int
    seconds: float | None
    """The time that all of it took; None for a run that went on where another had ended."""
    latents: Evidence
    repeated: RepeatedKeys
    merge: MergeOptions
    dataset_config: str | None = None
    """The name of the dataset config that was written."""

    def text(self) -> str:
        """The table and the notes for a terminal."""
        tally = self.tally
        rows = [
            ("records", f"{tally.records:,}"),
            ("rewritten", f"{tally.rewritten:,}"),
            ("  tags and caption", f"{tally.kinds['both']:,}"),
            ("  tags only", f"{tally.kinds['tags_only']:,}"),
            ("  caption only", f"{tally.kinds['caption_only']:,}"),
            ("  empty", f"{tally.kinds['empty']:,}"),
            ("rejected", f"{tally.rejected:,}"),
            ("latents", self.latents.files),
            *([("without size", f"{tally.without_size:,}")] if tally.without_size else []),
            *([("passed through", f"{tally.passed:,}")] if tally.passed else []),
            *([("left out by --fit", f"{tally.fit_left_out:,}")] if tally.fit_left_out else []),
            *([("cut by --fit", f"{tally.fit_cut:,}")] if tally.fit_cut else []),
            *_tag_rows(tally),
            ("lines per record", f"{self._lines_per_record:.2f}"),
            ("bytes read", f"{self.read_bytes:,}"),
            ("bytes written", f"{self.written_bytes:,}"),
        ]
        if self.seconds is not None:
            speed = self.read_bytes / 1e6 / max(1e-9, self.seconds)
            rows += [("seconds", f"{self.seconds:.2f}"), ("MB/s", f"{speed:,.0f}")]
        table = "\n".join(f"{name:<18} {value:>16}" for name, value in rows)
        return "\n".join([table, *(f"note: {note}" for note in self._notes()), *self._settings()])

    def _settings(self) -> list[str]:
        lines = [
            "",
            "sd-scripts needs these settings for this file:",
            *(f"  {need}" for need in SD_SCRIPTS_NEEDS),
        ]
        if self.dataset_config:
            lines.append(
                f"{printable(self.dataset_config)} sets enable_wildcard for --dataset_config."
            )
        return lines

    def _notes(self) -> list[str]:
        """Notes on what the user may want to change, each of one or two sentences."""
        tally = self.tally
        notes = []
        if tally.image_size_added:
            notes.append(
                f"image_size = train_resolution was added to {_records(tally.image_size_added)}, "
                "which is right only for legacy <stem>.npz latents. --latents DIR looks at your "
                "names, and --no-image-size adds nothing."
            )
        if self.latents.files == "both kinds":
            notes.append(
                f"the latents seem to be of both kinds ({self.latents.reason}). The dataset config "
                "leaves the buckets to sd-scripts, which suits both."
            )
        if tally.wrong_size:
            notes.append(
                f"the train_resolution or image_size of {_records(tally.wrong_size)} is not "
                "two whole numbers above 0. It is left as it is and counts as no size."
            )
        if tally.replaced:
            notes.append(
                f"{_records(tally.replaced)} had a caption or tags that were not read, because "
                "--caption-field or --tags-field names another field. They are not in the output."
            )
        notes += missing_text_notes(tally)
        notes += tag_notes(tally, self.merge)
        if tally.captions and tally.paragraphs > _PARAGRAPHS_WORTH_ADVICE * tally.captions:
            notes.append(
                f"the captions of {_records(tally.paragraphs)} have blank lines between "
                "paragraphs, and each paragraph became an alternative. If the paragraphs belong "
                "together, use --caption-lines join."
            )
        if tally.special_tokens:
            notes.append(
                f"the text of {_records(tally.special_tokens)} holds a literal <|endoftext|> or "
                "<|startoftext|>, which is trained as the real token."
            )
        if tally.capped:
            notes.append(_rounded(tally))
        if tally.inline_as_lines:
            notes.append(
                f"{_records(tally.inline_as_lines)} got several lines instead of one, because an "
                "in-line wildcard cannot hold the text."
            )
        if tally.fit_too_long:
            notes.append(
                f"{_counted(tally.fit_too_long, 'alternative')} longer than --fit allows could not "
                "be left out or cut, because nothing shorter was there to train."
            )
        notes += self.repeated.notes()
        if tally.rejected:
            notes.append(
                f"{_records(tally.rejected)} could not be merged. They were left out of the "
                "output and listed whole, with the reason."
            )
        return notes

    @property
    def _lines_per_record(self) -> float:
        return self.tally.lines / max(1, self.tally.rewritten)


def _tag_rows(tally: Tally) -> list[tuple[str, str]]:
    """The rows on tags that were dropped or replaced, where there are such tags."""
    counts = (("tags dropped", tally.dropped_tags), ("tags replaced", tally.replaced_tags))
    return [(name, f"{count.total():,}") for name, count in counts if count]


def _rounded(tally: Tally) -> str:
    """What rounding cost, and how far off the worst record is."""
    note = f"the weights of {_records(tally.capped)} do not fit into {MOST_LINES} lines. "
    left_out = tally.capped_left_out
    if left_out:
        were = "was" if left_out == 1 else "were"
        note += f"{_counted(left_out, 'alternative')} {were} left out. "
    template, line = tally.capped_template_ppm, tally.capped_line_ppm
    if template:
        note += f"In the worst record the share of a template is off by {_points(template)}, and "
    else:
        note += "Every template keeps its share, and in the worst record "
    note += (
        f"that of a line by {_points(line)}"
        if template
        else (f"the share of a line is off by {_points(line)}")
    )
    return f"{note}. --weights field writes every line, with its exact weight."


def _points(ppm: int) -> str:
    """A difference of two shares, given in millionths, rounded up so that it is never 0."""
    return f"{-(-ppm // 100) / 100:.2f} percentage points"


def _records(count: int) -> str:
    return _counted(count, "record")


def _counted(count: int, noun: str) -> str:
    """A number with its noun, such as `1 record` or `3 records`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
