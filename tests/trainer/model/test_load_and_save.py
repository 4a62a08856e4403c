"""Tests of diffusers folders: saving, loading, use by diffusers, and refusals."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from builders.model import make_config, make_ids, make_model, predict
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTokenizer

import trainer.model.save
from capmerge.errors import OutputError
from capmerge.tokens.load import load_clip, load_tokenizer_file
from trainer.errors import ModelError
from trainer.families import FAMILIES
from trainer.model.build import build_model
from trainer.model.noise_schedule import Schedule
from trainer.model.save import save_model, without_wrappers
from trainer.model.text_encoders import encode, encoder_rules

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each family a tiny model and the folder it was saved to; the folders are only read."""
    found = {}
    for family in FAMILIES:
        model, folder = make_model(family), tmp_path_factory.mktemp(family) / "model"
        assert save_model(model, model.state_dict(), folder, make_config(family)) == ("vae",)
        found[family] = model, folder
    return found


@pytest.fixture
def copied(saved, tmp_path):
    """A copy of a saved folder, to be damaged."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(saved[family][1], tmp_path / "model"))

    return copy


def edit_json(path: Path, **changes: Any) -> None:
    """Change some values of a JSON file; None takes the key away."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def edit_tensors(
    path: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    """Rewrite the tensors of a safetensors file."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(tensors), path)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad
def test_a_saved_model_comes_back(saved, family):
    """Saved and built again from the folder it predicts the same to the last bit."""
    model, folder = saved[family]
    again = build_model(make_config(family, folder))
    assert torch.equal(predict(model), predict(again))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == {
        name: tensor.dtype for name, tensor in again.state_dict().items()
    }
    assert again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad
def test_a_pipeline_of_diffusers_reads_the_folder(saved, family):
    """A pipeline with a VAE takes all else from the folder, and encodes text as it was trained."""
    model, folder = saved[family]
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_pretrained(folder, vae=vae, local_files_only=True)

    ids = make_ids(family, ["a cat, 1girl, it's 10 hats"], 1)
    states = [
        encode(part, each, rule, "kohya")
        for (_, part), each, rule in zip(
            model.text_encoders(), ids, encoder_rules(family), strict=True
        )
    ]
    found = pipeline.encode_prompt(
        prompt="a cat, 1girl, it's 10 hats",
        device="cpu",
        num_images_per_prompt=1,
        do_classifier_free_guidance=False,
    )
    torch.testing.assert_close(found[0], torch.cat([hidden for hidden, _ in states], dim=2))
    if family == "sdxl":
        torch.testing.assert_close(found[2], states[1][1])
        assert pipeline.config.force_zeros_for_empty_prompt is False
    for name, tensor in model.unet.state_dict().items():
        assert torch.equal(pipeline.unet.state_dict()[name], tensor)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    torch.testing.assert_close(
        pipeline.scheduler.alphas_cumprod, Schedule.of(make_config(family).noise).alphas_cumprod_T
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizers_give_the_ids_of_the_training(saved, family):
    """CLIPTokenizer of transformers gives the ids and padding that the captions trained with."""
    for number, name in enumerate(FAMILIES[family].tokenizers):
        folder = saved[family][1] / ("tokenizer_2" if number else "tokenizer")
        found = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        ours = load_clip(name)
        text = "masterpiece, 1girl, cat_ears, it's a HAT, naïve 日本"
        assert found(text).input_ids == [ours.bos, *ours.encode(text), ours.eos]
        assert (found.pad_token_id, found.model_max_length) == (ours.pad, 77)
        assert load_tokenizer_file(folder).encode(text) == ours.encode(text)


def test_the_given_state_is_saved_not_the_weights_of_the_model(saved, tmp_path):
    """Under several ranks the state is gathered first, and the weights at hand may be shards."""
    model, _ = saved["sd1"]
    state = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    save_model(model, state, tmp_path / "model", make_config("sd1"))
    again = build_model(make_config("sd1", tmp_path / "model"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_a_bf16_model_says_so(saved, tmp_path):
    """Weights that are written in bf16 come back as float32 of the same values."""
    model = make_model("sdxl", train={"precision": "full_bf16"})
    config = make_config("sdxl", export={"dtype": "bf16"})
    save_model(model, model.state_dict(), tmp_path / "model", config)
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "model/unet" / WEIGHTS["unet"]).values()
    } == {torch.bfloat16}
    assert (
        json.loads((tmp_path / "model/text_encoder/config.json").read_text())["torch_dtype"]
        == "bfloat16"
    )
    again = build_model(make_config("sdxl", tmp_path / "model"))
    assert again.unet.conv_in.weight.dtype == torch.float32
    assert torch.equal(
        again.unet.conv_in.weight, saved["sdxl"][0].unet.conv_in.weight.bfloat16().float()
    )


@pytest.mark.parametrize("wrapping", ["whole", "whole over DDP", "by blocks"])
def test_names_lose_what_wrappers_put_into_them(saved, wrapping):
    """A state gathered from a compiled model has the names and the tensors of the bare one."""
    model, _ = saved["sd1"]
    if wrapping == "by blocks":
        wrapped = compile_regions(model, backend="eager")
    else:
        inner = nn.ModuleDict({"module": model}) if "DDP" in wrapping else model
        wrapped = torch.compile(inner, backend="eager")
    gathered = wrapped.state_dict()
    assert any("_orig_mod." in name for name in gathered)
    named = without_wrappers(gathered)
    assert named.keys() == model.state_dict().keys()
    assert all(torch.equal(named[name], tensor) for name, tensor in model.state_dict().items())


def test_zero_terminal_snr_and_v_prediction_are_written(saved, tmp_path):
    """The saved scheduler samples with the schedule that was trained, from its last timestep on."""
    model, _ = saved["sd2"]
    config = make_config("sd2", noise={"prediction": "v", "zero_terminal_snr": True})
    save_model(model, model.state_dict(), tmp_path / "model", config)
    scheduler = DDIMScheduler.from_pretrained(tmp_path / "model/scheduler", local_files_only=True)
    assert scheduler.config.prediction_type == "v_prediction"
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999
    torch.testing.assert_close(scheduler.alphas_cumprod, Schedule.of(config.noise).alphas_cumprod_T)
    build_model(
        make_config("sd2", tmp_path / "model", noise={"prediction": "v", "zero_terminal_snr": True})
    )
    with pytest.raises(ModelError, match=r"rescale_betas_zero_snr is true, .*zero_terminal_snr"):
        build_model(make_config("sd2", tmp_path / "model", noise={"prediction": "v"}))


@pytest.mark.parametrize(("shift", "written"), [(2.5, 2.5), ("resolution", 0.5)])
def test_a_flow_is_sampled_as_it_was_trained(saved, tmp_path, shift, written):
    """The saved scheduler walks the line from noise to latents, at the times that were trained.

    A pipeline takes it. The folder trains on as a flow, and as nothing else.
    """
    model, _ = saved["sd1"]
    noise = {"prediction": "flow", "shift": shift}
    config, folder = make_config("sd1", noise=noise), tmp_path / "model"
    save_model(model, model.state_dict(), folder, config)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, vae=None, local_files_only=True)
    scheduler = pipeline.scheduler
    assert scheduler.config.flow_shift == written
    scheduler.set_timesteps(10)
    torch.testing.assert_close(
        scheduler.timesteps.float(), scheduler.sigmas[:-1] * 1000, atol=1, rtol=0
    )
    latents, drawn = torch.full((1, 4, 8, 8), 0.5), torch.randn(1, 4, 8, 8)
    sample = drawn * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        sample = scheduler.step(drawn - latents, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, atol=1e-4, rtol=0)
    build_model(make_config("sd1", folder, noise=noise))
    with pytest.raises(ModelError, match=r'"flow_prediction", but noise.prediction is "epsilon"'):
        build_model(make_config("sd1", folder))


def test_a_flow_begins_with_a_model_that_predicts_noise(copied):
    """No model of these families was made as a flow, so one that predicts noise becomes one.

    A scheduler that says v names the contradiction, and a FlowMatch scheduler says flow.
    """
    source = copied("sd1")
    build_model(make_config("sd1", source, noise={"prediction": "flow"}))
    file = source / "scheduler/scheduler_config.json"
    edit_json(file, prediction_type="v_prediction")
    with pytest.raises(ModelError, match=r'"v_prediction", but noise.prediction is "flow"'):
        build_model(make_config("sd1", source, noise={"prediction": "flow"}))
    edit_json(file, prediction_type=None, _class_name="FlowMatchEulerDiscreteScheduler")
    build_model(make_config("sd1", source, noise={"prediction": "flow"}))
    with pytest.raises(ModelError, match=r'but noise.prediction is "epsilon"'):
        build_model(make_config("sd1", source))


@pytest.mark.parametrize(
    ("scheduler", "zero_terminal", "expected"),
    [
        (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
            False,
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True},
        ),
        (
            {"_class_name": "PNDMScheduler"},
            True,
            {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"},
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": False},
            True,
            {"_class_name": "EulerDiscreteScheduler", "rescale_betas_zero_snr": True},
        ),
        (
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
            True,
            {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True},
        ),
    ],
)
def test_the_scheduler_of_the_source_is_kept_where_it_can_be(
    copied, tmp_path, scheduler, zero_terminal, expected
):
    """A scheduler keeps its class and settings unless it lacks the run's zero-terminal SNR."""
    source = copied("sd1")
    (source / "scheduler/scheduler_config.json").write_text(
        json.dumps(scheduler | {"prediction_type": "v_prediction"})
    )
    config = make_config(
        "sd1", source, noise={"prediction": "v", "zero_terminal_snr": zero_terminal}
    )
    model = build_model(config)
    save_model(model, model.state_dict(), tmp_path / "trained", config)
    written = json.loads((tmp_path / "trained/scheduler/scheduler_config.json").read_text())
    assert written.items() >= (expected | {"prediction_type": "v_prediction"}).items()
    assert json.loads((tmp_path / "trained/model_index.json").read_text())["scheduler"] == [
        "diffusers",
        written["_class_name"],
    ]


def test_parts_that_are_not_trained_come_from_the_source(copied, tmp_path):
    """All parts that the pipeline names are taken over, large files as links, others as copies.

    Other folders are not.
    """
    source = copied("sd1")
    for name in ("vae", "safety_checker", "flax"):
        (source / name).mkdir()
        (source / name / "config.json").write_text(name)
    (source / "vae/weights.safetensors").write_bytes(b"0" * (1 << 20))
    (source / "tokenizer/tokenizer_config.json").write_text('{"own": 1}')
    index = {
        "vae": ["diffusers", "AutoencoderKL"],
        "safety_checker": ["x", "Y"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    edit_json(source / "model_index.json", **index, requires_safety_checker=True)
    config = make_config("sd1", source)
    model = build_model(config)

    target = tmp_path / "trained"
    assert save_model(model, model.state_dict(), target, config) == ()
    assert (target / "vae/weights.safetensors").stat().st_ino == (
        source / "vae/weights.safetensors"
    ).stat().st_ino
    assert (target / "vae/config.json").stat().st_ino != (source / "vae/config.json").stat().st_ino
    assert [(target / name / "config.json").read_text() for name in ("vae", "safety_checker")] == [
        "vae",
        "safety_checker",
    ]
    assert (target / "tokenizer/tokenizer_config.json").read_text() == '{"own": 1}'
    assert not (target / "flax").exists()
    written = json.loads((target / "model_index.json").read_text())
    assert (
        written.items()
        >= (
            index | {"requires_safety_checker": True, "_class_name": "StableDiffusionPipeline"}
        ).items()
    )


def test_a_source_that_vanished_loses_no_training(copied, tmp_path):
    """The model is saved without the folder it came from; only the VAE is missing, and named."""
    source = copied("sdxl")
    (source / "vae").mkdir()
    config = make_config("sdxl", source)
    model = build_model(config)
    shutil.rmtree(source)
    assert save_model(model, model.state_dict(), tmp_path / "trained", config) == ("vae",)
    build_model(make_config("sdxl", tmp_path / "trained"))


def test_a_full_disk_leaves_the_older_model(saved, tmp_path, monkeypatch):
    """A save that fails half way keeps what stood there, leaves nothing else, and says why."""
    model, _ = saved["sd1"]
    target = tmp_path / "model"
    save_model(model, model.state_dict(), target, make_config("sd1"))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}

    def fail(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer.model.save, "write_tokenizer", fail)
    with pytest.raises(OutputError, match=r"model: the model cannot be written \(.*No space left"):
        save_model(model, model.state_dict(), target, make_config("sd1"))
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [target]


def test_saving_again_replaces_the_folder(saved, tmp_path):
    """Remains of an older or a killed save are gone afterwards."""
    model, _ = saved["sd1"]
    target = tmp_path / "model"
    for left in (target, tmp_path / ".model.unfinished", tmp_path / ".model.replaced"):
        (left / "old").mkdir(parents=True)
    save_model(model, model.state_dict(), target, make_config("sd1"))
    assert not (target / "old").exists()
    assert (target / "model_index.json").exists()
    assert list(tmp_path.iterdir()) == [target]


def in_two_files(folder: Path) -> None:
    """Split the U-Net in two files, as diffusers stores one past 10 GB."""
    whole = folder / "unet" / WEIGHTS["unet"]
    tensors = sorted(load_file(whole).items())
    shards = {"a.safetensors": dict(tensors[::2]), "b.safetensors": dict(tensors[1::2])}
    for name, part in shards.items():
        save_file({key: tensor.clone() for key, tensor in part.items()}, whole.with_name(name))
    index = {"weight_map": {key: name for name, part in shards.items() for key in part}}
    whole.with_name(f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()


def with_names_of_old(folder: Path) -> None:
    """Name the tensors as early transformers 4 did, or without the prefix of newer names."""
    edit_tensors(
        folder / "text_encoder/model.safetensors",
        lambda old: old | {"text_model.embeddings.position_ids": torch.arange(77)[None]},
    )
    edit_tensors(
        folder / "text_encoder_2/model.safetensors",
        lambda old: {name.removeprefix("text_model."): tensor for name, tensor in old.items()},
    )


def saved_by_the_libraries(folder: Path) -> None:
    """Save each part as the installed diffusers and transformers save it themselves."""
    model = build_model(make_config("sdxl", folder))
    for name, part in model.parts().items():
        shutil.rmtree(folder / name)
        part.save_pretrained(folder / name)


@pytest.mark.parametrize("change", [in_two_files, with_names_of_old, saved_by_the_libraries])
def test_other_layouts_are_read(saved, copied, change):
    """Several files with an index, old and new names: the same weights."""
    folder = copied("sdxl")
    change(folder)
    again = build_model(make_config("sdxl", folder)).state_dict()
    assert all(
        torch.equal(again[name], tensor) for name, tensor in saved["sdxl"][0].state_dict().items()
    )


@pytest.mark.parametrize("shards", ["one file", "several files"])
def test_a_variant_is_read(saved, copied, shards):
    """The files of `model.variant` are read where there are any, as the libraries store them."""
    folder = copied("sdxl")
    model = build_model(make_config("sdxl", folder))
    size = "10GB" if shards == "one file" else "400KB"
    with torch.no_grad():
        model.unet.conv_in.weight += 1
        model.text_encoder_2.text_projection.weight += 1
    for name in ("unet", "text_encoder_2"):
        part = getattr(model, name)
        part.half().save_pretrained(folder / name, variant="fp16", max_shard_size=size)
        found = [path.name for path in (folder / name).glob("*fp16*")]
        assert (len(found) > 1) == (shards == "several files")
    usual = build_model(make_config("sdxl", folder)).state_dict()
    again = build_model(make_config("sdxl", folder, model={"variant": "fp16"})).state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value.float()), name
        assert torch.equal(usual[name], saved["sdxl"][0].state_dict()[name]), name
    with pytest.raises(ModelError, match=r"found the variants fp16, expected .* variant fp8"):
        build_model(make_config("sdxl", folder, model={"variant": "fp8"}))


def test_half_precision_files_become_float32(saved, copied):
    """A folder with fp16 files alone is read as float32, and saved in fp16 by default."""
    folder = copied("sd1")
    for name in ("unet", "text_encoder"):
        path = folder / name / WEIGHTS[name]
        halves = {key: tensor.half() for key, tensor in load_file(path).items()}
        save_file(halves, path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
        path.unlink()
    edit_json(folder / "text_encoder/config.json", torch_dtype="float16")
    config = make_config("sd1", folder)
    model = build_model(config)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(
        model.unet.conv_in.weight, saved["sd1"][0].unet.conv_in.weight.half().float()
    )
    target = folder.with_name("trained")
    for dtype, expected in (("source", "float16"), ("fp32", "float32")):
        config = make_config("sd1", folder, export={"dtype": dtype})
        save_model(model, model.state_dict(), target, config)
        written = json.loads((target / "text_encoder/config.json").read_text())
        assert (written["torch_dtype"], "dtype" in written) == (expected, False)
        for name in ("unet", "text_encoder"):
            stored = load_file(target / name / WEIGHTS[name])
            assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{expected}"}


def remove(name: str) -> Callable[[Path], None]:
    """Take a file or folder away."""

    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def set_values(name: str, **changes: Any) -> Callable[[Path], None]:
    """Change values of a JSON file."""
    return lambda folder: edit_json(folder / name, **changes)


def as_pickle(folder: Path) -> None:
    """Weights as an old folder stores them."""
    (folder / "unet" / WEIGHTS["unet"]).rename(folder / "unet/diffusion_pytorch_model.bin")


def cut_short(folder: Path) -> None:
    """A file whose copying was interrupted."""
    path = folder / "unet" / WEIGHTS["unet"]
    path.write_bytes(path.read_bytes()[:-100])


def without_a_tensor(folder: Path) -> None:
    """Weights of which one is missing, one has another shape, and one is of something else."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["conv_in.bias"] = torch.zeros(5)
        tensors["lora"] = tensors.pop("conv_out.bias")
        return tensors

    edit_tensors(folder / "unet" / WEIGHTS["unet"], change)


def with_a_way_out(folder: Path) -> None:
    """An index that names a file elsewhere."""
    whole = folder / "unet" / WEIGHTS["unet"]
    whole.with_name(f"{whole.name}.index.json").write_text(
        '{"weight_map": {"conv_in.bias": "../../secret.safetensors"}}'
    )
    whole.unlink()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("sd1", remove("unet/config.json"), r"unet/config\.json: no such file"),
        ("sd1", remove("text_encoder"), r"text_encoder/config\.json: no such file"),
        (
            "sd1",
            remove(f"unet/{WEIGHTS['unet']}"),
            r"unet: found no weights, expected diffusion_pytorch_model\.safetensors",
        ),
        ("sd1", as_pickle, r"unet: found diffusion_pytorch_model\.bin, which may run programs"),
        (
            "sd1",
            cut_short,
            r"diffusion_pytorch_model\.safetensors: not a complete \.safetensors file",
        ),
        (
            "sd1",
            without_a_tensor,
            (
                r"conv_out\.bias: missing; conv_in\.bias: shape \(5,\), expected \(16,\); "
                "lora: unknown"
            ),
        ),
        ("sd1", with_a_way_out, r"names files outside its folder"),
        (
            "sd1",
            set_values("scheduler/scheduler_config.json", prediction_type="v_prediction"),
            r'"v_prediction", but noise\.prediction is "epsilon"',
        ),
        (
            "sd1",
            set_values("scheduler/scheduler_config.json", rescale_betas_zero_snr=True),
            r"rescale_betas_zero_snr is true, but noise\.zero_terminal_snr is false\. Set noise",
        ),
        (
            "sd1",
            set_values("text_encoder/config.json", hidden_act="gelu"),
            r"a model of family sd2 by its text encoders, expected sd1",
        ),
        (
            "sd1",
            set_values("text_encoder/config.json", hidden_act="relu"),
            r"text_encoder: clip_text_model relu, expected those of sd1",
        ),
        (
            "sdxl",
            remove("text_encoder_2"),
            r"a model of family sd1 by its text encoders, expected sdxl",
        ),
        (
            "sd1",
            set_values("unet/config.json", in_channels=9),
            r"takes 9 channels and gives 4, .*inpainting",
        ),
        (
            "sd1",
            set_values("unet/config.json", cross_attention_dim=32),
            r"cross_attention_dim 32, expected 16, the width of the text encoders",
        ),
        (
            "sd1",
            set_values("unet/config.json", _class_name="Other"),
            r"found a Other, expected a UNet2DConditionModel",
        ),
        (
            "sd1",
            set_values("unet/config.json", block_out_channels=[16]),
            r"config\.json: no U-Net can be built from it",
        ),
        (
            "sdxl",
            set_values("unet/config.json", addition_embed_type=None),
            r"addition_embed_type None, expected text_time",
        ),
        (
            "sdxl",
            set_values("text_encoder_2/config.json", projection_dim=16),
            r"input_dim 1556, expected 1552: projection_dim 16 of text_encoder_2",
        ),
        (
            "sd2",
            set_values("text_encoder/config.json", vocab_size=49409),
            r"49409 tokens and 77 positions, expected 49408 and 77",
        ),
        (
            "sd2",
            set_values(
                "text_encoder/config.json",
                hidden_size=1024,
                num_attention_heads=16,
                num_hidden_layers=24,
            ),
            r'text_encoder has 24 layers, expected 23 \(.*"num_hidden_layers": 23',
        ),
        (
            "sd1",
            lambda folder: (folder / "unet/config.json").write_text("{"),
            r"unet/config\.json: cannot be read as JSON",
        ),
        (
            "sd1",
            lambda folder: (folder / "unet/config.json").write_text("[]"),
            r"found a JSON list, expected an object",
        ),
    ],
)
def test_a_folder_that_does_not_fit_is_named(copied, family, change, message):
    """Each damage and each mix-up is one message: where, what was found, what was expected."""
    folder = copied(family)
    change(folder)
    with pytest.raises(ModelError, match=message) as caught:
        build_model(make_config(family, folder))
    assert str(folder) in str(caught.value)


def test_paths_that_are_no_folder_are_named():
    """A name of a hub is told apart from a folder, with its next step."""
    with pytest.raises(
        ModelError, match=r"stabilityai/sdxl: no such folder.*Nothing is downloaded"
    ):
        build_model(make_config("sdxl", "stabilityai/sdxl"))


def test_a_cut_text_encoder_leaves_the_layers_past_its_config(saved, copied):
    """With fewer layers in its config, a 24-layer encoder is read without the others."""
    folder = copied("sd2")
    edit_json(folder / "text_encoder/config.json", num_hidden_layers=2)
    model = build_model(make_config("sd2", folder, optimizer={"text_learning_rate": 1e-5}))
    assert sum(".layers.2." in name for name in saved["sd2"][0].state_dict()) > 0
    assert sum(".layers.2." in name for name in model.state_dict()) == 0


def test_counting_reads_no_weights(copied):
    """A dry run needs the configs alone."""
    folder = copied("sd1")
    (folder / "unet" / WEIGHTS["unet"]).unlink()
    model = build_model(make_config("sd1", folder), weights=False)
    assert all(parameter.is_meta for parameter in model.parameters())
