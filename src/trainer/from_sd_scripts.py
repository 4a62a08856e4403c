"""The command line `python -m trainer.from_sd_scripts FILE`, which turns errors into exit codes.

It reads the options and hands over to `config`; it decides nothing itself. The exit codes are those
of `trainer.run`.
"""

from capmerge.start import importing

_WANTED = "'capmerge[train]'"

with importing("", _WANTED):
    from enum import StrEnum
    from pathlib import Path
    from typing import Annotated

    import typer

    from capmerge.errors import UsageError, printable
    from capmerge.files.atomic import AtomicFile
    from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class _Family(StrEnum):
    """The values of --family."""

    sd1 = "sd1"
    sd2 = "sd2"
    sdxl = "sdxl"


@app.command()
def _convert(
    arguments: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="CONFIG",
            help="The config file to write. Default: standard output.",
            show_default=False,
        ),
    ] = None,
    family: Annotated[
        _Family | None,
        typer.Option(
            help="The family of the model, where neither the script nor an option tells it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a training config from the arguments of sd-scripts' fine_tune.py or sdxl_train.py.

    FILE holds the command, as a shell script or a batch file does, or is the .toml file that
    sd-scripts takes with --config_file. A dataset config that it names is read too. Options that
    would train something else here are refused by name; comments in the config say what was left
    out. Relative paths are relative to the current directory.
    """
    with errors_as_exit_codes(program=None):
        with importing("", _WANTED):
            from trainer.config.kohya_arguments import read_arguments
            from trainer.config.kohya_convert import convert
            from trainer.families import FAMILIES

        if output and output.exists():
            raise UsageError(
                f"{printable(str(output))}: exists already. Choose another output, or remove it."
            )
        named = FAMILIES[family.value].name if family else None
        text = convert(read_arguments(arguments), named, printable(str(arguments)))
        if output is None:
            print(text, end="")
            return
        with AtomicFile(output) as file:
            file.write(text.encode())
            file.publish()


def main() -> None:
    """Run the command line and exit with its exit code."""
    make_streams_safe()
    app(prog_name="python -m trainer.from_sd_scripts")


if __name__ == "__main__":
    main()
