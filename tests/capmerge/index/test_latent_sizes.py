"""The sizes of latents: files that are opened, and how they decide the bucket of a record."""

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders.columns import edit_head
from builders.latents import arrays_of, write_latents
from builders.metadata import run

from capmerge.errors import WorkerError
from capmerge.index import latent_pool
from capmerge.index.build import build_index
from capmerge.index.latent_build import ensure_listing
from capmerge.index.latent_check import check_file
from capmerge.index.latent_choice import Wanted
from capmerge.index.latent_sizes import read_sizes

SDXL = Wanted(("_sdxl",))
PICTURE = (547, 466)
NEW = "_0547x0466_sdxl.npz"


def index_of(folder, records):
    """Return the index of a file with records of these fields by key."""
    path = folder / "m.json"
    path.write_text(
        json.dumps({key: {"caption": "a", "capmerge": "c", **r} for key, r in records.items()}),
        encoding="utf-8",
    )
    return build_index(path, tokens=False)


def sizes_in(index, listing, wanted=SDXL):
    """Return the bucket of each key."""
    buckets = listing.buckets(wanted, index)
    keys = [index.read(number)[0] for number in range(len(index))]
    return dict(
        zip(keys, zip(buckets.width.tolist(), buckets.height.tolist(), strict=True), strict=True)
    )


# --- what is in a file ----------------------------------------------------------------------------


def test_several_resolutions_and_flipped_arrays_in_one_file(tmp_path):
    """Every resolution is found once; flipped latents, masks and other arrays are none."""
    path = write_latents(tmp_path / "a.npz", (256, 512), (128, 64), flipped=True)
    assert read_sizes(path) == ([(128, 64), (256, 512)], "")
    path = write_latents(tmp_path / "b.npz", (64, 128), suffixed=False)
    assert read_sizes(path).sizes == [(64, 128)]


def test_an_array_of_text_before_the_latents_is_not_taken_for_them(tmp_path):
    """`latents_dtype` and the like say nothing about a size."""
    np.savez(tmp_path / "a.npz", latents_dtype=np.array("float32"), **arrays_of(64, 128))
    assert read_sizes(tmp_path / "a.npz").sizes == [(64, 128)]


@pytest.mark.parametrize("suffix", ["", "_8x16"])
@pytest.mark.parametrize("how", ["compressed", "version 2", "fortran"])
def test_other_layouts_of_the_file_give_the_same_size(tmp_path, suffix, how):
    """Compressed members, long npy headers and another order of the values are read too."""
    arrays = arrays_of(128, 64, suffix)
    path = tmp_path / "a.npz"
    if how == "compressed":
        np.savez_compressed(path, **arrays)
    elif how == "fortran":
        np.savez(path, **{name: np.asfortranarray(array) for name, array in arrays.items()})
    else:
        with zipfile.ZipFile(path, "w") as zipped:
            for name, array in arrays.items():
                with zipped.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, version=(2, 0))
    assert read_sizes(path).sizes == [(128, 64)]


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({}, "found no arrays"),
        ({"x": np.zeros(3)}, 'found "x"'),
        ({"latents": np.zeros((4, 8))}, 'found "latents"'),
        ({"latents": np.zeros((64, 64, 4))}, 'found "latents"'),
        ({"latents": np.zeros((4, 0, 8))}, 'found "latents"'),
        ({"latents_8x9": np.zeros((4, 8, 8))}, 'found "latents_8x9"'),
        ({"latents_flipped": np.zeros((4, 8, 8))}, 'found "latents_flipped"'),
    ],
)
def test_a_file_without_latents_says_what_it_holds(tmp_path, arrays, problem):
    """Latents have channels, two sides of 64 px or more, and the shape of their name."""
    np.savez(tmp_path / "a.npz", **arrays)
    found = read_sizes(tmp_path / "a.npz")
    assert found.sizes == []
    assert problem in found.problem


@pytest.mark.parametrize("content", [b"", b"PK", b"PK\3\4" + bytes(400), b"\0" * 70_000])
def test_a_file_that_is_no_npz_has_a_problem_and_no_traceback(tmp_path, content):
    """Whatever the bytes are, a reason in one line comes back."""
    (tmp_path / "a.npz").write_bytes(content)
    found = read_sizes(tmp_path / "a.npz")
    assert found.sizes == []
    assert found.problem
    assert "\n" not in found.problem


# --- the bucket of a record -----------------------------------------------------------------------


def test_the_latents_decide_whatever_the_record_says(tmp_path):
    """A picture's own size, in any field, is no bucket, and a record needs no size at all."""
    latents = tmp_path / "latents"
    records = {
        "image_size": {"image_size": [*PICTURE]},
        "none": {},
        "width_height": {"width": 547, "height": 466},
        "odd": {"train_resolution": [512], "image_size": [*PICTURE]},
        "differs": {"train_resolution": [64, 64], "image_size": [*PICTURE]},
        "legacy_without": {},
        "legacy": {"train_resolution": [64, 128]},
    }
    for key in list(records)[:5]:
        write_latents(latents / f"{key}{NEW}", (256, 128))
    write_latents(latents / "legacy_without.npz", (192, 64), suffixed=False)
    (latents / "legacy.npz").write_bytes(b"never opened")
    index = index_of(tmp_path, records)
    said: list[str] = []
    listing = ensure_listing(index, latents, tell=said.append)
    expected = dict.fromkeys(records, (256, 128))
    assert sizes_in(index, listing) == expected | {
        "legacy_without": (192, 64),
        "legacy": (64, 128),
    }
    assert (listing.found, listing.opened, listing.differing, listing.broken) == (7, 6, 1, 0)
    assert listing.buckets(SDXL, index).differing == 1
    assert "6 latents files were opened to see their sizes" in said[0]


def test_of_several_resolutions_the_wanted_one_or_the_largest_is_taken(tmp_path):
    """The resolution is the side of a square; a picture without it keeps its largest."""
    latents = tmp_path / "latents"
    write_latents(latents / f"many{NEW}", (512, 512), (1024, 960), (832, 1216), (256, 256))
    write_latents(latents / f"one{NEW}", (512, 448))
    index = index_of(tmp_path, {"many": {}, "one": {}})
    listing = ensure_listing(index, latents)
    wanted = {
        None: ((832, 1216), (512, 448), 0, 1),
        1024: ((832, 1216), (512, 448), 1, 1),
        512: ((512, 512), (512, 448), 2, 1),
        256: ((256, 256), (512, 448), 1, 1),
        128: ((832, 1216), (512, 448), 0, 1),
    }
    for resolution, (many, one, answering, several) in wanted.items():
        choice = Wanted(("_sdxl",), resolution)
        assert sizes_in(index, listing, choice) == {"many": many, "one": one}, resolution
        buckets = listing.buckets(choice, index)
        assert (buckets.answering, buckets.several) == (answering, several), resolution
    assert listing.file_of(0, "many", Wanted(("_sdxl",), 256), index) == latents / f"many{NEW}"


def test_a_broken_file_is_listed_and_gives_no_bucket(tmp_path):
    """The record of a broken file has a file, and the size 0 x 0; another form is taken first."""
    latents = tmp_path / "latents"
    latents.mkdir()
    (latents / f"a{NEW}").write_bytes(b"broken")
    (latents / "b.npz").write_bytes(b"broken")
    write_latents(latents / f"b{NEW}", (64, 64))
    index = index_of(tmp_path, {"a": {}, "b": {}, "c": {"image_size": [64, 64]}})
    listing = ensure_listing(index, latents)
    buckets = listing.buckets(SDXL, index)
    assert sizes_in(index, listing) == {"a": (0, 0), "b": (64, 64), "c": (0, 0)}
    assert buckets.found.tolist() == [True, True, False]
    assert listing.broken == 2
    assert listing.file_of(0, "a", SDXL, index) == latents / f"a{NEW}"
    assert listing.file_of(1, "b", SDXL, index) == latents / f"b{NEW}"


def test_any_number_of_processes_gives_the_same_listing(tmp_path, monkeypatch):
    """Files are opened in parallel, and come back in their order."""
    latents = tmp_path / "latents"
    records = {f"k{number}": {} for number in range(60)}
    for number, key in enumerate(records):
        if number % 7:
            write_latents(latents / f"{key}{NEW}", (64, 64 + 8 * number), (64, 128))
        else:
            (latents / f"{key}{NEW}").parent.mkdir(exist_ok=True)
            (latents / f"{key}{NEW}").write_bytes(b"broken")
    index = index_of(tmp_path, records)
    whole = ensure_listing(index, latents).path.read_bytes()
    monkeypatch.setattr(latent_pool, "_FILES_PER_MESSAGE", 4)
    for jobs in (2, 5):
        listing = ensure_listing(index, latents, relist=True, jobs=jobs)
        assert listing.path.read_bytes() == whole


def test_a_listing_of_an_older_version_is_made_again_and_told(tmp_path):
    """Listings of the first version have no sizes."""
    latents = tmp_path / "latents"
    write_latents(latents / f"a{NEW}", (64, 128))
    index = index_of(tmp_path, {"a": {}})
    listing = ensure_listing(index, latents)
    whole = listing.path.read_bytes()
    edit_head(listing.path, lambda head: head.update(version=1))
    said: list[str] = []
    again = ensure_listing(index, latents, tell=said.append)
    assert again.path.read_bytes() == whole
    assert "version 1" in said[0]
    assert "The folder is listed again." in said[0]


def test_memory_does_not_grow_with_the_size_of_the_files(tmp_path):
    """The headers alone are read, however large the arrays are."""
    latents = tmp_path / "latents"
    latents.mkdir()
    np.savez(latents / f"a{NEW}", latents=np.zeros((4, 2048, 1024), np.float32))
    tracemalloc.start()
    assert read_sizes(latents / f"a{NEW}").sizes == [(8192, 16384)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000


def test_a_process_that_is_killed_is_told(tmp_path, monkeypatch):
    """The parent says which process ended, and does not wait for its results."""
    monkeypatch.setattr(latent_pool, "_FILES_PER_MESSAGE", 2)
    paths = [str(tmp_path / f"{number}.npz") for number in range(9)]
    with (
        latent_pool.FilePool(_die_at_5, 2) as pool,
        pytest.raises(WorkerError, match="exit code 7"),
    ):
        list(pool.map(paths))


def _die_at_5(path):
    if path.endswith("5.npz"):
        os._exit(7)
    return path


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def broken_data(tmp_path):
    """Return metadata and a folder of latents with one sound file and a broken one of each kind."""
    latents = tmp_path / "latents"
    arrays = arrays_of(64, 64)
    faults = {
        "cut": None,
        "nan": arrays | {"latents": np.full((4, 8, 8), np.nan, np.float32)},
        "whole": arrays | {"latents": np.zeros((4, 8, 8), np.int64)},
        "flip": arrays | {"latents_flipped": np.zeros((4, 8, 9), np.float32)},
        "old": {"latents": arrays["latents"]},
        "other": arrays_of(64, 128),
        "bits": None,
    }
    latents.mkdir()
    for key, found in faults.items():
        np.savez(latents / f"{key}.npz", **(found or arrays))
    cut = (latents / "cut.npz").read_bytes()
    (latents / "cut.npz").write_bytes(cut[: len(cut) // 2])
    (latents / "bits.npz").write_bytes(cut[:300] + bytes([cut[300] ^ 1]) + cut[301:])
    write_latents(latents / f"sound{NEW}", (64, 64), flipped=True)
    records = {key: {"train_resolution": [64, 64]} for key in faults} | {"sound": {}}
    return index_of(tmp_path, records).metadata, latents, list(faults)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_check_names_every_broken_file(broken_data, jobs):
    """Each fault that would stop a run is found, with its file, and the exit status is 1."""
    metadata, latents, faults = broken_data
    done = run("index", metadata, "--latents", latents, "--check", "-j", jobs, fails=1)
    lines = [line for line in done.out.decode().splitlines() if line.startswith("broken: ")]
    assert [Path(line.split(": ")[1]).stem for line in lines] == faults
    assert "checked: 8 files, 7 of them broken" in done.out.decode()
    error = done.err
    assert "7 latents files are broken" in error
    assert 'data.on_missing = "skip"' in error


def test_check_of_sound_files_exits_with_0(tmp_path):
    """Nothing is named when nothing is broken; without --latents there is nothing to check."""
    latents = tmp_path / "latents"
    write_latents(latents / f"a{NEW}", (64, 128), (128, 128), flipped=True)
    metadata = index_of(tmp_path, {"a": {}}).metadata
    said = run("index", metadata, "--latents", latents, "--check").out.decode()
    assert "checked: 1 files, 0 of them broken" in said
    assert "1 latents files were opened to see their sizes" in said
    assert "--latents DIR" in run("index", metadata, "--check", fails=2).err


def test_the_index_may_lie_elsewhere(tmp_path):
    """With --out nothing is written beside the metadata, and no other file is ever replaced."""
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    write_latents(data / "latents" / f"a{NEW}", (64, 128))
    metadata = data / "m.json"
    metadata.write_text('{"a": {"caption": "a", "capmerge": "c"}}', encoding="utf-8")
    elsewhere.mkdir()
    out = elsewhere / "x.index"
    for _ in range(2):
        run("index", metadata, "--out", out, "--latents", data / "latents")
        assert sorted(path.name for path in data.iterdir()) == ["latents", "m.json"]
        names = sorted(path.name for path in elsewhere.iterdir())
        assert names[0] == "x.index"
        assert names[1].startswith("x.latents-")
    run("index", metadata, "--out", out, "--force")
    before = metadata.read_bytes()
    for taken in (metadata, elsewhere, data / "latents" / f"a{NEW}"):
        error = run("index", metadata, "--out", taken, fails=2).err
        assert "found something else than an index there" in error
    assert metadata.read_bytes() == before


def test_latents_of_any_channels_have_a_size(tmp_path):
    """How many channels a model takes is its own matter: VAEs of 16 and 32 are in use."""
    np.savez(tmp_path / "a.npz", latents=np.zeros((32, 8, 16), np.uint16))
    assert read_sizes(tmp_path / "a.npz").sizes == [(128, 64)]


def test_the_check_reads_latents_as_a_run_does(tmp_path):
    """bfloat16 in uint16 is sound, and infinite numbers and false tags are told."""
    path = tmp_path / "a.npz"
    bits = (np.ones((4, 8, 8), np.float32).view(np.uint32) >> 16).astype(np.uint16)
    plain = {"latents": bits, "original_size": np.ones(2), "crop_ltrb": np.ones(4)}
    np.savez(path, latents_dtype=np.array("bfloat16"), **plain)
    assert check_file(path) == ("", "")
    np.savez(path, latents_dtype=np.array("float16"), **plain)
    assert 'type uint16, but "latents_dtype" says' in check_file(path)[1]
    plain["latents"][0, 0, 0] = 0x7F80
    np.savez(path, **plain)
    assert check_file(path)[1] == '1 of 256 numbers of "latents" are NaN or infinite'
