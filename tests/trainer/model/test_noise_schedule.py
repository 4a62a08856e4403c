import json

import torch
from builders.paths import DATA
from diffusers import DDPMScheduler

from trainer.config.settings import NoiseSettings
from trainer.model.noise_schedule import Schedule

GOLDEN = json.loads((DATA / "noise_and_loss.json").read_text(encoding="utf-8"))


TIMESTEPS_B = torch.tensor(GOLDEN["timesteps"])


def golden(name):
    """A tensor of the golden file."""
    return torch.tensor(GOLDEN[name])


def close(found, name):
    """`found` is the golden tensor within what its README allows."""
    torch.testing.assert_close(found, golden(name), rtol=1e-4, atol=1e-6)


def test_the_schedule_is_golden():
    """Signal shares and SNR are sd-scripts' at every golden timestep."""
    schedule = Schedule.of(NoiseSettings())
    close(schedule.alphas_cumprod_T[TIMESTEPS_B], "alphas_cumprod")
    close(schedule.snr_T[TIMESTEPS_B], "snr")


def test_the_zero_terminal_schedule_is_golden_and_keeps_the_snr():
    """The rescale moves what is added to the latents and leaves the SNR of the weights alone."""
    schedule = Schedule.of(NoiseSettings(prediction="v", zero_terminal_snr=True))
    close(schedule.alphas_cumprod_T[TIMESTEPS_B], "zero_terminal_snr_alphas_cumprod")
    assert schedule.alphas_cumprod_T[-1] == 0
    close(schedule.snr_T[TIMESTEPS_B], "snr")


def test_the_schedule_is_that_of_sampling():
    """All 1000 numbers are bit for bit those that diffusers samples with."""
    reference = DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    assert torch.equal(Schedule.of(NoiseSettings()).alphas_cumprod_T, reference.alphas_cumprod)


def test_noisy_latents_and_velocity_are_golden():
    """Noise is added, and velocity made, in sd-scripts' shares."""
    schedule = Schedule.of(NoiseSettings()).to("cpu")
    close(
        schedule.add_noise(golden("latents"), golden("target"), TIMESTEPS_B),
        "noisy(latents,noise=target)",
    )
    close(
        schedule.velocity(golden("latents"), golden("target"), TIMESTEPS_B),
        "velocity(latents,noise=target)",
    )


def test_the_last_zero_terminal_timestep_is_pure_noise():
    """The input holds nothing of the latents, and the velocity is their negative."""
    schedule = Schedule.of(NoiseSettings(prediction="v", zero_terminal_snr=True))
    last_B = torch.full((8,), 999)
    assert torch.equal(
        schedule.add_noise(golden("latents"), golden("target"), last_B), golden("target")
    )
    assert torch.equal(
        schedule.velocity(golden("latents"), golden("target"), last_B), -golden("latents")
    )
