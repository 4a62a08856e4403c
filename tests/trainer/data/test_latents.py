import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.paths import EXAMPLE_LATENTS

from trainer.data.latents import check_latent_scale, load_latents
from trainer.errors import LatentsError
from trainer.families import FAMILIES

SD1, SDXL = FAMILIES["sd1"], FAMILIES["sdxl"]


EXAMPLES = EXAMPLE_LATENTS


def arrays(height=32, width=24, seed=0, **changes):
    """The arrays that sd-scripts caches for a bucket of 192x256 px."""
    rng = np.random.default_rng(seed)
    latents = (rng.standard_normal((4, height, width)) / 0.18215).astype(np.float32)
    found = {
        "latents": latents,
        "original_size": np.array([700, 1000]),
        "crop_ltrb": np.array([10.0, 3.0, 150.9, 256.0]),
        "latents_flipped": latents[:, :, ::-1] + np.float32(1),
        "alpha_mask": rng.random((height * 8, width * 8)).astype(np.float32),
    } | changes
    return {name: array for name, array in found.items() if array is not None}


@pytest.fixture
def save(tmp_path):
    """A function that writes an npz file as sd-scripts does and returns its path."""

    def write(contents, how=np.savez):
        path = tmp_path / "a.npz"
        how(path, **contents)
        return path

    return write


def load(path, *, family=SD1, width=192, height=256, flipped=False, alpha_mask=False):
    """The result of `load_latents` for the default bucket."""
    return load_latents(
        path, family=family, width=width, height=height, flipped=flipped, alpha_mask=alpha_mask
    )


def test_a_named_pipe_is_no_file_of_latents(tmp_path):
    """A pipe among the latents is an error at once, where opening it would wait for a writer."""
    path = tmp_path / "a.npz"
    os.mkfifo(path)
    with pytest.raises(LatentsError, match=r"a\.npz: not a regular file, expected an \.npz"):
        load(path)


def test_a_zip_without_members_has_no_arrays(tmp_path):
    """An empty zip is told as such, and not by an error of Python."""
    path = tmp_path / "a.npz"
    np.savez(path)
    with pytest.raises(LatentsError, match='found no arrays, expected "latents"'):
        load(path)


@pytest.mark.parametrize("how", [np.savez, np.savez_compressed])
def test_scaled_by_the_family(save, how):
    """Latents are float32 times the family's factor, from stored and compressed files alike."""
    contents = arrays()
    path = save(contents, how)
    for family, scale in ((SD1, 0.18215), (SDXL, 0.13025)):
        found = load(path, family=family)
        assert found.latents_CHW.dtype == torch.float32
        torch.testing.assert_close(
            found.latents_CHW, torch.from_numpy(contents["latents"]) * scale, rtol=0, atol=0
        )
    assert load(path).size_conditioning is None
    assert load(path).mask_HW is None


def test_size_conditioning(save):
    """Original, crop and target are (height, width) pairs of whole pixels. Facts C4.

    When flipped, the crop is measured from the right.
    """
    path = save(arrays())
    assert load(path, family=SDXL).size_conditioning == (1000, 700, 3, 10, 256, 192)
    assert load(path, family=SDXL, flipped=True).size_conditioning == (1000, 700, 3, 41, 256, 192)


def test_flipped(save):
    """Flipped latents are read from the file, and the mask is mirrored."""
    contents = arrays()
    path = save(contents)
    straight, flipped = load(path, alpha_mask=True), load(path, flipped=True, alpha_mask=True)
    assert torch.equal(flipped.latents_CHW, torch.from_numpy(contents["latents_flipped"]) * 0.18215)
    assert torch.equal(flipped.mask_HW, straight.mask_HW.flip(1))


def test_mask_is_resized_by_area(save):
    """The weight of each latent is the mean of its 64 pixels, as in torch's area resize."""
    contents = arrays()
    mask = load(save(contents), alpha_mask=True).mask_HW
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(contents["alpha_mask"])[None, None], size=(32, 24), mode="area"
    )[0, 0]
    torch.testing.assert_close(mask, expected)


def test_keys_of_the_bucket_go_first(save):
    """Arrays with the bucket's size in their names win over plain and other ones."""
    suffixed = {f"{name}_32x24": array for name, array in arrays(seed=1).items()}
    other = {f"{name}_24x32": array for name, array in arrays(24, 32).items()}
    for contents in (suffixed | other, arrays(16, 16) | suffixed, arrays() | suffixed):
        found = load(save(contents), flipped=True, alpha_mask=True, family=SDXL)
        assert torch.equal(
            found.latents_CHW, torch.from_numpy(suffixed["latents_flipped_32x24"]) * 0.13025
        )
        assert found.size_conditioning == (1000, 700, 3, 41, 256, 192)
    assert torch.equal(
        load(save(arrays() | other)).latents_CHW, torch.from_numpy(arrays()["latents"]) * 0.18215
    )


@pytest.mark.parametrize("dtype", ["<f2", "<f8", ">f4"])
def test_other_float_types(save, dtype):
    """Half, double and foreign byte order are converted to float32."""
    latents = arrays()["latents"].astype(dtype)
    found = load(save(arrays(latents=latents))).latents_CHW
    assert torch.equal(found, torch.from_numpy(latents.astype(np.float32)) * 0.18215)


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        (
            {"latents": np.zeros((4, 24, 32), np.float32)},
            {},
            r'"latents" has the shape \(4, 24, 32\), expected \(4, 32, 24\) for the bucket 192x256',
        ),
        ({"latents": np.zeros((1, 4, 32, 24), np.float32)}, {}, r"has the shape \(1, 4, 32, 24\)"),
        (
            {"latents": np.full((4, 32, 24), np.nan, np.float32)},
            {},
            '3072 of 3072 numbers of "latents" are NaN or infinite',
        ),
        ({"latents": np.full((4, 32, 24), 1e300)}, {}, "NaN or infinite"),
        (
            {"latents": np.zeros((4, 32, 24), np.int32)},
            {},
            '"latents" is of type int32, expected a float type',
        ),
        ({"latents": np.array([{"a": 1}])}, {}, "Object arrays cannot be loaded"),
        (
            {"latents": None},
            {},
            (
                'found "alpha_mask", "crop_ltrb", .*expected "latents" or "latents_32x24" '
                "for the bucket 192x256"
            ),
        ),
        (
            {"original_size": None},
            {},
            'expected "original_size" too: a very old version wrote the file',
        ),
        ({"crop_ltrb": None}, {}, 'expected "crop_ltrb" too: a very old version wrote the file'),
        (
            {"latents_flipped": None},
            {"flipped": True},
            '"latents_flipped", which data.flip needs.*data.flip = false',
        ),
        (
            {"alpha_mask": None},
            {"alpha_mask": True},
            '"alpha_mask", which data.alpha_mask needs.*data.alpha_mask = false',
        ),
        (
            {"alpha_mask": np.zeros((32, 24), np.float32)},
            {"alpha_mask": True},
            r"float32 \(32, 24\), expected floats \(256, 192\)",
        ),
        ({"alpha_mask": np.full((256, 192), 255.0)}, {"alpha_mask": True}, r"outside \[0, 1\]"),
        ({"alpha_mask": np.full((256, 192), np.nan)}, {"alpha_mask": True}, r"outside \[0, 1\]"),
        (
            {"original_size": np.array([1])},
            {"family": SDXL},
            r'"original_size" is int64 \[1\], expected 2 numbers',
        ),
        (
            {"crop_ltrb": np.array([0, 0, np.inf, 1])},
            {"family": SDXL},
            '"crop_ltrb" is float64 .* expected 4 numbers',
        ),
    ],
)
def test_what_a_file_may_lack(save, changes, asked, message):
    """An error names the file, what was found in it and what was expected."""
    path = save(arrays(**changes))
    with pytest.raises(LatentsError, match=message) as error:
        load(path, **asked)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("how", [np.savez, np.savez_compressed])
def test_damage_is_never_trained(save, how):
    """A truncated file, or one with a changed byte, always raises `LatentsError`."""
    path = save(arrays(), how)
    whole = path.read_bytes()
    for size in (0, 10, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LatentsError, match=r"expected an [.]npz of plain arrays"):
            load(path)
    path.write_bytes(whole[:3000] + bytes([whole[3000] ^ 1]) + whole[3001:])
    with pytest.raises(LatentsError, match=r"CRC|decompress|shape|NaN"):
        load(path)
    path.write_bytes(b"\0" * len(whole))
    with pytest.raises(LatentsError, match=r"expected an [.]npz of plain arrays"):
        load(path)


def test_files_that_cannot_be_read(tmp_path):
    """A missing file, a folder and a single array each have their own message."""
    with pytest.raises(LatentsError, match="no such file, expected cached latents"):
        load(tmp_path / "none.npz")
    with pytest.raises(LatentsError, match="directory, expected a readable"):
        load(tmp_path)
    np.save(tmp_path / "a.npy", arrays()["latents"])
    with pytest.raises(LatentsError, match="not a zip of arrays"):
        load(tmp_path / "a.npy")


def bits_of(latents):
    """Latents as bfloat16 in uint16, rounded down."""
    return (latents.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("suffix", ["", "_32x24"])
@pytest.mark.parametrize(
    ("tag", "cast"),
    [
        (None, bits_of),
        ("bfloat16", bits_of),
        ("bfloat16", lambda latents: bits_of(latents).astype(">u2")),
        (b"bfloat16", bits_of),
        (None, lambda latents: latents.astype(np.float16)),
        ("float16", lambda latents: latents.astype(np.float16)),
        ("float32", lambda latents: latents),
    ],
)
def test_halves_are_read_as_meant(save, suffix, tag, cast):
    """float16, and bfloat16 stored as uint16 with or without a tag, are the numbers they stand for.

    A tag that stands before the latents in the file is not taken for them by the check of the
    scale.
    """
    latents = arrays()["latents"]
    contents = {} if tag is None else {f"latents_dtype{suffix}": np.array(tag)}
    contents |= {
        f"{name}{suffix}": cast(array) if name == "latents" else array
        for name, array in arrays(latents_flipped=None).items()
    }
    path = save(contents)
    found = load(path).latents_CHW
    torch.testing.assert_close(found, torch.from_numpy(latents) * 0.18215, rtol=2**-7, atol=1e-5)
    assert check_latent_scale([path], SD1) is None


@pytest.mark.parametrize(
    ("tag", "cast", "message"),
    [
        ("bfloat16", lambda latents: latents, r'float32, but "latents_dtype" says .bfloat16.'),
        ("float16", lambda latents: latents, r'float32, but "latents_dtype" says .float16.'),
        ("float16", bits_of, r'uint16, but "latents_dtype" says .float16.'),
        ("half", lambda latents: latents, r'float32, but "latents_dtype" says .half.'),
        (1.5, lambda latents: latents, r'"latents_dtype" is float64 \(\), expected one text'),
        (["float32"] * 2, lambda latents: latents, r'"latents_dtype" is <U7 \(2,\), expected one'),
        (None, lambda latents: latents.astype(np.int16), r"of type int16, expected a float type"),
    ],
)
def test_a_tag_that_contradicts_its_array_is_refused(save, tag, cast, message):
    """The numbers would be read as others than those that were cached."""
    contents = {} if tag is None else {"latents_dtype": np.array(tag)}
    path = save(contents | arrays(latents=cast(arrays()["latents"])))
    with pytest.raises(LatentsError, match=message):
        load(path)
    with pytest.raises(LatentsError, match=message):
        check_latent_scale([path], SD1)


def test_numbers_that_become_infinite_are_refused(save):
    """Infinities of bfloat16 and of float16, and doubles past float32, are told by their name."""
    bits = bits_of(arrays()["latents"])
    bits[0, 0, 0] = 0x7F80
    halves = np.full((4, 32, 24), -np.inf, np.float16)
    for latents in (bits, halves, np.full((4, 32, 24), 1e300)):
        with pytest.raises(LatentsError, match=r'numbers of "latents" are NaN or infinite'):
            load(save(arrays(latents=latents)))


def test_latents_of_another_vae(save):
    """Channels, shift and scale are those of the model: (latents - shift) times scale."""
    family = replace(SDXL, latent_channels=32, latent_scale=0.6, latent_shift=0.5)
    latents = np.random.default_rng(0).standard_normal((32, 32, 24)).astype(np.float32) / 0.6 + 0.5
    path = save(arrays(latents=latents.astype(np.float32)))
    found = load(path, family=family).latents_CHW
    torch.testing.assert_close(found, (torch.from_numpy(latents).float() - 0.5) * 0.6)
    assert check_latent_scale([path], family) is None
    assert "model.latent_scale" in check_latent_scale([path], SDXL)
    with pytest.raises(LatentsError, match=r"expected \(4, 32, 24\).*set model\.latent_channels"):
        load(path)


def test_scale_of_the_wrong_family(tmp_path):
    """Latents of the right family pass, and those of another one are detected."""
    paths = []
    for number in range(100):
        paths.append(tmp_path / f"{number}.npz")
        np.savez(paths[-1], **arrays(seed=number))
    assert check_latent_scale(paths, SD1) is None
    warning = check_latent_scale(paths, SDXL)
    assert (
        "the latents of 64 files have a standard deviation of 0.71, expected 0.85 to 1.18 for sdxl"
        in warning
    )
    assert check_latent_scale([], SD1) is None


def test_a_text_before_the_latents_is_not_taken_for_them(tmp_path):
    """An array such as `latents_dtype` may stand first in the file."""
    np.savez(tmp_path / "a.npz", latents_dtype=np.array("float32"), **arrays())
    assert check_latent_scale([tmp_path / "a.npz"], SD1) is None


def test_examples_are_as_they_should_be():
    """The example latents load for every family, also flipped, and have SD 1's scale."""
    paths = sorted(EXAMPLES.rglob("*.npz"))
    assert len(paths) == 213
    assert check_latent_scale(paths, SD1) is None
    assert sum(path.stat().st_size for path in paths) < 2_000_000
    for path in paths[::20]:
        with np.load(path) as file:
            (shape,) = {file[name].shape for name in file.files if name.startswith("latents")}
        for family in FAMILIES.values():
            load(path, family=family, width=shape[2] * 8, height=shape[1] * 8, flipped=True)
