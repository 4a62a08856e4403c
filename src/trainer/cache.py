"""The command line `python -m trainer.cache CONFIG`, which turns errors into exit codes.

It reads the options and hands over to `caching.story`; it decides nothing itself. The exit codes
are those of `trainer.run`.
"""

from capmerge.start import importing

_WANTED = "'capmerge[train,cache]'"

with importing("", _WANTED):
    from typing import Annotated

    import typer

    from capmerge.errors import printable
    from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def _cache(
    config: Annotated[str, typer.Argument(metavar="CONFIG", show_default=False)],
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Replace a setting of the file, for example cache.resolution=768. Can be given "
            "several times.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file of cache.metadata_output.")
    ] = False,
    recache: Annotated[
        bool,
        typer.Option(
            "--recache", help="Replace latents that other settings or other programs made."
        ),
    ] = False,
) -> None:
    """Make cached latents of pictures, named and laid out as sd-scripts does.

    CONFIG is a TOML file with [model] and [cache]; a training config may hold [cache] too. With
    cache.metadata, a copy of the metadata gets the size of each picture and of its bucket. Started
    by accelerate launch, several GPUs divide the pictures. A run that was interrupted goes on where
    it was when it is started again.
    """
    with errors_as_exit_codes(program=None):
        with importing("", _WANTED):
            from trainer.caching.story import cache
            from trainer.config.load import load_config

        settings = load_config(config, overrides or [], trains=False)
        cache(settings, printable(config), force=force, recache=recache)


def main() -> None:
    """Run the command line and exit with its exit code."""
    make_streams_safe()
    app(prog_name="python -m trainer.cache")


if __name__ == "__main__":
    main()
