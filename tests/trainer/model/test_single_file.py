"""Tests of single-file models: what is read of them, what they tell the config, refusals."""

import json
import subprocess
import sys

import pytest
import torch
from builders.config import LEAST, load, write
from builders.model import predict
from builders.single_files import SECOND, random_model, tiny_vae, write_single
from safetensors.torch import load_file, save_file

from trainer.config.load import load_config, resolved_toml
from trainer.config.settings import family_of
from trainer.errors import ConfigError, ModelError
from trainer.families import FAMILIES
from trainer.model.build import build_model, model_fingerprint

CLIP = {"sd1": "cond_stage_model.transformer.", "sdxl": "conditioner.embedders.0.transformer."}


def asked(folder, path, **settings):
    """The config that is loaded for a model of that path, without a family."""
    document = LEAST | {"model": {"path": str(path)}}
    for name, value in settings.items():
        section, key = name.split("__")
        document = document | {section: document.get(section, {}) | {key: value}}
    return load_config(write(folder / "config.toml", document))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad
def test_a_single_file_is_read(tmp_path, family, dtype):
    """Its weights are those of the model it was written of, in the precision of the file."""
    model = random_model(family)
    write_single(tmp_path / "m.safetensors", model, dtype)
    config = asked(tmp_path, tmp_path / "m.safetensors")
    assert config.model.family == family
    again = build_model(config)
    expected = {name: value.to(dtype).float() for name, value in model.state_dict().items()}
    found = again.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {value.dtype for value in found.values()} == {torch.float32}
    if dtype == torch.float32:
        assert torch.equal(predict(model), predict(again))


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_files_without_text_model_are_read(tmp_path, family):
    """Three public programs wrote CLIP's names without `text_model.`; such files load too."""
    model, path = random_model(family), tmp_path / "m.safetensors"
    write_single(path, model)
    short = {
        name.replace(f"{CLIP[family]}text_model.", CLIP[family]): value
        for name, value in load_file(path).items()
    }
    assert short.keys() != load_file(path).keys()
    save_file(short, path)
    config = asked(tmp_path, path)
    assert config.model.family == family
    again = build_model(config).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


def test_other_forms_of_the_same_matrices_are_read(tmp_path):
    """Projections as convolutions, and one as a linear layer, hold the same values."""
    model, path = random_model("sdxl"), tmp_path / "m.safetensors"
    tensors = write_single(path, model)
    for name in [name for name in tensors if name.endswith("proj_in.weight")]:
        tensors[name] = tensors[name][:, :, None, None]
    stored = tensors.pop(f"{SECOND}text_projection")
    assert stored.shape != stored.T.shape
    tensors[f"{SECOND}text_projection.weight"] = stored.T.contiguous()
    save_file(tensors, path)
    again = build_model(asked(tmp_path, path)).state_dict()
    assert all(torch.equal(again[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("marks", "settings", "expected"),
    [
        ((), {}, ("epsilon", False)),
        (("v_pred",), {}, ("v", False)),
        (("v_pred", "ztsnr"), {}, ("v", True)),
        (("ztsnr",), {}, ("epsilon", False)),
        (("v_pred",), {"noise__zero_terminal_snr": True}, ("v", True)),
        ((), {"noise__prediction": "v"}, ("v", False)),
    ],
)
def test_marks_set_the_prediction(tmp_path, marks, settings, expected):
    """The marks of a file decide where the config is silent, and the resolved config names both."""
    path = tmp_path / "m.safetensors"
    write_single(path, random_model("sd1"), others={mark: torch.empty(0) for mark in marks})
    config = asked(tmp_path, path, **settings)
    assert (config.noise.prediction, config.noise.zero_terminal_snr) == expected
    (tmp_path / "again.toml").write_text(resolved_toml(config))
    assert load_config(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"noise__prediction": "epsilon"},
            r'noise\.prediction: found "epsilon", but .*m\.safetensors has the mark v_pred',
        ),
        (
            {"noise__zero_terminal_snr": False},
            r"noise\.zero_terminal_snr: found false, but .*m\.safetensors has the mark ztsnr",
        ),
        (
            {"model__family": "sdxl"},
            r"found sdxl, but .* of sd1 by its tensor cond_stage_model\.transformer\.text_model\.",
        ),
        ({"model__variant": "fp16"}, r"model\.variant: .* is a single file, expected a folder"),
        ({"model__latent_channels": 16}, r"latent_channels: found 16, but the U-Net .* takes 4"),
    ],
)
def test_a_config_that_contradicts_the_file_is_refused(tmp_path, settings, message):
    """The message names the setting with its value, and what in the file says otherwise."""
    path = tmp_path / "m.safetensors"
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    write_single(path, random_model("sd1"), others=marks)
    with pytest.raises(ConfigError, match=message):
        asked(tmp_path, path, **settings)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"edm_vpred.sigma_max": [80.0]}, r"EDM's noise levels by its tensor edm_vpred\.sigma_max"),
        (
            {"edm_mean": [0.0] * 4, "edm_std": [1.0] * 4},
            r"EDM's noise levels by its tensor edm_mean",
        ),
        ({"in 9": 9}, "an inpainting model by the 9 channels"),
        ({"in 8": 8}, "an instruct-pix2pix model by the 8 channels"),
        ({"only": {"lora_unet_a.lora_down.weight": [1.0]}}, "a LoRA by its tensor lora_unet_a"),
        (
            {"only": {"conditioner.embedders.0.model.ln_final.weight": [1.0]}},
            "an SDXL refiner by its tensor",
        ),
        ({"only": {"first_stage_model.encoder.conv_in.weight": [1.0]}}, "a VAE alone"),
        ({"only": {"double_blocks.0.img_attn.norm.key_norm.scale": [1.0]}}, "a diffusion transf"),
        ({"only": {"x": [1.0]}}, "found the tensor x"),
        ({"only": {}}, "found no tensors"),
        ({"without": "cond_stage"}, "a U-Net without the text encoders of its family"),
        ({"without": "model.diffusion_model.middle_block.1"}, r"middle_block\.1\..* is missing"),
    ],
)
def test_what_is_no_base_model_is_named(tmp_path, tensors, message):
    """A file that cannot be trained is told as what it is, with what decides it."""
    path = tmp_path / "m.safetensors"
    if "only" in tensors:
        save_file({name: torch.tensor(value) for name, value in tensors["only"].items()}, path)
    else:
        found = write_single(path, random_model("sd1"))
        for name, value in tensors.items():
            if name.startswith("in "):
                first = "model.diffusion_model.input_blocks.0.0.weight"
                found[first] = torch.zeros(16, value, 3, 3)
            elif name == "without":
                found = {one: found[one] for one in found if not one.startswith(value)}
            else:
                found[name] = torch.tensor(value)
        save_file(found, path)
    with pytest.raises(ModelError, match=message):
        build_model(asked(tmp_path, path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.ckpt", b"PK\3\4", r"m\.ckpt: a pickle, which may run programs.*Save it as one"),
        ("m.pt", b"", r"m\.pt: a pickle"),
        ("m.safetensors", b"PK\3\4" + bytes(50), "a zip file such as torch.save writes"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        ("m.safetensors", b"<!doctype html>", "a page of a website"),
        ("m.safetensors", b"", r"not a complete \.safetensors file"),
        ("m.safetensors", b"\xff" * 64, r"not a complete \.safetensors file"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, content, message):
    """Pickles are refused with the way to convert them, whatever they are called."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=message):
        asked(tmp_path, tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path):
    """The message is about the path, and not about a family that nobody has to name."""
    with pytest.raises(ModelError, match=r"none\.safetensors: .*[Nn]o such file"):
        asked(tmp_path, tmp_path / "none.safetensors")
    config = asked(tmp_path, tmp_path / "none.safetensors", model__family="sd1")
    with pytest.raises(ModelError, match=r"none\.safetensors: .*[Nn]o such file"):
        build_model(config)


def test_a_cut_file_is_refused(tmp_path):
    """A download that broke off is told before anything is built."""
    path = tmp_path / "m.safetensors"
    write_single(path, random_model("sd1"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"not a complete \.safetensors file.*Copy the file again"):
        asked(tmp_path, path)


def test_the_fingerprint_is_that_of_all_bytes(tmp_path):
    """It does not change with the name of the file, and does with any byte of it."""
    path = tmp_path / "m.safetensors"
    write_single(path, random_model("sd1"))
    first = model_fingerprint(asked(tmp_path, path))
    moved = path.rename(tmp_path / "other.safetensors")
    assert model_fingerprint(asked(tmp_path, moved)) == first
    content = bytearray(moved.read_bytes())
    content[-3] ^= 1
    moved.write_bytes(content)
    assert model_fingerprint(asked(tmp_path, moved)) != first


def test_reading_takes_no_network_and_the_config_no_torch(tmp_path):
    """A config with a single file is checked without torch."""
    write_single(tmp_path / "m.safetensors", random_model("sd2"))
    config = write(
        tmp_path / "config.toml", LEAST | {"model": {"path": str(tmp_path / "m.safetensors")}}
    )
    code = (
        "import sys; from trainer.config.load import load_config; "
        f"print(load_config({str(config)!r}).model.family, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "sd2 False\n", done.stderr


# Latents of another VAE.


def folder_with_vae(folder, **config):
    """A model folder that holds nothing but the config of a VAE."""
    (folder / "model/vae").mkdir(parents=True)
    (folder / "model/vae/config.json").write_text(json.dumps(config))
    return folder / "model"


def latents_of(config):
    """Channels, scale and shift of the latents of a config."""
    family = family_of(config.model)
    return family.latent_channels, family.latent_scale, family.latent_shift


def test_the_config_of_the_vae_tells_the_latents(tmp_path):
    """Channels, scale and shift come from the VAE's config, and [model] has the last word."""
    path = folder_with_vae(tmp_path, latent_channels=4, scaling_factor=0.1406, shift_factor=-0.47)
    base = {"model.path": str(path), "model.family": "sdxl"}
    assert latents_of(load(tmp_path, base)) == (4, 0.1406, -0.47)
    assert latents_of(load(tmp_path, base | {"model.latent_scale": 0.5})) == (4, 0.5, -0.47)
    empty = folder_with_vae(tmp_path / "b")
    assert latents_of(load(tmp_path, base | {"model.path": str(empty)})) == (4, 0.13025, 0.0)
    assert latents_of(load(tmp_path, {"model.family": "sdxl"})) == (4, 0.13025, 0.0)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"latent_channels": 32}, ConfigError, r"model\.latent_scale: not set.*of 32 channels"),
        ({"scaling_factor": "x"}, ConfigError, r'latent_scale is "x"|scaling_factor is "x"'),
        ({"scaling_factor": float("nan")}, ConfigError, "scaling_factor is NaN"),
        ({"latents_mean": [0, 1, 2, 3]}, ModelError, "a shift for each channel"),
    ],
)
def test_a_config_of_a_vae_that_does_not_fit_is_refused(tmp_path, config, error, message):
    """Numbers that are none, and means per channel, are errors that name the file."""
    path = folder_with_vae(tmp_path, **config)
    with pytest.raises(error, match=message):
        load(tmp_path, {"model.path": str(path), "model.family": "sdxl"})


def test_a_model_of_other_latents_is_read(tmp_path):
    """A U-Net of 16 channels tells them itself, and asks for the scale."""
    path = tmp_path / "m.safetensors"
    model = random_model("sdxl", model={"latent_channels": 16})
    write_single(path, model, vae=False)
    with pytest.raises(ConfigError, match=r"latent_scale: not set.*latents of 16 channels"):
        asked(tmp_path, path)
    config = asked(tmp_path, path, model__latent_scale=0.6, model__latent_shift=0.1)
    assert latents_of(config) == (16, 0.6, 0.1)
    assert build_model(config).unet.conv_in.weight.shape == (16, 16, 3, 3)


def test_a_vae_of_its_own_tells_the_latents(tmp_path):
    """`model.vae` may be a folder or a file; one of other channels than the U-Net is refused."""
    path = tmp_path / "m.safetensors"
    write_single(path, random_model("sd1"))
    vae = tiny_vae()
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path / "vae")
    assert latents_of(asked(tmp_path, path, model__vae=str(tmp_path / "vae"))) == (4, 0.5, 0.0)
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    assert latents_of(asked(tmp_path, path, model__vae=str(file))) == (4, 0.18215, 0.0)
    tiny_vae(8).save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"model\.vae: .*8 channels, but the U-Net .* takes 4"):
        asked(tmp_path, path, model__vae=str(tmp_path / "other"))
    with pytest.raises(ModelError, match=r"none.*no such file.*Set model\.vae"):
        asked(tmp_path, path, model__vae=str(tmp_path / "none"))
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"expected a VAE\. Set model\.vae"):
        asked(tmp_path, path, model__vae=str(tmp_path / "x.safetensors"))
