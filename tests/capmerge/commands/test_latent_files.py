"""The kind of the cached latents decides the dataset config and the default of image_size."""

import json
import tomllib

import pytest
from builders.metadata import as_indent_2, as_jsonl, run

from capmerge import MergeOptions, rewrite_file
from capmerge.commands.latent_files import count_names
from capmerge.errors import UsageError

LEGACY = {"a": {"tags": "x", "train_resolution": [256, 128]}}
NEW = {"b": {"tags": "x", "image_size": [547, 466]}}
BOTH_SIZES = {"c": {"tags": "x", "train_resolution": [256, 256], "image_size": [547, 466]}}
EQUAL = {"d": {"tags": "x", "train_resolution": [256, 256], "image_size": [256, 256]}}
NONE = {"e": {"tags": "x"}}
OLD_NAMES = ["a.npz", "deep/b.npz", "v1.5.npz", "x_10x20_sdxl.npz"]
NEW_NAMES = ["a_0547x0466_sdxl.npz", "deep/b_0832x1216_sd.npz", "c_1024x1024_flux.npz"]
NO_LATENTS = ["a_te_outputs.npz", "a_flux_te.npz", "a.txt"]


@pytest.fixture
def rewritten(tmp_path):
    """Rewrite records beside latents of the given names; gives outcome, records and config."""

    def rewritten(records, names=None, **merge):
        source, target, folder = (tmp_path / name for name in ("m.json", "o.json", "latents"))
        source.write_bytes(as_indent_2(records))
        for name in names or ():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        latents = folder if names else None
        outcome = rewrite_file(source, target, MergeOptions(**merge), latents=latents)
        config = tomllib.loads((tmp_path / "o.json.dataset.toml").read_text(encoding="utf-8"))
        return outcome, json.loads(target.read_bytes()), config["datasets"][0]

    return rewritten


@pytest.mark.parametrize(
    ("records", "files", "no_upscale"),
    [
        (LEGACY, "legacy", True),
        (LEGACY | EQUAL, "legacy", True),
        (NEW, "new-style", False),
        (BOTH_SIZES, "new-style", False),
        (NONE, "unknown", False),
        (LEGACY | NEW, "both kinds", False),
        (LEGACY | NONE, "legacy", True),
    ],
)
def test_the_sizes_decide_without_a_folder(rewritten, records, files, no_upscale):
    """Only train_resolution means legacy files; a size of the picture's own, new-style ones."""
    outcome, written, config = rewritten(records)
    assert outcome.latents.files == files
    assert ("bucket_no_upscale" in config) == ("resolution" in config) == no_upscale
    assert config["enable_bucket"] is True
    for key, record in records.items():
        expected = record.get("image_size", record.get("train_resolution"))
        assert written[key].get("image_size") == expected


@pytest.mark.parametrize(
    ("names", "files", "added"),
    [
        (OLD_NAMES, "legacy", True),
        (NEW_NAMES, "new-style", False),
        (OLD_NAMES + NEW_NAMES, "both kinds", True),
        (NEW_NAMES + NO_LATENTS, "new-style", False),
    ],
)
def test_the_names_of_the_latents_decide(rewritten, tmp_path, names, files, added):
    """--latents adds image_size and makes each size a bucket unless all names are new-style."""
    outcome, written, config = rewritten(LEGACY, names)
    assert outcome.latents.files == files
    assert ("image_size" in written["a"]) == added
    assert ("bucket_no_upscale" in config) == (files == "legacy")
    receipt = json.loads((tmp_path / "o.json.capmerge.json").read_bytes())
    assert receipt["options"]["image_size"] is added
    run("verify", tmp_path / "m.json", tmp_path / "o.json")


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("names", [OLD_NAMES, NEW_NAMES])
def test_an_explicit_choice_is_obeyed(rewritten, names, asked):
    """image_size is added or not as asked, and the config is right for what was written."""
    _, written, config = rewritten(LEGACY, names, image_size=asked)
    assert ("image_size" in written["a"]) == asked
    assert ("bucket_no_upscale" in config) == (asked and names == OLD_NAMES)


def test_a_folder_without_latents_is_refused(tmp_path):
    """A folder that is missing or has only other files is a mistake that names both."""
    for name in NO_LATENTS:
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="found no latents"):
        count_names(tmp_path)
    with pytest.raises(UsageError, match="there is no such folder"):
        count_names(tmp_path / "missing")


def test_the_command_tells_the_case(tmp_path):
    """The end table names the case and counts records without size; --dry-run follows the names."""
    source, folder = tmp_path / "m.jsonl", tmp_path / "latents"
    source.write_bytes(as_jsonl(LEGACY | NONE | {"w": {"tags": "x", "width": 5, "height": 7}}))
    folder.mkdir()
    (folder / NEW_NAMES[0]).touch()
    table = run("rewrite", source, "-o", tmp_path / "o.json").out.decode()
    assert "latents                  both kinds" in table
    assert "with the picture's own size: 1, without a size: 1" in table
    assert "without size                      1" in table
    shown = run("rewrite", source, "--dry-run", "1", "--latents", folder).out.decode()
    assert "image_size" not in shown
    table = run("rewrite", source, "-o", tmp_path / "p.json", "--latents", folder).out.decode()
    assert "latents                   new-style" in table
    verified = run("verify", source, tmp_path / "p.json").out.decode()
    assert "without a size (train_resolution or image_size): 1" in verified
