"""Imports follow the layers of `docs/architecture.md`, and some modules load no large library."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"

LAYERS = dict(
    line.split(maxsplit=1)
    for line in (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("    ") and "  <  " in line
)
"""The layers from low to high, of each folder that has folders in it, as the page lists them."""
TRAINER_TAKES = "errors rng toml cores start html_page terminal files tokens captions index"
"""The folders and modules of capmerge that the trainer may import."""

WITH_NUMPY = {"files", "tokens", "index", "stats", "shards"}
"""The folders of capmerge that may import numpy."""
LIGHT = [
    *(
        "trainer.run",
        "trainer.from_sd_scripts",
        "trainer.report.__main__",
        "trainer.cache",
        "trainer.errors",
        "trainer.families",
        "trainer.config.load",
        "trainer.config.settings",
    ),
    *(
        "trainer.config.conflicts",
        "trainer.config.impossible",
        "trainer.config.rules",
        "trainer.config.overrides",
        "trainer.config.validation",
        "trainer.config.kohya_convert",
        "capmerge.toml",
    ),
]
"""What `--help` and a mistake in the config need of the trainer."""
DRAWERS = {"utils", "util", "common", "helpers", "helper", "misc", "base"}

MODULES = {
    ".".join(path.relative_to(SRC).with_suffix("").parts): path
    for path in SRC.rglob("*.py")
    if path.stem != "__init__"
}


def level_of(package: str) -> dict[str, int]:
    """The number of the layer, from 0, of each folder and single module of a package."""
    return {
        name: level
        for level, names in enumerate(LAYERS[package].split("<"))
        for name in names.split()
    }


@cache
def imported_by(module: str) -> frozenset[str]:
    """The dotted names of all modules that a module imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
    return frozenset(names)


def test_every_tree_has_layers():
    """There are layers for exactly the folders that have other folders in them."""
    folders = {module.rpartition(".")[0] for module in MODULES}
    assert {folder.rpartition(".")[0] for folder in folders} - {""} == LAYERS.keys()


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_every_folder_has_a_layer(package):
    """The layers name exactly the folders and single modules that are there."""
    inside = f"{package}."
    assert {
        module.removeprefix(inside).split(".")[0] for module in MODULES if module.startswith(inside)
    } == level_of(package).keys()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    """A module imports only from its own folder, lower layers, and what the trainer may import."""
    for package in LAYERS:
        inside = f"{package}."
        if not module.startswith(inside):
            continue
        levels, folder = level_of(package), module.removeprefix(inside).split(".")[0]
        for name in imported_by(module):
            theirs = name.removeprefix(inside).split(".")[0]
            if name.startswith(inside) and theirs != folder:
                assert levels[theirs] < levels[folder], name
    root = module.split(".")[0]
    for name in imported_by(module):
        theirs, *rest = name.split(".")
        if theirs in {"capmerge", "trainer"} - {root}:
            assert root == "trainer", name
            assert not rest or rest[0] in TRAINER_TAKES.split(), name


@pytest.mark.parametrize("folder", sorted({module.rpartition(".")[0] for module in MODULES}))
def test_no_circle_inside_a_folder(folder):
    """The modules of a folder have an order in which each one needs only those before it."""
    inside = {module for module in MODULES if module.rpartition(".")[0] == folder}
    TopologicalSorter(
        {module: imported_by(module) & inside - {module} for module in inside}
    ).prepare()


@pytest.mark.parametrize(
    "module", sorted(module for module in MODULES if module.startswith("capmerge."))
)
def test_capmerge_is_light(module):
    """No module of capmerge imports torch and its kin, and few import numpy or matplotlib."""
    roots = {name.split(".")[0] for name in imported_by(module)}
    assert roots.isdisjoint({"torch", "transformers", "diffusers"})
    assert (
        "numpy" not in roots
        or module.split(".")[1] in WITH_NUMPY
        or module
        in {
            "capmerge.metadata.borders",
            "capmerge.metadata.quotes",
            "capmerge.proof.signs",
        }
    )
    assert "matplotlib" not in roots or module == "capmerge.stats.figure"
    assert roots.isdisjoint({"datatrove", "fsspec"}) or module.startswith("capmerge.shards.")


def test_the_command_line_loads_nothing_heavy():
    """Importing the command line loads neither torch nor transformers, numpy, pyarrow nor tqdm."""
    heavy = "{'torch', 'transformers', 'tqdm', 'numpy', 'pyarrow', 'zstandard', 'trainer'}"
    code = (
        "import sys, typer; from capmerge.cli.app import app; group = typer.main.get_command(app); "
        "[group.get_command(None, name) for name in group.list_commands(None)]; "
        f"print(sorted({heavy} & sys.modules.keys()))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_a_rewrite_loads_only_what_it_uses():
    """The command `rewrite` loads neither other commands, statistics, tokenizers nor processes."""
    code = (
        "import sys; from capmerge.cli import rewrite; found = sys.modules.keys() & {"
        "'capmerge.cli.stats', 'capmerge.commands.verify', 'capmerge.stats.observer', "
        "'capmerge.tokens.tokenizer', 'capmerge.metadata.pool', 'multiprocessing', 'rich'}; "
        "print(sorted(found))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("module", LIGHT)
def test_what_help_needs_is_light(module):
    """Importing it loads neither torch nor transformers, diffusers, accelerate or numpy."""
    heavy = "{'torch', 'transformers', 'diffusers', 'accelerate', 'numpy', 'matplotlib'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_packages_hold_no_code():
    """The `__init__` of a folder is its one line of description."""
    for path in SRC.glob("*/*/**/__init__.py"):
        (described,) = ast.parse(path.read_text(encoding="utf-8")).body
        assert isinstance(described, ast.Expr), path


def test_no_module_is_a_drawer():
    """A module is named after what it owns."""
    assert {module.rpartition(".")[2] for module in MODULES}.isdisjoint(DRAWERS)
