import ast
import subprocess
import sys
from pathlib import Path

import pytest

import capmerge

FLOORS = [
    ["errors", "chance", "families", "marks", "tags", "tally", "tokens_clean", "tokens_table", "stats", "duplicates", "stems"],
    ["wildcard", "templates", "source", "scan", "summary", "tokens_vocabulary", "caption_stats"],
    ["rewritten", "plain", "blocks", "output", "tokens_ids"],
    ["codec", "side_files", "tokens_count", "trained", "columns"],
    ["tokens", "worker", "spans", "index"],
    ["cut", "fit", "parallel", "document", "observe", "tokens_lengths", "listing_search"],
    ["caption", "histogram", "report", "index_rows", "listing"],
    ["preview", "gather", "figure", "page_picture", "index_build"],
    ["show", "rewriter", "page"],
    ["rewrite", "verify", "measure", "stats_files"],
    ["cli_frame"],
    ["cli_index"],
    ["cli"],
    ["__main__"],
]
"""A module imports from lower floors only. A new one goes on the lowest floor above all that it needs."""

WITH_NUMPY = [
    *("columns", "index", "index_build", "index_rows", "listing", "listing_search"),
    *("duplicates", "tokens_count", "tokens_lengths", "tokens_table"),
]

PACKAGE = Path(capmerge.__file__).parent
MODULES = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
FLOOR_OF = {module: floor for floor, modules in enumerate(FLOORS) for module in modules}


def imported_by(path):
    """The dotted names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "capmerge" else {node.module}
    return names


def test_every_module_has_a_floor():
    """The picture of the house names exactly the modules that are there."""
    assert sorted(FLOOR_OF) == sorted(MODULES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module):
    """A module imports from strictly lower floors, never sideways or up."""
    ours = {name.split(".")[1] for name in imported_by(MODULES[module]) if name.startswith("capmerge.")} & MODULES.keys()
    assert [name for name in sorted(ours) if FLOOR_OF[name] >= FLOOR_OF[module]] == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_nothing_heavy_is_imported(module):
    """No module knows of trainer, torch and transformers."""
    roots = {name.split(".")[0] for name in imported_by(MODULES[module])}
    assert roots.isdisjoint({"trainer", "torch", "transformers", "diffusers"})
    assert "numpy" not in roots or module in WITH_NUMPY
    assert "matplotlib" not in roots or module == "figure"


def test_the_command_line_loads_nothing_heavy():
    """Importing the command line loads neither torch nor transformers nor tqdm."""
    code = "import sys, capmerge.cli; print(sorted({'torch', 'transformers', 'tqdm', 'numpy', 'trainer'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_no_module_is_a_drawer():
    """A module is named after what it owns."""
    files = {path.stem for path in PACKAGE.parent.rglob("*.py")}
    assert files.isdisjoint({"utils", "util", "common", "helpers", "helper", "misc"})
