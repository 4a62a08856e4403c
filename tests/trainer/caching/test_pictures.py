"""Pictures are read and resized as sd-scripts does, and damaged ones are told apart."""

import base64
import io
import json
from contextlib import suppress

import numpy as np
import pytest
from builders.paths import ROOT
from PIL import Image

from trainer.caching.buckets import Placed
from trainer.caching.pictures import PictureError, read_header, read_pixels
from trainer.caching.resize import fit_to_bucket, shrink

GOLDEN = json.loads((ROOT / "tests" / "data" / "pictures.json").read_text())


def _golden_name(alpha):
    return "pixels_with_alpha" if alpha else "pixels"


def _write(tmp_path, name):
    path = tmp_path / "picture"
    path.write_bytes(base64.b64decode(GOLDEN[name]["file"]))
    return path


@pytest.mark.parametrize(
    ("name", "alpha"),
    [
        (name, alpha)
        for name in GOLDEN
        for alpha in (False, True)
        if _golden_name(alpha) in GOLDEN[name]
    ],
)
def test_pixels_are_those_of_sd_scripts(tmp_path, name, alpha):
    """Each kind of picture gives the pixels that sd-scripts' own code gave."""
    golden = GOLDEN[name]
    expected = golden[_golden_name(alpha)]
    pixels = read_pixels(_write(tmp_path, name), exif_rotation=False, alpha=alpha)
    found = fit_to_bucket(pixels, Placed(tuple(golden["bucket"]), tuple(golden["resized"])))
    expected = np.frombuffer(base64.b64decode(expected), np.uint8).reshape(found.shape)
    # Versions of the JPEG library differ by single values.
    most = 2 if name in ("jpeg", "cmyk", "turned") else 1
    assert np.abs(found.astype(int) - expected).max() <= most
    assert np.count_nonzero(found != expected) <= found.size * (0.05 if most == 2 else 0.002)


def _bytes_of(image, kind, **options):
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def _with_orientation(number):
    exif = Image.Exif()
    exif[0x0112] = number
    return exif.tobytes()


def _corners():
    """A picture of 20 x 10 px whose corners have four greys."""
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:5, :10], pixels[:5, 10:], pixels[5:, :10], pixels[5:, 10:] = 20, 90, 160, 230
    return Image.fromarray(pixels)


UPRIGHT = {
    1: (20, 90, 160, 230),
    2: (90, 20, 230, 160),
    3: (230, 160, 90, 20),
    4: (160, 230, 20, 90),
    5: (20, 160, 90, 230),
    6: (160, 20, 230, 90),
    7: (230, 90, 160, 20),
    8: (90, 230, 20, 160),
}
"""The greys of the corners by the EXIF orientation, in reading order. Source: the EXIF standard."""


@pytest.mark.parametrize("number", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_data_turn_a_picture_when_asked(tmp_path, kind, number):
    """Each orientation shows the picture upright, in the header and in the pixels."""
    path = tmp_path / "picture"
    path.write_bytes(_bytes_of(_corners(), kind, exif=_with_orientation(number)))
    as_stored = read_header(path, exif_rotation=False)
    assert (as_stored.width, as_stored.height) == (20, 10)
    assert as_stored.is_turned == (number != 1)
    header = read_header(path, exif_rotation=True)
    pixels = read_pixels(path, exif_rotation=True, alpha=False)
    assert pixels.shape == (header.height, header.width, 3)
    corners = [pixels[row, column, 0] for row in (1, -2) for column in (1, -2)]
    np.testing.assert_allclose(corners, UPRIGHT[number], atol=6)


@pytest.mark.parametrize("number", [0, 9, 65535])
def test_an_unknown_orientation_turns_nothing(tmp_path, number):
    """EXIF data outside of the standard are no reason to turn or to lose a picture."""
    path = tmp_path / "picture"
    path.write_bytes(_bytes_of(_corners(), "JPEG", exif=_with_orientation(number)))
    assert not read_header(path, exif_rotation=True).is_turned
    assert read_pixels(path, exif_rotation=True, alpha=False).shape == (10, 20, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_do_no_harm(tmp_path):
    """A picture whose EXIF data are noise is read as it is stored."""
    path = tmp_path / "picture"
    path.write_bytes(_bytes_of(_corners(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffnoise"))
    assert not read_header(path, exif_rotation=True).is_turned
    assert read_pixels(path, exif_rotation=True, alpha=False).shape == (10, 20, 3)


def test_sixteen_bits_are_scaled(tmp_path):
    """A grey picture of 16 bits keeps its greys, which Pillow alone would make white."""
    path = tmp_path / "picture"
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    path.write_bytes(_bytes_of(Image.fromarray(grey), "PNG"))
    pixels = read_pixels(path, exif_rotation=False, alpha=True)
    assert np.array_equal(pixels[..., 1], grey >> 8)
    assert (pixels[..., 3] == 255).all()


def _read(path):
    """The header and the pixels of a picture."""
    header = read_header(path, exif_rotation=True)
    return header, read_pixels(path, exif_rotation=True, alpha=False)


WHOLE = _bytes_of(_corners().resize((200, 100)), "PNG")
BROKEN = {
    "empty": (b"", "it is none of JPEG"),
    "text": (b"no picture at all", "it is none of JPEG"),
    "truncated": (WHOLE[: len(WHOLE) // 2], "truncated"),
    "changed": (WHOLE[:60] + b"\0\0\0\0" + WHOLE[64:], "broken|truncated|CRC|Error"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "it is none of JPEG"),
    "a bomb": (
        _bytes_of(Image.new("1", (20_000, 20_000)), "PNG"),
        "exceeds limit of 178956970 pixels",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_picture_says_why(tmp_path, name):
    """Damage anywhere, a format that runs programs, and a picture without an end are refused."""
    content, reason = BROKEN[name]
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=reason) as raised:
        _read(path)
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_any_damage_is_told(tmp_path):
    """Bytes that are cut off or changed give pixels or a reason, never another error."""
    path = tmp_path / "picture"
    rng = np.random.default_rng(4)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"):
        whole = _bytes_of(_corners(), kind)
        for _ in range(60):
            damaged = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            for place in rng.integers(0, len(damaged), 3):
                damaged[place] = rng.integers(0, 256)
            path.write_bytes(damaged)
            with suppress(PictureError):
                header, pixels = _read(path)
                assert pixels.shape == (header.height, header.width, 3)


@pytest.mark.parametrize(("width", "height"), [(7, 5), (6, 5), (3, 2), (1, 1), (13, 9)])
def test_areas_keep_the_mean(width, height):
    """A constant picture stays constant, and the mean of any picture is kept."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (9, 13, 3), dtype=np.uint8)
    small = shrink(pixels, width, height)
    assert small.shape == (height, width, 3)
    assert abs(small.mean() - pixels.mean()) < 0.5
    assert (shrink(np.full_like(pixels, 77), width, height) == 77).all()
