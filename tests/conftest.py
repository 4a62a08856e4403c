"""What holds for all tests."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

SLOW = {
    "test_stored_files.py",
    "test_sweep.py",
    "test_synthetic.py",
    "test_toolbox.py",
    "capmerge/captions/test_fit.py",
    "capmerge/cli/test_collect.py",
    "capmerge/cli/test_convert.py",
    "capmerge/cli/test_filter.py",
    "capmerge/cli/test_formats.py",
    "capmerge/cli/test_in_place.py",
    "capmerge/cli/test_interrupted_runs.py",
    "capmerge/cli/test_join.py",
    "capmerge/cli/test_merge_options.py",
    "capmerge/cli/test_split.py",
    "capmerge/cli/test_stats.py",
    "capmerge/commands/test_preview.py",
    "capmerge/commands/test_receipt.py",
    "capmerge/commands/test_stats.py",
    "capmerge/commands/test_verify.py",
    "capmerge/index/test_build.py",
    "capmerge/metadata/test_parallel.py",
    "trainer/caching/test_story.py",
    "capmerge/shards/test_datatrove_engine.py",
    "capmerge/shards/test_runs.py",
    "capmerge/shards/test_urls.py",
    "trainer/model/test_attention.py",
    "trainer/model/test_load_and_save.py",
    "trainer/test_bench_step.py",
    "trainer/test_examples.py",
    "trainer/model/test_model.py",
    "trainer/model/test_save_single.py",
    "trainer/model/test_single_file.py",
    "trainer/model/test_text_encoders.py",
    "trainer/training/states/test_checkpoint.py",
    "trainer/training/states/test_continuation.py",
    "trainer/training/test_ema.py",
    "trainer/training/states/test_export.py",
    "trainer/training/engines/test_lean_runs.py",
    "trainer/training/engines/test_loss_scaling.py",
    "trainer/training/memory/test_estimate.py",
    "trainer/training/test_new_style_latents.py",
    "trainer/training/optimizer/test_portions.py",
    "trainer/training/engines/test_ranks.py",
    "trainer/report/test_page.py",
    "trainer/training/states/test_resume.py",
    "trainer/training/test_runs.py",
    "trainer/training/test_sampling.py",
    "trainer/training/test_signals.py",
    "trainer/training/speed/test_speed_up.py",
    "trainer/training/test_validation.py",
}
"""The files whose tests take about ten seconds or more of processor time together."""

# Tests run beside each other, so no single example is held to a time.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
# A shell ignores Ctrl-C in what it starts in the background, and nohup a lost terminal; commands
# inherit both.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of the slow files."""
    folder = Path(__file__).parent
    for item in items:
        if item.path.relative_to(folder).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)
