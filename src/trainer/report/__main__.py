"""The command line `python -m trainer.report RUN_DIR`, which turns errors into exit codes.

It reads the options and hands over to `page`; it decides nothing itself. The exit codes are
those of `trainer.run`.
"""

from capmerge.start import importing

_WANTED = "'capmerge[train]'"

with importing("", _WANTED):
    import shlex
    import sys
    from pathlib import Path
    from typing import Annotated

    import typer

    from capmerge.errors import printable
    from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def _report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write the page to FILE instead of report.html in RUN_DIR.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is no report on a run.")
    ] = False,
) -> None:
    """Write one HTML page about a training run, while it goes on or after it.

    RUN_DIR is the folder of a run (train.output_dir). The page shows the loss, the learning rates,
    the speed, the samples, and what was trained with which settings.
    """
    with errors_as_exit_codes(program=None):
        with importing("", _WANTED):
            from trainer.report.page import write_report

        command = shlex.join(["python", "-m", "trainer.report", *sys.argv[1:]])
        for line in write_report(run_dir, output, force=force, command=command):
            print(printable(line), file=sys.stderr)


def main() -> None:
    """Run the command line and exit with its exit code."""
    make_streams_safe()
    app(prog_name="python -m trainer.report")


if __name__ == "__main__":
    main()
