"""docs/toolbox.md says what the settings of `[cache]` are."""

import re

from builders.paths import ROOT

from capmerge.toml import to_toml
from trainer.config.settings import CacheSettings


def test_the_table_has_every_setting_and_default():
    """Each setting has a row, in order, with its default as TOML where that is a value."""
    page = (ROOT / "docs" / "toolbox.md").read_text(encoding="utf-8").split("### Settings\n")[1]
    page = page.split("\n### ")[0]
    rows = re.findall(r"^\| ((?:`[a-z_]+`(?:, )?)+) \| (.+) \| .+ \|$", page, re.MULTILINE)
    defaults = {name: shown for names, shown in rows for name in re.findall(r"`(\w+)`", names)}
    fields = CacheSettings.model_fields
    assert list(defaults) == list(fields)
    for name, shown in defaults.items():
        default = fields[name].default
        if name == "images":
            assert (default, shown) == ("", "none")
        elif default is not None:
            assert shown == f"`{to_toml(default)}`", name
