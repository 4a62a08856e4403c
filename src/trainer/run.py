"""The command line `python -m trainer.run config.toml`, which turns errors into exit codes.

It reads the options and hands over to `loop` or `dry_run`; it decides nothing itself. The exit
codes are 0, 1 for data, 2 for usage or settings, 130 for Ctrl-C, 141 for a closed pipe and 143 for
SIGTERM. Heavy modules are imported only when they are needed.
"""

from capmerge.start import importing

_WANTED = "'capmerge[train]'"

with importing("", _WANTED):
    from typing import Annotated

    import typer

    from capmerge.errors import UsageError
    from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def _run(
    config: Annotated[str | None, typer.Argument(metavar="[CONFIG]", show_default=False)] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Replace a setting of the file, for example train.max_steps=20 or "
            "text.chunking=a1111. data.metadata belongs to the first data set, data.1.metadata to "
            "the second. Can be given several times.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the whole config, the numbers that follow from it, and the first samples "
            "exactly as they will train; train nothing.",
        ),
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            "--ranks",
            metavar="N",
            min=1,
            help="With --dry-run: show the numbers and the memory of a run on N GPUs, which need "
            "not be here.",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="latest|PATH",
            help="Continue from the newest saved state of the run, or from PATH, a saved state or "
            "the folder of a run. With PATH, CONFIG may be left out: it is then that of the run.",
            show_default=False,
        ),
    ] = None,
    allow_change: Annotated[
        bool,
        typer.Option(
            "--allow-change",
            help="With --resume: continue even though settings or data have changed that decide "
            "what is trained; the new ones apply.",
        ),
    ] = False,
) -> None:
    """Fine-tune SD 1.x, SD 2.x or SDXL on captions that capmerge wrote.

    CONFIG is a TOML file, needed unless --resume names a folder; examples/tiny_sd1.toml is a good
    start. Relative paths in it are relative to the current directory.
    """
    with errors_as_exit_codes(program=None):
        if dry_run and (resume is not None or allow_change):
            raise UsageError(
                "--dry-run starts no training, so --resume and --allow-change have no effect "
                "with it. Leave them out."
            )
        if ranks is not None and not dry_run:
            raise UsageError(
                "--ranks has no effect without --dry-run: the launcher decides how many processes "
                "train. Leave it out, or add --dry-run."
            )
        if allow_change and resume is None:
            raise UsageError(
                "--allow-change has no effect without --resume. "
                "Leave it out, or add --resume latest."
            )
        with importing("", _WANTED):
            from trainer.config.load import load_config

        overrides = overrides or []
        if config is None:
            config, of_the_run = _config_of(resume)
            overrides = [*of_the_run, *overrides]
        settings = load_config(config, overrides)
        if dry_run:
            with importing("", _WANTED):
                from trainer.training.dry_run import show

            show(settings, ranks, config)
        else:
            with importing("", _WANTED):
                from trainer.training.loop import train

            if code := train(settings, resume=resume, allow_change=allow_change, name=config):
                raise typer.Exit(code)


def _config_of(resume: str | None) -> tuple[str, list[str]]:
    """The config of the run to resume, and the overrides it needs, for a command without CONFIG."""
    if resume is None:
        raise UsageError(
            "found no CONFIG, expected the path of a config file; examples/tiny_sd1.toml is a good "
            "start. Only --resume PATH needs none."
        )
    if resume == "latest":
        raise UsageError(
            "--resume latest: found no CONFIG that tells the folder of the run. Give the config, "
            "or the folder itself: --resume runs/mine."
        )
    from trainer.training.run_folder import config_to_resume

    path, overrides = config_to_resume(resume)
    return str(path), overrides


def main() -> None:
    """Run the command line and exit with its exit code."""
    make_streams_safe()
    app(prog_name="python -m trainer.run")


if __name__ == "__main__":
    main()
