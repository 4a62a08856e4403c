"""Tests of single files that are written: names, values, marks, metadata, and use by diffusers."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from builders.model import make_config, make_ids, predict
from builders.single_files import (
    SECOND,
    originals_of,
    random_model,
    tiny_vae,
    write_single,
)
from diffusers import (
    AutoencoderKL,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.errors import ModelError
from trainer.families import FAMILIES
from trainer.model.build import build_model
from trainer.model.save import save_model
from trainer.model.save_single import metadata_of, save_single_file
from trainer.model.shapes import VAE_SHAPES
from trainer.model.tensor_file import ReadTensors, new_tensor, write_tensors
from trainer.model.text_encoders import encode, encoder_rules

DATA = Path(__file__).parents[2] / "data"
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def metadata(path):
    """The metadata of a file."""
    with safe_open(path, "pt") as file:
        return file.metadata()


def same_bits(one, other):
    """True for tensors of one type, one shape and the same bits."""
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def trained_state(model):
    """The state of a model after its trained parameters moved, and their names."""
    trained = {name for name, one in model.named_parameters() if one.requires_grad}
    moved = {
        name: value + 0.125 if name in trained else value
        for name, value in model.state_dict().items()
    }
    return moved, trained


@pytest.fixture
def vae_folder(tmp_path):
    """The folder of a tiny VAE."""
    tiny_vae().save_pretrained(tmp_path / "a vae")
    return tmp_path / "a vae"


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_full_size_are_the_golden_ones(family, tmp_path, monkeypatch):
    """Without a source, keys and shapes are those of sd-scripts, all in the type that is asked."""
    listed = json.loads((DATA / f"original_keys_{family}.json").read_text())
    expected = {name: shape for name, shape in listed.items() if not name.startswith("_")}
    folder = tmp_path / "vae"
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE_SHAPES["full"])
    vae.save_config(folder)
    header = {
        name: {"dtype": "F16", "shape": list(one.shape), "data_offsets": [0, 0]}
        for name, one in vae.state_dict().items()
    }
    place = 0
    for one in header.values():
        size = 2 * torch.Size(one["shape"]).numel()
        one["data_offsets"] = [place, place + size]
        place += size
    content = json.dumps(header).encode()
    with (folder / "diffusion_pytorch_model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + place)  # no byte of it takes room on the disk
    found = {}

    def keep(_path, tensors, _metadata, _reader):
        found.update({one.name: (one.dtype, list(one.shape)) for one in tensors})

    monkeypatch.setattr("trainer.model.save_single.write_tensors", keep)
    config = make_config(
        family, model={"size": "full", "vae": str(folder)}, export={"dtype": "bf16"}
    )
    model = build_model(config, weights=False)
    guessed = "unet.up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    state = {guessed: torch.tensor([-0.1, 0.1] * 160)}
    notes = save_single_file(model, state, tmp_path / "m.safetensors", config, step=1)
    assert {name: shape for name, (_, shape) in found.items()} == expected
    assert {dtype for dtype, _ in found.values()} == {"BF16"}
    if family != "sd2":
        assert notes == []
        return
    (note,) = notes
    assert note == (
        'WARNING: ComfyUI takes the file for a model of prediction "v": the standard deviation of '
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias is 0.1001, above "
        '0.09, but noise.prediction is "epsilon"'
    )
    config = make_config(family, model={"size": "full"}, noise={"prediction": "v"})
    notes = save_single_file(model, state, tmp_path / "m.safetensors", config, step=1)
    assert [note.partition(":")[0] for note in notes] == [
        "it has no VAE",
        "other programs take it for v-prediction by its v_pred",
        'ComfyUI takes the file for a model of prediction "v"',
    ]
    assert found["v_pred"] == ("F32", [0])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_without_a_source_comes_back(family, dtype, tmp_path, vae_folder):
    """Our own reader finds each tensor with the same bits, a projection that is not square too."""
    path = tmp_path / "m.safetensors"
    config = make_config(family, model={"vae": str(vae_folder)}, export={"dtype": dtype})
    model = random_model(family)
    save_single_file(model, model.state_dict(), path, config, step=3)
    stored = load_file(path)
    for name, value in originals_of(model).items():
        assert same_bits(stored[name], value.to(DTYPES[dtype])), name
    assert {value.dtype for value in stored.values()} == {DTYPES[dtype]}
    again = build_model(make_config(family, path)).state_dict()
    for name, value in model.state_dict().items():
        assert same_bits(again[name], value.to(DTYPES[dtype]).float()), name


@pytest.mark.parametrize("stored", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("precision", ["fp32", "full_bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_is_trained_differs_from_the_source(family, precision, stored, tmp_path):
    """Keys, shapes and types are those of the source, and untrained tensors have its very bits."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    write_single(source, random_model(family), DTYPES[stored])
    config = make_config(
        family,
        source,
        model={"train_only": ["down_blocks.*"]},
        train={"precision": precision},
        optimizer={"text_learning_rate": 1e-5} if family == "sdxl" else {},
    )
    model = build_model(config)
    state, trained = trained_state(model)
    assert save_single_file(model, state, path, config, step=3) == []
    before, after = load_file(source), load_file(path)
    assert after.keys() == before.keys()
    changed = {name for name in after if not same_bits(after[name], before[name])}
    assert {one.dtype for one in after.values()} == {one.dtype for one in before.values()}
    assert {name: one.shape for name, one in after.items()} == {
        name: one.shape for name, one in before.items()
    }
    prefixes = ["model.diffusion_model.input_blocks."]
    if family == "sdxl":
        prefixes.append("conditioner.embedders.0.transformer.text_model.")
    assert changed
    assert all(name.startswith(tuple(prefixes)) for name in changed)
    assert len(changed) == len(trained)
    again = build_model(make_config(family, path)).state_dict()
    for name in trained:
        assert same_bits(again[name], state[name].to(DTYPES[stored]).float()), name


def test_forms_of_the_source_are_kept(tmp_path):
    """Convolutions stay convolutions, and a projection of a linear layer stays one."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    tensors = write_single(source, random_model("sdxl"))
    for name in [name for name in tensors if name.endswith(("proj_in.weight", "proj_out.weight"))]:
        if tensors[name].ndim == 2:
            tensors[name] = tensors[name][:, :, None, None]
    tensors[f"{SECOND}text_projection.weight"] = tensors.pop(f"{SECOND}text_projection").T
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    save_file(tensors, source)
    config = make_config("sdxl", source, optimizer={"text2_learning_rate": 1e-5})
    model = build_model(config)
    save_single_file(model, model.state_dict(), path, config, step=3)
    after = load_file(path)
    assert after.keys() == tensors.keys()
    assert all(same_bits(after[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_missing_text_model_is_restored_and_told(family, tmp_path):
    """Newer programs wrote files without it, which older ones do not read."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    whole = write_single(source, random_model(family))
    save_file({name.replace("text_model.", ""): value for name, value in whole.items()}, source)
    config = make_config(family, source)
    model = build_model(config)
    notes = save_single_file(model, model.state_dict(), path, config, step=3)
    after = load_file(path)
    assert after.keys() == whole.keys()
    assert all(same_bits(after[name], value) for name, value in whole.items())
    assert re.search(r"^\d+ tensors of the text encoder are named with text_model\.", notes[0])


@pytest.mark.parametrize(
    ("before", "noise", "after"),
    [
        ((), {"prediction": "v"}, ("v_pred",)),
        ((), {"prediction": "v", "zero_terminal_snr": True}, ("v_pred", "ztsnr")),
        (("v_pred",), {"prediction": "v"}, ("v_pred",)),
        (("v_pred",), {"prediction": "v", "zero_terminal_snr": True}, ("v_pred", "ztsnr")),
        (("ztsnr",), {}, ()),
        (("v_pred", "ztsnr"), {}, ()),
    ],
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_marks_are_those_of_the_training(family, before, noise, after, tmp_path):
    """They are added where they are missing, and removed where they would be wrong."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    write_single(source, random_model(family), others={mark: torch.empty(0) for mark in before})
    config = make_config(family, source, noise=noise)
    model = build_model(config)
    notes = save_single_file(model, model.state_dict(), path, config, step=3)
    found = load_file(path)
    assert [mark for mark in ("v_pred", "ztsnr") if mark in found] == [*after]
    assert found.keys() - {"v_pred", "ztsnr"} == load_file(source).keys() - {"v_pred", "ztsnr"}
    assert all(found[mark].numel() == 0 for mark in after)
    assert len(notes) == bool(after)


def test_the_type_can_be_chosen(tmp_path):
    """What is held here gets the type; all else of the source keeps its bits."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    before = write_single(source, random_model("sd1"))
    config = make_config("sd1", source, export={"dtype": "fp16"})
    model = build_model(config)
    save_single_file(model, model.state_dict(), path, config, step=3)
    after = load_file(path)
    for name, value in before.items():
        held = (
            name.startswith(("model.diffusion_model.", "cond_stage_model.")) and "_ids" not in name
        )
        assert same_bits(after[name], value.half() if held else value), name


def test_a_number_that_does_not_fit_is_refused(tmp_path):
    """A weight that would become infinite is named, and nothing is written."""
    path = tmp_path / "m.safetensors"
    config = make_config("sd1", export={"dtype": "fp16"})
    model = random_model("sd1")
    state = model.state_dict()
    state["unet.conv_in.bias"][0] = 1e5
    with pytest.raises(ModelError, match=r"input_blocks\.0\.0\.bias: found 100000.*export\.dtype"):
        save_single_file(model, state, path, config, step=3)
    assert list(tmp_path.iterdir()) == []


def test_metadata_tell_the_model_and_nothing_of_the_data(tmp_path, vae_folder):
    """Title, architecture, prediction, resolution, date and hash; no path and nothing else."""
    path = tmp_path / "m.safetensors"
    config = make_config(
        "sdxl",
        model={"vae": str(vae_folder)},
        noise={"prediction": "v"},
        export={"title": 'My "model"'},
    )
    model = random_model("sdxl")
    save_single_file(model, model.state_dict(), path, config, step=3)
    found = metadata(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", found.pop("modelspec.date"))
    assert found == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": 'My "model"',
        "modelspec.resolution": "1024x1024",
        "modelspec.prediction_type": "v",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(content[start:]).hexdigest()}",
    }
    assert str(tmp_path).encode() not in content
    assert metadata_of(make_config("sd1"), 1200)["modelspec.title"] == (
        "SD 1.x, trained for 1,200 steps"
    )


def test_a_flow_is_told_by_its_metadata_alone(tmp_path):
    """No program recognises a flow, and the mark of v-prediction would be wrong."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    write_single(source, random_model("sdxl"))
    config = make_config("sdxl", source, noise={"prediction": "flow", "shift": 2.5})
    model = build_model(config)
    (note,) = save_single_file(model, model.state_dict(), path, config, step=3)
    assert "node ModelSamplingSD3 at shift 2.5" in note
    assert load_file(path).keys() == load_file(source).keys()
    found = metadata(path)
    assert found["modelspec.prediction_type"] == "velocity"
    assert found["modelspec.noise_process"] == "flow"
    assert found["modelspec.sampling_shift"] == "2.5"


def test_metadata_of_the_source_are_not_passed_on(tmp_path):
    """Files of other trainers hold names of data sets and paths."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    write_single(source, random_model("sd1"), metadata={"ss_dataset_dirs": "/home/anna/pictures"})
    config = make_config("sd1", source)
    model = build_model(config)
    save_single_file(model, model.state_dict(), path, config, step=3)
    assert b"anna" not in path.read_bytes()


def test_a_file_without_vae_says_who_will_complain(tmp_path):
    """Programs that need a VAE from elsewhere are named, with or without a source."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    write_single(source, random_model("sd1"), vae=False)
    for config in (make_config("sd1"), make_config("sd1", source)):
        model = build_model(config)
        (note,) = save_single_file(model, model.state_dict(), path, config, step=3)
        assert note.startswith("it has no VAE: ComfyUI needs one from a Load VAE node, WebUI")
        assert not any(name.startswith("first_stage_model.") for name in load_file(path))


@pytest.mark.parametrize("kind", ["folder", "diffusers file", "original file", "model file"])
def test_a_vae_of_its_own_is_written(kind, tmp_path, vae_folder):
    """`model.vae` gives the VAE of the export, whatever way it is stored, in both formats."""
    source, path = tmp_path / "source.safetensors", tmp_path / "m.safetensors"
    model = random_model("sd1")
    write_single(source, model)
    plain = load_file(source)
    bare = {
        name.removeprefix("first_stage_model."): value
        for name, value in plain.items()
        if name.startswith("first_stage_model.")
    }
    vae = vae_folder
    if kind == "diffusers file":
        vae = vae_folder / "diffusion_pytorch_model.safetensors"
    elif kind == "original file":
        vae = tmp_path / "vae.safetensors"
        save_file(bare, vae)
    elif kind == "model file":
        vae = source
    zeros = {
        name: value * 0 if name.startswith("first_stage_model.") else value
        for name, value in plain.items()
    }
    other = tmp_path / "other.safetensors"
    save_file(zeros, other)
    config = make_config("sd1", other, model={"vae": str(vae)})
    built = build_model(config)
    assert save_single_file(built, built.state_dict(), path, config, step=3) == []
    after = load_file(path)
    assert after.keys() == plain.keys()
    assert all(same_bits(after[name], value) for name, value in plain.items())
    save_model(built, built.state_dict(), tmp_path / "model", config)
    again = AutoencoderKL.from_pretrained(tmp_path / "model/vae").state_dict()
    assert all(torch.equal(again[name], value) for name, value in tiny_vae().state_dict().items())


def test_a_folder_gives_its_vae_and_its_types(tmp_path, vae_folder):
    """From a folder in halves, with old names in its VAE, comes a file in halves that holds it."""
    first = make_config("sd1", export={"dtype": "fp16"}, model={"vae": str(vae_folder)})
    model = random_model("sd1")
    save_model(model, model.state_dict(), tmp_path / "folder", first)
    file = tmp_path / "folder/vae/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, value in load_file(file).items():
        former = name
        for new, before in old.items():
            former = former.replace(f".{new}.", f".{before}.")
        renamed[former] = value.clone()
    assert renamed.keys() != load_file(file).keys()
    save_file(renamed, file)
    config = make_config("sd1", tmp_path / "folder")
    built = build_model(config)
    path = tmp_path / "m.safetensors"
    save_single_file(built, built.state_dict(), path, config, step=3)
    after = load_file(path)
    for name, value in originals_of(model).items():
        in_vae = name.startswith("first_stage_model.")
        assert same_bits(after[name], value if in_vae else value.half()), name


# In diffusers.


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad
def test_diffusers_reads_the_file(family, tmp_path, vae_folder):
    """`from_single_file` gives every tensor with the same bits, and the trained prediction."""
    path = tmp_path / "m.safetensors"
    config = make_config(family, model={"vae": str(vae_folder)}, train={"seed": 1})
    model = random_model(family)
    save_single_file(model, model.state_dict(), path, config, step=3)
    save_model(model, model.state_dict(), tmp_path / "config", config)
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipeline = kind.from_single_file(
        path, config=str(tmp_path / "config"), local_files_only=True, torch_dtype=torch.float32
    )
    for name, part in (model.parts() | {"vae": tiny_vae()}).items():
        found = {
            key.removeprefix("text_model."): value
            for key, value in getattr(pipeline, name).state_dict().items()
        }
        for key, value in part.state_dict().items():
            assert same_bits(found[key.removeprefix("text_model.")], value), f"{name}.{key}"
    if family == "sdxl":
        assert model.text_encoder_2.text_projection.weight.shape == (20, 24)
    expected = predict(model)
    for name in model.parts():
        setattr(model, name, getattr(pipeline, name))
    assert torch.equal(predict(model), expected)
    assert isinstance(pipeline.unet, UNet2DConditionModel)
    assert encode(
        model.text_encoder, make_ids(family, ["a"], 1)[0], encoder_rules(family)[0], "kohya"
    )


def test_a_file_that_is_mapped_is_replaced(tmp_path):
    """Also over the source itself, which stays whole for who has it open."""
    source = tmp_path / "source.safetensors"
    write_single(source, random_model("sd1"))
    before = load_file(source)
    config = make_config("sd1", source)
    model = build_model(config)
    state, _ = trained_state(model)
    with safe_open(source, "pt") as mapped:
        save_single_file(model, state, source, config, step=3)
        assert same_bits(mapped.get_tensor("alphas_cumprod"), before["alphas_cumprod"])
    again = build_model(config).state_dict()
    assert all(same_bits(again[name], value) for name, value in state.items())
    assert [one.name for one in tmp_path.iterdir()] == ["source.safetensors"]


def test_a_source_that_is_gone_is_named(tmp_path):
    """Without it, nobody knows the names and the tensors that a file must have."""
    source = tmp_path / "source.safetensors"
    write_single(source, random_model("sd1"))
    config = make_config("sd1", source)
    model = build_model(config)
    source.unlink()
    with pytest.raises(ModelError, match=r"source\.safetensors: no such file .*--source PATH"):
        save_single_file(model, model.state_dict(), tmp_path / "m.safetensors", config, step=3)


def test_a_part_of_a_weight_is_not_taken_for_the_whole(tmp_path):
    """A tensor with fewer numbers than its shape has, as engines divide them, is a loud error."""
    tensors = [
        new_tensor("whole", "F32", (2, 3), lambda: torch.zeros(6)),
        new_tensor("part", "F32", (2, 2), lambda: torch.zeros(0)),
    ]
    with (
        ReadTensors() as reader,
        pytest.raises(ModelError, match=r"part came with 0 bytes, expected 16 for its shape"),
    ):
        write_tensors(tmp_path / "m.safetensors", tensors, {}, reader)
    assert list(tmp_path.iterdir()) == []
