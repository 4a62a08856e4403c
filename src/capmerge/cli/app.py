"""The program `capmerge`: its commands, and the behaviour that all of them share."""

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

import capmerge
from capmerge.cli.check_latents import check_latents_command
from capmerge.cli.collect import collect_command
from capmerge.cli.convert import convert_command
from capmerge.cli.filter import filter_command
from capmerge.cli.index import index_command
from capmerge.cli.join import join_command
from capmerge.cli.pack_latents import pack_latents_command
from capmerge.cli.preview import preview_command
from capmerge.cli.rewrite import rewrite_command
from capmerge.cli.split import split_command
from capmerge.cli.stats import stats_command
from capmerge.cli.verify import verify_command
from capmerge.terminal import make_streams_safe

if TYPE_CHECKING:
    import click


class _Commands(TyperGroup):
    """The commands, whose descriptions are wrapped in the help and never cut."""

    def format_commands(self, ctx: "click.Context", formatter: "click.HelpFormatter") -> None:
        """Write the first sentence of the help of each command."""
        rows = []
        for name in self.list_commands(ctx):
            command = self.get_command(ctx, name)
            if command and not command.hidden:
                rows.append((name, command.get_short_help_str(limit=sys.maxsize)))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rewrite sd-scripts metadata of any size into captions that are ready for wildcards.",
)


@app.callback(invoke_without_command=True)
def _capmerge(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(capmerge.__version__)
        raise typer.Exit


app.command("rewrite")(rewrite_command)
app.command("verify")(verify_command)
app.command("stats")(stats_command)
app.command("preview")(preview_command)
app.command("index")(index_command)
app.command("join")(join_command)
app.command("split")(split_command)
app.command("filter")(filter_command)
app.command("convert")(convert_command)
app.command("collect")(collect_command)
app.command("check-latents")(check_latents_command)
app.command("pack-latents")(pack_latents_command)


def main() -> None:
    """Run the console script.

    Exit codes: 0 success, 1 wrong data or disk, 2 wrong usage, 130 Ctrl-C, 141 closed pipe, 143
    terminated.
    """
    signal.signal(signal.SIGTERM, _terminated)
    make_streams_safe()
    app(prog_name="capmerge")


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    """Exit through every `finally`, so that nothing temporary stays."""
    raise SystemExit(143)
