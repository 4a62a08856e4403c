"""The options of the merge, and the decorator that gives them to a command."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer

from capmerge.captions.templates import (
    CaptionLayout,
    CaptionLines,
    FitBy,
    MergeOptions,
    Underscores,
    Weights,
)
from capmerge.cli.options import FamilyOption
from capmerge.commands.merge_blocks import OnError
from capmerge.commands.tag_files import read_drop_tags, read_replace_tags
from capmerge.errors import UsageError


def _fit_with_known_word(fit: tuple[int, str] | None) -> tuple[int, str] | None:
    """The two values of --fit, with the word checked, because typer takes no Literal in a tuple."""
    words = get_args(FitBy)
    if fit and fit[1] not in words:
        raise typer.BadParameter(f"{fit[1]!r} is not one of {', '.join(map(repr, words))}.")
    return fit


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeChoice:
    """The merge options as the command line gives them; None where an option is not given.

    A field bears the name that it has in `captions.templates.MergeOptions`, and in a command's
    signature after `with_merge_options`. A new merge option is a field there and one here.
    """

    layout: Annotated[
        CaptionLayout | None,
        typer.Option(
            "--layout",
            help="The lines to write. lines: the tags on one line and the caption on another, and "
            "one of them is drawn. concat: tags, then caption on one line. concat-caption-first: "
            "caption, then tags. inline: one line {tags|caption}. Default: lines.",
            show_default=False,
        ),
    ] = None
    lines: Annotated[
        list[str] | None,
        typer.Option(
            "--line",
            metavar="TEMPLATE[=WEIGHT]",
            help="Write a line made of {tags}, {caption}, other fields such as {artist}, and "
            "literal text. It is drawn in proportion to WEIGHT, a whole number; default: 1. A "
            "record that lacks another field goes without the line. Repeat the option for more "
            "lines.",
            show_default=False,
        ),
    ] = None
    weights: Annotated[
        Weights | None,
        typer.Option(
            "--weights",
            help="Where weights are kept. repeat: a line is written several times. field: the "
            "record gets a list capmerge_weights. Default: repeat.",
            show_default=False,
        ),
    ] = None
    caption_lines: Annotated[
        CaptionLines | None,
        typer.Option(
            "--caption-lines",
            help="How to read a caption of several lines. each: every line is an alternative. "
            "join: the lines are joined into one. first: only the first line is used. "
            "Default: each.",
            show_default=False,
        ),
    ] = None
    underscores: Annotated[
        Underscores | None,
        typer.Option(
            "--underscores",
            help="Keep the underscores in tags, or replace them with spaces except in emoticons. "
            "Default: keep.",
            show_default=False,
        ),
    ] = None
    caption_wildcards: Annotated[
        bool | None,
        typer.Option(
            "--caption-wildcards",
            help="Treat {a|b} in a caption as an intended wildcard: its braces are not doubled.",
            show_default=False,
        ),
    ] = None
    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix", metavar="TEXT", help="Put TEXT before every line.", show_default=False
        ),
    ] = None
    suffix: Annotated[
        str | None,
        typer.Option(
            "--suffix", metavar="TEXT", help="Put TEXT after every line.", show_default=False
        ),
    ] = None
    tags_prefix: Annotated[
        str | None,
        typer.Option(
            "--tags-prefix",
            metavar="TEXT",
            help="Put TEXT before the tags in every line that holds them, such as 'tags: '.",
            show_default=False,
        ),
    ] = None
    drop_tags: Annotated[
        Path | None,
        typer.Option(
            "--drop-tags",
            metavar="FILE",
            help="Drop the tags that FILE lists, one per line. Capitals, underscores or spaces, "
            "and backslashes before parentheses make no difference.",
            show_default=False,
        ),
    ] = None
    replace_tags: Annotated[
        Path | None,
        typer.Option(
            "--replace-tags",
            metavar="FILE",
            help="Replace tags as FILE lists them: on each line the old tag, a tab and the new "
            "tag, or several with commas.",
            show_default=False,
        ),
    ] = None
    image_size: Annotated[
        bool | None,
        typer.Option(
            "--image-size/--no-image-size",
            help="Add image_size = train_resolution to records without image_size. This is right "
            "only for legacy <stem>.npz latents. Default: --image-size, unless `rewrite --latents` "
            "finds new-style latents alone.",
            show_default=False,
        ),
    ] = None
    caption_field: Annotated[
        str | None,
        typer.Option(
            "--caption-field",
            metavar="NAME",
            help="Read captions from the field NAME, which stays as it is. Default: caption.",
            show_default=False,
        ),
    ] = None
    tags_field: Annotated[
        str | None,
        typer.Option(
            "--tags-field",
            metavar="NAME",
            help="Read tags from the field NAME, which stays as it is. Default: tags.",
            show_default=False,
        ),
    ] = None
    lists: Annotated[
        bool | None,
        typer.Option(
            "--lists",
            help="Take a list of strings too: as caption, each string is an alternative; as tags, "
            "each is a tag.",
            show_default=False,
        ),
    ] = None
    on_error: Annotated[
        OnError | None,
        typer.Option(
            "--on-error",
            help="What to do with a record that cannot be merged. stop: end the run. skip: leave "
            "it out, and let `rewrite` list it whole in OUT.rejects.jsonl. Default: stop.",
            show_default=False,
        ),
    ] = None
    allow_rewritten: Annotated[
        bool | None,
        typer.Option(
            "--allow-rewritten",
            help="Pass records that are already rewritten through unchanged.",
            show_default=False,
        ),
    ] = None
    fit: Annotated[
        tuple[int, str] | None,
        typer.Option(
            "--fit",
            metavar="N drop|trim",
            callback=_fit_with_known_word,
            help="Keep alternatives within N tokens. drop: leave a longer one out where a shorter "
            "one exists. trim: cut it after a whole tag or sentence.",
            show_default=False,
        ),
    ] = None
    family: FamilyOption = None

    @property
    def is_given(self) -> bool:
        """True if an option is given that decides what a record becomes."""
        names = {option.name for option in fields(self)} - {"on_error", "family"}
        return any(getattr(self, name) not in (None, []) for name in names)

    def _given(self) -> dict[str, Any]:
        """The given options that decide what a record becomes, by their names in `MergeOptions`.

        The files of tags are read. Raises `UsageError` where that fails.
        """
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        # It decides whether a run stops, not what a record becomes.
        del values["on_error"]
        fit, family = values.pop("fit"), values.pop("family")
        values["lines"] = tuple(self.lines or ()) or None
        if self.drop_tags is not None:
            values["drop_tags"] = read_drop_tags(self.drop_tags)
        if self.replace_tags is not None:
            values["replace_tags"] = read_replace_tags(self.replace_tags)
        if fit:
            values |= {"fit_tokens": fit[0], "fit_by": fit[1], "fit_family": family}
        return {name: value for name, value in values.items() if value is not None}

    def options(self, *, counts_tokens: bool, counters: Sequence[str] = ()) -> MergeOptions:
        """The options of the merge, with the defaults for those that are not given.

        `counts_tokens` says that the command counts tokens without --fit too, and `counters` are
        its other options that would count them. Raises `UsageError` for --family where no tokens
        are counted, and where `MergeOptions` raises it.
        """
        if self.family and not self.fit and not counts_tokens:
            ways = ", ".join(["--fit N drop", "--fit N trim", *counters])
            raise UsageError(
                f"--family {self.family} says whose tokens are counted, but nothing counts them. "
                f"Give one of {ways}, or leave --family out."
            )
        return MergeOptions(**self._given())


def with_merge_options(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command the options of `MergeChoice`, except the fields `left_out`.

    The command takes them as one keyword parameter `merge: MergeChoice`. In the signature that
    typer reads, the options replace that parameter.
    """
    offered = [option.name for option in fields(MergeChoice) if option.name not in left_out]
    hints = get_type_hints(MergeChoice, include_extras=True)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**arguments: Any) -> None:
            chosen = {name: arguments.pop(name) for name in offered}
            command(**arguments, merge=MergeChoice(**chosen))

        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(command).parameters.values():
            if parameter.annotation is MergeChoice:
                parameters += [
                    parameter.replace(name=name, annotation=hints[name], default=None)
                    for name in offered
                ]
            else:
                parameters.append(parameter)
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate
