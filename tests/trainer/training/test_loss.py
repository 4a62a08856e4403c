import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.paths import DATA

from trainer.config.settings import LossSettings, NoiseSettings
from trainer.data.batch import Batch
from trainer.model.noise_schedule import Schedule
from trainer.training.loss import batch_loss, snr_weights

GOLDEN = json.loads((DATA / "noise_and_loss.json").read_text(encoding="utf-8"))
EPSILON, VELOCITY = NoiseSettings(), NoiseSettings(prediction="v")
PLAIN = LossSettings()
FLOW = NoiseSettings(prediction="flow")


def golden(name):
    """A tensor of the golden file."""
    return torch.tensor(GOLDEN[name])


def close(found, expected):
    """`found` is `expected` within what the golden data's README allows."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def golden_batch(**changes):
    """The golden latents and noise as one micro-batch of eight real samples."""
    batch = Batch(
        step=0,
        epoch=0,
        micro=0,
        latents_BCHW=golden("latents"),
        noise_BCHW=golden("target"),
        input_noise_BCHW=None,
        timesteps_B=golden("timesteps"),
        ids=(torch.zeros(8, 1, 77, dtype=torch.int64),),
        size_B6=None,
        mask_B1HW=None,
        weights_B=torch.ones(8),
        real_samples=8,
        text_noise_seeds=tuple(range(8)),
        keys=tuple("abcdefgh"),
        captions=("",) * 8,
        counts={"samples": 8},
    )
    return replace(batch, **changes)


def golden_model(*_):
    """A model that predicts the golden prediction whatever it is shown."""
    return golden("pred")


def loss_of(batch, loss, noise=EPSILON, model=golden_model):
    """The loss of a batch under the schedule of its noise settings."""
    return batch_loss(model, batch, Schedule.of(noise), noise, loss)


KINDS = [("l2", "snr", "loss_l2"), ("l1", "snr", "loss_l1")] + [
    (kind, schedule, f"loss_{kind}_{schedule}")
    for kind in ("huber", "smooth_l1")
    for schedule in ("constant", "exponential", "snr")
]


@pytest.mark.parametrize(("kind", "schedule", "name"), KINDS)
def test_every_kind_is_golden(kind, schedule, name):
    """Each distance with each threshold schedule equals that of sd-scripts for every sample."""
    found = loss_of(golden_batch(), LossSettings(kind=kind, huber_schedule=schedule))
    close(found.losses_B, golden(name))
    close(found.value, golden(name).mean())


@pytest.mark.parametrize("schedule", ["constant", "exponential"])
def test_the_scale_multiplies_the_threshold(schedule):
    """`huber_scale` scales the threshold of the two schedules that have it."""
    scaled, plain = (
        loss_of(
            golden_batch(), LossSettings(kind="huber", huber_schedule=schedule, huber_scale=s)
        ).losses_B
        for s in (2, 1)
    )
    assert (scaled > plain).all()
    if schedule == "constant":
        other = LossSettings(kind="huber", huber_schedule="constant", huber_c=0.2)
        close(scaled, loss_of(golden_batch(), other).losses_B)


@pytest.mark.parametrize("gamma", [1, 5, 20])
@pytest.mark.parametrize(("noise", "suffix"), [(EPSILON, "eps"), (VELOCITY, "v")])
def test_min_snr_is_golden(gamma, noise, suffix):
    """Min-SNR weights are sd-scripts' for both predictions."""
    close(
        snr_weights(golden("snr"), noise, LossSettings(min_snr_gamma=gamma)),
        golden(f"min_snr_{gamma}_{suffix}"),
    )


@pytest.mark.parametrize(("noise", "suffix"), [(EPSILON, "eps"), (VELOCITY, "v")])
def test_debiased_is_golden(noise, suffix):
    """Debiased weights are sd-scripts' for both predictions, the SNR capped at 1000."""
    close(
        snr_weights(golden("snr"), noise, LossSettings(debiased=True)), golden(f"debiased_{suffix}")
    )


def test_v_like_noise_is_golden():
    """A v-prediction's loss is scaled as a noise prediction's."""
    close(
        snr_weights(golden("snr"), VELOCITY, LossSettings(v_like_noise=True)),
        golden("scale_v_like_noise"),
    )


def test_v_pred_like_adds_a_share_of_the_v_loss():
    """Each loss becomes loss + loss / scale * share, where scale is the golden v-like weight."""
    close(
        snr_weights(golden("snr"), EPSILON, LossSettings(v_pred_like=0.5)),
        1 + 0.5 / golden("scale_v_like_noise"),
    )


def test_weights_multiply():
    """Several weights at once are the product of each alone."""
    both = snr_weights(
        golden("snr"), VELOCITY, LossSettings(min_snr_gamma=5, v_like_noise=True, debiased=True)
    )
    close(both, golden("min_snr_5_v") * golden("scale_v_like_noise") * golden("debiased_v"))


def test_weights_reach_the_loss():
    """The loss of a sample is its golden distance times its golden weight."""
    close(
        loss_of(golden_batch(), LossSettings(min_snr_gamma=5)).losses_B,
        golden("loss_l2") * golden("min_snr_5_eps"),
    )


def test_a_zero_terminal_schedule_keeps_its_weights():
    """At SNR 0, weights, thresholds and gradient are finite and not 0."""
    noise = NoiseSettings(prediction="v", zero_terminal_snr=True)
    last = golden_batch(timesteps_B=torch.full((8,), 999))
    for loss in (
        LossSettings(min_snr_gamma=5),
        LossSettings(debiased=True, kind="huber"),
        LossSettings(v_like_noise=True),
    ):
        prediction = golden("pred").requires_grad_()
        found = loss_of(last, loss, noise, lambda *_, prediction=prediction: prediction)
        found.value.backward()
        assert found.losses_B.isfinite().all()
        assert (found.losses_B > 0).all()
        assert prediction.grad.isfinite().all()


def test_the_model_is_shown_the_noisy_latents():
    """The model gets noisy latents, timesteps, ids, sizes and seeds; epsilon aims at the noise."""
    shown = []
    batch = golden_batch(size_B6=torch.ones(8, 6))
    found = loss_of(batch, PLAIN, model=lambda *given: shown.extend(given) or golden("target"))
    noisy_BCHW, *rest = shown
    close(noisy_BCHW, golden("noisy(latents,noise=target)"))
    assert [id(part) for part in rest] == [
        id(part) for part in (batch.timesteps_B, batch.ids, batch.size_B6, batch.text_noise_seeds)
    ]
    assert found.value == 0


def test_the_target_of_v_is_the_velocity():
    """A model that predicts the golden velocity has no loss."""
    found = loss_of(
        golden_batch(), PLAIN, VELOCITY, lambda *_: golden("velocity(latents,noise=target)")
    )
    close(found.losses_B, torch.zeros(8))


def test_input_perturbation_changes_the_input_alone():
    """The model sees the other noise and is still to find the clean one."""
    shown = []
    other = golden("pred")
    found = loss_of(
        golden_batch(input_noise_BCHW=other),
        PLAIN,
        model=lambda *given: shown.extend(given) or golden("target"),
    )
    close(shown[0], Schedule.of(EPSILON).add_noise(golden("latents"), other, golden("timesteps")))
    assert found.value == 0


def test_the_mask_is_multiplied_and_not_renormalised():
    """A sample with half of its places masked out and the others alike has half the loss."""
    mask_B1HW = torch.tensor([1.0, 0.0]).expand(8, 1, 2, 2)
    found = loss_of(golden_batch(mask_B1HW=mask_B1HW), PLAIN)
    squares_BCHW = (golden("pred") - golden("target")).square()
    close(found.losses_B, squares_BCHW[..., 0].sum(dim=(1, 2)) / 8)


def test_a_filled_place_counts_nothing():
    """A padding sample adds no loss and no gradient; the mean is over the real samples."""
    prediction = golden("pred").requires_grad_()
    batch = golden_batch(weights_B=torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 0]), real_samples=5)
    found = loss_of(batch, PLAIN, model=lambda *_: prediction)
    found.value.backward()
    close(found.value, golden("loss_l2")[:5].mean())
    assert (found.losses_B[5:] == 0).all()
    assert (prediction.grad[5:] == 0).all()
    assert (prediction.grad[:5] != 0).any()
    assert not found.losses_B.requires_grad


def test_slices_of_a_step_add_up():
    """A step of 5 samples is the same in one micro-batch as in slices of 2, 2 and 1 padded."""
    torch.manual_seed(0)
    whole, sliced = torch.nn.Conv2d(2, 2, 1), torch.nn.Conv2d(2, 2, 1)
    sliced.load_state_dict(whole.state_dict())
    loss = LossSettings(min_snr_gamma=5)
    first = loss_of(part(range(5), [1] * 5), loss, model=lambda noisy, *_: whole(noisy))
    first.value.backward()
    value = torch.zeros(())
    for places, weights in (((0, 1), [1, 1]), ((2, 3), [1, 1]), ((4, 0), [1, 0])):
        found = loss_of(part(places, weights), loss, model=lambda noisy, *_: sliced(noisy))
        found.value.backward()
        value += found.value.detach()
    torch.testing.assert_close(value, first.value.detach())
    torch.testing.assert_close(
        [p.grad for p in sliced.parameters()], [p.grad for p in whole.parameters()]
    )


def part(places, weights):
    """Some of the golden samples as a micro-batch of a step of five real ones."""
    at = list(places)
    return golden_batch(
        latents_BCHW=golden("latents")[at],
        noise_BCHW=golden("target")[at],
        timesteps_B=golden("timesteps")[at],
        weights_B=torch.tensor(weights, dtype=torch.float32),
        real_samples=5,
    )


def test_the_loss_is_single_precision():
    """A model that predicts in bf16 has its distances taken in float32."""
    found = loss_of(golden_batch(), PLAIN, model=lambda *_: golden("pred").bfloat16())
    expected = (golden("pred").bfloat16().float() - golden("target")).square().mean(dim=(1, 2, 3))
    assert found.value.dtype == torch.float32
    close(found.losses_B, expected)


# Flow; its reference is numpy in double precision, from the formulas as they were published.

SIGMAS = np.array([0.0005, 0.1234567, 0.25, 0.5, 0.61803, 0.75, 0.9, 0.99999])


def flow_batch(**changes):
    """The golden latents and noise at `SIGMAS`."""
    timesteps_B = torch.tensor(SIGMAS * 1000, dtype=torch.float32)
    return golden_batch(timesteps_B=timesteps_B, **changes)


def doubles(*names):
    """Golden tensors as float64 arrays."""
    return [np.array(GOLDEN[name], dtype=np.float64) for name in names]


def assert_within_a_millionth(found, expected):
    """Fail unless a tensor is what numpy says within 1e-6."""
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_flow_is_a_straight_line_from_latents_to_noise():
    """The U-Net is shown sigma noise + (1 - sigma) latents and sigma x 1000, not rounded."""
    shown = []
    loss_of(flow_batch(), PLAIN, FLOW, lambda *given: shown.extend(given) or golden("pred"))
    latents, noise = doubles("latents", "target")
    sigma = SIGMAS.reshape(-1, 1, 1, 1)
    assert_within_a_millionth(shown[0], sigma * noise + (1 - sigma) * latents)
    assert shown[1].dtype == torch.float32
    assert_within_a_millionth(shown[1], SIGMAS * 1000)


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_the_loss_of_a_flow_is_that_of_the_formula(weight):
    """The target is noise - latents, and the contrast with the next sample is subtracted."""
    latents, noise, prediction = doubles("latents", "target", "pred")
    target = noise - latents
    other = np.roll(target, -1, axis=0)
    expected = ((prediction - target) ** 2).mean(axis=(1, 2, 3))
    expected -= weight * ((prediction - other) ** 2).mean(axis=(1, 2, 3))
    batch = flow_batch(other_flow_BCHW=torch.tensor(other, dtype=torch.float32) if weight else None)
    found = loss_of(batch, LossSettings(contrastive=weight), FLOW)
    assert_within_a_millionth(found.losses_B, expected)
    assert_within_a_millionth(found.value, expected.mean())


@pytest.mark.parametrize("kind", ["l1", "huber", "smooth_l1"])
def test_the_other_distances_of_a_flow_are_those_of_the_formulas(kind):
    """l1 and the two rounded distances, with a threshold that falls with sigma, equal theirs."""
    latents, noise, prediction = doubles("latents", "target", "pred")
    difference = np.abs(prediction - (noise - latents))
    threshold = np.exp(np.log(0.1) * SIGMAS).reshape(-1, 1, 1, 1)
    rounded = 2 * (np.sqrt(difference**2 + threshold**2) - threshold)
    expected = {"l1": difference, "huber": threshold * rounded, "smooth_l1": rounded}[kind]
    found = loss_of(flow_batch(), LossSettings(kind=kind, huber_schedule="exponential"), FLOW)
    assert_within_a_millionth(found.losses_B, expected.mean(axis=(1, 2, 3)))


def test_a_mask_and_an_empty_place_of_a_flow_count_nothing():
    """Masked places and padding samples count neither in the distance nor in the contrast."""
    prediction = golden("pred").requires_grad_()
    mask_B1HW = torch.tensor([1.0, 0.0]).expand(8, 1, 2, 2)
    batch = flow_batch(
        mask_B1HW=mask_B1HW,
        weights_B=torch.tensor([1.0, 1, 1, 1, 1, 1, 1, 0]),
        real_samples=7,
        other_flow_BCHW=golden("latents"),
    )
    loss_of(batch, LossSettings(contrastive=0.05), FLOW, lambda *_: prediction).value.backward()
    assert (prediction.grad[:7, ..., 0] != 0).all()
    assert (prediction.grad[..., 1] == 0).all()
    assert (prediction.grad[7] == 0).all()
