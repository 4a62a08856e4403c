"""The picture of a key, and all pictures of a folder."""

import re

import pytest

from trainer.caching.finding import PictureFolder, items_of_folder, items_of_metadata
from trainer.caching.pictures import PictureError


@pytest.fixture
def images(tmp_path):
    """A folder of empty files with the names of pictures."""
    folder = tmp_path / "images"
    for name in (
        "a.png",
        "a.jpg",
        "b/c.WEBP",
        "b/v1.5.jpeg",
        "b/x.txt",
        "b/x_0010x0010_sd.npz",
        "name with [brackets]*.bmp",
        "..dots.png",
        ".avif",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


@pytest.mark.parametrize(
    ("key", "stem", "name"),
    [
        ("a", "a", "a.jpg"),  # as sd-scripts takes the first of the sorted names
        ("a.png", "a", "a.png"),
        ("./b//c", "b/c", "b/c.WEBP"),
        ("b/v1.5", "b/v1.5", "b/v1.5.jpeg"),
        ("b/v1.5.jpeg", "b/v1.5", "b/v1.5.jpeg"),
        ("name with [brackets]*", "name with [brackets]*", "name with [brackets]*.bmp"),
        ("b/../a.png", "a", "a.png"),
        ("..dots", "..dots", "..dots.png"),
    ],
)
def test_a_key_leads_to_its_picture(images, key, stem, name):
    """Keys with an extension and without, absolute or not, lead to one picture each."""
    folder = PictureFolder(images)
    found = folder.find(key)
    assert (found.stem, found.path, found.is_absolute) == (stem, images / name, False)
    found = folder.find(f"{images}/{key}")
    assert (found.stem, found.path, found.is_absolute) == (stem, images / name, True)


@pytest.mark.parametrize(
    "key",
    ["", "b", "b/x", "A", "a.jpeg", "c", "b/c.webp", "a\0b", "\ud800", "x" * 300, "/", "a/b/../.."],
)
def test_a_key_without_a_picture(images, key):
    """No key of any kind is taken for another picture, or is a bug."""
    with pytest.raises(PictureError, match=r"there is no such file|leads out"):
        PictureFolder(images).find(key)


@pytest.mark.parametrize("key", ["../images/a", "../x", "/etc/passwd", "b/../../a", "//a.png"])
def test_a_key_stays_inside(images, key):
    """A key that leads out of the folder is refused, even to a picture in it by a way round."""
    with pytest.raises(PictureError, match=re.escape(f"leads out of the folder {images}")):
        PictureFolder(images).find(key)


def test_a_folder_is_walked_in_order(images):
    """All pictures come once, in an order that the disk does not decide."""
    items = list(items_of_folder(images))
    assert [item.key for item in items] == [
        "..dots.png",
        "a.jpg",
        "a.png",
        "name with [brackets]*.bmp",
        "b/c.WEBP",
        "b/v1.5.jpeg",
    ]
    assert [item.number for item in items] == list(range(len(items)))
    problems = {item.key: item.problem for item in items if item.problem}
    assert problems == {"a.png": "its latents have the name of those of a.jpg"}
    for item in items:
        assert PictureFolder(images).find(item.key).path == images / item.key


def test_each_record_is_an_item(tmp_path):
    """Records with equal keys count apart, so that numbers stay those of the file."""
    (tmp_path / "m.json").write_text('{"a": {}, "b": 3, "a": {"tags": "x"}}')
    items = list(items_of_metadata(tmp_path / "m.json"))
    assert [(item.number, item.key) for item in items] == [(0, "a"), (1, "b"), (2, "a")]
