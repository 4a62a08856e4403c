"""Tests of models that runs and saved states leave as single files."""

import shutil
import subprocess
import sys

import pytest
import torch
from builders.model import predict
from builders.runs import (
    ENVIRONMENT,
    rewrite_examples,
    settings_of,
    train_here,
    write_config,
)
from builders.single_files import random_model, write_single
from safetensors.torch import load_file, save_file

from capmerge.errors import UsageError
from trainer.config.load import load_config
from trainer.errors import ModelError, ResumeError
from trainer.model.build import build_model
from trainer.training.active_run import ActiveRun
from trainer.training.states.export import export_state

SINGLE = {"formats": ["diffusers", "single"]}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"), 40)


@pytest.fixture(scope="module")
def runs(metadata, tmp_path_factory):
    """A function that trains five steps from a single file of a family and gives the folder.

    The file is `source.safetensors` there, and the run `run`; both are only read.
    """
    done = {}

    def run(family, dtype=torch.float16):
        if family not in done:
            folder = tmp_path_factory.mktemp(family)
            model = {"path": str(folder / "source.safetensors"), "family": None}
            write_single(folder / "source.safetensors", random_model(family), dtype)
            config = write_config(
                folder / "config.toml",
                settings_of(
                    metadata,
                    folder / "run",
                    model=model | {"train_only": ["*attn2*"]},
                    train={"max_steps": 5},
                    optimizer={"text_learning_rate": 0.0},
                    ema={"decay": 0.5},
                    export=SINGLE,
                ),
            )
            assert train_here(config) == 0
            done[family] = folder
        return done[family]

    return run


def export(state, target, source=None, *, ema=False, force=False, **changes):
    """The notes about an exported state."""
    return export_state(str(state), target, source=source, changes=changes, ema=ema, force=force)


def same_bits(one, other):
    """True for tensors of one type, one shape and the same bits."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_five_steps_change_only_what_is_trained(runs, family, tmp_path):
    """A run from a file ends with a file of the same keys; only trained tensors differ.

    The state of its last step gives the same files, but for the date.
    """
    folder = runs(family)
    before, after = (load_file(folder / f"{name}.safetensors") for name in ("source", "run/model"))
    assert after.keys() == before.keys()
    changed = {name for name in after if not same_bits(after[name], before[name])}
    assert changed
    assert all("attn2" in name for name in changed)
    trained = {name for name in before if "attn2" in name}
    assert len(changed) > 0.8 * len(trained)

    average = load_file(folder / "run" / "model-ema.safetensors")
    assert {name for name in after if not same_bits(after[name], average[name])} <= trained
    for expected, ema in ((after, False), (average, True)):
        assert export(folder / "run", tmp_path / "m.safetensors", ema=ema, force=ema) == []
        exported = load_file(tmp_path / "m.safetensors")
        assert exported.keys() == expected.keys()
        assert all(same_bits(exported[name], value) for name, value in expected.items())
    assert not all(same_bits(after[name], average[name]) for name in trained)


@torch.no_grad
def test_both_formats_hold_one_model(runs):
    """The folder and the file of a run predict the same, and each can be trained again."""
    folder = runs("sdxl")
    found = []
    for path in ("run/model", "run/model.safetensors"):
        text = (
            f"[model]\nfamily = 'sdxl'\npath = '{folder / path}'\n[[data]]\nmetadata = 'a'\n"
            "latents = 'a'\n[train]\nmax_steps = 1\noutput_dir = 'out'\n"
        )
        (folder / "again.toml").write_text(text)
        found.append(predict(build_model(load_config(folder / "again.toml"))))
    assert torch.equal(*found)


def test_a_moved_source_is_found_by_its_hash(runs, tmp_path):
    """A source that is gone or changed is refused; the same one elsewhere is taken."""
    folder = tmp_path / "copy"
    shutil.copytree(runs("sd1"), folder)
    state, target = folder / "run/checkpoints/step-00000005", tmp_path / "m.safetensors"
    text = (state / "config.toml").read_text()
    here = folder / "source.safetensors"
    (state / "config.toml").write_text(text.replace(str(runs("sd1")), str(folder)))
    with pytest.raises(ResumeError, match=r"config\.toml is not as it was saved"):
        export(state, target)
    (state / "config.toml").write_text(text)
    moved = here.rename(tmp_path / "moved.safetensors")
    with pytest.raises(ModelError, match=r"none: no such file or folder.*--source PATH"):
        export(state, target, str(tmp_path / "none"))
    export(state, target, str(moved))
    expected = load_file(runs("sd1") / "run/model.safetensors")
    assert all(same_bits(load_file(target)[name], value) for name, value in expected.items())

    tensors = load_file(moved)
    tensors["alphas_cumprod"] = tensors["alphas_cumprod"].clone()
    tensors["alphas_cumprod"][500] += 1e-9
    save_file(tensors, moved)
    with pytest.raises(
        ModelError, match=r"has changed \(its hash is \w+, and was \w+\), .*--source PATH"
    ):
        export(state, target, str(moved), force=True)


@pytest.mark.parametrize("precision", ["fp32", "full_bf16"])
def test_a_random_run_of_a_schedule_free_optimizer_exports_its_averages(
    metadata, tmp_path, precision
):
    """The file of a state is that of the run: the weights for use, not those that are trained."""
    config = write_config(
        tmp_path / "config.toml",
        settings_of(
            metadata,
            tmp_path / "run",
            train={"max_steps": 3, "precision": precision},
            optimizer={"name": "ScheduleFreeAdamW"},
            export={"formats": ["single"]},
        ),
    )
    assert train_here(config) == 0
    assert not (tmp_path / "run/model").exists()
    (note,) = export(tmp_path / "run", tmp_path / "m.safetensors")
    assert note.startswith("it has no VAE")
    expected, found = (
        load_file(path) for path in (tmp_path / "run/model.safetensors", tmp_path / "m.safetensors")
    )
    state = load_file(tmp_path / "run/checkpoints/step-00000003/model.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert not torch.equal(found[name], state["unet.conv_in.weight"])
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], value) for name, value in expected.items())


def test_the_command_writes_a_file_and_names_mistakes(runs, tmp_path):
    """Options replace settings of the run; each mistake is one line with its exit code."""
    state = runs("sd1") / "run"
    target = tmp_path / "m.safetensors"

    def command(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "trainer.export", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=ENVIRONMENT,
        )
        return done.returncode, done.stdout, done.stderr

    assert command(state, "-o", target, "--dtype", "fp32", "--title", "Mine") == (
        0,
        f"trained model: {target}\n",
        "",
    )
    stored = load_file(target)
    assert stored["model.diffusion_model.input_blocks.0.0.weight"].dtype == torch.float32
    assert b'"modelspec.title":"Mine"' in target.read_bytes()
    found, printed, told = command(state, "-o", target)
    assert (found, printed) == (2, "")
    assert told.splitlines() == [
        f"-o {target}: the file exists. Use --force to replace it, or choose another name."
    ]
    for path, output, error, message in (
        (state, tmp_path / "m.ckpt", UsageError, r"expected a name that ends in \.safetensors"),
        (state, tmp_path / "none/m.safetensors", UsageError, "there is no folder"),
        (tmp_path, tmp_path / "n.safetensors", ResumeError, "no complete state"),
        (tmp_path / "none", tmp_path / "n.safetensors", UsageError, "there is no such folder"),
    ):
        with pytest.raises(error, match=message):
            export(path, output)


def test_a_source_that_changes_during_a_run_is_not_mixed_into_its_file(
    metadata, tmp_path, monkeypatch
):
    """What was not trained would come from another model; the state is saved, and that is told."""
    source = tmp_path / "source.safetensors"
    write_single(source, random_model("sd1"))
    settings = settings_of(
        metadata,
        tmp_path / "run",
        model={"path": str(source), "family": None},
        train={"max_steps": 1},
        export={"formats": ["single"]},
    )
    config = write_config(tmp_path / "config.toml", settings)
    real = ActiveRun.finish

    def finish(run, interrupts):
        write_single(source, random_model("sd1", seed=4))
        real(run, interrupts)

    monkeypatch.setattr(ActiveRun, "finish", finish)
    with pytest.raises(ModelError, match=r"has changed .*trainer\.export STATE -o FILE --source"):
        train_here(config)
    assert (tmp_path / "run/checkpoints/step-00000001/state.json").exists()
    assert not (tmp_path / "run/model.safetensors").exists()
