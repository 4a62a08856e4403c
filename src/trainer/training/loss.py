"""The loss of a micro-batch, the only place where the mathematics meets the model.

Knows no optimizer, no ranks and no files.

B batch, C latent channels, H W latent height and width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.settings import LossSettings, NoiseSettings
from trainer.data.batch import Batch
from trainer.families import TIMESTEPS
from trainer.model.noise_schedule import Schedule, add_flow_noise

Predict = Callable[[Tensor, Tensor, tuple[Tensor, ...], Tensor | None, tuple[int, ...]], Tensor]
"""(noisy_BCHW, timesteps_B, ids, size_B6, text_noise_seeds) -> prediction_BCHW."""

_SNR_CAP = 1000.0
"""Largest SNR in debiased and v-like weights; min-SNR has its own. Source: sd-scripts-facts D3."""


class Loss(NamedTuple):
    """The loss of a micro-batch."""

    value: Tensor
    """Scalar float32 for the backward pass: this micro-batch's share of the step's mean.

    The mean is over all real samples of the step. Over the ranks and micro-batches of a step the
    shares add up to it, and so do their gradients: whoever averages gradients over ranks or
    micro-batches has to multiply by their number.
    """
    losses_B: Tensor
    """float32, detached: each sample's weighted loss, 0 for padding samples."""


def batch_loss(
    predict: Predict, batch: Batch, schedule: Schedule, noise: NoiseSettings, loss: LossSettings
) -> Loss:
    """The loss of one micro-batch, on the device of `batch`, `schedule` and the model.

    `predict` is the model. The distance of each element in float32 is masked, averaged over C, H
    and W, and weighted by SNR, unless the prediction is a flow; padding samples weigh 0. Nothing
    here asks for the values of a tensor, so the device is never waited for. Source:
    sd-scripts-facts D2, D3, model-facts 1.
    """
    noisy_BCHW, target_BCHW = _input_and_target(batch, schedule, noise)
    prediction_BCHW = predict(
        noisy_BCHW, batch.timesteps_B, batch.ids, batch.size_B6, batch.text_noise_seeds
    ).float()
    elements_BCHW = _distance(prediction_BCHW, target_BCHW, schedule, batch.timesteps_B, loss)
    if batch.other_flow_BCHW is not None:
        contrast_BCHW = (prediction_BCHW - batch.other_flow_BCHW).square()
        elements_BCHW = elements_BCHW - loss.contrastive * contrast_BCHW
    if batch.mask_B1HW is not None:
        # The mean is not renormalised, so masking makes a sample count less.
        elements_BCHW = elements_BCHW * batch.mask_B1HW
    losses_B = elements_BCHW.mean(dim=(1, 2, 3)) * batch.weights_B
    if noise.prediction != "flow":
        losses_B = losses_B * snr_weights(schedule.snr_T[batch.timesteps_B], noise, loss)
    return Loss(losses_B.sum() / batch.real_samples, losses_B.detach())


def _input_and_target(
    batch: Batch, schedule: Schedule, noise: NoiseSettings
) -> tuple[Tensor, Tensor]:
    """The noisy latents and the target of the prediction, both (B, C, H, W)."""
    latents_BCHW, noise_BCHW, timesteps_B = batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B
    if noise.prediction == "flow":
        noisy_BCHW = add_flow_noise(latents_BCHW, noise_BCHW, timesteps_B)
        return noisy_BCHW, noise_BCHW - latents_BCHW
    input_noise_BCHW = noise_BCHW if batch.input_noise_BCHW is None else batch.input_noise_BCHW
    noisy_BCHW = schedule.add_noise(latents_BCHW, input_noise_BCHW, timesteps_B)
    if noise.prediction == "v":
        return noisy_BCHW, schedule.velocity(latents_BCHW, noise_BCHW, timesteps_B)
    return noisy_BCHW, noise_BCHW


def _distance(
    prediction_BCHW: Tensor,
    target_BCHW: Tensor,
    schedule: Schedule,
    timesteps_B: Tensor,
    settings: LossSettings,
) -> Tensor:
    """The distance of each element (B, C, H, W) from its target, by `loss.kind`."""
    difference_BCHW = prediction_BCHW - target_BCHW
    if settings.kind == "l2":
        return difference_BCHW.square()
    if settings.kind == "l1":
        return difference_BCHW.abs()
    # Where huber and smooth_l1 change from square to absolute value.
    threshold_B = _threshold_B(schedule, timesteps_B, settings)
    threshold_B111 = threshold_B.reshape(-1, 1, 1, 1)
    rounded_BCHW = 2 * (
        (difference_BCHW.square() + threshold_B111.square()).sqrt() - threshold_B111
    )
    return rounded_BCHW * threshold_B111 if settings.kind == "huber" else rounded_BCHW


def _threshold_B(schedule: Schedule, timesteps_B: Tensor, settings: LossSettings) -> Tensor:
    """The threshold of huber and smooth_l1 (B,) by timestep. Source: sd-scripts-facts D3."""
    if settings.huber_schedule == "snr":
        alphas_cumprod_B = schedule.alphas_cumprod_T[timesteps_B]
        # Infinite at the end of a zero-terminal schedule, where the threshold is huber_c.
        sigma_B = ((1 - alphas_cumprod_B) / alphas_cumprod_B).sqrt()
        return (1 - settings.huber_c) / (1 + sigma_B).square() + settings.huber_c
    if settings.huber_schedule == "exponential":
        decay_B = torch.exp(timesteps_B * (math.log(settings.huber_c) / TIMESTEPS))
        return decay_B * settings.huber_scale
    threshold = settings.huber_c * settings.huber_scale
    return torch.full_like(timesteps_B, threshold, dtype=torch.float32)


def snr_weights(snr_B: Tensor, noise: NoiseSettings, loss: LossSettings) -> Tensor:
    """The weight of each sample's loss (B,) by its SNR.

    The product of the min-SNR, v-like-noise, v-pred-like and debiased weights, in this order.
    `snr_B` is of the schedule before any zero-terminal rescale, so no weight divides by 0. Source:
    sd-scripts-facts D3.
    """
    is_v = noise.prediction == "v"
    capped_B = snr_B.clamp(max=_SNR_CAP)
    weights_B = torch.ones_like(snr_B)
    if loss.min_snr_gamma:
        weights_B = weights_B * snr_B.clamp(max=loss.min_snr_gamma) / (snr_B + 1 if is_v else snr_B)
    if loss.v_like_noise:
        weights_B = weights_B * capped_B / (capped_B + 1)
    if loss.v_pred_like:
        weights_B = weights_B * (1 + loss.v_pred_like * (capped_B + 1) / capped_B)
    if loss.debiased:
        weights_B = weights_B / (capped_B + 1 if is_v else capped_B.sqrt())
    return weights_B
