"""Metrics files for tests."""

from trainer.training.metrics import MetricsFile


def write_steps(path, steps):
    """Write a metrics file with a line for each step."""
    file = MetricsFile(path, after_step=0)
    for step in steps:
        assert file.write(step=step, loss=1 / step, keys=["k"]) == ""
    file.close()
