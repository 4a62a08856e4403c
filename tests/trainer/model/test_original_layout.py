import json
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from builders.model import make_config
from diffusers import AutoencoderKL

from trainer.model.build import build_model
from trainer.model.original_layout import Original, list_originals
from trainer.model.shapes import VAE_SHAPES

DATA = Path(__file__).parents[2] / "data"
NOT_HELD = {
    "sd1": set(),
    "sd2": {"cond_stage_model.model.text_projection", "cond_stage_model.model.logit_scale"},
    "sdxl": {"conditioner.embedders.1.model.logit_scale"},
}
"""Tensors of original files that no part of a diffusers model has."""


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_names_and_shapes_are_those_of_sd_scripts(family):
    """At full size, every tensor gets the name and the shape that sd-scripts gives it."""
    listed = json.loads((DATA / f"original_keys_{family}.json").read_text())
    expected = {
        name: tuple(shape)
        for name, shape in listed.items()
        if not name.startswith("_")
        and name not in NOT_HELD[family]
        and not name.startswith("cond_stage_model.model.transformer.resblocks.23.")
    }
    model = build_model(make_config(family, model={"size": "full"}), weights=False)
    with init_empty_weights():
        parts = model.parts() | {"vae": AutoencoderKL(**VAE_SHAPES["full"])}
    held = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }
    originals = list_originals(family, parts)
    found = {one.name: tuple(one.to_file([held[p] for p in one.parts]).shape) for one in originals}
    assert found == expected
    assert len(found) == len(originals)
    assert sorted(name for one in originals for name in one.parts) == sorted(held)


def test_every_form_comes_back():
    """What is written of values and read again is the values, also where the form differs."""
    for form, shapes in (
        ("same", [(2, 3)]),
        ("joined", [(2, 3)] * 3),
        ("transposed", [(2, 3)]),
        ("convolution", [(2, 3)]),
    ):
        values = [torch.rand(shape) for shape in shapes]
        one = Original("x", tuple("abc"[: len(values)]), form)
        back = one.from_file(one.to_file(values))
        assert all(torch.equal(*pair) for pair in zip(values, back, strict=True))
