import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from builders.config import load
from builders.model import make_config, make_model
from builders.ranks import run_ranks
from builders.runs import rewrite_examples, settings_of, state_of, train_here, write_config
from builders.single_files import random_model, tiny_vae, write_single
from diffusers import AutoencoderKL
from PIL import Image

from trainer.config.settings import SamplePrompt
from trainer.data.samples import build_chunker
from trainer.errors import ConfigError, ModelError
from trainer.families import FAMILIES
from trainer.model.noise_schedule import Schedule
from trainer.model.save import save_model
from trainer.model.vae import load_vae
from trainer.report.page import write_report
from trainer.training import sampling
from trainer.training.engines.accelerator import build_engine
from trainer.training.engines.launcher import agreed
from trainer.training.engines.loss_scaling import LossScaling
from trainer.training.sampling import Sampler, check_samples, make_latents, sampling_scheduler

PROMPTS = [
    {"prompt": "1girl, hat", "negative_prompt": "fog", "width": 64, "height": 96, "steps": 2},
    {"prompt": "", "width": 72, "height": 64, "seed": 4, "steps": 1, "guidance": 1},
]


def write_vae(folder, **changes):
    """Write a tiny VAE with random weights."""
    torch.manual_seed(0)
    shape = {
        "block_out_channels": (8, 8, 8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
    }
    AutoencoderKL(**(shape | changes)).save_pretrained(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A diffusers folder of a tiny SD1 model with a VAE."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model = make_model("sd1")
    save_model(model, model.state_dict(), folder, make_config("sd1"))
    write_vae(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten metadata of a few examples."""
    return rewrite_examples(tmp_path_factory.mktemp("data"), 12)


def config_of(folder, metadata, model_folder, name, **samples):
    """The config of a run of three steps with a text encoder that trains."""
    sections = settings_of(
        metadata,
        folder / name,
        model={"path": str(model_folder)},
        train={"max_steps": 3},
        caption={"dropout_rate": 0.5},
    )
    path = write_config(folder / f"{name}.toml", sections)
    if samples:
        tables = "".join(
            "[[samples.prompts]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in one.items())
            for one in PROMPTS
        )
        every = "".join(f"{k} = {v}\n" for k, v in samples.items())
        path.write_text(path.read_text() + f"[samples]\n{every}{tables}")
    return path


def test_samples_change_nothing_of_the_training(tmp_path, metadata, model_folder):
    """A run writes its pictures every n steps and at the end, and the same weights as without."""
    plain = config_of(tmp_path, metadata, model_folder, "plain")
    sampled = config_of(tmp_path, metadata, model_folder, "sampled", every_steps=2)
    assert train_here(plain) == 0
    assert train_here(sampled) == 0
    one, other = (state_of(tmp_path / name, 3) for name in ("plain", "sampled"))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    made = tmp_path / "sampled" / "samples"
    assert sorted(path.name for path in made.iterdir()) == ["step-00000002", "step-00000003"]
    lines = (made / "step-00000003" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {
            "step": 3,
            "index": number,
            "file": f"{number:02d}.png",
            "negative_prompt": "",
            "seed": 0,
            "guidance": 6.0,
            **prompt,
        }
        for number, prompt in enumerate(PROMPTS)
    ]
    for number, prompt in enumerate(PROMPTS):
        with Image.open(made / "step-00000003" / f"{number:02d}.png") as picture:
            assert picture.size == (prompt["width"], prompt["height"])
            assert len(picture.getcolors(1 << 20)) > 20
    # Its report shows them, and what was trained.
    write_report(tmp_path / "sampled", None, force=False, command="")
    page = (tmp_path / "sampled" / "report.html").read_text(encoding="utf-8")
    assert page.count("<img src=") == 4
    assert '<td>unet</td><td class="n">249,268</td><td class="n">100.0 %</td>' in page
    assert "Step 3 of 3: the run is complete." in page
    # A run that goes on from an older state makes the later pictures again, and keeps the old ones.
    later = made / "step-00000009"
    (made / "step-00000003").rename(later)
    assert train_here(sampled, resume="latest") == 0
    assert sorted(path.name for path in made.iterdir()) == [
        "before-resume-step-00000009",
        "step-00000002",
        "step-00000003",
    ]


@pytest.mark.ranks
@pytest.mark.slow
def test_one_rank_makes_the_pictures_for_all(tmp_path, metadata, model_folder):
    """With two processes, one of them makes the pictures while the other one waits."""
    config = config_of(tmp_path, metadata, model_folder, "two", every_steps=2)
    ends = run_ranks(tmp_path, config, "--set", "train.batch_size=1")
    assert [end.code for end in ends] == [0, 0], ends
    made = tmp_path / "two" / "samples"
    assert sorted(path.name for path in made.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_a_perfect_model_gives_its_picture(prediction, zero_terminal_snr):
    """Whatever the noise, the scheduler leads a model that knows the latents to these latents."""
    if zero_terminal_snr and prediction == "epsilon":
        pytest.skip("the last timestep has no latents to tell")
    config = make_config(
        "sd1", noise={"prediction": prediction, "zero_terminal_snr": zero_terminal_snr}
    )
    scheduler, schedule = sampling_scheduler(config), Schedule.of(config.noise)
    assert torch.allclose(scheduler.alphas_cumprod, schedule.alphas_cumprod_T, atol=1e-6)
    assert scheduler.init_noise_sigma == 1
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == (999 if zero_terminal_snr else 901)
    generator = torch.Generator().manual_seed(1)
    wanted, latents = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for timestep in scheduler.timesteps:
        signal, rest = (
            share.reshape(1, 1, 1, 1)
            for share in (
                schedule.alphas_cumprod_T[timestep].sqrt(),
                (1 - schedule.alphas_cumprod_T[timestep]).sqrt(),
            )
        )
        eps = (latents - signal * wanted) / rest
        predicted = eps if prediction == "epsilon" else signal * eps - rest * wanted
        (latents, *_) = scheduler.step(predicted, timestep, latents, return_dict=False)
    # The scheduler ends at the first timestep, which has a little noise.
    first = schedule.alphas_cumprod_T[0]
    wanted = first.sqrt() * wanted + (1 - first).sqrt() * eps
    assert torch.allclose(latents, wanted, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 2.5, "resolution"])
def test_a_perfect_flow_gives_its_picture(shift):
    """A flow is led from pure noise to the latents, in steps with the shift of its training."""
    config = make_config("sd1", noise={"prediction": "flow", "shift": shift})
    scheduler = sampling_scheduler(config)
    scheduler.set_timesteps(10)
    factor = 0.5 if shift == "resolution" else shift

    def shifted(sigma):
        return factor * sigma / (1 + (factor - 1) * sigma)

    expected = 1000 * shifted(np.linspace(1, shifted(0.001), 10))
    assert np.allclose(scheduler.timesteps.numpy(), expected)
    generator = torch.Generator().manual_seed(1)
    wanted, latents = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
    for timestep in scheduler.timesteps:
        flow = (latents - wanted) / (timestep / 1000)
        (latents, *_) = scheduler.step(flow, timestep, latents, return_dict=False)
    assert torch.allclose(latents, wanted, atol=1e-4)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("chunking", ["kohya", "a1111", "crop"])
def test_prompts_are_chunked_as_in_training(family, chunking):
    """Both prompts are encoded at as many chunks as captions, and the pictures are repeatable."""
    text = {"chunking": chunking} | ({"max_tokens": 150} if chunking != "crop" else {})
    config, model = make_config(family, text=text), make_model(family, text=text)
    chunker, seen = build_chunker(config), []
    encode = model.encode_text
    model.encode_text = lambda ids: seen.append(ids) or encode(ids)
    prompt = SamplePrompt(prompt="cat, " * 200, width=64, height=64, steps=2, guidance=3.0)
    state = torch.get_rng_state()
    with torch.no_grad():
        made = [
            make_latents(model.eval(), chunker, prompt, config, torch.device("cpu"))
            for _ in range(2)
        ]
    assert torch.equal(*made)
    assert torch.equal(state, torch.get_rng_state())
    n_chunks = 1 if chunking == "crop" else 2
    assert [ids.shape for ids in seen[0]] == [(2, n_chunks, 77)] * len(FAMILIES[family].encoders)
    laid_out = chunker.lay_out(chunker.cut(prompt.prompt), n_chunks)
    assert [ids[1].tolist() for ids in seen[0]] == list(laid_out)


def test_guidance_weighs_both_predictions():
    """Without guidance the negative prompt has no effect; with it, it has."""
    config, model = make_config("sd1"), make_model("sd1").eval()
    chunker = build_chunker(config)

    def latents(negative, guidance):
        prompt = SamplePrompt(
            prompt="a", negative_prompt=negative, width=64, height=64, steps=1, guidance=guidance
        )
        with torch.no_grad():
            return make_latents(model, chunker, prompt, config, torch.device("cpu"))

    assert torch.equal(latents("x", 1.0), latents("y", 1.0))
    assert not torch.equal(latents("x", 5.0), latents("y", 5.0))
    # One step is linear in the guidance.
    between = (latents("x", 1.0) + latents("x", 5.0)) / 2
    assert torch.allclose(between, latents("x", 3.0), atol=1e-3)


def test_the_vae_of_a_single_file_makes_the_pictures(tmp_path):
    """Pictures are decoded by the VAE in a single file, or by that of `model.vae`."""
    write_single(tmp_path / "m.safetensors", random_model("sd1"))
    write_single(tmp_path / "bare.safetensors", random_model("sd1"), vae=False)
    tiny_vae().save_pretrained(tmp_path / "vae")
    expected = tiny_vae().state_dict()
    for model in (
        {"path": str(tmp_path / "m.safetensors")},
        {"path": str(tmp_path / "bare.safetensors"), "vae": str(tmp_path / "vae")},
        {"path": "random", "vae": str(tmp_path / "m.safetensors")},
    ):
        found = load_vae(make_config("sd1", model["path"], model=model)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert load_vae(make_config("sd1", tmp_path / "bare.safetensors")) is None


def test_pictures_without_a_vae_are_refused(tmp_path, model_folder):
    """Before training, a message says that there is no VAE, or that it does not fit."""
    asked = {"samples": {"prompts": [{"prompt": "a"}]}}
    with pytest.raises(ConfigError, match="pictures need a VAE"):
        check_samples(make_config("sd1", **asked))
    check_samples(make_config("sd1", model_folder, **asked))
    check_samples(make_config("sd1"))
    write_vae(tmp_path / "vae", latent_channels=16)
    with pytest.raises(ModelError, match="16 latent channels"):
        check_samples(make_config("sd1", tmp_path, **asked))
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"not a complete \.safetensors file"):
        check_samples(make_config("sd1", tmp_path, **asked))


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([{}], "found no `prompt` in [[samples.prompts]], expected text in quotes."),
        ([{"prompt": "a", "width": 65}], "`samples.prompts.0.width` is 65, expected"),
        ([{"prompt": "a"}, {"prompt": "b", "sed": 1}], "unknown key `sed` in [[samples.prompts]]"),
        ([{"prompt": 3}], "`samples.prompts.0.prompt` is 3, expected text in quotes."),
        (["a", "b"], '`samples.prompts.0` is "a", expected a section [[samples.prompts]].'),
        ("a", '`samples.prompts` is "a", expected a list of tables.'),
    ],
)
def test_mistakes_in_prompts_are_named(tmp_path, prompts, said):
    """A mistake in a prompt is told with its number and its key."""
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, {"samples.prompts": prompts})
    assert said in str(refused.value)


@pytest.fixture
def sampler(tmp_path, model_folder):
    """The sampler of a run in `tmp_path`, and the lines that it says."""
    config = make_config(
        "sd1",
        model_folder,
        samples={"prompts": PROMPTS, "every_steps": 2},
        train={"output_dir": tmp_path, "seed": 7},
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    engine = build_engine(agreed(config, "the config"))
    state = SimpleNamespace(
        engine=engine,
        config=config,
        bare_model=make_model("sd1"),
        scaling=LossScaling(config, engine.device),
    )
    said = []
    sampler = Sampler(state, said.append)
    sampler.said = said
    return sampler


def test_pictures_go_to_the_trackers(sampler, tmp_path):
    """A tracker gets each picture in the layout that it takes, and modules keep their modes."""
    logged = {}
    for name in ("tensorboard", "wandb"):
        log = partial(lambda name, images, **rest: logged.update({name: (images, rest)}), name)
        sampler._engine.trackers.append(SimpleNamespace(name=name, log_images=log))
    model = sampler._state.bare_model.train()
    model.text_encoder.eval()
    sampler.make(4, lambda: False)
    assert sampler.said == [f"samples of step 4: {tmp_path}/samples/step-00000004"]
    images, rest = logged["tensorboard"]
    assert {name: image.shape for name, image in images.items()} == {
        "samples/00": (1, 96, 64, 3),
        "samples/01": (1, 64, 72, 3),
    }
    assert rest == {"step": 4, "dataformats": "NHWC"}
    assert logged["wandb"][1] == {"step": 4}
    assert model.unet.training
    assert not model.text_encoder.training
    with Image.open(tmp_path / "samples" / "step-00000004" / "00.png") as picture:
        assert np.array_equal(np.asarray(picture), images["samples/00"][0])


@pytest.mark.parametrize("hindrance", ["memory", "disk", "signal"])
def test_a_set_is_written_whole_or_not_at_all(sampler, tmp_path, monkeypatch, hindrance):
    """Full memory, a full disk and a signal leave no set, and the training goes on."""

    def fail(*_):
        raise torch.OutOfMemoryError if hindrance == "memory" else OSError(28, "No space left")

    if hindrance == "memory":
        monkeypatch.setattr(sampling, "decode", fail)
    if hindrance == "disk":
        monkeypatch.setattr(sampling, "publish_folder", fail)
    sampler.make(4, lambda: hindrance == "signal")
    assert [path for path in tmp_path.rglob("*") if "step-" in path.name] == []
    reasons = {"memory": "the memory of the device is full", "disk": "No space left"}
    if hindrance in reasons:
        (line,) = sampler.said
        assert line.startswith("WARNING: there are no samples of step 4: ")
        assert reasons[hindrance] in line
    else:
        assert sampler.said == []
