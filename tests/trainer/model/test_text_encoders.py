"""Tests of the text states against a plain reference written from the facts."""

import json
from itertools import product

import pytest
import torch
from builders.model import make_ids, make_model
from builders.paths import DATA
from torch import nn

from trainer.model.text_encoders import add_noise, encode, encoder_body, encoder_rules, join_chunks

# one chunk not full, padding chunks behind; exactly 75 tokens; a full 75th place that is id 0; more
# than four chunks
CAPTIONS = [
    "a hat!",
    ", ".join(["cat"] * 38),
    "cat " * 74 + "!~ " + "dog " * 30,
    "cat, dog, hat! " * 60,
]


@pytest.fixture(scope="module")
def encoders():
    """The text encoders of tiny models by family, with norms and embeddings that have an effect."""
    found = {}
    for family in ("sd1", "sd2", "sdxl"):
        model = make_model(family)
        generator = torch.Generator().manual_seed(11)
        for _, encoder in model.text_encoders():
            for parameter in encoder.parameters():
                parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        found[family] = [encoder for _, encoder in model.text_encoders()]
    return found


def layer_outputs(encoder: nn.Module, chunk: list[int]) -> list[torch.Tensor]:
    """The output of each layer of an encoder for one chunk, first layer first: (77, D) each."""
    outputs = []

    def remember(_module, _arguments, output):
        outputs.append((output[0] if isinstance(output, tuple) else output)[0])

    handles = [
        layer.register_forward_hook(remember) for layer in encoder_body(encoder).encoder.layers
    ]
    encoder(input_ids=torch.tensor([chunk]))
    for handle in handles:
        handle.remove()
    return outputs


def reference_states(encoder, chunks, *, layer: int, normed: bool, keep_whole_chunks: bool):
    """The states of one caption, one position after the other; `layer` counts from 0, the first."""
    norm = encoder_body(encoder).final_layer_norm
    rows = []
    for number, chunk in enumerate(chunks):
        states = layer_outputs(encoder, chunk)[layer]
        for position in range(77):
            is_first = number == 0 and position == 0
            is_last = number == len(chunks) - 1 and position == 76
            if keep_whole_chunks or is_first or is_last or 1 <= position <= 75:
                rows.append(norm(states[position]) if normed else states[position])
    return torch.stack(rows)


def reference_pooled(encoder, chunk):
    """The projection of the normed last state at the first EOS, or at BOS in a chunk without one.

    The product is x @ P, where P is stored transposed.
    """
    place = next((position for position in range(77) if chunk[position] == 49407), 0)
    normed = encoder_body(encoder).final_layer_norm(layer_outputs(encoder, chunk)[-1][place])
    return normed @ encoder.text_projection.weight.T


def reference(family, encoders, ids, chunking, clip_skip):
    """Hidden states (B, T, D) and pooled vector, as sections C3 and C4 of the facts tell it."""
    hidden, pooled = [], []
    for sample in range(len(ids[0])):
        wide = []
        for encoder, chunks_BNL in zip(encoders, ids, strict=True):
            chunks = chunks_BNL[sample].tolist()
            n_layers = len(encoder_body(encoder).encoder.layers)
            layer = n_layers - 2 if family == "sdxl" else n_layers - (clip_skip or 1)
            wide.append(
                reference_states(
                    encoder,
                    chunks,
                    layer=layer,
                    normed=family != "sdxl",
                    keep_whole_chunks=chunking == "a1111",
                )
            )
        hidden.append(torch.cat(wide, dim=1))
        if family == "sdxl":
            pooled.append(reference_pooled(encoders[1], ids[1][sample][0].tolist()))
    return torch.stack(hidden), torch.stack(pooled) if pooled else None


@pytest.mark.parametrize(
    ("family", "chunking", "n_chunks", "clip_skip"),
    [
        *product(("sd1", "sd2", "sdxl"), ("kohya", "a1111"), (1, 2, 3, 4), (None,)),
        *product(("sd1", "sd2", "sdxl"), ("crop",), (1,), (None,)),
        *product(("sd1",), ("kohya", "a1111"), (2,), (1, 2, 3)),
    ],
)
@torch.no_grad
def test_states_equal_a_plain_reference(encoders, family, chunking, n_chunks, clip_skip):
    """All chunks at once give the states and the pooled vector of single chunks, in order."""
    ids = make_ids(family, CAPTIONS, n_chunks, chunking)
    rules = encoder_rules(family, clip_skip)
    found = [
        encode(encoder, each, rule, chunking)
        for encoder, each, rule in zip(encoders[family], ids, rules, strict=True)
    ]
    expected, expected_pooled = reference(family, encoders[family], ids, chunking, clip_skip)

    torch.testing.assert_close(
        torch.cat([hidden for hidden, _ in found], dim=2), expected, rtol=1e-4, atol=1e-5
    )
    assert expected.shape[1] == (77 * n_chunks if chunking == "a1111" else 75 * n_chunks + 2)
    if family == "sdxl":
        torch.testing.assert_close(found[1][1], expected_pooled, rtol=1e-4, atol=1e-5)
    assert [pooled is not None for _, pooled in found] == [rule.pooled for rule in rules]


def test_an_encoder_runs_once_for_all_chunks(encoders):
    """A batch of 4 captions in 3 chunks is one call of 12 rows."""
    rows = []
    encoder = encoders["sd1"][0]
    handle = (
        encoder_body(encoder)
        .encoder.layers[0]
        .register_forward_pre_hook(lambda _module, arguments: rows.append(len(arguments[0])))
    )
    encode(encoder, make_ids("sd1", CAPTIONS, 3)[0], encoder_rules("sd1")[0], "kohya")
    handle.remove()
    assert rows == [12]


@pytest.mark.parametrize("places", ["75", "150", "225"])
def test_joined_places_equal_the_golden_file(places):
    """Each joined state is the chunk and position that sd-scripts puts there."""
    golden = json.loads((DATA / "joined_states_chunk_position.json").read_text())[places]
    n_chunks = int(places) // 75
    marks_BNLD = torch.stack(
        torch.meshgrid(torch.arange(2), torch.arange(n_chunks), torch.arange(77), indexing="ij"),
        dim=-1,
    )
    joined = join_chunks(marks_BNLD, "kohya")
    assert joined[1].tolist() == [[1, chunk, position] for chunk, position in golden]


@pytest.mark.parametrize("eos_in_config", [2, 49407, 1])
@torch.no_grad
def test_the_pooled_place_does_not_depend_on_the_config_of_the_encoder(encoders, eos_in_config):
    """The pooled state is at CLIP's EOS, even if the stored config says that EOS is 2."""
    encoder = encoders["sdxl"][1]
    ids_BNL = make_ids("sdxl", CAPTIONS, 2)[1]
    body = encoder_body(encoder)
    before, body.eos_token_id = body.eos_token_id, eos_in_config
    _, pooled = encode(encoder, ids_BNL, encoder_rules("sdxl")[1], "kohya")
    body.eos_token_id = before
    torch.testing.assert_close(
        pooled[0], reference_pooled(encoder, ids_BNL[0, 0].tolist()), rtol=1e-4, atol=1e-5
    )


@torch.no_grad
def test_a_first_chunk_without_eos_pools_at_bos(encoders):
    """A chunk without EOS pools at BOS.

    sd-scripts leaves such a chunk when its 75th token is a real id 0 and the caption goes on.
    """
    ids_BNL = make_ids("sdxl", ["cat " * 74 + "!~ " + "dog " * 30], 2)[1]
    assert 49407 not in ids_BNL[0, 0].tolist()
    _, pooled = encode(encoders["sdxl"][1], ids_BNL, encoder_rules("sdxl")[1], "kohya")
    torch.testing.assert_close(
        pooled[0],
        reference_pooled(encoders["sdxl"][1], ids_BNL[0, 0].tolist()),
        rtol=1e-4,
        atol=1e-5,
    )


def test_noise_depends_on_the_seed_of_the_sample_alone():
    """A sample's noise is the same alone, in a batch and in longer states, of the given size."""
    states = torch.zeros(3, 152, 32)
    noise = add_noise(states, (5, 6, 1 << 62), 0.5)
    assert torch.equal(add_noise(states[1:2], (6,), 0.5)[0], noise[1])
    assert torch.equal(add_noise(torch.zeros(1, 227, 32), (6,), 0.5)[0, :152], noise[1])
    assert not torch.equal(noise[0], noise[1])
    assert noise.std().item() == pytest.approx(0.5, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
