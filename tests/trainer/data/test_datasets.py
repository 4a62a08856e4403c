import errno
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders.data_sets import new_style_data, open_one
from builders.runs import LATENTS, settings_of

from capmerge.errors import CapmergeError, OutputError
from capmerge.files import atomic
from capmerge.files.lock import open_locked
from capmerge.index.build import build_index
from trainer.config.settings import Config
from trainer.data.datasets import open_datasets
from trainer.errors import LatentsError


def test_every_example_is_found(metadata, tmp_path):
    """All records have latents for every family, and a pickled set finds the same files."""
    (note,) = open_one(metadata, tmp_path).notes
    assert note.startswith("data.0: 22 latents files were opened to see their sizes, ")
    for family in ("sd1", "sd2", "sdxl"):
        dataset = open_one(metadata, tmp_path, model={"family": family, "path": "random"})
        assert (len(dataset.index), dataset.rows.usable, dataset.notes) == (213, None, ())
        again = pickle.loads(pickle.dumps(dataset))
        files = {
            dataset.latents_file(number, dataset.index.read(number)[0]) for number in range(213)
        }
        assert (
            files
            == {again.latents_file(number, again.index.read(number)[0]) for number in range(213)}
            == set(LATENTS.rglob("*.npz"))
        )


def test_records_of_equal_keys(metadata, tmp_path):
    """Of records with equal keys the last is trained, and the number of the others is told."""
    path = tmp_path / "equal.json"
    text = metadata.read_text().rstrip()
    key, record = next(iter(json.loads(text).items()))
    again = json.dumps(record | {"caption": "last\nlast"}, indent=2)
    path.write_text(f"{text.removesuffix('}').rstrip()},\n  {json.dumps(key)}: {again}\n}}\n")
    dataset = open_one(path, tmp_path)
    assert len(dataset.index) == 213
    found = dict(dataset.index.read(number) for number in range(213))
    assert found[key]["caption"] == "last\nlast"
    told = "records not trained, because a later record has the same key: 1."
    assert any(note.endswith(told) for note in dataset.notes)


def test_captions_of_a_set(metadata, tmp_path):
    """Caption settings of a data set override those of `[caption]`."""
    sections = settings_of(metadata, tmp_path / "run", caption={"shuffle": True, "keep_tokens": 2})
    other = sections["data"] | {"caption": {"keep_tokens": 0}, "repeats": 3}
    first, second = open_datasets(
        Config.model_validate(sections | {"data": [sections["data"], other]}), jobs=1
    )
    assert [
        (found.number, found.captions.keep_tokens, found.captions.shuffle)
        for found in (first, second)
    ] == [(0, 2, True), (1, 0, True)]
    assert (first.rows.repeats, second.rows.repeats) == (1, 3)


def test_records_without_a_size_have_that_of_their_latents(metadata, tmp_path):
    """The latents decide the bucket where the record does not; the picture's own size is none."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    for number, record in enumerate(records.values()):
        del record["train_resolution"]
        record["image_size"] = [547, 466]
        if number % 2:
            del record["image_size"]
    changed = tmp_path / "meta.json"
    changed.write_text(json.dumps(records), encoding="utf-8")
    dataset, before = open_one(changed, tmp_path), open_one(metadata, tmp_path)
    assert dataset.rows.usable is None
    assert dataset.rows.width.tolist() == before.rows.width.tolist()
    assert dataset.rows.height.tolist() == before.rows.height.tolist()


def test_the_index_may_lie_elsewhere(tmp_path):
    """`data.index` names the index; its listing is beside it, and nothing is beside the data."""
    metadata, latents = new_style_data(tmp_path, [(64, 64)])
    place = tmp_path / "cache" / "set.index"
    place.parent.mkdir()
    for _ in range(2):
        dataset = open_one(metadata, tmp_path, data={"latents": str(latents), "index": str(place)})
        assert dataset.index.path == place
        assert dataset.listing.path.parent == place.parent
        assert pickle.loads(pickle.dumps(dataset)).index.path == place
    assert sorted(path.name for path in metadata.parent.iterdir()) == ["latents", "m.json"]
    with pytest.raises(CapmergeError, match="something else than an index"):
        open_one(metadata, tmp_path, data={"latents": str(latents), "index": str(metadata)})


@pytest.mark.parametrize("made", ["nothing", "index", "both"])
def test_a_folder_of_data_that_cannot_be_written(tmp_path, monkeypatch, made):
    """What is missing there goes into the run's folder, which is told; what fits is used."""
    metadata, latents = new_style_data(tmp_path, [(64, 64)])
    data = {"latents": str(latents)}
    if made == "index":
        build_index(metadata)
    elif made == "both":
        open_one(metadata, tmp_path, data=data)
    before = sorted(metadata.parent.iterdir())

    def refuse(path):
        if path.parent == metadata.parent:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_locked(path)

    monkeypatch.setattr(atomic, "open_locked", refuse)  # root may write everywhere
    for _ in range(2):
        dataset = open_one(metadata, tmp_path, data=data)
        assert dataset.rows.width.tolist() == [64]
        own = [path.name for path in (dataset.index.path, dataset.listing.path)]
        in_run = [
            path.parent == tmp_path / "run" for path in (dataset.index.path, dataset.listing.path)
        ]
        assert in_run == [made == "nothing", made != "both"]
        assert own[0] == ("data-0.index" if made == "nothing" else "m.json.index")
        told = [note for note in dataset.notes if "cannot be written" in note]
        assert len(told) == any(in_run)
    assert sorted(metadata.parent.iterdir()) == before
    (tmp_path / "file").touch()
    if made != "both":
        with pytest.raises(OutputError, match=r"train.output_dir.*Set data.index"):
            open_one(metadata, tmp_path, data=data, train={"output_dir": str(tmp_path / "file")})


def test_links_that_lead_out(metadata, tmp_path):
    """A link that leads out of the folder is refused on reading unless that is allowed."""
    latents = tmp_path / "latents"
    shutil.copytree(
        LATENTS, latents, copy_function=lambda source, target: Path(target).symlink_to(source)
    )
    dataset = open_one(metadata, tmp_path, data={"latents": str(latents)})
    with pytest.raises(CapmergeError, match="allow_outside"):
        dataset.latents_file(0, dataset.index.read(0)[0])
    allowed = open_one(metadata, tmp_path, data={"latents": str(latents), "allow_outside": True})
    assert allowed.latents_file(0, dataset.index.read(0)[0]).is_symlink()


@pytest.mark.parametrize(("chunking", "unit"), [("kohya", "tokens"), ("a1111", "chunks")])
def test_chunks_for_the_plan(metadata, tmp_path, chunking, unit):
    """The longest alternative decides the chunk count of a record, capped by `max_tokens`."""
    dataset = open_one(
        metadata, tmp_path, text={"dynamic_chunks": True, "chunking": chunking, "max_tokens": 150}
    )
    values = dataset.index.longest_alternative(unit, "sd1").astype(int)
    expected = np.clip(values if chunking == "a1111" else np.ceil(values / 75), 1, 2)
    assert dataset.rows.chunks.tolist() == expected.tolist()
    assert set(dataset.rows.chunks.tolist()) == {1, 2}
    assert open_one(metadata, tmp_path, text={"chunking": chunking}).rows.chunks is None
    unlimited = open_one(
        metadata,
        tmp_path,
        text={"dynamic_chunks": True, "chunking": chunking, "max_tokens": "unlimited"},
    )
    assert max(unlimited.rows.chunks) > 2


def test_an_index_without_token_lengths(metadata, tmp_path):
    """An index without token lengths is rebuilt only for dynamic chunks."""
    copy = shutil.copy(metadata, tmp_path / "meta.json")
    build_index(copy, tokens=False)
    assert not open_one(copy, tmp_path).index.has_tokens
    assert open_one(copy, tmp_path, text={"dynamic_chunks": True}).rows.chunks.min() == 1


def test_scale_is_looked_at_for_real_models_alone(metadata, latents, tmp_path):
    """Latents of another family are noted, but only for a real model.

    A broken file among those checked is an error, or is skipped.
    """
    data = {"latents": str(latents), "on_missing": "stop"}
    open_one(metadata, tmp_path, data=data)
    assert (
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"}).notes
        == ()
    )
    (note,) = open_one(
        metadata, tmp_path, data=data, model={"family": "sdxl", "path": "a/model"}
    ).notes
    assert note.startswith(
        f"WARNING: data.0, {latents}: scaled by 0.13025, "
        "the latents of 64 files have a standard deviation of 0.7"
    )
    for path in latents.rglob("*.npz"):
        path.write_bytes(b"")
    with pytest.raises(LatentsError, match=r'expected an.*data.on_missing = "skip".*--check'):
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"})
    data["on_missing"] = "skip"
    assert (
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"}).notes
        == ()
    )
