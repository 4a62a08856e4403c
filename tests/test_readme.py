"""The README says what is true: its commands print what stands there, and its tree names every file."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```console\n\$ (.+)\n((?:.|\n)*?)```", README)


def _without_speed(text: str) -> str:
    """`text` without the figures that differ from run to run."""
    return re.sub(r"^(seconds|MB/s) .*$", r"\1", text, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the examples, in which the README's commands run one after the other."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(
        ROOT / "examples",
        folder / "examples",
        ignore=shutil.ignore_patterns("*_wildcard*", "*.stats.json"),
    )
    return folder


@pytest.mark.parametrize(
    ("command", "printed"), EXAMPLES, ids=[command[:60] for command, _ in EXAMPLES]
)
def test_example_prints_what_the_readme_shows(folder, command, printed):
    """Each console example prints exactly what stands below it, but for seconds and MB/s."""
    command = (
        command.replace("capmerge ", f"{sys.executable} -m capmerge ", 1)
        if command.startswith("capmerge ")
        else command
    )
    finished = subprocess.run(
        command, shell=True, cwd=folder, capture_output=True, text=True, timeout=120, check=True
    )
    assert _without_speed(finished.stdout) == _without_speed(printed)


def test_readme_has_examples():
    """The example blocks are found at all."""
    assert len(EXAMPLES) >= 3


def test_tree_names_every_folder():
    """Every folder of both packages and every script stands in the README."""
    folders = {f"{path.parent.name}/" for path in (ROOT / "src").glob("*/*/__init__.py")}
    scripts = [path.name for path in (ROOT / "scripts").iterdir() if path.is_file()]
    missing = [
        *(name for name in folders if name not in README),
        *(
            name
            for name in scripts
            if f"`{name}`" not in README and f"`scripts/{name}`" not in README
        ),
    ]
    assert missing == []
