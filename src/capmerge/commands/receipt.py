"""The receipt beside a rewritten file: how the file was made, for later commands and for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import capmerge
from capmerge.captions.templates import MergeOptions
from capmerge.commands.merge_blocks import OnError
from capmerge.errors import DataError, UsageError, printable, quoted
from capmerge.files.atomic import side_path
from capmerge.metadata.format import RECEIPT

_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    str: "a string",
    tuple[str, ...]: "a list of strings",
    type(None): "null",
}
"""The JSON values that stand for each type of a merge option, in words."""


def receipt(
    source: str,
    fingerprint: dict[str, Any],
    merge: MergeOptions,
    on_error: str,
    counts: dict[str, Any],
) -> str:
    """The text of `OUT.capmerge.json`, which tells `verify` and people how OUT was made."""
    content = {
        "version": capmerge.__version__,
        "source": {"name": source, **fingerprint},
        "options": {**asdict(merge), "on_error": on_error},
        "templates": [asdict(template) for template in merge.templates()],
        "counts": counts,
    }
    return json.dumps(content, indent=2) + "\n"


def load_receipt(target: Path) -> tuple[MergeOptions, bool]:
    """The merge options of the run that wrote `target`, and True if that run had --on-error skip.

    Options that the receipt lacks have their defaults, as in a receipt of an earlier version.
    Raises `UsageError` when there is no receipt, `DataError` when it cannot be read, or holds
    options or values that this version does not know.
    """
    if not target.name:
        raise UsageError(f"{printable(str(target))}: found a folder, expected the rewritten file.")
    path = side_path(target, RECEIPT)
    content: Any = None
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is a folder, a pipe or a device")  # noqa: TRY301  # told below
        content = json.loads(path.read_text(encoding="utf-8"))
        options = _checked_options(content)
        skips = options.pop("on_error") == "skip"
        lists = {name: tuple(value) for name, value in options.items() if type(value) is list}
        return MergeOptions(**{**options, **lists}), skips
    except FileNotFoundError as error:
        raise UsageError(
            f"{printable(str(path))}: found no such file, expected the receipt that says how the "
            "output was made. Give the options of the rewrite instead."
        ) from error
    except (ValueError, UsageError) as error:
        # A UsageError is one of `MergeOptions`: two options that cannot go together, for example.
        reason = str(error).removesuffix(".")
        problem = f"the file is no receipt of capmerge {capmerge.__version__} ({reason})."
        raise DataError(str(path), None, None, problem, _next_step(content)) from error


def _checked_options(content: Any) -> dict[str, Any]:
    """The options of a receipt, each known to this version and with a value that it can have.

    Raises `ValueError` with what was found and expected.
    """
    options = content.get("options") if isinstance(content, dict) else None
    if not isinstance(options, dict):
        raise ValueError('found no object "options"')  # noqa: TRY004  # the file's value is wrong
    hints = {**get_type_hints(MergeOptions), "on_error": OnError}
    for name in ("lines", "on_error"):
        if name not in options:
            raise ValueError(f'the option "{name}" is missing')
    for name, value in options.items():
        if name not in hints:
            raise ValueError(f"found an option {quoted(name)}, which this version does not have")
        choices = _choices(hints[name])
        if not any(_is_choice(value, choice) for choice in choices):
            words = [_KINDS.get(choice) or quoted(choice) for choice in choices]
            expected = " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
            shown = json.dumps(value, ensure_ascii=False)
            shown = printable(shown if len(shown) <= 60 else f"{shown[:59]}…")
            raise ValueError(f"the option {quoted(name)} is {shown}, expected {expected}")
    return options


def _choices(hint: Any) -> list[Any]:
    """What the annotation of an option allows: types, and the words of a `Literal`.

    >>> _choices(Literal["drop", "trim"] | None)
    ['drop', 'trim', <class 'NoneType'>]
    """
    if hint in _KINDS:
        return [hint]
    if get_origin(hint) is Literal:
        return list(get_args(hint))
    return [choice for part in get_args(hint) for choice in _choices(part)]


def _is_choice(value: Any, choice: Any) -> bool:
    """True if a value of JSON is the word `choice`, or of the type `choice`."""
    if isinstance(choice, str):
        return bool(value == choice)
    if choice == tuple[str, ...]:
        return isinstance(value, list) and all(isinstance(one, str) for one in value)
    return type(value) is choice  # isinstance would take true for a whole number


def _next_step(content: Any) -> str:
    """The advice for a receipt that cannot be used; it names the version that wrote the receipt.

    The version is left out when it is this one, or when the receipt does not tell it.
    """
    version = content.get("version") if isinstance(content, dict) else None
    if not isinstance(version, str) or version == capmerge.__version__:
        return "Give the options of the rewrite instead."
    return (
        "Give the options of the rewrite instead, or use the version that wrote the receipt: "
        f"capmerge {printable(version[:40])}."
    )
