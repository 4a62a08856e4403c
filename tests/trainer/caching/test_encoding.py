"""The VAE of a config encodes, and what is not finite is refused with the remedy."""

import numpy as np
import pytest
import torch
from builders.model import make_config
from builders.single_files import random_model, tiny_vae, write_single

from trainer.caching.encoding import Encoder
from trainer.errors import LatentsError, ModelError

CPU = torch.device("cpu")
PIXELS = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)


def _encoder(tmp_path, scale=1.0, model=None, **settings):
    """An encoder whose VAE has its first weights multiplied by `scale`."""
    vae = tiny_vae()
    with torch.no_grad():
        vae.encoder.conv_in.weight *= scale
    vae.save_pretrained(tmp_path / "vae")
    cache = {"vae": str(tmp_path / "vae")} | settings
    return Encoder(make_config("sd1", cache=cache, **(model or {})), CPU)


def test_the_draw_follows_from_seed_and_stem(tmp_path):
    """Equal stems have equal draws beside any others; another stem or seed has another one."""
    encoder = _encoder(tmp_path)
    first, other, again = encoder.encode([PIXELS] * 3, ["a/b", "c", "a/b"])
    assert first["latents"].shape == (4, 4, 8)
    np.testing.assert_allclose(first["latents"], again["latents"], atol=1e-5)
    assert np.abs(first["latents"] - other["latents"]).mean() > 0.01
    (alone,) = encoder.encode([PIXELS], ["a/b"])
    np.testing.assert_allclose(first["latents"], alone["latents"], atol=1e-4)
    (seeded,) = _encoder(tmp_path, seed=5).encode([PIXELS], ["a/b"])
    assert np.abs(seeded["latents"] - alone["latents"]).mean() > 0.01


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_half_precision_gives_nearly_the_same(tmp_path, precision):
    """The VAE computes in bf16 or fp16, and the latents are float32 all the same."""
    (exact,) = _encoder(tmp_path, latents="mean").encode([PIXELS], ["a"])
    (found,) = _encoder(tmp_path, latents="mean", vae_precision=precision).encode([PIXELS], ["a"])
    assert found["latents"].dtype == np.float32
    difference = np.abs(found["latents"] - exact["latents"]).max()
    assert 0 < difference < 0.1


def test_a_vae_that_overflows_names_the_remedy(tmp_path):
    """fp16 that overflows names the precision and the mended VAE; in fp32 the same VAE works."""
    encoder = _encoder(tmp_path, 1e6, vae_precision="fp16")
    with pytest.raises(LatentsError, match=r"a/b: .* NaN or infinite") as raised:
        encoder.encode([PIXELS], ["a/b"])
    assert 'vae_precision to "bf16" or "fp32"' in str(raised.value)
    assert "mended for fp16" in str(raised.value)
    assert np.isfinite(_encoder(tmp_path, 1e6).encode([PIXELS], ["a"])[0]["latents"]).all()


def test_a_damaged_vae_is_named(tmp_path):
    """NaN weights give an error about the VAE, whatever the precision."""
    with pytest.raises(LatentsError, match="The VAE is damaged"):
        _encoder(tmp_path, float("nan")).encode([PIXELS], ["a"])


def test_a_full_gpu_names_what_to_lower(tmp_path, monkeypatch):
    """Where a GPU has no memory left, the message names the batch and both settings."""
    encoder = _encoder(tmp_path)

    def full(_pictures):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(encoder._vae, "encode", full)
    with pytest.raises(LatentsError, match=r"memory on cpu for 2 pictures of 64 x 32 px.*batch_si"):
        encoder.encode([PIXELS] * 2, ["a", "b"])


def test_latents_past_fp16_name_the_type(tmp_path):
    """Latents that fp16 cannot hold are refused, with the types that can."""
    encoder = _encoder(tmp_path, dtype="fp16", latents="mean")
    with torch.no_grad():
        encoder._vae.quant_conv.weight *= 1e7
    with pytest.raises(LatentsError, match=r'too large for fp16.*"fp32" or "bf16"'):
        encoder.encode([PIXELS], ["a"])


def test_the_vae_of_a_single_file_is_the_same(tmp_path):
    """The VAE inside of a single-file model, and one of its own, make the same latents."""
    found = [_encoder(tmp_path).encode([PIXELS], ["a"])[0]["latents"]]
    write_single(tmp_path / "model.safetensors", random_model("sd1"))
    inside = {"path": str(tmp_path / "model.safetensors")}
    encoder = Encoder(make_config("sd1", model=inside), CPU)
    found.append(encoder.encode([PIXELS], ["a"])[0]["latents"])
    assert np.array_equal(*found)
    assert encoder.fingerprint == _encoder(tmp_path).fingerprint
    assert encoder.fingerprint != _encoder(tmp_path, 2.0).fingerprint


def test_a_model_without_a_vae_says_where_to_set_one():
    """Random weights have no VAE, so `cache.vae` is asked for."""
    with pytest.raises(ModelError, match=r"random has no VAE.*Set cache\.vae"):
        Encoder(make_config("sd1"), CPU)


def test_a_vae_of_other_channels_is_refused(tmp_path):
    """A VAE whose latents have other channels names both numbers and `cache.vae`."""
    tiny_vae(16).save_pretrained(tmp_path / "vae")
    config = make_config("sd1", cache={"vae": str(tmp_path / "vae")})
    with pytest.raises(ModelError, match=r"16 latent channels.*expected 4.*set cache\.vae"):
        Encoder(config, CPU)
