"""`python -m trainer.run config.toml`: the command line, errors to exit codes. Nothing is decided here.

Exit codes: 0, 1 data, 2 usage or settings, 130 Ctrl-C, 141 closed pipe, 143 terminated. Everything
heavy is imported when it is needed.
"""

from typing import Annotated

import typer

from capmerge.errors import UsageError
from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def _run(
    config: Annotated[str, typer.Argument(metavar="CONFIG", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Replaces a setting of the file, such as train.max_steps=20 or text.chunking=a1111. data.metadata is the first data "
            "set's, data.1.metadata the second's. Repeatable.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the whole config, what follows from it, and the first samples as they will train.",
        ),
    ] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="latest|PATH",
            help="Go on from the newest saved state, or from that one.",
            show_default=False,
        ),
    ] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="With --resume: go on although seed, metadata or global batch are others.",
        ),
    ] = False,
) -> None:
    """Fine-tune SD 1.x, SD 2.x or SDXL on captions that capmerge wrote.

    CONFIG is a TOML file; examples/tiny_sd1.toml is one to start from. Relative paths in it count
    from the current directory.
    """
    with errors_as_exit_codes(program=None):
        if dry_run and (resume is not None or allow_change):
            raise UsageError(
                "--dry-run starts no training, so --resume and --allow-change have no effect with it. Leave them out."
            )
        if allow_change and resume is None:
            raise UsageError(
                "--allow-change has no effect without --resume. Leave it out, or add --resume latest."
            )
        from trainer.config.load import load_config

        settings = load_config(config, overrides or [])
        if dry_run:
            from trainer.training.dry_run import show

            show(settings)
        else:
            from trainer.training.loop import train

            if code := train(settings, resume=resume, allow_change=allow_change):
                raise typer.Exit(code)


def main() -> None:
    """The command line."""
    make_streams_safe()
    app(prog_name="python -m trainer.run")


if __name__ == "__main__":
    main()
