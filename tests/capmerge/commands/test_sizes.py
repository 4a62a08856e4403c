"""The size of a record is the same in statistics, the index and the dataset config."""

import json
import tomllib
from collections import Counter

import pytest
from builders.metadata import as_indent_2

from capmerge.captions.size import MOST_PX, SIZE_FIELDS, WIDTH_AND_HEIGHT, is_size, size_of
from capmerge.captions.templates import MergeOptions
from capmerge.commands.dataset_config import dataset_config
from capmerge.commands.rewrite import RewriteOptions, rewrite
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.files.source import open_source
from capmerge.index.reader import open_index
from capmerge.stats.collector import Tokenizers

NO_SIZE = [
    *([], [512], [512, 512, 3], [512.0, 512], [512, 512.5], [True, 5], [5, False], [0, 0], [0, 5]),
    *([-1, 512], ["512", 512], [None, 512], [[512], 512], "512x512", 512, True, None, {"w": 5}),
    *([MOST_PX + 1, 5], [5, 10**30], [10**400, 10**400]),
]
SIZES = [[1, 1], [832, 1216], [MOST_PX, 7]]


def cases():
    """Fields of a record, and its size with the field that it comes from."""
    yield {}, None
    for odd in NO_SIZE:
        yield {"train_resolution": odd}, None
        yield {"image_size": odd}, None
        yield {"train_resolution": odd, "image_size": odd}, None
        yield {"train_resolution": odd, "image_size": [640, 480]}, (640, 480, "image_size")
        yield {"train_resolution": [64, 128], "image_size": odd}, (64, 128, "train_resolution")
    for width, height in SIZES:
        yield {"train_resolution": [width, height]}, (width, height, "train_resolution")
        yield {"image_size": [width, height]}, (width, height, "image_size")
        picture = {"width": width, "height": height}
        yield picture, (width, height, WIDTH_AND_HEIGHT)
        yield {**picture, "image_size": [9, 9]}, (width, height, WIDTH_AND_HEIGHT)
        yield {**picture, "train_resolution": [64, 128]}, (64, 128, "train_resolution")
        yield {"width": width, "image_size": [640, 480]}, (640, 480, "image_size")
    yield {"train_resolution": [64, 128], "image_size": [9, 9]}, (64, 128, "train_resolution")


CASES = list(cases())


@pytest.fixture
def run(tmp_path):
    """Rewrite records with statistics and an index; gives the outcome and the output's path."""

    def run(records, **merge):
        path, target = tmp_path / "m.json", tmp_path / "out.json"
        path.write_bytes(as_indent_2(records))
        options = RewriteOptions(
            target, merge=MergeOptions(**merge), force=True, stats=Tokenizers(), index=True
        )
        with open_source(str(path)) as source:
            outcome = rewrite(source, options, warn=print, progress=lambda _offset: None)
        return outcome, target

    return run


@pytest.mark.parametrize("texts", [{"tags": "a", "caption": "b"}, {"tags": "a"}])
@pytest.mark.parametrize("image_size", [True, False])
def test_statistics_and_index_have_the_same_sizes(run, texts, image_size):
    """Statistics count sizes by the rule and say whose they are; the index holds the buckets."""
    records = {f"k{number}": {**texts, **fields} for number, (fields, _) in enumerate(CASES)}
    outcome, target = run(records, image_size=image_size)
    expected = [size[:2] if size else (0, 0) for _, size in CASES]
    buckets = [size[:2] if size and size[2] == "train_resolution" else (0, 0) for _, size in CASES]
    index = open_index(target)
    assert list(zip(index.width.tolist(), index.height.tolist(), strict=True)) == buckets
    fields = Counter(size[2].replace(" ", "_") for _, size in CASES if size)
    assert outcome.statistics["size_fields"] == fields
    counted = {row["resolution"]: row["records"] for row in outcome.statistics["resolutions"]}
    assert counted == Counter(f"{width}x{height}" for width, height in expected if width)
    written = json.loads(target.read_bytes())
    assert [tuple(size_of(record) or (0, 0))[:2] for record in written.values()] == expected


def test_the_dataset_config_has_the_sizes_of_latents(run):
    """Buckets are made from `train_resolution`, and none where a picture's own size is there."""
    for fields, size in CASES:
        outcome, target = run({"k": {"tags": "a", **fields}})
        of_latents = {size[:2]} if size and size[2] == "train_resolution" else set()
        text = target.with_name("out.json.dataset.toml").read_text(encoding="utf-8")
        assert text == dataset_config(target, target.parent, of_latents, outcome.latents), fields
        config = tomllib.loads(text)["datasets"][0]
        own = is_size(fields.get("image_size")) and size[:2] != tuple(fields["image_size"])
        is_legacy = bool(of_latents) and not own
        assert ("resolution" in config) == ("bucket_no_upscale" in config) == is_legacy
        assert outcome.latents.files == (
            "legacy" if is_legacy else "new-style" if size else "unknown"
        )
        written = json.loads(target.read_bytes())["k"]
        assert ("image_size" in written) == ("image_size" in fields or bool(of_latents))
        assert outcome.tally.without_size == (size is None)
        assert outcome.tally.wrong_size == any(
            fields.get(name) is not None and not is_size(fields[name]) for name in SIZE_FIELDS
        )


def test_a_broken_record_is_in_no_count_of_sizes(tmp_path):
    """Statistics leave the size of a record out with the record."""
    path = tmp_path / "m.json"
    size = {"train_resolution": [64, 64]}
    good, broken = ({"caption": "a", "capmerge": mark, **size} for mark in "tx")
    path.write_bytes(as_indent_2({"good": good, "broken": broken}))
    options = MeasureOptions(merge=MergeOptions(allow_rewritten=True), on_error="skip")
    with open_source(str(path)) as source:
        document = measure(source, options, progress=lambda _offset: None)
    assert document["resolutions"] == [{"resolution": "64x64", "records": 1}]
