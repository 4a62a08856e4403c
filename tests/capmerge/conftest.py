"""Files that the tests of several commands read."""

from pathlib import Path

import pytest
from builders.commands import RECORDS, UNMERGEABLE
from builders.metadata import as_indent_2


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """`RECORDS` as a file."""
    path = tmp_path / "meta_lat.json"
    path.write_bytes(as_indent_2(RECORDS))
    return path


@pytest.fixture
def unmergeable(tmp_path: Path) -> Path:
    """`UNMERGEABLE` as a file."""
    path = tmp_path / "bad.json"
    path.write_bytes(as_indent_2(UNMERGEABLE))
    return path
