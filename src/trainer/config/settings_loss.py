"""`[noise]` and `[loss]`: what the U-Net learns to predict, and how far it is from that."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.section import Section


def _checked_deviation(deviation: float) -> float:
    """The standard deviation itself; raises `ValueError` unless it is above 0."""
    if deviation <= 0:
        raise ValueError(
            "expected a number above 0. A mean, which may be below 0, is noise.timestep_mean"
        )
    return deviation


class NoiseSettings(Section):
    """`[noise]`: schedule, noise and timesteps. Source: sd-scripts-facts D2."""

    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """Quantity that the U-Net predicts: the noise, the velocity, or the flow.

    The flow is the noise minus the latents on the straight line between them, at a share sigma of
    noise in (0, 1); sigma x 1000 is its timestep, a number that is not rounded. Source: arXiv
    2210.02747, model-facts 1.
    """
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise; needs `prediction = "v"`.

    Source: arXiv 2305.08891.
    """
    offset: float = Field(default=0.0, ge=0)
    """Standard deviation of a constant added to the noise of each channel."""
    multires_iterations: int = Field(default=0, ge=0, le=64)
    """Levels of multi-resolution noise. 0: none. A level of one pixel is the last."""
    multires_discount: float = Field(default=0.3, gt=0, le=1)
    """Weight of each level relative to the previous, finer one."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise on the input that is not in the target, as a share of the noise.

    Source: arXiv 2301.11706.
    """
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep that is drawn; of a flow, lower limit of sigma x 1000 after the shift."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """Upper limit of the timesteps, which is not drawn itself."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Flow: distribution of sigma before the shift.

    logit_normal is 1 / (1 + exp(-x)) of a normal x, which has more of the middle timesteps. Source:
    arXiv 2403.03206.
    """
    timestep_mean: float = Field(default=0.0, ge=-10, le=10)
    """Mean of the normal x of logit_normal; below 0 there is less noise."""
    timestep_std: Annotated[float, AfterValidator(_checked_deviation)] = Field(default=1.0, le=10)
    """Standard deviation of the normal x of logit_normal, above 0."""
    shift: Annotated[float, Field(ge=0.001, le=1000)] | Literal["resolution"] = 1.0
    """Flow: factor s that moves sigma to s sigma / (1 + (s - 1) sigma); above 1 to more noise.

    "resolution" is the square root of the picture's pixels / 1,048,576: 1 at 1024 x 1024. Source:
    arXiv 2403.03206.
    """


class LossSettings(Section):
    """`[loss]`. Source: sd-scripts-facts D3."""

    kind: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """Dependence of the threshold of huber and smooth_l1 on the timestep."""
    huber_c: float = Field(default=0.1, gt=0)
    """Threshold of huber and smooth_l1."""
    huber_scale: float = Field(default=1.0, gt=0)
    """Factor of the threshold for the constant and exponential schedules."""
    min_snr_gamma: float = Field(default=0.0, ge=0)
    """Largest SNR in min-SNR weights. 0: no such weights. Source: arXiv 2303.09556."""
    debiased: bool = False
    """Debiased estimation weights. Source: arXiv 2310.08442."""
    v_like_noise: bool = False
    """Scale a v-prediction loss like one of a noise prediction; needs `noise.prediction = "v"`."""
    v_pred_like: float = Field(default=0.0, ge=0)
    """Share of a v-prediction loss to add to that of a noise prediction.

    Needs `noise.prediction = "epsilon"`.
    """
    contrastive: float = Field(default=0.0, ge=0, lt=1)
    """Flow: weight of the squared distance from the target of another sample, which is subtracted.

    The other sample is the next one in the global batch. Needs `kind = "l2"`. Source: arXiv
    2506.05350.
    """
