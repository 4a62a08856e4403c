import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from builders.ranks import run_ranks
from builders.runs import (
    LATENTS,
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file

from trainer.config.load import load_config
from trainer.data.batch import SampleRequest
from trainer.data.datasets import open_datasets
from trainer.data.held_out import hold_out
from trainer.data.samples import SampleMaker, build_chunker
from trainer.errors import LatentsError, ResumeError
from trainer.model.build import build_model
from trainer.model.noise_schedule import Schedule
from trainer.training import validation
from trainer.training.dry_run import show
from trainer.training.validation import Measured, summary

RECORDS = 2


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The first 40 of the rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"), n_records=40)


def write(metadata, folder, **changes):
    """Write the config of a run in `run` of the folder that validates; its path."""
    folder.mkdir(exist_ok=True)
    changes = {
        "validation": {"records": RECORDS, "every_steps": 3},
        "ema": {"decay": 0.5},
        "checkpoint": {"every_steps": 2, "keep": 9},
    } | changes
    return write_config(folder / "c.toml", settings_of(metadata, folder / "run", **changes))


def lines_of(run):
    """The lines of a run's validations, without the fields that depend on the machine."""
    lines = (run / "validation.jsonl").read_text(encoding="ascii").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMES}
        for line in lines
    ]


TIMES = {"seconds", "share_of_time"}


@pytest.fixture(scope="module")
def validated(metadata, tmp_path_factory):
    """The folder of a run of 8 steps that validates 2 held-out records at every third step."""
    folder = tmp_path_factory.mktemp("validated")
    assert train_here(write(metadata, folder)) == 0
    return folder / "run"


def split_of(run):
    """The config, the opened data sets and the split of a run."""
    config = load_config(run / "config.toml")
    datasets = open_datasets(config, jobs=1)
    return config, datasets, hold_out(config, datasets)


def test_a_run_is_validated_at_its_start_on_the_way_and_at_its_end(validated):
    """Validations come before the first step, at every n-th and after the last, each with a time.

    Training takes both losses down, and its first average is that of the untrained weights.
    """
    lines = lines_of(validated)
    assert [line["step"] for line in lines] == [0, 3, 6, 8]
    for records in ("held_out", "train"):
        assert lines[0][records]["raw"] == lines[0][records]["ema"]
        for weights in ("raw", "ema"):
            losses = [line[records][weights]["loss"] for line in lines]
            assert losses == sorted(losses, reverse=True)
        assert lines[3][records]["raw"]["loss"] < lines[3][records]["ema"]["loss"]
    for line in (validated / "validation.jsonl").read_text().splitlines():
        assert 0 < json.loads(line)["share_of_time"] <= 1


def test_held_out_records_are_never_trained(metadata, tmp_path):
    """In two epochs, each record is trained twice but those held out, which are not."""
    train = {"max_steps": None, "max_epochs": 2, "batch_size": 8}
    seldom = {"records": RECORDS, "every_steps": 100}
    config = write(metadata, tmp_path, train=train, ema={}, validation=seldom)
    assert train_here(config) == 0
    _, (dataset,), split = split_of(tmp_path / "run")
    held = {dataset.index.read(record)[0] for _, record in split.held_out}
    keys = [key for line in metrics_of(tmp_path / "run") for key in line["keys"]]
    assert len(held) == RECORDS
    assert sorted(keys) == sorted(2 * [*(set(json.loads(metadata.read_text())) - held)])


def reference_losses(run, records, weights):
    """The loss of each record at each timestep, worked out here from a model and samples."""
    config, datasets, _ = split_of(run)
    model = build_model(config).eval()
    model.load_state_dict(weights, strict=False)
    maker, chunker = SampleMaker(config, datasets, max_steps=1), build_chunker(config)
    schedule = Schedule.of(config.noise)
    losses = np.zeros((len(records), 4))
    for row, (dataset, record) in enumerate(records):
        sample = maker.make(SampleRequest(dataset, record, 0, -1, 0))
        ids = torch.tensor(chunker.lay_out(sample.cut, 1))
        for column, timestep in enumerate((125, 375, 625, 875)):
            kept = schedule.alphas_cumprod_T[timestep]
            noisy = kept.sqrt() * sample.latents_CHW + (1 - kept).sqrt() * sample.noise_CHW
            with torch.no_grad():
                found = model(noisy[None], torch.tensor([timestep]), (ids,))
            losses[row, column] = (found[0] - sample.noise_CHW).square().mean()
    return losses


def test_the_losses_are_those_of_an_independent_calculation(validated):
    """The losses of held-out and trained records, raw and averaged, follow from their formula."""
    _, _, split = split_of(validated)
    state = validated / "checkpoints" / "step-00000008"
    raw, averages = load_file(state / "model.safetensors"), load_file(state / "ema.safetensors")
    last = lines_of(validated)[-1]
    assert last["step"] == 8
    for name, records in (("held_out", split.held_out), ("train", split.trained)):
        assert last[name]["records"] == len(records) == RECORDS
        for weights, tensors in (("raw", raw), ("ema", raw | averages)):
            expected = reference_losses(validated, records, tensors)
            found = last[name][weights]
            assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
            assert list(found["quantiles"].values()) == pytest.approx(
                expected.mean(axis=0).tolist(), rel=1e-5
            )


def test_validation_changes_nothing_in_the_training(metadata, validated, tmp_path):
    """A run that hardly validates trains the same weights and averages, bit for bit."""
    config = write(metadata, tmp_path, validation={"records": RECORDS, "every_steps": 100})
    assert train_here(config) == 0
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 8]
    assert_equal_bits(state_of(tmp_path / "run", 8), state_of(validated, 8))
    assert metrics_of(tmp_path / "run") == metrics_of(validated)
    assert lines_of(tmp_path / "run")[-1] == lines_of(validated)[-1]


def test_workers_and_micro_batches_change_no_result(metadata, validated, tmp_path):
    """Before the first step, other workers and micro-batches give the very same results."""
    train = {"workers": 2, "batch_size": 1, "accumulation": 2, "max_steps": 1}
    config = write(metadata, tmp_path, train=train)
    assert train_here(config) == 0
    assert lines_of(tmp_path / "run")[0] == lines_of(validated)[0]


def test_a_resumed_run_has_the_validations_of_an_unbroken_one(metadata, validated, tmp_path):
    """Lines past the state are cut off and come again; the one of its own step is made up for.

    It is missing when the run was killed between saving the state and the end of the validation.
    """
    run = shutil.copytree(validated, tmp_path / "run")
    lines = (run / "validation.jsonl").read_text().splitlines(keepends=True)
    others = [line for line in lines if json.loads(line)["step"] != 6]
    (run / "validation.jsonl").write_text("".join([*others, '{"step": 4, "held']))
    config = write(metadata, tmp_path)
    assert train_here(config, resume=str(run / "checkpoints" / "step-00000006")) == 0
    assert lines_of(run) == lines_of(validated)
    # What is there is not done again.
    before = (run / "validation.jsonl").read_bytes()
    assert train_here(config, resume="latest") == 0
    assert (run / "validation.jsonl").read_bytes() == before


def test_a_signal_ends_a_validation_at_once(metadata, validated, tmp_path, monkeypatch):
    """A signal during a validation saves the state of its step; the resumed run makes up for it."""
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 11:  # of the 8 before the first step, and 8 after step 3
            os.kill(os.getpid(), signal.SIGTERM)
        return batch_loss(*arguments)

    batch_loss = validation.batch_loss
    monkeypatch.setattr(validation, "batch_loss", interrupted)
    config = write(metadata, tmp_path)
    assert train_here(config) == 143
    assert len(calls) == 11
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0]
    assert (tmp_path / "run/checkpoints/step-00000003/state.json").exists()
    assert train_here(config, resume="latest") == 0
    assert lines_of(tmp_path / "run") == lines_of(validated)
    assert_equal_bits(state_of(tmp_path / "run", 8), state_of(validated, 8))


def test_the_share_changes_only_when_allowed(metadata, validated, tmp_path, capsys):
    """Another number of held-out records is refused by name; `--allow-change` warns of it.

    How often a run validates may change by itself.
    """
    shutil.copytree(validated, tmp_path / "run")
    train = {"max_steps": 9}
    changed = write(metadata, tmp_path, validation={"share": 0.1}, train=train)
    with pytest.raises(ResumeError, match=r"validation\.share: saved 0\.0, now 0\.1"):
        train_here(changed, resume="latest")
    assert train_here(changed, resume="latest", allow_change=True) == 0
    assert "held out from now on may have been trained" in capsys.readouterr().err
    again = write(
        metadata, tmp_path, validation={"share": 0.1, "every_steps": 2}, train={"max_steps": 10}
    )
    assert train_here(again, resume="latest") == 0
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 3, 6, 8, 9, 10]


@pytest.mark.parametrize("on_missing", ["stop", "skip"])
def test_latents_that_break_later(metadata, validated, tmp_path, caplog, on_missing):
    """A held-out record whose latents break stops the run, or is left out with a warning."""
    _, (dataset,), split = split_of(validated)
    record = split.held_out[1][1]
    file = dataset.latents_file(record, dataset.index.read(record)[0])
    latents = shutil.copytree(LATENTS, tmp_path / "latents")
    (latents / file.relative_to(LATENTS)).write_bytes(b"no archive")
    data = {"latents": str(latents), "on_missing": on_missing}
    config = write(metadata, tmp_path, data=data, train={"max_steps": 1})
    if on_missing == "stop":
        with pytest.raises(LatentsError):
            train_here(config)
        return
    assert train_here(config) == 0
    first, last = lines_of(tmp_path / "run")
    assert (first["held_out"]["records"], first["train"]["records"]) == (RECORDS - 1, RECORDS)
    assert math.isfinite(last["held_out"]["ema"]["loss"])
    (told,) = caplog.messages
    assert told.endswith("It is left out of the validation.")


@pytest.mark.parametrize("precision", [pytest.param("fp16", marks=pytest.mark.slow), "full_bf16"])
def test_other_precisions_are_validated_and_leave_no_trace(metadata, tmp_path, precision):
    """In fp16 and with bf16 weights, validating trains the same, raw and averaged."""
    train = {"max_steps": 2, "precision": precision}
    for every in (1, 100):
        settings = {"records": 1, "every_steps": every}
        folder = tmp_path / str(every)
        assert train_here(write(metadata, folder, validation=settings, train=train)) == 0
    often, seldom = tmp_path / "1" / "run", tmp_path / "100" / "run"
    assert_equal_bits(state_of(often, 2), state_of(seldom, 2))
    averages = "checkpoints/step-00000002/ema.safetensors"
    assert_equal_bits(load_file(often / averages), load_file(seldom / averages))
    assert lines_of(often)[-1] == lines_of(seldom)[-1]
    assert lines_of(often)[1]["held_out"]["ema"]["loss"] > 0.1


def test_the_dry_run_tells_what_is_held_out(metadata, tmp_path, capsys):
    """The dry run shows the numbers of held-out and compared records, and trains the others."""
    show(load_config(write(metadata, tmp_path, validation={"records": 30})))
    told = capsys.readouterr().out
    assert "# records: 40; samples per epoch: 10;" in told
    assert "# validation: 30 held-out records, which are never trained, and 10 of the " in told


def test_a_summary_by_quantile_and_style():
    """Means are taken per set, timestep and style; a long caption counts in its style too."""
    raw = [
        Measured(0, "t", 10, (1.0, 2.0, 3.0, 4.0)),
        Measured(1, "b", 76, (3.0, 4.0, 5.0, 6.0)),
        Measured(2, "c", 75, (0.5, 0.5, 0.5, 0.5)),
        Measured(4, "", 0, (1.5, 1.5, 1.5, 1.5)),
    ]
    line = summary({"raw": raw}, held_out=2)
    assert line["held_out"] == {
        "records": 2,
        "styles": {"tags": 1, "caption": 0, "both": 1, "long": 1},
        "raw": {
            "loss": 3.5,
            "quantiles": {"0.125": 2.0, "0.375": 3.0, "0.625": 4.0, "0.875": 5.0},
            "styles": {"tags": 2.5, "both": 4.5, "long": 4.5},
        },
    }
    assert line["train"]["records"] == 2
    assert line["train"]["styles"] == {"tags": 0, "caption": 1, "both": 0, "long": 0}
    assert line["train"]["raw"]["loss"] == 1.0
    assert math.isnan(summary({"raw": []}, held_out=2)["held_out"]["raw"]["loss"])


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_find_the_losses_of_one(tmp_path):
    """Two ranks validate as one does, to 1e-6 before the first step, with an odd record too."""
    few = rewrite_examples(tmp_path, n_records=7)
    settings = {"validation": {"records": 4, "every_steps": 2}}
    whole, split = tmp_path / "whole", tmp_path / "split"
    assert train_here(write(few, whole, train={"max_steps": 2}, **settings)) == 0
    config = write(few, split, train={"max_steps": 2, "batch_size": 1}, **settings)
    for ended in run_ranks(split, config):
        assert ended.code == 0, ended.output
    (before, after), (found, later) = (numbers_of(folder / "run") for folder in (whole, split))
    assert found == pytest.approx(before, rel=1e-6)
    assert later == pytest.approx(after, rel=1e-3)


def numbers_of(run):
    """All numbers of the lines before the first step and after the last one."""
    return [list(_numbers(line)) for line in lines_of(run)]


def _numbers(value):
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    else:
        yield value


@pytest.mark.ranks
@pytest.mark.slow
def test_an_error_of_one_rank_in_a_validation_ends_both(metadata, validated, tmp_path):
    """Where one rank cannot read a held-out record, both end with its message and exit code 1."""
    _, (dataset,), split = split_of(validated)
    record = split.held_out[1][1]  # which the second of two ranks measures
    file = dataset.latents_file(record, dataset.index.read(record)[0])
    latents = shutil.copytree(LATENTS, tmp_path / "latents")
    (latents / file.relative_to(LATENTS)).write_bytes(b"no archive")
    config = write(metadata, tmp_path, data={"latents": str(latents)}, train={"batch_size": 1})
    ends = run_ranks(tmp_path, config)
    assert [ended.code for ended in ends] == [1, 1]
    assert "An error of rank 1 ends all 2 processes of the run." in ends[0].output
    assert f"{file.name}: not a zip of arrays" in ends[1].output
    assert all("Traceback" not in ended.output for ended in ends)
    assert (tmp_path / "run" / "validation.jsonl").read_bytes() == b""
