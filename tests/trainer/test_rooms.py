import ast
import subprocess
import sys
from pathlib import Path

import pytest

import capmerge
import trainer

FLOORS = [
    ["errors", "families", "interrupts", "order", "publish", "toml", "npz", "tokenizer_files", "worker_processes", "handover"],
    ["settings", "chunks", "buckets", "metrics", "shapes"],
    ["batch", "text", "noise", "latents", "plan", "optim", "engine", "captions", "conflicts"],
    ["model", "model_load", "datasets", "checkpoint", "mistakes", "overrides"],
    ["freeze", "loss", "samples", "loader", "derived", "model_save", "config"],
    ["build", "steps", "run_folder"],
    ["dry_run", "loop"],
    ["run"],
]
"""A module imports from lower floors only. A new one goes on the lowest floor above all that it needs."""

LIGHT = {"errors", "families", "settings", "config", "conflicts", "mistakes", "overrides", "toml", "run"}
"""What `--help` and a mistake in the config need: without torch and its kin."""
CAPMERGE_ROOMS = {
    "cli",
    "cli_frame",
    "cli_index",
    "rewrite",
    "rewriter",
    "verify",
    "measure",
    "parallel",
    "preview",
    "show",
    "page",
    "report",
}
"""The stories of capmerge and what serves them alone: not for the trainer."""

PACKAGE = Path(trainer.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def imported_by(path):
    """The dotted names of all modules that a file imports from, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names.add(node.module)
    return names


def test_every_module_has_a_floor():
    """The picture of the house names exactly the modules that are there."""
    assert sorted(FLOOR_OF) == sorted(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    """A module imports from strictly lower floors, and of capmerge no story."""
    names = [name.split(".") for name in imported_by(MODULES[module])]
    ours = {name[1] for name in names if name[0] == "trainer" and len(name) > 1}
    assert [name for name in sorted(ours) if FLOOR_OF[name] >= FLOOR_OF[module]] == []
    theirs = {name[1] for name in names if name[0] == "capmerge" and len(name) > 1}
    assert theirs & CAPMERGE_ROOMS == set()


@pytest.mark.parametrize("module", sorted(LIGHT))
def test_what_help_needs_is_light(module):
    """Importing it loads neither torch nor transformers, diffusers, accelerate or numpy."""
    heavy = "{'torch', 'transformers', 'diffusers', 'accelerate', 'numpy', 'matplotlib'}"
    code = f"import sys, trainer.{module}; print(sorted({heavy} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_capmerge_knows_nothing_of_the_trainer():
    """No module of capmerge imports trainer."""
    importing = [
        path.name for path in Path(capmerge.__file__).parent.glob("*.py") if any(n.startswith("trainer") for n in imported_by(path))
    ]
    assert importing == []
