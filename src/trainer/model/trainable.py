"""The parameters that are trained, and their learning rates.

A parameter that cannot get a gradient is frozen, whatever the settings say, so DDP never has to
look for unused ones.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.families import EncoderRule
from trainer.model.model import Model
from trainer.model.text_encoders import encoder_body, encoder_rules


def freeze_parts(model: Model, config: Config) -> None:
    """Set `requires_grad` of every parameter.

    It is on for the parts with a learning rate, as far as the U-Net's patterns allow, and off for
    parameters that no gradient reaches. Raises `ConfigError` for a pattern without effect, a
    clip_skip past the encoder's layers, and when nothing is left to train.
    """
    rates = _rates(config)
    for name, part in model.parts().items():
        part.requires_grad_(rates[name] > 0)
    if rates["unet"] > 0:
        _apply_patterns(model.unet, config)
    for (name, encoder), rule in zip(
        model.text_encoders(), encoder_rules(model.family, config.text.clip_skip), strict=True
    ):
        for module in _unused(name, encoder, rule):
            module.requires_grad_(requires_grad=False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        named = ", ".join(f"{key} = {getattr(config.optimizer, key):g}" for key in _RATES.values())
        raise ConfigError(
            f"optimizer: nothing is trained, found {named}. "
            "Expected at least one above 0, for a part that this model has."
        )
    # Frozen parts go to eval mode.
    model.train(model.training)


_RATES = {
    "unet": "learning_rate",
    "text_encoder": "text_learning_rate",
    "text_encoder_2": "text2_learning_rate",
}


def _rates(config: Config) -> dict[str, float]:
    return {part: getattr(config.optimizer, key) for part, key in _RATES.items()}


def _apply_patterns(unet: nn.Module, config: Config) -> None:
    """Freeze the U-Net's parameters that `train_only` leaves out or that `freeze` names."""
    trained = {name for name, _ in unet.named_parameters()}
    problems = []

    def matching(key: str, pattern: str) -> set[str]:
        found = {name for name in trained if fnmatchcase(name, pattern)}
        if not found:
            example = next(iter(dict(unet.named_parameters())))
            problems.append(
                f'model.{key}: "{pattern}" matches none of the {len(trained):,} U-Net parameters '
                f"left. Expected an fnmatch pattern for names such as {example}, for instance "
                '"*attn2*" or "down_blocks.*".'
            )
        return found

    if config.model.train_only:
        trained = set().union(
            *(matching("train_only", pattern) for pattern in config.model.train_only)
        )
    if not problems:
        trained -= set().union(*(matching("freeze", pattern) for pattern in config.model.freeze))
    if problems:
        raise ConfigError("\n".join(problems))
    if not trained:
        raise ConfigError(
            "model.freeze: no parameter of the U-Net is left to train. "
            "To freeze all of it, set optimizer.learning_rate = 0."
        )
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(name in trained)


def _unused(name: str, encoder: nn.Module, rule: EncoderRule) -> Iterator[nn.Module]:
    """The modules of a text encoder that do not reach the U-Net.

    These are the layers above the one that is read, and the final norm if it is not used.
    """
    body = encoder_body(encoder)
    layers = body.encoder.layers
    if rule.layer > len(layers):
        raise ConfigError(
            f"text.clip_skip = {rule.layer}: {name} has {len(layers)} layers. "
            f"Expected 1 to {len(layers)}."
        )
    # The pooled vector comes from the very end, so all layers reach the U-Net.
    if rule.pooled:
        return
    yield from layers[len(layers) - rule.layer + 1 :]
    if not rule.final_norm:
        yield body.final_layer_norm


def parameter_groups(model: Model, config: Config) -> list[dict[str, Any]]:
    """The trained parameters for an optimizer: `params`, `lr` and `name` for each part with any."""
    rates = _rates(config)
    groups = []
    for name, part in model.parts().items():
        trained = [parameter for parameter in part.parameters() if parameter.requires_grad]
        if trained:
            groups.append({"params": trained, "lr": rates[name], "name": name})
    return groups


def trained_names(model: Model) -> list[str]:
    """The names of the trained parameters, in the order of `parameter_groups`."""
    return [
        f"{name}.{key}"
        for name, part in model.parts().items()
        for key, parameter in part.named_parameters()
        if parameter.requires_grad
    ]


def trained_share(model: Model) -> dict[str, tuple[int, int]]:
    """The number of trained parameters and of all parameters of each part, by its name."""
    share = {}
    for name, part in model.parts().items():
        # Parameters that an engine has divided among the ranks are empty, and note their numbers.
        sizes = [
            (getattr(parameter, "ds_numel", parameter.numel()), parameter.requires_grad)
            for parameter in part.parameters()
        ]
        share[name] = (
            sum(size for size, trained in sizes if trained),
            sum(size for size, _ in sizes),
        )
    return share
