import json
import sys

import numpy as np
import pytest
from builders.metrics import write_steps
from PIL import Image

from trainer.training.loss_plot import save_loss_plot


def plot(tmp_path, losses, rate=1e-5):
    """The picture of a run with these losses; checks that it is there, whole, and no sliver."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_text(
        "".join(
            json.dumps({"step": step, "loss": loss, "lr_unet": rate}) + "\n"
            for step, loss in enumerate(losses, 1)
        )
    )
    assert save_loss_plot(path, tmp_path / "loss.png") == ""
    with Image.open(tmp_path / "loss.png") as picture:
        picture.load()
        assert min(picture.size) > 500
        return picture.convert("RGB")


def blue_in(picture):
    """The number of blue pixels in each row, which only lines have, and of the dark ones."""
    red, _, blue = (channel.astype(int) for channel in np.moveaxis(np.asarray(picture), 2, 0))
    return (blue - red > 40).sum(axis=1), ((blue - red > 100) & (red < 60)).sum(axis=1)


def test_the_plot_shows_losses_median_and_rate(tmp_path):
    """The losses are pale, their median is dark, and the rate below is dark from side to side."""
    pytest.importorskip("matplotlib")
    picture = plot(tmp_path, [0.2 - 0.0005 * step + 0.05 * (step % 7) for step in range(200)])
    lines, dark = blue_in(picture)
    below = picture.size[1] * 3 // 4
    assert (lines[:below] > 0).sum() > 300
    assert 10 < (dark[:below] > 0).sum() < 200
    assert dark[below:].max() > picture.size[0] // 2


def test_a_spike_does_not_flatten_the_rest(tmp_path):
    """With one loss 1000 times the others, a logarithmic axis still gives those some height."""
    pytest.importorskip("matplotlib")
    picture = plot(
        tmp_path, [300.0 if step == 50 else 0.1 + 0.05 * (step % 7) for step in range(200)]
    )
    lines, _ = blue_in(picture)
    assert (lines[: picture.size[1] * 3 // 4] > 50).sum() > 40


@pytest.mark.parametrize("losses", [[0.5], [0.5, None, 0.25], [0.0] * 30, [0.1] * 10_000])
def test_odd_runs_are_drawn_too(tmp_path, losses):
    """A single step, missing losses and many steps give a plot without a warning."""
    pytest.importorskip("matplotlib")
    plot(tmp_path, losses)


def test_no_step_is_lost_from_the_picture(tmp_path):
    """A single high loss among 20,000 steps is still drawn."""
    pytest.importorskip("matplotlib")
    losses = [0.1] * 20_000
    flat, _ = blue_in(plot(tmp_path, losses))
    (tmp_path / "spiked").mkdir()
    losses[12_345] = 0.5
    spiked, _ = blue_in(plot(tmp_path / "spiked", losses))
    assert (spiked > 0).sum() > (flat > 0).sum() + 300


def test_a_plot_that_cannot_be_is_one_line(tmp_path, monkeypatch):
    """No losses, no folder, no matplotlib: the reason in one line, and no exception."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "metrics.jsonl"
    write_steps(path, [])
    assert (
        save_loss_plot(path, tmp_path / "loss.png") == f"no loss plot: there is no loss in {path}."
    )
    write_steps(path, [1, 2])
    assert save_loss_plot(path, tmp_path / "none" / "loss.png").startswith("no loss plot: ")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    problem = save_loss_plot(path, tmp_path / "loss.png")
    assert "pip install matplotlib" in problem
    assert "\n" not in problem
    assert list(tmp_path.iterdir()) == [path]
