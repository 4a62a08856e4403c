"""ComfyUI's guess at what an SD 2.x model predicts, whose files have no mark that it reads.

It takes the standard deviation of one bias of the U-Net, and a fine-tuned model can be guessed
wrongly. Source: ComfyUI, `comfy/supported_models.py`, class SD20.
"""

from torch import Tensor

from capmerge.errors import printable
from trainer.config.settings import Config
from trainer.model.model import Model
from trainer.model.original_layout import list_originals
from trainer.model.source import Source
from trainer.model.tensor_file import ReadTensors

GUESS_KEY = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
GUESS_LIMIT = 0.09
"""Standard deviations above it are taken for v-prediction."""


def guessed_by(model: Model) -> str | None:
    """Our name of the tensor that decides; None for other families and for tiny models."""
    if model.family != "sd2":
        return None
    originals = list_originals("sd2", {"unet": model.unet})
    return next((one.parts[0] for one in originals if one.name == GUESS_KEY), None)


def guess_on_source(model: Model, source: Source, config: Config) -> list[str]:
    """What ComfyUI takes the model for that a training begins with, as lines to show."""
    name = guessed_by(model)
    if name is None or name not in source.held:
        return []
    with ReadTensors() as tensors:
        bias = source.held[name].read(tensors)
    return [guess_line(bias, config, printable(config.model.path))]


def guess_line(bias: Tensor, config: Config, shown: str) -> str:
    """What ComfyUI takes a model for, called `shown`, and whether that is what it predicts."""
    deviation = float(bias.detach().float().std(unbiased=False))
    guess = "v" if deviation > GUESS_LIMIT else "epsilon"
    than = "above" if guess == "v" else "not above"
    line = (
        f'ComfyUI takes {shown} for a model of prediction "{guess}": the standard deviation of '
        f"{GUESS_KEY} is {deviation:.4f}, {than} {GUESS_LIMIT}"
    )
    prediction = config.noise.prediction
    if prediction == guess:
        return line
    return f'WARNING: {line}, but noise.prediction is "{prediction}"'
