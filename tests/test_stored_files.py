"""Files of an earlier version are used as they are, made anew, or refused with a message.

The samples and what wrote them are described in `data/stored/README.md`.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STORED = Path(__file__).resolve().parent / "data" / "stored"
NEWER = STORED.with_name("stored_2")
"""Samples of formats that have changed since; they replace the older ones."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
METADATA, INDEX = "meta_wildcard.json", "meta_wildcard.json.index"
RECEIPT, LISTING = "meta_wildcard.json.capmerge.json", "meta_wildcard.json.latents-650fd751"
STATE = "run/checkpoints/step-00000002"
PLAN = "run/plans/epoch-00000000-ba3f38012a8c19624e38c656cca9a8e8.plan"
GO_ON = ("run/config.toml", "--resume", "latest", "--set", "train.max_steps=4")
"""The arguments with which the trainer goes on with the stored run, by its own config."""
OF_THE_MACHINE = {"samples_per_second", "data_wait", "memory_bytes"}
"""Fields of metrics.jsonl that depend on the machine, not on the training."""
ROUNDED = {"loss", "grad_norm"}
"""Fields of metrics.jsonl whose last digits another processor may round differently."""


@pytest.fixture
def folder(tmp_path):
    """A copy of the samples, in which the listing is the one of the copied folder of latents."""
    copy = Path(shutil.copytree(STORED, tmp_path.resolve() / "stored"))
    for name in (INDEX, LISTING):
        shutil.copy2(NEWER / name, copy / name)
    for path in (copy / PLAN).parent.glob("*.plan"):
        path.unlink()
    shutil.copy2(NEWER / Path(PLAN).name, copy / PLAN)
    listing_of(copy)
    return copy


def listing_of(folder):
    """The path of the listing in a copy of the samples; made the copy's own when it is not yet.

    A listing belongs to the absolute path of its latents, which is in its name and in its head.
    Only those two are changed: the columns keep their bytes, some places further behind.
    """
    latents = str(folder / "latents")
    digest = hashlib.blake2b(os.fsencode(latents), digest_size=4).hexdigest()
    own = folder / f"{METADATA}.latents-{digest}"
    if own.exists():
        return own
    stored = folder / LISTING
    data, status = stored.read_bytes(), stored.stat()
    head = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    start = min(place for _, place in head["columns"].values())
    shift = 8192  # longer than any path, and a multiple of the alignment
    columns = {name: [dtype, place + shift] for name, (dtype, place) in head["columns"].items()}
    changed = {"folder": latents, "file_bytes": head["file_bytes"] + shift, "columns": columns}
    text = json.dumps(head | changed).encode()
    whole = data[:8] + len(text).to_bytes(8, "little") + text
    own.write_bytes(whole.ljust(start + shift, b"\0") + data[start:])
    os.utime(own, ns=(status.st_atime_ns, status.st_mtime_ns))
    stored.unlink()
    return own


def run(folder, module, *arguments):
    """A command of the project as a user runs it in `folder`; its result with text output."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def run_well(folder, module, *arguments):
    """The result of a command that ends with exit code 0."""
    done = run(folder, module, *arguments)
    assert done.returncode == 0, done.stderr
    return done


def index_and_list(folder):
    """The text that `capmerge index` prints for the stored metadata and latents."""
    return run_well(folder, "capmerge", "index", METADATA, "--latents", "latents").stdout


def contents(folder, *names):
    """Bytes, time of change and inode of each file in `folder`, or only of `names` in it."""
    found = {}
    for place in [folder / name for name in names] or [folder]:
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            if path.is_file() and path.name != ".lock":
                status = path.stat()
                kept = (path.read_bytes(), status.st_mtime_ns, status.st_ino)
                found[path.relative_to(folder).as_posix()] = kept
    return found


def patch(path, old, new):
    """Replace the only place in a file that reads `old`."""
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def table(path):
    """The contents of an index or a listing: its version, and type and bytes of each column."""
    data = path.read_bytes()
    head = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    columns = {"version": head["version"]}
    for name, (dtype, place) in head["columns"].items():
        columns[name] = dtype, data[place : place + int(dtype[2:]) * head["rows"]]
    return columns


def metrics(path):
    """The lines of a metrics.jsonl, without the fields that depend on the machine."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in line.keys() - OF_THE_MACHINE} for line in lines]


def assert_same_training(found, expected):
    """The steps are the expected ones: same samples and captions, same numbers but for rounding."""
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, wanted in zip(found, expected, strict=True):
        for name, value in wanted.items():
            same = pytest.approx(value, rel=1e-4) if name in ROUNDED else value
            assert line[name] == same, name


# --- a rewritten file and its receipt ------------------------------------------------------------


def test_verify_reads_a_stored_receipt(folder):
    """`verify` takes the options from a stored receipt and proves the rewritten file by them."""
    before = contents(folder)
    done = run_well(folder, "capmerge", "verify", "meta.json", METADATA)
    assert "verified: 10 records" in done.stdout
    assert "could not be merged, and listed whole: 1" in done.stdout
    assert contents(folder) == before


@pytest.mark.parametrize(
    "changed",
    [
        {"of_a_later_version": True},
        {"layout": "of_a_later_version", "lines": []},
        {"lines": None},
    ],
    ids=["unknown option", "unknown layout", "other types"],
)
def test_a_receipt_of_another_format_is_refused(folder, changed):
    """`verify` refuses a receipt that it cannot understand, and says what to give in its place."""
    receipt = json.loads((folder / RECEIPT).read_text(encoding="utf-8"))
    receipt["options"] |= changed
    (folder / RECEIPT).write_text(json.dumps(receipt), encoding="utf-8")
    done = run(folder, "capmerge", "verify", "meta.json", METADATA)
    assert done.returncode == 1
    assert done.stdout == ""
    assert f"{RECEIPT}: the file is no receipt of capmerge" in done.stderr
    assert "Give the options of the rewrite instead." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stored_rewritten_file_is_neither_merged_again_nor_replaced(folder):
    """A stored rewritten file is refused as a source, and it is not replaced without `--force`."""
    before = contents(folder)
    again = run(folder, "capmerge", "rewrite", METADATA)
    assert again.returncode == 1
    assert "the record is rewritten already" in again.stderr
    anew = run(folder, "capmerge", "rewrite", "meta.json")
    assert anew.returncode == 2
    assert "Use --force to replace it" in anew.stderr
    assert contents(folder) == before


# --- index and listing ---------------------------------------------------------------------------


def test_a_stored_index_and_listing_are_used_as_they_are(folder):
    """`capmerge index` reads the stored index and listing rightly and changes neither of them."""
    before = contents(folder)
    printed = index_and_list(folder)
    assert re.search(r"^records +10$", printed, re.MULTILINE)
    assert re.search(r"^token lengths +yes$", printed, re.MULTILINE)
    assert "latents: 10 of 10 records have a file in latents" in printed
    assert contents(folder) == before


def test_the_format_has_not_changed_under_its_version(folder):
    """An index and a listing made today have the version and the columns of the stored ones."""
    run_well(folder, "capmerge", "index", METADATA, "--force", "--latents", "latents", "--relist")
    assert table(folder / INDEX) == table(NEWER / INDEX)
    assert table(listing_of(folder)) == table(NEWER / LISTING)


def test_an_index_and_a_listing_of_the_first_format_are_made_anew(tmp_path):
    """They hold no sizes of latents; the new ones are as if nothing had been there, and told."""
    copy = Path(shutil.copytree(STORED, tmp_path.resolve() / "stored"))
    listing = listing_of(copy)
    printed = index_and_list(copy)
    assert printed.count("of version 1, expected") == 2
    assert table(copy / INDEX) == table(NEWER / INDEX)
    assert table(listing) == table(NEWER / LISTING)


OTHER_FORMATS = {
    "a later version": (b'"version": 2, ', b'"version":99, '),
    "no version": (b'"version": 2, ', b"              "),
    "another kind": (b'"kind": "capmerge.', b'"kind": "mergecap.'),
    "another container": (b"CMCOLS\r\n", b"CMCOLS99"),
}


@pytest.mark.parametrize(("old", "new"), OTHER_FORMATS.values(), ids=OTHER_FORMATS)
@pytest.mark.parametrize("which", ["index", "listing"])
def test_an_index_or_listing_of_another_format_is_made_anew(folder, which, old, new):
    """An index or listing of an unknown format is made anew, while the other one stays."""
    index, listing = folder / INDEX, listing_of(folder)
    mine, other = (index, listing) if which == "index" else (listing, index)
    patch(mine, old, new)
    before, untouched = mine.read_bytes(), contents(folder, other.name)
    printed = index_and_list(folder)
    assert re.search(r"^records +10$", printed, re.MULTILINE)
    assert "latents: 10 of 10 records have a file in latents" in printed
    assert mine.read_bytes() != before
    assert table(mine) == table(NEWER / (INDEX if which == "index" else LISTING))
    assert contents(folder, other.name) == untouched


def test_a_stored_index_and_listing_of_other_content_are_made_anew(folder):
    """A stored index and listing are made anew when the rewritten file has changed since."""
    records = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    records.pop(next(iter(records)))
    (folder / METADATA).write_text(json.dumps(records, indent=2), encoding="utf-8")
    printed = index_and_list(folder)
    assert re.search(r"^records +9$", printed, re.MULTILINE)
    assert "latents: 9 of 9 records have a file in latents" in printed


def test_a_stored_listing_of_another_folder_is_made_anew(folder):
    """A listing that names another folder of latents than the one asked for is made anew."""
    listing = listing_of(folder)
    shutil.copyfile(STORED / LISTING, listing)
    for path in (folder / "latents" / "danbooru").glob("4*.npz"):
        path.unlink()
    assert "latents: 8 of 10 records have a file in latents" in index_and_list(folder)
    assert str(folder / "latents").encode() in listing.read_bytes()


# --- runs ----------------------------------------------------------------------------------------


def test_a_stored_run_goes_on_as_the_version_that_began_it(folder):
    """A stored run uses its stored files and trains the steps that the version before trained."""
    kept = [METADATA, INDEX, listing_of(folder).name, STATE, PLAN]
    before = contents(folder, *kept)
    metadata_files = {path.name for path in folder.glob(f"{METADATA}*")}
    lines = (folder / "run" / "metrics.jsonl").read_bytes()
    done = run_well(folder, "trainer.run", *GO_ON)
    assert "resumes at step 2: seed 7; 10 records" in done.stderr
    assert "an earlier version saved this state without its config" in done.stderr
    assert contents(folder, *kept) == before
    assert {path.name for path in folder.glob(f"{METADATA}*")} == metadata_files
    assert [path.name for path in (folder / "run" / "plans").glob("*.plan")] == [Path(PLAN).name]
    assert (folder / "run" / "metrics.jsonl").read_bytes().startswith(lines)
    found = metrics(folder / "run" / "metrics.jsonl")
    expected = metrics(folder / "unbroken_metrics.jsonl")
    assert_same_training(found, expected)


@pytest.mark.parametrize("which", ["index and listing", "plan"])
def test_a_stored_run_goes_on_past_files_of_another_format(folder, which):
    """A run makes an index, listing and plan of unknown formats anew and trains the same steps."""
    listing = listing_of(folder)
    if which == "plan":
        patch(folder / PLAN, b"trplan01", b"trplan99")
    else:
        patch(folder / INDEX, b'"version": 2, ', b'"version":99, ')
        patch(listing, b'"version": 2, ', b'"version":99, ')
    run_well(folder, "trainer.run", *GO_ON)
    if which == "plan":
        assert (folder / PLAN).read_bytes() == (NEWER / Path(PLAN).name).read_bytes()
    else:
        assert table(folder / INDEX) == table(NEWER / INDEX)
        assert table(listing) == table(NEWER / LISTING)
    found = metrics(folder / "run" / "metrics.jsonl")
    expected = metrics(folder / "unbroken_metrics.jsonl")
    assert_same_training(found, expected)


def test_a_stored_run_without_a_state_starts_again_with_its_seed(folder):
    """A stored run without a saved state starts again with the seed that its run.json tells."""
    shutil.rmtree(folder / "run" / "checkpoints")
    patch(folder / "run.toml", b"seed = 7\n", b"")
    patch(folder / "run.toml", b"max_steps = 2\n", b"max_steps = 1\n")
    done = run_well(folder, "trainer.run", "run.toml", "--resume", "latest")
    assert "no state was saved yet: starts again at step 0: seed 7;" in done.stderr
    found = metrics(folder / "run" / "metrics.jsonl")
    expected = metrics(folder / "unbroken_metrics.jsonl")
    assert_same_training(found, expected[:1])


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("state.json", b'"step": 2', b'"done": 2', "no complete state (state.json: found no step)"),
        (
            "state.json",
            b'"identity": {',
            b'"identity": {"text.of_a_later_version": 1, ',
            "text.of_a_later_version: saved 1, now nothing",
        ),
        (
            "model.safetensors",
            b'"unet.conv_in.weight"',
            b'"unet.first_c.weight"',
            "does not fit this run's model or optimizer",
        ),
    ],
    ids=["no step", "unknown setting", "other names"],
)
def test_a_state_of_another_format_is_refused(folder, name, old, new, message):
    """A state that this version does not wholly know is refused with the reason, and kept."""
    patch(folder / STATE / name, old, new)
    before = contents(folder)
    done = run(folder, "trainer.run", *GO_ON)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert f"{STATE}: " in done.stderr
    assert message in done.stderr
    assert contents(folder) == before
