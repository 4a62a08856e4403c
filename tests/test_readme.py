"""README and docs are true: examples print what they show, and trees and links hold."""

import difflib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLE = re.compile(
    r"```console\n\$ (?P<command>.+)\n(?P<shown>(?:.|\n)*?)```"
    r"|```python\n(?P<program>(?:(?!```)(?:.|\n))*)```\n\nIt prints:\n\n"
    r"```text\n(?P<printed>(?:.|\n)*?)```"
)
"""A command and what it prints, or a program and what it prints."""
PYTHON = shlex.quote(sys.executable)
FUNCTIONS = f'capmerge() {{ {PYTHON} -m capmerge "$@"; }}; python() {{ {PYTHON} "$@"; }}; '
"""What a reader types, as commands of this very interpreter."""
MOST_README_BYTES = 11_000


def _without_speed(text: str) -> str:
    """`text` without the figures that differ from run to run."""
    return re.sub(r"^(seconds|MB/s) .*$", r"\1", text, flags=re.MULTILINE)


def _difference(example: re.Match[str], folder: Path) -> str:
    """How the output of an example differs from what the page shows; "" when it does not."""
    command, program = example["command"], example["program"]
    shown = example["shown"] if command else example["printed"]
    words = [FUNCTIONS + command] if command else [sys.executable, "-c", program]
    done = subprocess.run(
        words,
        shell=bool(command),
        cwd=folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )
    lines = [_without_speed(text).splitlines() for text in (shown, done.stdout)]
    difference = "\n".join(difflib.unified_diff(*lines, "the page", "the output", lineterm=""))
    # A command that shows an error message sends it to standard output, and may fail.
    failed = (
        f"exit code {done.returncode}: {done.stderr}"
        if done.returncode and "2>&1" not in (command or "")
        else ""
    )
    return f"$ {command or 'python'}\n{difference}\n{failed}" if difference or failed else ""


def _with_examples():
    """The pages that have examples; pages that train take more than ten seconds."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if EXAMPLE.search(text):
            yield pytest.param(
                page,
                marks=[pytest.mark.slow] if "$ python -m trainer.run" in text else [],
                id=page.name,
            )


@pytest.mark.parametrize("page", list(_with_examples()))
def test_examples_print_what_the_page_shows(page, tmp_path):
    """The examples, run in order beside a fresh `examples/`, print what the page shows."""
    shutil.copytree(
        ROOT / "examples",
        tmp_path / "examples",
        ignore=shutil.ignore_patterns("*_wildcard*", "*.stats.json"),
    )
    examples = EXAMPLE.finditer(page.read_text(encoding="utf-8"))
    differences = [
        difference for example in examples if (difference := _difference(example, tmp_path))
    ]
    assert not differences, "\n".join(differences)


def test_examples_are_found():
    """Every console block is an example that the pattern finds, and the README has some."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = [example for example in EXAMPLE.finditer(text) if example["command"]]
        assert len(found) == text.count("```console"), page.name
    assert README.count("```console") >= 3


def test_readme_is_short():
    """The README is read in a few minutes; what it has no room for is in docs/."""
    assert len(README.encode()) <= MOST_README_BYTES


def test_tree_names_every_source_folder():
    """README names each package below src/ and its folders, not the folders in those."""
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "src").rglob("*.py")}
    shown = [folder.as_posix() for folder in folders if len(folder.parts) <= 3]
    assert sorted(folder for folder in shown if f"`{folder}/`" not in README) == []


@pytest.mark.parametrize(
    "folder", sorted({path.parent for path in (ROOT / "src").rglob("*.py")}), ids=lambda f: f.name
)
def test_architecture_names_the_modules_of_each_folder(folder):
    """The row of a folder in docs/architecture.md names its modules, and none that is not there."""
    start = f"| `{folder.relative_to(ROOT).as_posix()}/` |"
    (row,) = [line for line in ARCHITECTURE.splitlines() if line.startswith(start)]
    named = set(re.findall(r"`([a-z_0-9]+)`", row))
    assert named == {path.stem for path in folder.glob("[a-z]*.py")}


def test_every_script_is_named():
    """Each script is named in the README or in docs/architecture.md."""
    scripts = [
        path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").iterdir() if path.is_file()
    ]
    assert sorted(script for script in scripts if f"`{script}`" not in README + ARCHITECTURE) == []


def test_every_page_is_linked():
    """The README leads to each page in docs/."""
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in README] == []


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / ".github" / "CONTRIBUTING.md"], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    """Each relative link of a page leads to a file, and to a heading where it names one."""
    broken = []
    for path, anchor in re.findall(
        r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text(encoding="utf-8")
    ):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def _anchors(page: Path) -> set[str]:
    """The anchors that a link can name in a page: its headings as GitHub spells them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
