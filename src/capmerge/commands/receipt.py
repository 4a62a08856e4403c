"""The receipt beside a rewritten file: how the file was made, for later commands and for people."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import capmerge
from capmerge.captions.tally import Tally
from capmerge.captions.templates import MergeOptions
from capmerge.errors import DataError, UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.metadata.format import RECEIPT


def receipt(
    source: str, fingerprint: dict[str, Any], merge: MergeOptions, on_error: str, tally: Tally
) -> str:
    """The text of `OUT.capmerge.json`: how OUT was made, for `verify` and for whoever finds it in a year."""
    content = {
        "version": capmerge.__version__,
        "source": {"name": source, **fingerprint},
        "options": {**asdict(merge), "on_error": on_error},
        "templates": [asdict(template) for template in merge.templates()],
        "counts": tally.as_dict(),
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
