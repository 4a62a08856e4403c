"""One module for all parts: what it predicts, where gradients go, what a seed gives."""

import json
from itertools import product
from math import prod

import pytest
import torch
from builders.model import ALL_TRAINED, SIZES, make_config, make_ids, make_model, predict
from builders.paths import DATA

from trainer.errors import ConfigError
from trainer.model.build import build_model
from trainer.model.trainable import freeze_parts, parameter_groups, trained_share


def original_counts(family):
    """Numbers in the original file for each part, without what only the original layout stores."""
    keys = json.loads((DATA / f"original_keys_{family}.json").read_text())
    parts = {
        "model.diffusion_model.": "unet",
        "cond_stage_model.": "text_encoder",
        "conditioner.embedders.0.": "text_encoder",
        "conditioner.embedders.1.": "text_encoder_2",
    }
    # of SD2's encoder the last of 24 layers and the projection are not read; the logit scale
    # belongs to CLIP's loss
    sd2 = "cond_stage_model.model."
    left_out = ("logit_scale", f"{sd2}transformer.resblocks.23.", f"{sd2}text_projection")
    counts = dict.fromkeys(parts.values(), 0)
    for key, shape in keys.items():
        for prefix, part in parts.items():
            if key.startswith(prefix) and not any(word in key for word in left_out):
                counts[part] += prod(shape)
    return {part: count for part, count in counts.items() if count}


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_full_model_has_the_numbers_of_the_original_file(family):
    """Every part of the real shape counts as many numbers as sd-scripts writes."""
    model = build_model(make_config(family, model={"size": "full"}), weights=False)
    assert {part: total for part, (_, total) in trained_share(model).items()} == original_counts(
        family
    )
    assert all(parameter.is_meta for parameter in model.parameters())


def test_random_weights_are_a_function_of_the_seed():
    """The seed alone decides the weights, and torch's own random state stays untouched."""
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = make_model("sd1").state_dict()
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    same = make_model("sd1").state_dict()
    other = make_model("sd1", train={"seed": 8}).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    embedding = next(name for name in one if name.endswith("token_embedding.weight"))
    assert not any(
        torch.equal(one[name], other[name]) for name in ("unet.conv_in.weight", embedding)
    )


@pytest.mark.parametrize(
    ("family", "chunking", "recompute"),
    [
        *product(("sd1", "sd2", "sdxl"), ("kohya", "a1111", "crop"), (False,)),
        *product(("sd1", "sd2", "sdxl"), ("kohya",), (True,)),
    ],
)
def test_every_trained_parameter_gets_a_gradient(family, chunking, recompute):
    """After one backward pass no parameter is left without: DDP need not look for unused ones."""
    model = make_model(
        family,
        text={"chunking": chunking},
        optimizer=ALL_TRAINED,
        model={"gradient_checkpointing": recompute},
    )
    predict(model, 1 if chunking == "crop" else 2, chunking).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    frozen = {part for part, (trained, total) in trained_share(model).items() if trained < total}
    # The pooled vector reads the end of the second encoder, so none of that is frozen.
    assert frozen == ({"text_encoder"} if family == "sdxl" else set())


@pytest.mark.parametrize("clip_skip", [1, 2, 3])
def test_layers_above_clip_skip_are_frozen(clip_skip):
    """With clip_skip k, the last k - 1 layers are frozen, and all else is trained."""
    model = make_model("sd1", text={"clip_skip": clip_skip}, optimizer=ALL_TRAINED)
    predict(model).square().mean().backward()
    frozen = {
        name
        for name, parameter in model.text_encoder.named_parameters()
        if not parameter.requires_grad
    }
    assert {name.split("layers.")[1].split(".")[0] for name in frozen} == {
        str(layer) for layer in range(4 - clip_skip, 3)
    }
    assert all(
        (parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters()
    )


def test_a_clip_skip_past_the_layers_is_named():
    """The message names the setting and how many layers there are."""
    with pytest.raises(ConfigError, match=r"text\.clip_skip = 4: text_encoder has 3 layers"):
        make_model("sd1", text={"clip_skip": 4})


def test_recomputed_activations_change_no_gradient():
    """Gradient checkpointing recomputes layers of U-Net and encoders, to the same gradients."""
    gradients = []
    calls = []
    for recompute in (False, True):
        model = make_model(
            "sdxl",
            optimizer={"text_learning_rate": 1e-5},
            model={"gradient_checkpointing": recompute},
        )
        counts = {"unet": 0, "trained": 0, "frozen": 0}
        watched = {"unet": model.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q}
        for name, encoder in (("trained", model.text_encoder), ("frozen", model.text_encoder_2)):
            watched[name] = next(
                module
                for key, module in encoder.named_modules()
                if key.endswith("layers.0.mlp.fc1")
            )
        for name, module in watched.items():
            module.register_forward_hook(
                lambda *_, name=name, counts=counts: counts.update({name: counts[name] + 1})
            )
        predict(model).square().mean().backward()
        gradients.append(
            [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        )
        calls.append(counts)
    assert calls == [{"unet": 1, "trained": 1, "frozen": 1}, {"unet": 2, "trained": 2, "frozen": 1}]
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_frozen_parts_stay_in_eval_mode_and_out_of_the_graph():
    """`train()` leaves frozen parts in eval mode, and a frozen encoder keeps no activations."""
    model = make_model("sdxl", optimizer={"text_learning_rate": 1e-5})
    model.eval()
    model.train()
    assert (model.unet.training, model.text_encoder.training, model.text_encoder_2.training) == (
        True,
        True,
        False,
    )
    modes = []
    for _, encoder in model.text_encoders():
        layer = next(module for key, module in encoder.named_modules() if key.endswith("layers.0"))
        layer.register_forward_pre_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    predict(model)
    assert modes == [True, False]
    model.eval()
    assert not model.unet.training


def test_a_frozen_unet_passes_gradients_to_the_encoder():
    """Text encoders can be trained alone."""
    model = make_model("sd1", optimizer={"learning_rate": 0, "text_learning_rate": 1e-5})
    predict(model).square().mean().backward()
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    assert all(parameter.grad is not None for parameter in model.text_encoder.parameters())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@torch.no_grad
def test_a_sample_is_predicted_alike_alone_and_in_a_batch(family):
    """Nothing leaks between samples, even with noise on the text states, which has an effect."""
    model = make_model(family, text={"embedding_noise": 0.5})
    both = predict(model, text_noise_seeds=(3, 4))
    second = predict(model, batch=slice(1, 2), text_noise_seeds=(4,))
    torch.testing.assert_close(both[1:], second)
    assert not torch.allclose(second, predict(model, batch=slice(1, 2), text_noise_seeds=(5,)))
    torch.testing.assert_close(
        predict(make_model(family)), predict(make_model(family), text_noise_seeds=(3, 4))
    )


@torch.no_grad
def test_size_conditioning_equals_the_golden_file():
    """SDXL's U-Net embeds the sizes as the 1536 numbers of sd-scripts, after the pooled vector."""
    golden = json.loads((DATA / "noise_and_loss.json").read_text())["size_embedding"]
    pairs = zip(golden["original_hw"], golden["crop_top_left"], golden["target_hw"], strict=True)
    assert [[*original, *crop, *target] for original, crop, target in pairs] == SIZES
    model = make_model("sdxl")
    seen = []
    model.unet.add_embedding.register_forward_pre_hook(
        lambda _module, arguments: seen.append(arguments[0])
    )
    predict(model)
    pooled_width = model.text_encoder_2.config.projection_dim
    vector = seen[0][:, pooled_width:]
    assert vector.shape == (2, golden["width"])
    for name, start in (("first_8", 0), ("at_512_8", 512), ("at_1024_8", 1024)):
        torch.testing.assert_close(
            vector[:, start : start + 8], torch.tensor(golden[name]), rtol=1e-4, atol=2e-4
        )
    torch.testing.assert_close(vector.sum(dim=1), torch.tensor(golden["sum"]), rtol=1e-4, atol=2e-3)


@torch.no_grad
def test_text_and_size_reach_the_prediction():
    """Another caption for either encoder, size or timestep changes the prediction."""
    model = make_model("sdxl")
    noisy_BCHW = torch.ones(1, 4, 16, 8)
    cat, dog = make_ids("sdxl", ["cat"], 1), make_ids("sdxl", ["dog"], 1)
    size = torch.tensor(SIZES[:1])
    plain = model(noisy_BCHW, torch.tensor([10]), cat, size)
    others = [
        model(noisy_BCHW, torch.tensor([10]), (dog[0], cat[1]), size),
        model(noisy_BCHW, torch.tensor([10]), (cat[0], dog[1]), size),
        model(noisy_BCHW, torch.tensor([10]), cat, size + 64),
        model(noisy_BCHW, torch.tensor([500]), cat, size),
    ]
    for other in others:
        assert not torch.allclose(plain, other, rtol=1e-4, atol=1e-5)


def test_full_bf16_casts_weights_and_gives_float32():
    """Weights, gradients and computation are bf16; the prediction is float32 for any input."""
    model = make_model("sdxl", train={"precision": "full_bf16"}, optimizer=ALL_TRAINED)
    prediction = predict(model)
    prediction.square().mean().backward()
    assert prediction.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    single = predict(make_model("sdxl"))
    assert torch.nn.functional.mse_loss(prediction, single) < 0.01 * single.square().mean()


def test_mixed_precision_keeps_the_weights():
    """Under autocast the weights and their gradients stay float32, and so does the prediction."""
    model = make_model("sdxl", train={"precision": "bf16"}, optimizer=ALL_TRAINED)
    with torch.autocast("cpu", torch.bfloat16):
        prediction = predict(model)
    prediction.square().mean().backward()
    assert prediction.dtype == torch.float32
    assert {
        parameter.grad.dtype for parameter in model.parameters() if parameter.requires_grad
    } == {torch.float32}


def test_groups_have_the_rates_of_their_parts():
    """Each part with trained parameters has one group with all of them, at its own rate."""
    model = make_model("sdxl", optimizer=ALL_TRAINED)
    groups = parameter_groups(model, make_config("sdxl", optimizer=ALL_TRAINED))
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("unet", 1e-4),
        ("text_encoder", 1e-5),
        ("text_encoder_2", 2e-5),
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    )
    config = make_config("sdxl", optimizer={"text2_learning_rate": 1e-5, "learning_rate": 0.0})
    freeze_parts(model, config)
    assert [group["name"] for group in parameter_groups(model, config)] == ["text_encoder_2"]


def test_patterns_choose_parameters_of_the_unet():
    """`train_only` keeps matching parameters, `freeze` removes some; the share counts numbers."""
    model = make_model(
        "sd1", model={"train_only": ["*attn2*", "conv_in.*"], "freeze": ["*.to_v.*"]}
    )
    trained = {name for name, parameter in model.unet.named_parameters() if parameter.requires_grad}
    assert trained == {
        name
        for name, _ in model.unet.named_parameters()
        if ("attn2" in name or name.startswith("conv_in.")) and ".to_v." not in name
    }
    total = sum(parameter.numel() for parameter in model.unet.parameters())
    some = sum(
        parameter.numel() for name, parameter in model.unet.named_parameters() if name in trained
    )
    assert trained_share(model)["unet"] == (some, total)
    predict(model).square().mean().backward()
    assert {
        name for name, parameter in model.unet.named_parameters() if parameter.grad is not None
    } == trained


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ({"train_only": ["*attn2*", "*atn2*"]}, r'model\.train_only: "\*atn2\*" matches none'),
        ({"freeze": ["down_blocks"]}, r'model\.freeze: "down_blocks" matches none'),
        (
            {"train_only": ["conv_in.*"], "freeze": ["conv_out.*"]},
            r'model\.freeze: "conv_out\.\*" matches none of the 2',
        ),
        ({"freeze": ["*"]}, r"model\.freeze: no parameter of the U-Net is left"),
    ],
)
def test_patterns_without_effect_are_named(patterns, message):
    """A pattern that matches no parameter is refused by name, with an example of a real name."""
    with pytest.raises(ConfigError, match=message):
        make_model("sd1", model=patterns)


def test_nothing_to_train_is_an_error():
    """All rates 0 leaves nothing."""
    with pytest.raises(ConfigError, match=r"nothing is trained, found learning_rate = 0"):
        make_model("sd1", optimizer={"learning_rate": 0.0})
