from collections import Counter

import pytest
import torch
from accelerate import init_empty_weights
from builders.model import ALL_TRAINED, make_model, predict
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from trainer.model.attention import (
    AttentionShape,
    encoder_shapes,
    unet_shapes,
    use_in_encoder,
    use_in_unet,
    use_package_in_unet,
)
from trainer.model.parts import new_parts
from trainer.model.shapes import shape_of


class Seen(TorchFunctionMode):
    """Counts the shapes of all attention in its context."""

    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_function__(self, function, types, arguments=(), named=None):
        """Count the function if it is attention, and call it."""
        named = named or {}
        if function is scaled_dot_product_attention:
            query, key = arguments[0], arguments[1]
            batch, heads, queries, width = query.shape
            causal = named.get("is_causal", False)
            self.shapes[AttentionShape(batch, heads, width, queries, key.shape[2], causal)] += 1
        return function(*arguments, **named)


def prediction_and_gradients(model):
    """A prediction of the model, and the gradient of its sum for every trained parameter."""
    predicted = predict(model)
    model.zero_grad()
    predicted.sum().backward()
    return predicted.detach(), {
        name: one.grad for name, one in model.named_parameters() if one.requires_grad
    }


def assert_close(one, other):
    """Fail unless predictions and gradients differ by no more than rounding."""
    assert torch.allclose(one[0], other[0], atol=1e-5)
    for name, gradient in one[1].items():
        scale = gradient.abs().max().item() + 1e-2  # some are 0 but for rounding
        assert torch.allclose(gradient, other[1][name], atol=1e-4 * scale), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_kernel_computes_the_same(family, checkpointing):
    """The loss and its gradients depend on the kernel by no more than rounding."""
    settings = {"gradient_checkpointing": checkpointing}
    model = make_model(family, model=settings, optimizer=ALL_TRAINED)
    before = prediction_and_gradients(model)
    for order in (("math",), ("flash", "math")):
        use_in_unet(model.unet, order)
        for _, encoder in model.text_encoders():
            use_in_encoder(encoder, order)
        assert_close(before, prediction_and_gradients(model))


def test_the_kernel_that_is_chosen_computes():
    """Both passes use the chosen kernel, also where checkpointing computes a block again."""
    model = make_model("sdxl", model={"gradient_checkpointing": True}, optimizer=ALL_TRAINED)
    kernels = {}
    for order in (("math",), ("flash", "math")):
        use_in_unet(model.unet, order)
        for _, encoder in model.text_encoders():
            use_in_encoder(encoder, order)
        with torch.profiler.profile() as profile:
            prediction_and_gradients(model)
        names = {event.key for event in profile.key_averages()}
        kernels[order] = {name for name in names if name.startswith("aten::_scaled_dot_product")}
    assert kernels["math",] == {"aten::_scaled_dot_product_attention_math"}
    assert kernels["flash", "math"] == {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    }


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_function_of_another_package_gets_what_it_expects(family):
    """Both xformers and flash-attention take (B, T, H, D), and return it."""
    model = make_model(family)
    before = prediction_and_gradients(model)

    def attend(*queries_keys_values):
        parts = (part.transpose(1, 2) for part in queries_keys_values)
        return scaled_dot_product_attention(*parts).transpose(1, 2)

    use_package_in_unet(model.unet, attend)
    assert_close(before, prediction_and_gradients(model))


def test_a_choice_leaves_no_trace_in_the_saved_config():
    """The config of a text encoder, which is written beside its weights, stays as it was."""
    _, encoder = make_model("sd1").text_encoders()[0]
    before = encoder.config.to_dict()
    use_in_encoder(encoder, ("math",))
    assert encoder.config.to_dict() == before


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_shapes_are_those_that_are_computed(family):
    """The shapes that are measured are those that a forward pass has."""
    model = make_model(family)
    for _, encoder in model.text_encoders():
        use_in_encoder(encoder, ("flash", "math"))
    with Seen() as seen:
        predict(model, n_chunks=2)
    expected = unet_shapes(model.unet, 2, 16, 8, 2 * 75 + 2)
    for _, encoder in model.text_encoders():
        expected += encoder_shapes(encoder, 2 * 2)
    assert seen.shapes == expected


def test_the_shapes_of_sdxl():
    """SDXL has 70 blocks, each with attention to the picture and to the text."""
    with init_empty_weights():
        unet, _ = new_parts("sdxl", shape_of("sdxl", "full"))
    assert unet_shapes(unet, 4, 128, 128, 77) == {
        AttentionShape(4, 10, 64, 4096, 4096): 10,
        AttentionShape(4, 10, 64, 4096, 77): 10,
        AttentionShape(4, 20, 64, 1024, 1024): 60,
        AttentionShape(4, 20, 64, 1024, 77): 60,
    }
