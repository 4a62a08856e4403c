"""Pictures that the model makes from the prompts of `[samples]` while it trains.

Nothing of the training changes by them: all noise comes from generators of their own, the weights
are read only, and the memory on the device is given back. One process makes the pictures; the
others wait for each of them in turn, so no wait is longer than that for one picture.

B batch (2 with guidance, else 1), C H W latents, N chunks, L 77.
"""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from capmerge.files.folders import publish_folder
from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.tokens.chunks import Chunker
from trainer.config.settings import Config, SamplePrompt, family_of
from trainer.data.samples import build_chunker
from trainer.errors import ConfigError
from trainer.families import FAMILIES, TIMESTEPS
from trainer.model.flow_sampling import sampling_shift
from trainer.model.load import PREDICTION_TYPES
from trainer.model.model import Model
from trainer.model.noise_schedule import FIRST_BETA, LAST_BETA
from trainer.model.vae import decode, has_vae, load_vae
from trainer.training.run_folder import SAMPLES_FILE, SAMPLES_FOLDER
from trainer.training.step import TrainState


def sampling_scheduler(config: Config) -> Any:
    """The scheduler of diffusers that samples a model trained with this config.

    It takes the noise and the noisy latents as they are, without a scale of its own. After
    `zero_terminal_snr` it begins at the last timestep, which is pure noise then. Source: arXiv
    2305.08891. A flow goes in straight steps, with the shift that it was trained with.
    """
    if config.noise.prediction == "flow":
        shift = sampling_shift(config.noise, config.model.family)
        return FlowMatchEulerDiscreteScheduler(  # type: ignore[no-untyped-call]
            num_train_timesteps=TIMESTEPS, shift=shift
        )
    return DDIMScheduler(  # type: ignore[no-untyped-call]
        num_train_timesteps=TIMESTEPS,
        beta_start=FIRST_BETA,
        beta_end=LAST_BETA,
        beta_schedule="scaled_linear",
        prediction_type=PREDICTION_TYPES[config.noise.prediction],
        rescale_betas_zero_snr=config.noise.zero_terminal_snr,
        timestep_spacing="trailing" if config.noise.zero_terminal_snr else "leading",
        steps_offset=0 if config.noise.zero_terminal_snr else 1,
        clip_sample=False,
        set_alpha_to_one=False,
    )


def check_samples(config: Config) -> None:
    """Raise `ConfigError` if pictures are asked for and the model has no VAE to make them with."""
    if config.samples.prompts and not has_vae(config):
        raise ConfigError(
            "samples.prompts: pictures need a VAE, and the model "
            f"({config.model.path}) has none, expected one in it or in model.vae. Set model.vae, "
            "for instance to the model that the latents were made with, or remove "
            "[[samples.prompts]]."
        )


class Sampler:
    """The pictures of a run, on every rank; rank 0 alone makes and writes them."""

    def __init__(self, state: TrainState, say: Callable[..., None]) -> None:
        self._state, self._config, self._say = state, state.config, say
        self._engine, self._prompts = state.engine, state.config.samples.prompts
        is_maker = bool(self._prompts) and self._engine.is_main_process
        self._vae = load_vae(self._config) if is_maker else None
        self._chunker = build_chunker(self._config) if is_maker else None

    def is_due(self, step: int) -> bool:
        """True if a set of pictures is due after this step, besides the one at the end."""
        every = self._config.samples.every_steps
        return bool(self._prompts and every and step % every == 0)

    def make(self, step: int, is_stopped: Callable[[], bool]) -> None:
        """Make the set of pictures after `step`; every rank has to call this.

        No set is written once `is_stopped()` is true, or when the disk or the memory is full: then
        a warning says so, and the training goes on.
        """
        pictures: list[Tensor] = []
        problem = ""
        for prompt in self._prompts:
            if self._vae is not None and not problem and not is_stopped():
                try:
                    pictures.append(self._picture(prompt))
                except torch.OutOfMemoryError:
                    problem = "the memory of the device is full"
            self._engine.wait_for_everyone()
        if self._vae is not None:
            if not problem and len(pictures) == len(self._prompts):
                problem = self._write(step, pictures)
            if problem:
                self._say(
                    f"WARNING: there are no samples of step {step:,}: {problem}. The run continues."
                )
            _free_memory(self._engine.device)
        self._engine.wait_for_everyone()

    def _picture(self, prompt: SamplePrompt) -> Tensor:
        """The picture of a prompt, (H, W, 3) uint8."""
        assert self._chunker is not None
        assert self._vae is not None
        device = self._engine.device
        with _evaluating(self._state.bare_model), torch.no_grad():
            with self._engine.autocast(), self._state.scaling.autocast():
                latents_1CHW = make_latents(
                    self._state.bare_model, self._chunker, prompt, self._config, device
                )
            vae = self._vae.to(device)
            try:
                return decode(vae, latents_1CHW, self._config)
            finally:
                vae.to("cpu")

    def _write(self, step: int, pictures: list[Tensor]) -> str:
        """Write a set of pictures; returns "", or the reason why it was not written."""
        folder = self._config.train.output_dir / SAMPLES_FOLDER / f"step-{step:08d}"
        unfinished = folder.with_name(f".{folder.name}.unfinished")
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            lines = []
            for number, (prompt, picture) in enumerate(zip(self._prompts, pictures, strict=True)):
                name = f"{number:02d}.png"
                Image.fromarray(picture.numpy()).save(unfinished / name)
                width, height = size_of(prompt, self._config)
                line = {"step": step, "index": number, "file": name, **prompt.model_dump()}
                lines.append(json.dumps(line | {"width": width, "height": height}) + "\n")
            (unfinished / SAMPLES_FILE).write_text("".join(lines), encoding="utf-8")
            publish_folder(unfinished, folder)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            return f"{folder} cannot be written ({error.strerror})"
        self._say(f"samples of step {step:,}: {folder}")
        for tracker in self._engine.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            shown = {f"samples/{n:02d}": one.numpy()[None] for n, one in enumerate(pictures)}
            tracker.log_images(shown, step=step, **layout)
        return ""


def set_aside_later_samples(output_dir: Path, step: int) -> None:
    """Rename the sets of pictures later than `step`, as a resumed run will make these again."""
    for folder in (output_dir / SAMPLES_FOLDER).glob("step-*"):
        number = folder.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            target = folder.with_name(f"before-resume-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)


def size_of(prompt: SamplePrompt, config: Config) -> tuple[int, int]:
    """The width and height of a picture in pixels."""
    side = FAMILIES[config.model.family].side_px
    return prompt.width or side, prompt.height or side


def make_latents(
    model: Model, chunker: Chunker, prompt: SamplePrompt, config: Config, device: torch.device
) -> Tensor:
    """The latents of a prompt (1, C, H, W) in float32, scaled as in training.

    The text is cut into chunks as captions are in training. With guidance, the prompt and its
    negative prompt are encoded at the same number of chunks. Source: arXiv 2207.12598.
    """
    width, height = size_of(prompt, config)
    guided = prompt.guidance != 1
    texts = [prompt.negative_prompt, prompt.prompt] if guided else [prompt.prompt]
    ids = tuple(each.to(device) for each in _ids(chunker, texts, config))
    hidden_BTD, pooled_BP = model.encode_text(ids)
    size_B6 = None
    if FAMILIES[config.model.family].size_conditioning:
        size = [float(side) for side in (height, width, 0, 0, height, width)]
        size_B6 = torch.tensor([size] * len(texts), device=device)

    scheduler = sampling_scheduler(config)
    scheduler.set_timesteps(prompt.steps, device=device)
    channels = family_of(config.model).latent_channels
    shape = (1, channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    # On the CPU, so that the noise is the same on any device.
    noise_1CHW = torch.randn(shape, generator=torch.Generator().manual_seed(prompt.seed))
    latents_1CHW = noise_1CHW.to(device)
    for timestep in scheduler.timesteps:
        noisy_BCHW = latents_1CHW.expand(len(texts), -1, -1, -1)
        predicted_BCHW = model.predict(
            noisy_BCHW, timestep.expand(len(texts)), hidden_BTD, pooled_BP, size_B6
        )
        predicted_1CHW = predicted_BCHW[-1:]
        if guided:
            away_1CHW = predicted_BCHW[:1]
            predicted_1CHW = away_1CHW + prompt.guidance * (predicted_1CHW - away_1CHW)
        (latents_1CHW, *_) = scheduler.step(
            predicted_1CHW, timestep, latents_1CHW, return_dict=False
        )
    return latents_1CHW


def _ids(chunker: Chunker, texts: list[str], config: Config) -> Iterator[Tensor]:
    """The ids (B, N, L) for each text encoder, at the number of chunks that training encodes."""
    cuts = [chunker.cut(text) for text in texts]
    n_chunks = max(chunker.chunks_of(cut) for cut in cuts)
    if chunker.max_chunks is not None and chunker.chunking != "crop":
        # With dynamic chunks, a batch has no more of them than it needs.
        n_chunks = n_chunks if config.text.dynamic_chunks else chunker.max_chunks
    for rows in zip(*(chunker.lay_out(cut, n_chunks) for cut in cuts), strict=True):
        yield torch.from_numpy(np.array(rows, np.int64))


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Switch dropout off; afterwards every module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
