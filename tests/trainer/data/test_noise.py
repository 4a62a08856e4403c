import pytest
import torch

from capmerge.rng import Chance, SampleId
from trainer.config.settings import NoiseSettings
from trainer.data.noise import draw_noise, draw_timestep

LATENTS_CHW = torch.zeros(4, 48, 40)


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
    drawn = {draw_timestep(chance_of(repeat=repeat), settings) for repeat in range(200)}
    assert drawn == set(range(990, 1000))


def test_timesteps_never_change_between_releases():
    """A run that continues with a newer release draws the same timesteps."""
    assert [draw_timestep(chance_of(repeat=repeat), NoiseSettings()) for repeat in range(4)] == [
        674,
        372,
        886,
        300,
    ]
