"""A config of this trainer from the arguments of sd-scripts, with comments on what was left out.

Refuses, by name, what would train something else here. Knows no files.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.kohya import LEFT_OUT, REFUSED, SETTINGS
from trainer.config.kohya_arguments import Arguments
from trainer.config.kohya_notes import OFF, drop_ignored, left_out, on_memory, without_effect
from trainer.config.kohya_optimizer import Options, can_fuse, convert_optimizer, convert_schedule
from trainer.config.load import iter_problems
from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.families import FamilyName

_DEFAULTS = {"learning_rate": 2e-6, "max_train_steps": 1600}
"""Defaults of sd-scripts that are other ones here, or none."""
_OF_DATA = ("data", "caption")
_FORMATS = {
    "ckpt": ["single"],
    "safetensors": ["single"],
    "diffusers": ["diffusers"],
    "diffusers_safetensors": ["diffusers"],
}
_DTYPES = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}
_PRECISIONS = {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}


def convert(arguments: Arguments, family: FamilyName | None, name: str) -> str:
    """The text of a config that trains what `arguments` ask sd-scripts for.

    `family` is needed where no script and no option tells it; `name` is that of the arguments'
    file. The text loads as a config. Raises `ConfigError` with a line for each option that cannot
    be converted.
    """
    subsets = arguments.subsets
    shared = _DEFAULTS | {
        option: value for option, value in arguments.options.items() if value is not None
    }
    if subsets:
        # As in sd-scripts, a dataset config takes the place of these.
        shared = {k: v for k, v in shared.items() if k not in ("in_json", "train_data_dir")}
    asked = {k: v for one in (shared, *subsets) for k, v in one.items() if v not in OFF}
    problems = [*_refusals(asked)]
    try:
        document = _document(shared, subsets or [{}], _family(arguments, family))
    except ConfigError as error:
        problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(f"{name}: {problem}" for problem in problems))
    notes = [
        *left_out(asked),
        *on_memory(shared),
        *without_effect(asked, arguments, document),
        *drop_ignored(document),
    ]
    if lines := [f"{name}: {text}" for _, text in iter_problems(document)]:
        raise ConfigError("\n".join(lines))
    return _text(document, notes, name)


def _refusals(asked: Options) -> Iterator[str]:
    for option in asked:
        if option in REFUSED:
            yield f"{option}: {REFUSED[option]}."
        elif option not in SETTINGS and option not in LEFT_OUT:
            yield (
                f"{printable(option)}: not an option of fine_tune.py or sdxl_train.py that is "
                "known here. Remove it if what it does is not needed."
            )


def _family(arguments: Arguments, family: FamilyName | None) -> FamilyName:
    options = arguments.options
    if family:
        return family
    if options.get("v2"):
        return "sd2"
    if arguments.script == "sdxl_train.py" or {"learning_rate_te1", "learning_rate_te2"} & set(
        options
    ):
        return "sdxl"
    if arguments.script == "fine_tune.py" or "learning_rate_te" in options:
        return "sd1"
    raise ConfigError(
        "found neither fine_tune.py nor sdxl_train.py, which would tell the family of the model. "
        "Add --family sd1, sd2 or sdxl."
    )


def _document(shared: Options, subsets: list[dict[str, Any]], family: FamilyName) -> dict[str, Any]:
    """The sections of the config; raises `ConfigError` for what has no counterpart."""
    document: dict[str, Any] = {name: {} for name in Config.model_fields if name != "data"}
    size, *others = (
        subset.get("batch_size", shared.get("train_batch_size", 1)) for subset in subsets
    )
    if any(other != size for other in others):
        raise ConfigError(
            f"batch_size: found {size} and others in one dataset config, "
            "expected one for all data sets. Set the same in each."
        )
    for option, value in shared.items():
        if (setting := SETTINGS.get(option)) and not setting.startswith(_OF_DATA):
            section, key = setting.split(".")
            document[section][key] = value
    document["model"]["family"] = family
    document["train"]["batch_size"] = size
    special = {
        **convert_optimizer(shared, family),
        **convert_schedule(shared),
        **_rest(shared, family),
        **_engine(shared),
    }
    for setting, value in special.items():
        section, key = setting.split(".")
        document[section][key] = value

    # The data sets; caption settings that all of them share go to [caption].
    own = [_of_data({**shared, **subset}, family) for subset in subsets]
    captions = [caption for _, caption in own]
    common = {
        key: value
        for key, value in captions[0].items()
        if all(caption.get(key) == value for caption in captions)
    }
    document["caption"] = common
    document["data"] = []
    for data, caption in own:
        different = {key: value for key, value in caption.items() if key not in common}
        document["data"].append(data | ({"caption": different} if different else {}))
    ordered = {
        name: document[name] if name == "data" else _in_order(name, document[name])
        for name in Config.model_fields
    }
    return {name: values for name, values in ordered.items() if values}


def _in_order(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that ask for something, in the order of the settings of their section."""
    keys = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    asked = {key: values.get(key) for key in keys}
    return {key: value for key, value in asked.items() if value is not None and value is not False}


def _of_data(options: Options, family: FamilyName) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of a data set and those of its captions."""
    data: dict[str, Any] = {}
    caption: dict[str, Any] = {}
    for option, value in options.items():
        section, _, key = SETTINGS.get(option, "").partition(".")
        if section in _OF_DATA and value is not None and value is not False:
            (data if section == "data" else caption)[key] = value
    if family != "sdxl":
        data.pop("alpha_mask", None)  # fine_tune.py has no masked loss
    for key, names in (
        ("metadata", "in_json, or metadata_file in a dataset config"),
        ("latents", "train_data_dir, or image_dir in a dataset config"),
    ):
        if key not in data:
            raise ConfigError(f"found no {names}, expected one for each data set. Add it.")
    return data, caption


def _rest(options: Options, family: FamilyName) -> dict[str, Any]:
    """The other settings whose value is another one here, as `section.key` -> value."""
    folder, output_name = options.get("output_dir"), options.get("output_name")
    logs = options.get("log_with") or ("tensorboard" if options.get("logging_dir") else None)
    trackers = ["tensorboard", "wandb"] if logs == "all" else [logs] if logs else None
    precision = _PRECISIONS.get(str(options.get("mixed_precision", "no")))
    if precision is None:
        raise ConfigError(
            f"mixed_precision: found {printable(str(options['mixed_precision']))}, expected no, "
            "fp16 or bf16. Set one of them."
        )
    has_epochs = options.get("max_train_epochs") is not None
    return {
        "text.max_tokens": options.get("max_token_length", 75),
        # sd-scripts ignores it for the other families.
        "text.clip_skip": options.get("clip_skip") if family == "sd1" else None,
        "noise.prediction": "v" if options.get("v_parameterization") else None,
        "train.output_dir": f"{folder}/{output_name}" if folder and output_name else folder,
        # As in sd-scripts, epochs take the place of steps.
        "train.max_steps": None if has_epochs else options["max_train_steps"],
        "train.precision": "full_bf16" if options.get("full_bf16") else precision,
        "optimizer.fused_backward": True if can_fuse(options) else None,
        "train.on_nonfinite": "stop" if can_fuse(options) else None,
        "export.formats": _chosen(options, "save_model_as", _FORMATS),
        "export.dtype": _chosen(options, "save_precision", _DTYPES),
        "log.trackers": trackers,
    }


def _engine(options: Options) -> dict[str, Any]:
    """The settings of `[engine]`; sd-scripts reads none of them without `--deepspeed`."""
    if not options.get("deepspeed"):
        return {setting: None for setting in SETTINGS.values() if setting.startswith("engine.")}
    return {"engine.kind": "deepspeed"}


def _chosen(options: Options, option: str, meanings: Mapping[str, Any]) -> Any:
    """What the value of an option is called here; None if it is not given."""
    value = options.get(option)
    if value is None:
        return None
    if str(value) not in meanings:
        raise ConfigError(
            f"{option}: found {printable(str(value))}, expected {', '.join(meanings)}. "
            "Set one of them."
        )
    return meanings[str(value)]


def _text(document: Mapping[str, Any], notes: list[str], name: str) -> str:
    """The config as TOML, with its comments."""
    lines = [
        f"# Made of {name} by python -m trainer.from_sd_scripts.",
        "# Files in data.metadata have to be written by capmerge rewrite.",
    ]
    for section, values in document.items():
        for one in values if section == "data" else [values]:
            if not one:  # all of its settings were without effect
                continue
            header = "[[data]]" if section == "data" else f"[{section}]"
            lines += ["", header, *(f"{key} = {to_toml(value)}" for key, value in one.items())]
    if notes:
        lines += ["", "# Left out:", *(f"# - {note}" for note in dict.fromkeys(notes))]
    return "\n".join(lines) + "\n"
