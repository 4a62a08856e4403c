"""Pictures become latents and sizes, by the command in a process of its own."""

import json
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import preloaded
from builders.pictures import (
    CACHE,
    cached,
    latents_in,
    make_picture,
    run_cache,
    skipped_in,
    write_cache_config,
    write_pictures,
    write_vae,
)
from builders.ranks import run_ranks
from builders.runs import ENVIRONMENT, run
from builders.single_files import tiny_vae
from PIL import Image

from trainer.caching.buckets import Buckets, crop_of
from trainer.data.latents import load_latents
from trainer.families import FAMILIES

N_PICTURES = 8


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Pictures, their metadata and a VAE, which no test changes."""
    folder = tmp_path_factory.mktemp("base")
    records = write_pictures(folder / "pictures", N_PICTURES)
    (folder / "meta_cap.json").write_text(json.dumps(records, indent=2), encoding="utf-8")
    write_vae(folder)
    return folder


@pytest.fixture
def folder(base, tmp_path):
    """A copy of `base`."""
    shutil.copytree(base, tmp_path / "copy")
    return tmp_path / "copy"


def test_cached_rewritten_and_trained(folder):
    """Latents and sizes of pictures, rewritten, are what a training takes, flipped ones too."""
    cached(folder, metadata="meta_cap.json", flip=True, batch_size=2)
    arguments = ["rewrite", "meta_cap_lat.json", "-o", "meta.json", "--latents", "pictures"]
    assert preloaded.run("capmerge", *arguments, cwd=folder).returncode == 0
    with (folder / "cache.toml").open("a", encoding="utf-8") as file:
        file.write(
            '[[data]]\nmetadata = "meta.json"\nlatents = "pictures"\nflip = true\n'
            '[train]\noutput_dir = "run"\nmax_steps = 2\nbatch_size = 2\nworkers = 0\n'
        )
    done = run(folder / "cache.toml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "[cache]" in (folder / "run" / "config.toml").read_text(encoding="utf-8")


def test_files_are_those_of_sd_scripts(folder):
    """Names, arrays, types and shapes are sd-scripts', for each picture by its own bucket."""
    cached(folder, metadata="meta_cap.json", flip=True)
    buckets = Buckets(resolution=128, step=32, least=64, most=256, upscale=True)
    records = json.loads((folder / "meta_cap_lat.json").read_text(encoding="utf-8"))
    before = json.loads((folder / "meta_cap.json").read_text(encoding="utf-8"))
    assert list(records) == list(before)
    for number, (key, record) in enumerate(records.items()):
        width, height = make_picture(number).size
        bucket = buckets.place(width, height).bucket
        sizes = {"train_resolution": list(bucket), "image_size": [width, height]}
        assert record == before[key] | sizes
        path = folder / "pictures" / f"{key}_{width:04d}x{height:04d}_sd.npz"
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: (arrays[name].dtype, arrays[name].shape) for name in arrays.files}
            assert arrays["original_size"].tolist() == [width, height]
            assert arrays["crop_ltrb"].tolist() == list(crop_of(bucket, width, height))
        shape = (4, bucket[1] // 8, bucket[0] // 8)
        assert found.pop("trainer_cache")[1] == ()
        assert found == {
            "latents": (np.float32, shape),
            "latents_flipped": (np.float32, shape),
            "original_size": (np.int64, (2,)),
            "crop_ltrb": (np.float64, (4,)),
        }
    assert len(latents_in(folder / "pictures")) == N_PICTURES


def _exact(picture, *, flipped=False):
    """The latents of a picture that needs no resizing: mean and standard deviation, unscaled."""
    torch.set_num_threads(1)
    pixels_HWC = torch.from_numpy(np.array(picture))
    picture_BCHW = (pixels_HWC.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5
    with torch.inference_mode():
        found = tiny_vae().eval().encode(picture_BCHW.flip(3) if flipped else picture_BCHW)
    return found.latent_dist.mean[0].numpy(), found.latent_dist.std[0].numpy()


def _one_picture(folder):
    """Write a picture that has the size of its bucket; it."""
    picture = make_picture(0).resize((128, 128))
    (folder / "pictures").mkdir(parents=True)
    picture.save(folder / "pictures" / "a.png")
    return picture


def _arrays(folder):
    (path,) = (folder / "pictures").glob("*.npz")
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def test_latents_are_those_of_the_vae(tmp_path):
    """The mean is the VAE's, not scaled, and the draw lies around it with the VAE's deviation."""
    picture = _one_picture(tmp_path)
    arrays = _arrays(cached(tmp_path, latents="mean", flip=True))
    mean, deviation = _exact(picture)
    np.testing.assert_allclose(arrays["latents"], mean, atol=1e-4)
    flipped, _ = _exact(picture, flipped=True)
    np.testing.assert_allclose(arrays["latents_flipped"], flipped, atol=1e-4)

    shutil.rmtree(tmp_path / "pictures")
    _one_picture(tmp_path)
    drawn = _arrays(cached(tmp_path, flip=True))
    noise = (drawn["latents"] - mean) / deviation
    assert abs(noise.mean()) < 0.15
    assert 0.9 < noise.std() < 1.1
    # The mirrored picture has a draw of its own.
    other = (drawn["latents_flipped"] - flipped) / deviation
    assert abs(np.corrcoef(noise.ravel(), other.ravel())[0, 1]) < 0.15

    shutil.rmtree(tmp_path / "pictures")
    _one_picture(tmp_path)
    assert not np.array_equal(_arrays(cached(tmp_path, seed=1))["latents"], drawn["latents"])


@pytest.mark.parametrize(("dtype", "most"), [("fp16", 2**-11), ("bf16", 2**-8)])
def test_small_types_are_those_of_the_trainer(tmp_path, dtype, most):
    """The trainer reads fp16 and bf16 as fp32 latents that were rounded, and the end says so."""
    found = {}
    for name in ("fp32", dtype):
        inner = tmp_path / name
        _one_picture(inner)
        write_vae(inner)
        done = run_cache(write_cache_config(inner / "cache.toml", dtype=name))
        assert ("sd-scripts does not read latents" in done.stdout) == (name != "fp32")
        (path,) = (inner / "pictures").glob("*.npz")
        found[name] = load_latents(
            path, family=FAMILIES["sd1"], width=128, height=128, flipped=False, alpha_mask=False
        ).latents_CHW
    assert not torch.equal(found[dtype], found["fp32"])
    torch.testing.assert_close(found[dtype], found["fp32"], rtol=most, atol=1e-6)


def test_batches_change_no_more_than_rounding(folder):
    """The size of a batch is no part of the result, but for the rounding of sums."""
    one = latents_in(cached(folder, batch_size=1) / "pictures")
    for path in (folder / "pictures").rglob("*.npz"):
        path.rename(path.with_suffix(".one"))
    four = cached(folder, batch_size=4) / "pictures"
    assert latents_in(four).keys() == one.keys()
    for name in one:
        with np.load(four / name) as many, np.load((four / name).with_suffix(".one")) as alone:
            np.testing.assert_allclose(many["latents"], alone["latents"], atol=1e-4)
            assert many["trainer_cache"] == alone["trainer_cache"]


def test_a_folder_without_metadata_gives_the_same(folder):
    """Pictures found in their folder have the same latents as those that keys name."""
    named = latents_in(cached(folder, metadata="meta_cap.json") / "pictures")
    for name in named:
        (folder / "pictures" / name).unlink()
    make_picture(50).save(folder / "pictures" / "p1.png")  # beside p1.jpg
    make_picture(51).save(folder / "pictures" / "UPPER.PNG")
    found = latents_in(cached(folder) / "pictures")
    (upper,) = found.keys() - named.keys()
    assert upper.startswith("UPPER_")
    del found[upper]
    assert found == named
    assert skipped_in(folder / "pictures") == {
        "p1.png": "its latents have the name of those of p1.jpg"
    }


def test_finished_files_are_kept_and_others_left_alone(folder):
    """What is finished is not made again; files of others stop the run until they may go."""
    cached(folder, metadata="meta_cap.json")
    config = folder / "cache.toml"
    before = latents_in(folder / "pictures")
    done = run_cache(config)
    assert done.returncode == 2
    assert "cache.metadata_output: meta_cap_lat.json exists. Give --force" in done.stderr
    done = run_cache(config, "--force")
    assert f"kept{N_PICTURES:>25}" in done.stdout

    done = run_cache(config, "--force", "--set", "cache.seed=1")
    assert done.returncode == 1
    assert "other settings made it" in done.stderr
    assert latents_in(folder / "pictures") == before
    (folder / "pictures" / "p1.jpg").write_bytes((folder / "pictures" / "p4.jpg").read_bytes())
    name = next(name for name in before if name.startswith("p2_"))
    np.savez(folder / "pictures" / name, latents=np.zeros(3))
    done = run_cache(config, "--force")
    assert "another program made it" in done.stderr
    assert "--recache" in done.stderr
    done = run_cache(config, "--force", "--recache")
    assert (done.returncode, f"kept{N_PICTURES - 2:>25}" in done.stdout) == (0, True), done.stdout
    again = latents_in(folder / "pictures")
    assert again[name] == before[name]


def _kill_in_the_middle(folder):
    """Start the command, and kill it when some files are there but not all."""
    pictures = folder / "pictures"
    with (folder / "out").open("wb") as out, Path("/dev/null").open("rb") as nothing:
        streams = [nothing.fileno(), out.fileno(), out.fileno()]
        process = preloaded.start(
            "trainer.cache", ["cache.toml"], streams, cwd=folder, env=ENVIRONMENT, new_session=True
        )
        try:
            while not latents_in(pictures) and process.poll() is None:
                time.sleep(0.01)
        finally:
            process.kill()
            process.wait()
    assert process.returncode == -signal.SIGKILL, (folder / "out").read_text()


def test_a_killed_run_goes_on(tmp_path):
    """After a kill, the same command makes the rest, bit for bit as if nothing had happened."""
    for name in ("whole", "killed"):
        records = write_pictures(tmp_path / name / "pictures", 40)
        (tmp_path / name / "meta_cap.json").write_text(json.dumps(records), encoding="utf-8")
        write_vae(tmp_path / name)
        write_cache_config(
            tmp_path / name / "cache.toml", metadata="meta_cap.json", batch_size=3, workers=2
        )
    assert run_cache(tmp_path / "whole" / "cache.toml").returncode == 0
    _kill_in_the_middle(tmp_path / "killed")
    left = latents_in(tmp_path / "killed" / "pictures")
    assert 0 < len(left) < 40
    assert not (tmp_path / "killed" / "meta_cap_lat.json").exists()
    done = run_cache(tmp_path / "killed" / "cache.toml")
    assert done.returncode == 0, done.stderr
    kept = int(done.stdout.split("kept")[1].split()[0])
    assert 0 < kept < 40
    assert latents_in(tmp_path / "killed" / "pictures") == latents_in(
        tmp_path / "whole" / "pictures"
    )
    texts = [(tmp_path / name / "meta_cap_lat.json").read_text() for name in ("whole", "killed")]
    assert texts[0] == texts[1]
    hidden = [path for path in (tmp_path / "killed").rglob(".*") if path.is_file()]
    assert hidden == []


@pytest.mark.ranks
def test_ranks_give_the_same_bytes(tmp_path):
    """Two processes make the same files, metadata and list as one."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        records = write_pictures(folder / "pictures", 80) | {"gone": {}, "p1/": {"tags": "x"}}
        (folder / "pictures" / "sub" / "p9.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        (folder / "meta_cap.json").write_text(json.dumps(records), encoding="utf-8")
        write_vae(folder)
        config = write_cache_config(
            folder / "cache.toml",
            metadata=str(folder / "meta_cap.json"),
            images=str(folder / "pictures"),
            vae=str(folder / "vae"),
        )
        ended = run_ranks(folder, config, ranks=ranks, python=CACHE)
        assert [one.code for one in ended] == [0] * ranks, ended
        assert f"skipped{2:>22}" in ended[0].output
        found[ranks] = (
            latents_in(folder / "pictures"),
            (folder / "meta_cap_lat.json").read_text(),
            skipped_in(folder / "pictures"),
        )
    assert found[1] == found[2]
    assert len(found[1][0]) == 79


def test_transparency_and_rotation_when_asked(tmp_path):
    """`alpha_mask` stores the transparency at the size of the bucket; EXIF data turn a picture."""
    (tmp_path / "pictures").mkdir()
    pixels = np.zeros((64, 128, 4), np.uint8)
    pixels[:, 64:, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "pictures" / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    make_picture(3).resize((128, 64)).save(tmp_path / "pictures" / "turned.jpg", exif=exif)
    write_vae(tmp_path)
    done = run_cache(write_cache_config(tmp_path / "cache.toml"))
    assert "note: 1 pictures are turned by their EXIF data alone" in done.stdout
    assert sorted(latents_in(tmp_path / "pictures")) == [
        "clear_0128x0064_sd.npz",
        "turned_0128x0064_sd.npz",
    ]
    settings = {"exif_rotation": True, "alpha_mask": True, "output": "latents"}
    done = run_cache(write_cache_config(tmp_path / "cache.toml", **settings))
    assert "EXIF" not in done.stdout
    with np.load(tmp_path / "latents" / "turned_0064x0128_sd.npz") as arrays:
        assert (arrays["alpha_mask"] == 1).all()
        assert arrays["latents"].shape[1] > arrays["latents"].shape[2]
    path = tmp_path / "latents" / "clear_0128x0064_sd.npz"
    with np.load(path) as arrays:
        mask, (_, height, width) = arrays["alpha_mask"], arrays["latents"].shape
    assert (mask.dtype, mask.shape) == (np.float32, (height * 8, width * 8))
    assert mask[:, 0].max() == 0
    assert mask[:, -1].min() == 1
    loaded = load_latents(
        path,
        family=FAMILIES["sd1"],
        width=width * 8,
        height=height * 8,
        flipped=False,
        alpha_mask=True,
    )
    assert loaded.mask_HW.shape == (height, width)


def test_old_names_and_absolute_keys(folder):
    """Without a suffix the names are the old ones, for which both sizes are the bucket."""
    records = json.loads((folder / "meta_cap.json").read_text())
    absolute = {f"{folder}/pictures/{key}": record for key, record in records.items()}
    (folder / "meta_cap.json").write_text(json.dumps(absolute))
    cached(folder, metadata="meta_cap.json", suffix="", metadata_output="new.json")
    found = latents_in(folder / "pictures")
    assert sorted(found) == sorted(f"{key}.npz" for key in records)
    for key, record in json.loads((folder / "new.json").read_text()).items():
        assert record["train_resolution"] == record["image_size"]
        with np.load(f"{key}.npz") as arrays:
            sides = [8 * side for side in arrays["latents"].shape[:0:-1]]
        assert record["train_resolution"] == sides

    done = run_cache(folder / "cache.toml", "--force", "--set", "cache.output=elsewhere")
    assert done.returncode == 2
    assert "keys are absolute paths" in done.stderr


def test_two_keys_may_name_one_picture(folder):
    """Records whose keys differ in the extension alone, or not at all, share the latents."""
    names = ["p1", "p1.jpg", "./p1", "p1"] * 4
    text = ", ".join(f'"{name}": {{"caption": "{number}"}}' for number, name in enumerate(names))
    (folder / "meta_cap.json").write_text(f"{{{text}}}", encoding="utf-8")
    cached(folder, metadata="meta_cap.json", batch_size=4, workers=8)
    assert len(latents_in(folder / "pictures")) == 1
    pairs = json.loads(
        (folder / "meta_cap_lat.json").read_text(encoding="utf-8"), object_pairs_hook=list
    )
    assert [key for key, _ in pairs] == names
    assert len({str(dict(record)["image_size"]) for _, record in pairs}) == 1


def test_mistakes_are_told_before_any_work(folder):
    """A place that is missing or taken ends the run with a message, and nothing is made."""
    config = write_cache_config(folder / "cache.toml", metadata="meta_cap.json")
    for override, code, text in (
        ("cache.images=", 2, "found no `cache.images`"),
        ("cache.images=none", 2, "cache.images: none is no folder"),
        ("cache.metadata=none.json", 2, "cache.metadata: none.json is no file"),
        ("cache.metadata_output=none/x.json", 2, "in a folder that does not exist"),
        ("cache.metadata_output=meta_cap.json", 2, "is cache.metadata itself"),
        ("cache.output=meta_cap.json", 2, "cache.output: meta_cap.json cannot be made"),
        ("cache.vae=none", 1, "none/config.json"),
        (
            "cache.bucket_min=512",
            2,
            "`cache.bucket_min = 512`, expected at most `cache.resolution`",
        ),
        ("cache.images=vae", 1, "vae: none of 8 pictures has latents"),
        ("cache.metadata_output=meta.jsonl.gz", 2, "does not end as cache.metadata does"),
    ):
        done = run_cache(config, "--set", override)
        assert (done.returncode, text in done.stderr) == (code, True), (override, done.stderr)
        assert "Traceback" not in done.stderr
    assert not (folder / "meta_cap_lat.json").exists()


def test_two_runs_at_once_are_kept_apart(folder):
    """A second run into the same folder ends with a message; the first one is not disturbed."""
    from capmerge.files.atomic import AtomicFile  # noqa: PLC0415  # its lock is that of a run

    config = write_cache_config(folder / "cache.toml")
    with AtomicFile(folder / "pictures" / "cache_skipped.jsonl"):
        done = run_cache(config)
    assert done.returncode == 1
    assert "another run is writing this file" in done.stderr
    assert latents_in(folder / "pictures") == {}
