"""The program `capmerge`: its commands, and the behaviour that all of them share."""

import signal
import sys
from importlib import import_module
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup
from typer.main import get_command_from_info
from typer.models import CommandInfo

import capmerge
from capmerge.start import importing
from capmerge.terminal import make_streams_safe

if TYPE_CHECKING:
    import click

_COMMANDS = (
    *("rewrite", "verify", "stats", "preview", "index"),
    *("join", "split", "filter", "convert", "collect", "check-latents", "pack-latents"),
)
"""The commands; the function of `pack-latents` is `cli.pack_latents.pack_latents_command`."""


class _Commands(TyperGroup):
    """The commands, each of them imported when it is asked for.

    A rewrite starts a third faster without the code of `verify` and `stats`. The descriptions are
    wrapped in the help and never cut.
    """

    def list_commands(self, ctx: "click.Context") -> list[str]:  # noqa: ARG002  # as click names it
        """Return the names of the commands, in the order of the help."""
        return list(_COMMANDS)

    def get_command(self, ctx: "click.Context", cmd_name: str) -> "click.Command | None":
        """Return the command of that name; None, and all are loaded, if there is none."""
        if cmd_name not in _COMMANDS:
            # Their names are suggested for one that is misspelt.
            for name in _COMMANDS:
                self.get_command(ctx, name)
            return None
        if cmd_name not in self.commands:
            name = cmd_name.replace("-", "_")
            with importing("capmerge: ", "capmerge"):
                module = import_module(f"capmerge.cli.{name}")
            self.commands[cmd_name] = get_command_from_info(
                CommandInfo(cmd_name, callback=getattr(module, f"{name}_command")),
                pretty_exceptions_short=False,
                rich_markup_mode=None,
            )
        return self.commands[cmd_name]

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
