"""How a trained flow is sampled in other programs."""

from trainer.config.settings import NoiseSettings
from trainer.families import FAMILIES, FamilyName, resolution_shift


def sampling_shift(noise: NoiseSettings, family: FamilyName) -> float:
    """The shift with which a flow is sampled as it was trained.

    A shift by resolution is that of the family's usual size.
    """
    side_px = FAMILIES[family].side_px
    return resolution_shift(side_px**2) if noise.shift == "resolution" else noise.shift


def sampling_note(noise: NoiseSettings, family: FamilyName) -> str | None:
    """How a flow is sampled in ComfyUI, which cannot tell it by its weights; None for no flow."""
    if noise.prediction != "flow":
        return None
    return (
        "the model is a flow: sample it in ComfyUI with the node ModelSamplingSD3 at shift "
        f"{sampling_shift(noise, family):.4g}. Without the node it makes noise."
    )
