import numpy as np
import pytest
import torch

from capmerge.rng import Chance, SampleId
from trainer.config.settings import NoiseSettings
from trainer.data.noise import draw_noise, draw_timestep, flow_timestep

LATENTS_CHW = torch.zeros(4, 48, 40)
PIXELS = 384 * 320


SAMPLE = SampleId(seed=3, epoch=1, key="danbooru/42", dataset=0, repeat=2)
CHANCE = Chance(SAMPLE)


EVERYTHING = NoiseSettings(offset=0.1, multires_iterations=5, input_perturbation=0.1)


def chance_of(**other):
    """The random numbers of the default sample with parts of its identity changed."""
    return Chance(SAMPLE._replace(**other))


def test_noise_is_a_pure_function_of_the_sample():
    """The noise of a sample neither depends on the global generator nor advances it."""
    first = draw_noise(LATENTS_CHW, CHANCE, EVERYTHING)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    second = draw_noise(LATENTS_CHW + 5, CHANCE, EVERYTHING)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "other", [{"seed": 4}, {"epoch": 0}, {"key": "danbooru/43"}, {"dataset": 1}, {"repeat": 0}]
)
def test_every_part_of_a_sample_s_name_moves_its_noise(other):
    """A different seed, epoch, record, data set or repeat gives different noise."""
    ours, _ = draw_noise(LATENTS_CHW, CHANCE, NoiseSettings())
    theirs, _ = draw_noise(LATENTS_CHW, chance_of(**other), NoiseSettings())
    assert correlation(ours, theirs) < 0.05


def correlation(left, right):
    """The absolute correlation of two tensors, 0 to 1."""
    return abs(torch.corrcoef(torch.stack([left.flatten(), right.flatten()]))[0, 1].item())


def test_plain_noise_is_normal():
    """Without options, noise is standard normal float32 in the shape of the latents."""
    noise_CHW, input_noise_CHW = draw_noise(
        torch.zeros(4, 128, 128, dtype=torch.float16), CHANCE, NoiseSettings()
    )
    assert (noise_CHW.shape, noise_CHW.dtype, input_noise_CHW) == (
        (4, 128, 128),
        torch.float32,
        None,
    )
    assert noise_CHW.mean().item() == pytest.approx(0, abs=0.02)
    assert noise_CHW.std().item() == pytest.approx(1, abs=0.02)


def test_offset_moves_each_channel_as_a_whole():
    """Offset adds one constant per channel, with the given standard deviation."""
    constants = []
    for repeat in range(100):
        chance = chance_of(repeat=repeat)
        moved_CHW = (
            draw_noise(LATENTS_CHW, chance, NoiseSettings(offset=0.5))[0]
            - draw_noise(LATENTS_CHW, chance, NoiseSettings())[0]
        )
        constants.append(moved_CHW[:, 0, 0])
        torch.testing.assert_close(
            moved_CHW, moved_CHW[:, :1, :1].expand_as(moved_CHW), rtol=0, atol=1e-6
        )
    assert torch.cat(constants).std().item() == pytest.approx(0.5, rel=0.15)


def test_levels_are_normalised_for_each_sample():
    """Multi-resolution noise has standard deviation 1 within each sample."""
    deviations = [
        draw_noise(
            LATENTS_CHW,
            chance_of(repeat=repeat),
            NoiseSettings(multires_iterations=6, multires_discount=0.9),
        )[0]
        .std()
        .item()
        for repeat in range(10)
    ]
    assert deviations == pytest.approx([1] * 10, abs=1e-5)


def test_the_first_level_is_as_fine_as_the_noise():
    """Level 0 adds uncorrelated noise of the same variance as the plain noise, as r**0 = 1."""
    plain_CHW, _ = draw_noise(LATENTS_CHW, CHANCE, NoiseSettings())
    one_CHW, _ = draw_noise(LATENTS_CHW, CHANCE, NoiseSettings(multires_iterations=1))
    assert correlation(plain_CHW, one_CHW) == pytest.approx(0.5**0.5, abs=0.03)
    assert correlation(one_CHW[:, :, 1:], one_CHW[:, :, :-1]) < 0.05


def test_coarse_levels_join_neighbours():
    """The second level correlates neighbours, more so the less it is discounted.

    A level of one pixel is the last one.
    """
    none, weak, strong = (
        neighbours(iterations=levels, discount=discount)
        for levels, discount in ((1, 1.0), (2, 0.3), (2, 1.0))
    )
    # The weak correlation is about 0.3 squared of the strong one.
    assert none < 0.01 < weak < 0.03
    assert strong > 0.1
    last, past = (
        draw_noise(LATENTS_CHW, CHANCE, NoiseSettings(multires_iterations=levels))[0]
        for levels in (7, 50)
    )
    assert torch.equal(last, past)


def neighbours(iterations, discount):
    """The correlation of adjacent pixels in multi-resolution noise."""
    noise_CHW, _ = draw_noise(
        torch.zeros(4, 128, 128),
        CHANCE,
        NoiseSettings(multires_iterations=iterations, multires_discount=discount),
    )
    return correlation(noise_CHW[:, :, 1:], noise_CHW[:, :, :-1])


def test_input_perturbation_leaves_the_target_clean():
    """The noise of the input differs from that of the target by normal noise of the given size."""
    clean_CHW, _ = draw_noise(LATENTS_CHW, CHANCE, NoiseSettings())
    noise_CHW, input_noise_CHW = draw_noise(
        LATENTS_CHW, CHANCE, NoiseSettings(input_perturbation=0.1)
    )
    assert torch.equal(noise_CHW, clean_CHW)
    assert (input_noise_CHW - noise_CHW).std().item() == pytest.approx(0.1, rel=0.03)
    assert correlation(input_noise_CHW - noise_CHW, noise_CHW) < 0.05


def test_timesteps_stay_in_their_range():
    """All timesteps in [`min_timestep`, `max_timestep`) are drawn, and no others."""
    settings = NoiseSettings(min_timestep=990, max_timestep=1000)
    drawn = {draw_timestep(chance_of(repeat=repeat), settings, PIXELS) for repeat in range(200)}
    assert drawn == set(range(990, 1000))


def test_timesteps_never_change_between_releases():
    """A run that continues with a newer release draws the same timesteps."""
    assert [
        draw_timestep(chance_of(repeat=repeat), NoiseSettings(), PIXELS) for repeat in range(4)
    ] == [
        674,
        372,
        886,
        300,
    ]


# Flow.

SHARES = [0.001, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999]
CUTS = [(0, 1000), (100, 900), (0, 250), (980, 1000)]


def flow_settings(**settings):
    """The noise settings of a flow."""
    return NoiseSettings(prediction="flow", **settings)


def reference_sigmas(n_draws, *, mean=None, std=None, shift=1.0, seed=0):
    """Shifted sigmas from the published formulas, drawn by numpy; uniform without a mean."""
    generator = np.random.default_rng(seed)
    sigma = (
        generator.random(n_draws)
        if mean is None
        else 1 / (1 + np.exp(-(mean + std * generator.standard_normal(n_draws))))
    )
    return shift * sigma / (1 + (shift - 1) * sigma)


@pytest.mark.parametrize("shift", [0.5, 1, 2.5, 6.0])
@pytest.mark.parametrize(("low", "high"), CUTS)
def test_uniform_sigmas_are_those_of_the_formula(shift, low, high):
    """A uniform sigma is shifted as published; limits cut the range after the shift."""
    settings = flow_settings(shift=shift, min_timestep=low, max_timestep=high)
    ends = np.array([low, high]) / 1000
    first, last = ends / (shift - (shift - 1) * ends)  # the formula solved for sigma
    for share in SHARES:
        sigma = first + share * (last - first)
        expected = shift * sigma / (1 + (shift - 1) * sigma)
        assert flow_timestep(share, settings, PIXELS) / 1000 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-0.2, 1.5), (2, 0.5)])
@pytest.mark.parametrize("shift", [1.0, 3.5])
def test_logit_normal_sigmas_are_those_of_the_formula(mean, std, shift):
    """sigmoid(mean + std n) of the normal's own quantile n is shifted as published."""
    settings = flow_settings(
        timestep_sampling="logit_normal", timestep_mean=mean, timestep_std=std, shift=shift
    )
    for share in SHARES:
        normal = torch.special.ndtri(torch.tensor(share, dtype=torch.float64)).item()
        sigma = 1 / (1 + np.exp(-(mean + std * normal)))
        expected = shift * sigma / (1 + (shift - 1) * sigma)
        assert flow_timestep(share, settings, PIXELS) / 1000 == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("low", "high"), CUTS)
def test_limits_keep_the_proportions_of_what_they_leave(low, high):
    """Drawn timesteps are distributed as the formula's draws between the limits are."""
    settings = flow_settings(
        timestep_sampling="logit_normal",
        timestep_mean=0.5,
        timestep_std=1.5,
        shift=2.5,
        min_timestep=low,
        max_timestep=high,
    )
    timesteps = 1000 * reference_sigmas(400_000, mean=0.5, std=1.5, shift=2.5)
    kept = timesteps[(timesteps >= low) & (timesteps < high)]
    ours = [flow_timestep(share, settings, PIXELS) for share in SHARES[1:-1]]
    spread = np.quantile(kept, 0.9) - np.quantile(kept, 0.1)
    np.testing.assert_allclose(ours, np.quantile(kept, SHARES[1:-1]), atol=0.02 * spread)


def test_the_shift_of_a_resolution_follows_the_picture():
    """The shift "resolution" is the square root of pixels / 1,048,576."""
    for width, height in ((1024, 1024), (512, 512), (832, 1216)):
        expected = flow_settings(shift=(width * height / 1_048_576) ** 0.5)
        assert flow_timestep(0.3, flow_settings(shift="resolution"), width * height) == (
            pytest.approx(flow_timestep(0.3, expected, 1), abs=1e-6)
        )


@pytest.mark.parametrize(
    "settings",
    [
        {"timestep_mean": 10, "timestep_std": 0.001, "max_timestep": 1},
        {"timestep_mean": -10, "timestep_std": 0.001, "min_timestep": 999},
        {"timestep_mean": 10, "timestep_std": 10, "shift": 1000},
        {"timestep_mean": -10, "timestep_std": 10, "shift": 0.001},
        {"timestep_mean": -10, "timestep_std": 1e-300},
    ],
)
def test_no_setting_makes_a_timestep_that_is_none(settings):
    """Timesteps stay within their limits and rise with their shares at the ends of all settings."""
    flow = flow_settings(timestep_sampling="logit_normal", **settings)
    found = [flow_timestep(share, flow, PIXELS) for share in (2**-53, *SHARES, 1 - 2**-53)]
    assert found == sorted(found)
    assert flow.min_timestep <= found[0] <= found[-1] <= flow.max_timestep


def test_timesteps_of_a_flow_are_drawn_evenly_by_share():
    """Draws are not rounded, depend on the sample alone, and fill their distribution evenly."""
    settings = flow_settings(min_timestep=200, max_timestep=600)
    drawn = [draw_timestep(chance_of(repeat=repeat), settings, PIXELS) for repeat in range(400)]
    assert drawn[0] == draw_timestep(chance_of(repeat=0), settings, PIXELS)
    assert len(set(drawn)) == 400
    assert sum(timestep != int(timestep) for timestep in drawn) == 400
    counts, _ = np.histogram(drawn, bins=8, range=(200, 600))
    assert counts.sum() == 400
    assert counts.min() > 25


def test_timesteps_of_a_flow_never_change_between_releases():
    """A run that continues with a newer release draws the same timesteps."""
    settings = flow_settings(timestep_sampling="logit_normal", shift=2.5)
    drawn = [draw_timestep(chance_of(repeat=repeat), settings, PIXELS) for repeat in range(3)]
    assert drawn == pytest.approx([624.111579376, 703.247040218, 423.215062808], abs=1e-8)
