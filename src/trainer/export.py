"""The command line `python -m trainer.export STATE -o FILE`, which turns errors into exit codes.

It reads the options and hands over to `training.states.export`; it decides nothing itself. The exit
codes are those of `trainer.run`.
"""

from capmerge.start import importing

_WANTED = "'capmerge[train]'"

with importing("", _WANTED):
    from enum import StrEnum
    from pathlib import Path
    from typing import Annotated

    import typer

    from capmerge.errors import printable
    from capmerge.terminal import errors_as_exit_codes, make_streams_safe

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Dtype(StrEnum):
    """The values of --dtype."""

    source = "source"
    fp16 = "fp16"
    bf16 = "bf16"
    fp32 = "fp32"


@app.command()
def _export(
    state: Annotated[str, typer.Argument(metavar="STATE", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FILE", help="The .safetensors file to write."),
    ],
    source: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where the model that the training began with lies now, if it was moved. It must "
            "be the same file or folder.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Replace export.dtype of the run.", show_default=False),
    ] = None,
    title: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Replace export.title of the run.", show_default=False),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Write the moving average of the weights ([ema]).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE if it exists.")] = False,
) -> None:
    """Write the model of a saved state as a single file for ComfyUI, WebUI, Forge and diffusers.

    STATE is a folder such as runs/mine/checkpoints/step-00001000, or the folder of a run, which
    stands for its newest state. Neither a GPU nor the data of the run is needed.
    """
    with errors_as_exit_codes(program=None):
        with importing("", _WANTED):
            from trainer.training.states.export import export_state

        given = {"dtype": dtype and dtype.value, "title": title}
        changes = {name: value for name, value in given.items() if value is not None}
        notes = export_state(state, output, source=source, changes=changes, ema=ema, force=force)
        what = "moving average of the trained model" if ema else "trained model"
        print(f"{what}: {printable(str(output))}")
        for note in notes:
            print(f"{printable(output.name)}: {printable(note)}")


def main() -> None:
    """Run the command line and exit with its exit code."""
    make_streams_safe()
    app(prog_name="python -m trainer.export")


if __name__ == "__main__":
    main()
