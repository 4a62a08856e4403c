"""The listing: the files of each record, the keys that lead outside, and the time it is made."""

import json
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
from builders.columns import edit_head
from builders.metadata import run

from capmerge.errors import CapmergeError, StaleError, UsageError
from capmerge.index import latent_match
from capmerge.index.build import build_index, ensure_index
from capmerge.index.latent_build import ensure_listing
from capmerge.index.latent_choice import Wanted
from capmerge.index.latent_listing import listing_path
from capmerge.index.latent_names import ABOVE, ABSOLUTE, INSIDE, stem_of
from capmerge.index.latent_scan import iter_latents

SD, SDXL = Wanted(("_sd", "_sdxl")), Wanted(("_sdxl",))
needs_links = pytest.mark.skipif(
    sys.platform == "win32", reason="links need a right of their own there"
)


def index_of(folder, keys, **fields):
    """Return the index of a file with these keys; `fields` adds fields to the records by key."""
    records = {key: {"caption": "a", "capmerge": "c", **fields.get(key, {})} for key in keys}
    path = folder / "m.json"
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    return build_index(path, tokens=False)


def touch(folder, *names):
    """Create empty files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(index, listing, wanted=SD, **options):
    """Return the name that the listing gives each key, relative to its folder."""
    names = {}
    for number in range(len(index)):
        key, _ = index.read(number)
        path = listing.file_of(number, key, wanted, index, **options)
        names[key] = (
            path
            and (
                path.relative_to(listing.folder) if path.is_relative_to(listing.folder) else path
            ).as_posix()
        )
    return names


@pytest.fixture
def latents(tmp_path):
    """Return an empty folder of latents."""
    folder = tmp_path / "latents"
    folder.mkdir()
    return folder


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "sd", "sdxl"),
    [
        (["a.npz"], "a.npz", "a.npz"),
        (["a_0512x0768_sd.npz"], "a_0512x0768_sd.npz", None),
        (["a_0512x0768_sdxl.npz"], "a_0512x0768_sdxl.npz", "a_0512x0768_sdxl.npz"),
        (
            ["a_0512x0768_sd.npz", "a_0640x0480_sdxl.npz"],
            "a_0512x0768_sd.npz",
            "a_0640x0480_sdxl.npz",
        ),
        (["a.npz", "a_0512x0768_sd.npz", "a_0512x0768_sdxl.npz"], "a.npz", "a.npz"),
        (["a_0064x12345_sd.npz"], "a_0064x12345_sd.npz", None),
        (
            [
                "a_64x64_sd.npz",
                "a_012345x0064_sd.npz",
                "a_0064x0064_sd3.npz",
                "a_0064x0064.npz",
                "b.npz",
                "a.npy",
            ],
            None,
            None,
        ),
        (["a_te_outputs.npz", "a_flip.npz", "A.npz", "sub/a.npz"], None, None),
        ([], None, None),
    ],
)
def test_the_family_decides_which_form_is_taken(tmp_path, latents, files, sd, sdxl):
    """A legacy name goes first, then the family's suffixes; no other name is the record's."""
    index = index_of(tmp_path, ["a"])
    touch(latents, *files)
    listing = ensure_listing(index, latents)
    assert found(index, listing, SD) == {"a": sd}
    assert found(index, listing, SDXL) == {"a": sdxl}
    assert listing.found == (sd is not None)


def test_keys_of_every_kind_find_their_files(tmp_path, latents):
    """Keys of any script, relative or absolute, with or without extension, find their files."""
    names = [
        "a",
        "b.png",
        "c.WEBP",
        "v1.5",
        "v1",
        "d/e/f.jpg",
        "日本/é 😀",
        "g.b.c.jpeg",
        "./h.png",
        "d//i",
        "d/../j.png",
        "k_0512x0512_sd",
    ]
    absolute = [str(latents / "l.png"), str(latents / "d" / "m")]
    index = index_of(tmp_path, names + absolute)
    files = [
        "a",
        "b",
        "c_0064x0064_sd",
        "v1.5",
        "d/e/f_0064x0032_sdxl",
        "日本/é 😀",
        "g.b.c",
        "h",
        "d/i",
        "j",
        "k_0512x0512_sd",
        "l",
        "d/m",
    ]
    touch(latents, *(f"{name}.npz" for name in files))
    expected = dict(zip(names + absolute, [*files[:4], None, *files[4:]], strict=True))
    listing = ensure_listing(index, latents)
    assert found(index, listing) == {key: name and f"{name}.npz" for key, name in expected.items()}
    assert listing.found == len(files)
    assert listing.unlisted == 0


def test_a_key_that_looks_like_a_size_is_not_mixed_up(tmp_path, latents):
    """A key that ends in a size has its own file, which looks like that of another key."""
    index = index_of(tmp_path, ["a", "a_0512x0512_sd"])
    touch(latents, "a_0512x0512_sd_0064x0064_sd.npz")
    assert found(index, ensure_listing(index, latents)) == {
        "a": None,
        "a_0512x0512_sd": "a_0512x0512_sd_0064x0064_sd.npz",
    }


def test_pictures_of_one_stem_share_their_latents(tmp_path, latents):
    """a.png and a.jpg have the same name for their latents, as in sd-scripts."""
    index = index_of(tmp_path, ["a.png", "a.jpg", "a"])
    touch(latents, "a_0064x0064_sd.npz")
    assert set(found(index, ensure_listing(index, latents)).values()) == {"a_0064x0064_sd.npz"}


def test_of_several_sizes_one_is_chosen(tmp_path, latents):
    """The name with the picture's own size is taken, else the newest file, else the largest one."""
    sizes = [(64, 128), (128, 64), (640, 480), (64, 64)]
    index = index_of(
        tmp_path,
        ["own", "new", "large"],
        own={"image_size": [64, 128]},
        new={"image_size": [1, [2]]},
    )
    touch(
        latents,
        *(f"{key}_{w:04d}x{h:04d}_sd.npz" for key in ("own", "new", "large") for w, h in sizes),
    )
    for path in latents.iterdir():
        os.utime(
            path,
            (1000, 2000 if path.name in ("new_0128x0064_sd.npz", "own_0640x0480_sd.npz") else 1000),
        )
    expected = {
        "own": "own_0064x0128_sd.npz",
        "new": "new_0128x0064_sd.npz",
        "large": "large_0640x0480_sd.npz",
    }
    assert found(index, ensure_listing(index, latents)) == expected


def test_many_files_are_matched_in_parts(tmp_path, latents, monkeypatch):
    """Matching in many parts gives the same listing, even if the sizes of one picture lie apart."""
    rng = random.Random(2)
    keys = [f"{number % 7}/{number}" for number in range(400)]
    index = index_of(tmp_path, keys)
    files = {
        key: rng.choice([None, ".npz", "_0064x0032_sd.npz", "_0032x0064_sdxl.npz"]) for key in keys
    }
    touch(
        latents,
        *(key + ending for key, ending in files.items() if ending),
        "0/0_0008x0008_sd.npz",
        "0/0_0016x0016_sd.npz",
    )
    files["0/0"] = ".npz" if files["0/0"] == ".npz" else None
    whole = ensure_listing(index, latents).path.read_bytes()
    monkeypatch.setattr(latent_match, "_FILES_AT_ONCE", 8)
    listing = ensure_listing(index, latents, relist=True)
    assert listing.path.read_bytes() == whole
    names = found(index, listing)
    assert {key: name for key, name in names.items() if key != "0/0"} == {
        key: ending and key + ending for key, ending in files.items() if key != "0/0"
    }


# --- where keys may lead --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "leads"),
    [
        ("a.b/c", "a.b/c", INSIDE),
        (".png", ".png", INSIDE),
        ("a/.png", "a/.png", INSIDE),
        ("a/../../b.png", "../b", ABOVE),
        ("..", "..", ABOVE),
        ("..a/b", "..a/b", INSIDE),
        ("/a//b/../c.png", "/a/c", ABSOLUTE),
        ("//a/b", "/a/b", ABSOLUTE),
        ("", "", INSIDE),
    ],
)
def test_a_stem_says_where_it_leads(key, text, leads):
    """A stem is in normal form, without the extension of a picture, and has a direction."""
    assert stem_of(key) == (text, leads)


def test_a_key_cannot_leave_the_folder_unless_allowed(tmp_path, latents):
    """Keys that lead outside are refused by name; if allowed, their folders are listed too."""
    outside, other = tmp_path / "outside", tmp_path / "other"
    keys = ["../outside/a.png", str(other / "b.png"), "../latents2/c", "d", ".."]
    index = index_of(tmp_path, keys)
    touch(outside, "a_0064x0064_sd.npz", "z.npz")
    touch(other, "b.npz")
    touch(latents, "d.npz")
    listing = ensure_listing(index, latents)
    for number, key in enumerate(keys):
        if key != "d":
            with pytest.raises(CapmergeError, match="allow_outside"):
                listing.file_of(number, key, SD, index)
    assert (listing.found, listing.unlisted, listing.outside) == (1, 4, False)
    allowed = ensure_listing(index, latents, allow_outside=True)
    assert (allowed.found, allowed.unlisted, allowed.outside) == (3, 2, True)
    paths = [
        allowed.file_of(number, key, SD, index, allow_outside=True)
        for number, key in enumerate(keys)
    ]
    assert [path and path.resolve() for path in paths] == [
        outside / "a_0064x0064_sd.npz",
        other / "b.npz",
        None,
        latents / "d.npz",
        None,
    ]
    with pytest.raises(CapmergeError, match="allow_outside"):
        allowed.file_of(0, keys[0], SD, index)
    before = allowed.path.stat().st_mtime_ns
    assert ensure_listing(index, latents).outside
    assert allowed.path.stat().st_mtime_ns == before


@needs_links
def test_a_link_cannot_leave_the_folder_unless_allowed(tmp_path, latents):
    """Links to files and folders outside are refused, and links inside the folder are followed."""
    touch(tmp_path / "outside", "x/a.npz", "b.npz")
    touch(latents, "real/c.npz")
    (latents / "x").symlink_to(tmp_path / "outside" / "x")
    (latents / "b.npz").symlink_to(tmp_path / "outside" / "b.npz")
    (latents / "inner").symlink_to(latents / "real")
    (latents / "d.npz").symlink_to("real/c.npz")
    keys = ["x/a", "b", "inner/c", "real/c", "d"]
    index = index_of(tmp_path, keys)
    listing = ensure_listing(index, latents)
    assert listing.found == len(keys)
    for number in (0, 1):
        with pytest.raises(CapmergeError, match=r"outside.*allow_outside"):
            listing.file_of(number, keys[number], SD, index)
        assert (
            listing.file_of(number, keys[number], SD, index, allow_outside=True)
            == latents / f"{keys[number]}.npz"
        )
    assert [listing.file_of(number, keys[number], SD, index) for number in (2, 3, 4)] == [
        latents / f"{key}.npz" for key in keys[2:]
    ]


@needs_links
def test_links_in_circles_are_walked_once(latents):
    """The walk ends at a link to a folder above, and at two folders that link to each other."""
    touch(latents, "a/a.npz", "b/b.npz")
    (latents / "a" / "up").symlink_to(latents)
    (latents / "a" / "to_b").symlink_to(latents / "b")
    (latents / "b" / "to_a").symlink_to(latents / "a")
    assert sorted(prefix + name for prefix, name in iter_latents(str(latents))) == [
        "a/a",
        "a/to_b/b",
        "b/b",
        "b/to_a/a",
    ]


@needs_links
def test_a_folder_is_found_under_both_its_names(tmp_path, latents):
    """Absolute keys may begin with a link to the folder or with its real path."""
    (tmp_path / "link").symlink_to(latents)
    keys = [str(tmp_path / "link" / "a.png"), str(latents / "b.png")]
    index = index_of(tmp_path, keys)
    touch(latents, "a.npz", "b.npz")
    listing = ensure_listing(index, tmp_path / "link")
    assert [listing.file_of(number, key, SD, index) for number, key in enumerate(keys)] == [
        tmp_path / "link" / "a.npz",
        latents / "b.npz",
    ]


# --- when it is made ------------------------------------------------------------------------------


def test_a_listing_is_kept_until_asked_for_anew(tmp_path, latents):
    """New files are seen with `relist` or with new metadata; each folder has its own listing."""
    index = index_of(tmp_path, ["a", "b"])
    touch(latents, "a.npz")
    seen: list[int] = []
    assert ensure_listing(index, latents, progress=seen.append).found == 1
    assert seen == [1]
    touch(latents, "b.npz")
    assert ensure_listing(index, latents, progress=seen.append).found == 1
    assert seen == [1]
    assert ensure_listing(index, latents, relist=True).found == 2
    (tmp_path / "empty").mkdir()
    assert ensure_listing(index, tmp_path / "empty").found == 0
    assert listing_path(index, latents) != listing_path(index, tmp_path / "empty")
    touch(latents, "c.npz")
    changed = index_of(tmp_path, ["c", "a", "d"])
    assert found(changed, ensure_listing(changed, latents)) == {
        "c": "c.npz",
        "a": "a.npz",
        "d": None,
    }


def test_a_broken_listing_is_made_anew(tmp_path, latents):
    """A listing that is cut off, or another kind of file, is never trusted."""
    index = index_of(tmp_path, ["a"])
    touch(latents, "a.npz")
    path = ensure_listing(index, latents).path
    whole = path.read_bytes()
    for broken in (b"", whole[:-1], index.path.read_bytes()):
        path.write_bytes(broken)
        assert ensure_listing(index, latents).path.read_bytes() == whole


@pytest.mark.parametrize(
    "edit",
    [
        lambda head: head["columns"].pop("form"),
        lambda head: head["columns"].pop("height"),
        lambda head: head["columns"]["form"].__setitem__(0, "<u4"),
        lambda head: head.update(rows=2),
        lambda head: head.update(rows=0),
        lambda head: head.pop("folder"),
        lambda head: head.pop("found"),
        lambda head: head.update(outside=0),
        lambda head: head.update(unlisted=None),
    ],
)
def test_a_listing_with_a_damaged_head_is_made_again(tmp_path, latents, edit):
    """A wrong head of the right version raises no other error and is not believed."""
    index = index_of(tmp_path, ["a"])
    touch(latents, "a_0064x0064_sd.npz")
    listing = ensure_listing(index, latents)
    pickled, whole = pickle.dumps(listing), listing.path.read_bytes()
    edit_head(listing.path, edit)
    with pytest.raises(StaleError, match=r"the file is broken: .*--relist"):
        pickle.loads(pickled)
    assert ensure_listing(index, latents).path.read_bytes() == whole


def test_a_listing_travels_to_other_processes(tmp_path, latents):
    """A pickled listing opens the same file again, and refuses any other."""
    index = index_of(tmp_path, ["a", "b"])
    touch(latents, "a_0064x0064_sd.npz")
    pickled = pickle.dumps(ensure_listing(index, latents))
    assert len(pickled) < 1000
    assert found(index, pickle.loads(pickled)) == {"a": "a_0064x0064_sd.npz", "b": None}
    other = index_of(tmp_path, ["c"])
    ensure_listing(other, latents)
    with pytest.raises(StaleError, match="made for other metadata"):
        pickle.loads(pickled)


def test_no_records_and_no_files_are_a_listing_too(tmp_path, latents):
    """An index without records and an empty folder both give a listing."""
    touch(latents, "a.npz")
    assert ensure_listing(index_of(tmp_path, []), latents).found == 0
    (tmp_path / "empty").mkdir()
    assert ensure_listing(index_of(tmp_path, ["a"]), tmp_path / "empty").found == 0


def test_a_missing_folder_is_an_error(tmp_path):
    """The message names the missing folder."""
    with pytest.raises(UsageError, match=r"nowhere.*no such folder"):
        ensure_listing(index_of(tmp_path, ["a"]), tmp_path / "nowhere")


def test_the_command_lists_folders(tmp_path, latents):
    """`capmerge index --latents` writes what the library opens, and counts what it found."""
    index = index_of(tmp_path, ["a", "../b", "c"])
    (tmp_path / "more").mkdir()
    touch(latents, "a.npz")
    said = run(
        "index", index.metadata, "--latents", latents, "--latents", tmp_path / "more"
    ).out.decode()
    assert f"1 of 3 records have a file in {latents}" in said
    assert f"0 of 3 records have a file in {tmp_path / 'more'}" in said
    assert "--allow-outside" in said
    again = ensure_index(index.metadata)
    touch(latents, "c.npz")
    touch(tmp_path, "b.npz")
    assert ensure_listing(again, latents).found == 1
    said = run(
        "index", index.metadata, "--latents", latents, "--relist", "--allow-outside"
    ).out.decode()
    assert "3 of 3" in said
    assert ensure_listing(again, Path(latents)).found == 3
    assert run("index", index.metadata, "--latents", latents, "--quiet").out == b""
