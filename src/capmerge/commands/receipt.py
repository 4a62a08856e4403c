"""The receipt beside a rewritten file: how the file was made, for later commands and for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import capmerge
from capmerge.captions.templates import MergeOptions
from capmerge.errors import DataError, UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.metadata.format import RECEIPT


def receipt(
    source: str,
    fingerprint: dict[str, Any],
    merge: MergeOptions,
    on_error: str,
    counts: dict[str, int],
) -> str:
    """The text of `OUT.capmerge.json`: how OUT was made, for `verify` and for whoever finds it in a year."""
    content = {
        "version": capmerge.__version__,
        "source": {"name": source, **fingerprint},
        "options": {**asdict(merge), "on_error": on_error},
        "templates": [asdict(template) for template in merge.templates()],
        "counts": counts,
    }
    return json.dumps(content, indent=2) + "\n"


def load_receipt(target: Path) -> tuple[MergeOptions, bool]:
    """The merge options of the run that wrote `target`, and whether it left out records that cannot be merged.

    Raises `UsageError` when there is no receipt, `DataError` when it cannot be read.
    """
    path = side_path(target, RECEIPT)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["options"]
        skips = options.pop("on_error") == "skip"
        _check_words(options)
        return MergeOptions(**{**options, "lines": tuple(options["lines"])}), skips
    except FileNotFoundError as error:
        raise UsageError(
            f"{printable(str(path))}: no such file. It says how the output was made; else give the options of the rewrite."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path),
            None,
            None,
            f"the file is no receipt of capmerge ({error}).",
            "Give the options of the rewrite instead.",
        ) from error


def _check_words(options: dict[str, Any]) -> None:
    """Raise `ValueError` for a word of `MergeOptions` that only another version knows."""
    for name, hint in get_type_hints(MergeOptions).items():
        words = get_args(hint) if get_origin(hint) is Literal else ()
        if words and name in options and options[name] not in words:
            raise ValueError(f"{name} is {options[name]!r}, expected one of {', '.join(words)}")
