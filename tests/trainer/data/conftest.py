"""The rewritten example metadata, and latents that a test may damage."""

import shutil

import pytest
from builders.runs import LATENTS, rewrite_examples


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten example metadata."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def latents(tmp_path):
    """A copy of the example latents that a test may damage."""
    return shutil.copytree(LATENTS, tmp_path / "latents")
