"""Records and pytest marks that the tests of the command line share."""

import sys

import pytest

RECORDS = {
    "danbooru/1": {
        "tags": "1girl, solo",
        "caption": "A girl {smiles}.",
        "train_resolution": [128, 192],
    },
    "danbooru/2": {"tags": "no_humans", "score": 3},
    "danbooru/3": {"caption": "Only words.", "train_resolution": [192, 128], "image_size": [1, 2]},
}
UNMERGEABLE = {
    "a": {"caption": "fine"},
    "b": {"caption": ["one\ntwo", "\u00a0\x7f"], "id": 10**30},
    "c": 7,
    "d": {"tags": "fine"},
}
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the test is written for bash")
needs_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="the test needs a Linux file system"
)


def assert_safe(text: str) -> None:
    """Fail when `text` holds a character that a terminal would act on."""
    assert [char for char in text if char != "\n" and not char.isprintable()] == []
