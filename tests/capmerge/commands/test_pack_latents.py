"""`capmerge pack-latents`: the shards hold what was there, byte for byte, or say what they lack."""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from builders.metadata import COMMAND, run, run_shell
from builders.packed import BROKEN, EXACT, SIZE, arrays, write_broken, write_metadata, write_sound
from builders.paths import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capmerge.commands import pack_latents
from capmerge.errors import CapmergeError
from capmerge.files.npz import Npz
from capmerge.files.shards import Shards
from capmerge.index import latent_pack
from capmerge.index.latent_values import read_values

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it needs pipes and links")


def pack(folder, *arguments, out="shards", fails=0):
    """Pack the latents of a folder; what the command printed."""
    return run(
        "pack-latents",
        folder / "meta.json",
        "--latents",
        folder / "latents",
        "-o",
        folder / out,
        *arguments,
        fails=fails,
    )


def members_of(folder):
    """The bytes of all members of the shards in a folder, by name, as `tarfile` reads them."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                found[member.name] = shard.extractfile(member).read()
    return found


def bytes_in(folder):
    """The bytes of all files in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_tar_program_unpacks_what_was_packed(tmp_path):
    """The example latents come out of tar byte for byte; headers name no owner and no time."""
    done = run(
        "pack-latents",
        ROOT / "examples" / "meta_lat.json",
        *("--latents", ROOT / "examples" / "latents"),
        *("-o", tmp_path / "shards", "--shard-mb", "1", "--verify"),
    )
    assert b"files verified                      213" in done.out
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == [
        "latents-00000.tar", "latents-00001.tar", "latents.index", "latents.names",
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    for shard in (tmp_path / "shards").glob("*.tar"):
        assert shard.stat().st_size <= 1_000_000
        subprocess.run(["tar", "-xf", shard, "-C", tmp_path / "out"], check=True)
        with tarfile.open(shard) as opened:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in opened} == {
                (0, 0, 0, "", "", 0o644)
            }
    compared = filecmp.dircmp(tmp_path / "out", ROOT / "examples" / "latents")
    assert not compared.left_only + compared.right_only
    for name, loose in (("out", tmp_path / "out"), ("given", ROOT / "examples" / "latents")):
        files = {str(p.relative_to(loose)): p.read_bytes() for p in loose.rglob("*.npz")}
        assert files == members_of(tmp_path / "shards"), name


def test_any_number_of_jobs_gives_the_same_bytes(tmp_path):
    """Nor does it matter when the files were written, or in which order the folder lists them."""
    names = [f"d/{number}" for number in range(300)]
    write_sound(tmp_path, names)
    (tmp_path / "latents" / "d" / "7.npz").write_bytes(b"junk")
    pack(tmp_path, "-j", "1", "--shard-mb", "1", out="one")
    for name in reversed(names):
        os.utime(tmp_path / "latents" / f"{name}.npz", (1, 1))
    pack(tmp_path, "-j", "3", "--shard-mb", "1", out="three")
    assert bytes_in(tmp_path / "one") == bytes_in(tmp_path / "three")
    assert len(bytes_in(tmp_path / "one")) > 4


def test_what_is_missing_or_broken_is_listed(tmp_path):
    """Nothing vanishes: each file and record that is not packed has a line, and all are counted."""
    write_broken(tmp_path)
    done = pack(tmp_path)
    packed = members_of(tmp_path / "shards")
    assert sorted(packed) == sorted(f"{name}.npz" for name in [*EXACT, "other"])
    for name, data in packed.items():
        assert data == (tmp_path / "latents" / name).read_bytes()
    lines = [
        json.loads(line)
        for line in (tmp_path / "shards" / "left-out.jsonl").read_text().splitlines()
    ]
    told = {line["key"]: line for line in lines}
    missing = {"gone", "folder"}
    assert told.keys() == {*BROKEN, *missing, "pipe", "loop", "dangling"}
    assert {key for key, line in told.items() if line["file"] is None} == missing
    for name, (_, problem) in BROKEN.items():
        assert problem in told[name]["problem"]
    assert "2 records without a latents file" in done.err
    assert f"{len(BROKEN) + 3} broken files left out" in done.err


def test_nothing_sound_is_an_error_and_leaves_nothing(tmp_path):
    """A wrong folder of latents does not become an empty folder of shards."""
    write_metadata(tmp_path, ["a"])
    (tmp_path / "latents").mkdir()
    done = pack(tmp_path, fails=1)
    assert "nothing was packed" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "meta.json"]


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_full_disk_is_one_message(tmp_path, jobs):
    """A shard that cannot be written ends the command, whichever process writes it."""
    write_sound(tmp_path, [f"d/{number}" for number in range(300)])
    done = run_shell(
        f"ulimit -f 600; CAPMERGE pack-latents meta.json --latents latents -o shards -j {jobs} "
        "--shard-mb 1",
        cwd=tmp_path,
    )
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "latents-00000.tar: cannot write, File too large" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latents", "meta.json"]


@pytest.mark.parametrize("problem", ["exists", "packed", "nowhere"])
def test_folders_that_cannot_be_packed(tmp_path, problem):
    """An existing target, shards as latents and a missing parent are refused before any work."""
    write_sound(tmp_path, ["a"])
    if problem == "exists":
        (tmp_path / "shards").mkdir()
        assert "it exists" in pack(tmp_path, fails=2).err
    elif problem == "packed":
        pack(tmp_path)
        (tmp_path / "latents").rename(tmp_path / "loose")
        (tmp_path / "shards").rename(tmp_path / "latents")
        assert "packed already" in pack(tmp_path, fails=2).err
    else:
        assert "there is no folder" in pack(tmp_path, out="none/shards", fails=2).err


def test_half_floats_are_the_rounded_values(tmp_path):
    """fp16 halves the bytes, keeps all other arrays, and leaves files that it cannot hold alone."""
    keys = ["plain", "bf", "big", "several"]
    write_metadata(tmp_path, keys)
    latents = tmp_path / "latents"
    latents.mkdir()
    values = arrays()["latents"]
    np.savez(latents / "plain.npz", **arrays(latents_flipped=values[:, :, ::-1]))
    bits = (values.view("u4") >> 16).astype("u2")
    np.savez(latents / "bf.npz", **arrays(latents=bits, latents_dtype=np.array("bfloat16")))
    np.savez(latents / "big.npz", **arrays(latents=values * np.float32(1e6)))
    suffixed = {f"{name}_16x24": array for name, array in arrays().items()}
    np.savez(latents / "several.npz", **suffixed, alpha_mask_16x24=np.ones(SIZE[::-1], "f4"))
    done = pack(tmp_path, "--dtype", "fp16", "--verify")
    assert "1 files kept their type, since float16 cannot hold them" in done.err
    shards = Shards(tmp_path / "shards")
    members = {name: shards[number] for number, name in enumerate(shards.names())}
    assert [*members] == [f"{key}.npz" for key in keys]
    assert members["big.npz"].read() == (latents / "big.npz").read_bytes()
    for name, tag in (("plain", None), ("bf", "float16"), ("several", None)):
        with Npz(members[f"{name}.npz"]) as packed, Npz(latents / f"{name}.npz") as loose:
            assert list(packed.names) == list(loose.names)
            for array in loose.names:
                if array.startswith("latents") and "dtype" not in array:
                    expected = read_values(loose, array).astype(np.float16)
                    np.testing.assert_array_equal(packed[array], expected, strict=True)
                    np.testing.assert_array_equal(read_values(packed, array), expected)
                elif "dtype" not in array:
                    np.testing.assert_array_equal(packed[array], loose[array], strict=True)
            assert tag is None or packed["latents_dtype"] == tag
    line = json.loads((tmp_path / "shards" / "left-out.jsonl").read_text())
    assert (line["key"], line["packed"]) == ("big", True)


def test_a_file_of_several_records_is_packed_once(tmp_path):
    """a.png and a.jpg have one file, however far apart they stand."""
    names = ["a.png", *(f"b{number}" for number in range(5)), "a.jpg"]
    write_metadata(tmp_path, names)
    (tmp_path / "latents").mkdir()
    for name in ["a", *names[1:-1]]:
        np.savez(tmp_path / "latents" / f"{name}.npz", **arrays())
    pack(tmp_path)
    assert [*members_of(tmp_path / "shards")] == ["a.npz", *(f"b{n}.npz" for n in range(5))]
    run("check-latents", tmp_path / "meta.json", "--latents", tmp_path / "shards")


def test_the_current_folder_is_packed(tmp_path):
    """Names in the shards are those below the folder, however it is named."""
    write_sound(tmp_path, ["x/a"])
    run(
        *("pack-latents", tmp_path / "meta.json", "--latents", ".", "-o", tmp_path / "shards"),
        cwd=tmp_path / "latents",
    )
    assert [*members_of(tmp_path / "shards")] == ["x/a.npz"]


def test_absolute_keys_find_their_members(tmp_path):
    """Keys that are paths below the folder of latents find the members in the shards."""
    keys = [str(tmp_path / "latents" / name) + ".png" for name in ("x/a", "x/b")]
    write_sound(tmp_path, ["x/a", "x/b"])
    write_metadata(tmp_path, keys)
    pack(tmp_path)
    assert [*members_of(tmp_path / "shards")] == ["x/a.npz", "x/b.npz"]
    shutil.rmtree(tmp_path / "latents")
    (tmp_path / "shards").rename(tmp_path / "moved")
    done = run("check-latents", tmp_path / "meta.json", "--latents", tmp_path / "moved")
    assert b"records without a file            0" in done.out


def test_long_and_odd_names(tmp_path):
    """Names of any length and of bytes that are not UTF-8 are unpacked as they were."""
    names = ["x" * 120, "d/" + "ü" * 90, "猫", "a\udcffb", "  space ", "new\nline"]
    write_sound(tmp_path, names)
    pack(tmp_path, "--verify")
    (tmp_path / "out").mkdir()
    subprocess.run(
        ["tar", "-xf", tmp_path / "shards" / "latents-00000.tar", "-C", tmp_path / "out"],
        check=True,
    )
    for name in names:
        assert (tmp_path / "out" / f"{name}.npz").read_bytes() == (
            tmp_path / "latents" / f"{name}.npz"
        ).read_bytes()


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    names=st.lists(
        st.text(
            st.characters(blacklist_characters="/\0.", blacklist_categories=["Cs"]), max_size=30
        )
        .filter(lambda name: name and len(name.encode()) < 200)
        .map(lambda name: f"d/{name}"),
        min_size=1,
        max_size=8,
        unique=True,
    ),
)
def test_round_trip_of_any_names(tmp_path_factory, names):
    """What was packed under any names is read back under them, in the order of the records."""
    folder = tmp_path_factory.mktemp("names")
    write_sound(folder, names)
    pack(folder, "--shard-mb", "1", "-j", "1")
    shards = Shards(folder / "shards")
    assert [*shards.names()] == [f"{name}.npz" for name in names]
    for number, name in enumerate(names):
        assert shards[number].read() == (folder / "latents" / f"{name}.npz").read_bytes()


def test_an_interrupted_packing_goes_on(tmp_path):
    """A killed run leaves no folder; the next one takes over whole shards, with the same bytes."""
    names = [f"d/{number:04d}" for number in range(1200)]
    write_sound(tmp_path, names)
    pack(tmp_path, "--shard-mb", "1", out="whole")
    command = [
        *COMMAND, "pack-latents", str(tmp_path / "meta.json"), "--latents",
        str(tmp_path / "latents"), "-o", str(tmp_path / "shards"), "--shard-mb", "1", "-j", "1",
    ]  # fmt: skip
    hidden = tmp_path / ".shards.capmerge-tmp" / "shards"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (hidden / "latents-00002.tar.members").exists():
            assert process.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert not (tmp_path / "shards").exists()
    first = (hidden / "latents-00000.tar").stat().st_mtime_ns
    # A file of the second shard is cached anew meanwhile, with the same bytes.
    os.utime(tmp_path / "latents" / "d" / "0200.npz", (5, 5))
    done = pack(tmp_path, "--shard-mb", "1", "--verify")
    (row,) = [row for row in done.out.decode().splitlines() if "finished before" in row]
    assert int(row.split()[-1]) >= 2
    assert (tmp_path / "shards" / "latents-00000.tar").stat().st_mtime_ns == first
    assert bytes_in(tmp_path / "shards") == bytes_in(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latents", "meta.json", "shards", "whole",
    ]  # fmt: skip


def test_verify_notices_a_difference(tmp_path, monkeypatch):
    """A member with other bytes than the loose file stops the packing with its name."""
    write_sound(tmp_path, ["a", "b"])
    write = latent_pack.write_shard_index

    def damage(folder, *arguments):
        path = Path(folder) / "latents-00000.tar"
        data = bytearray(path.read_bytes())
        data[-3000] ^= 1
        path.write_bytes(data)
        return write(folder, *arguments)

    monkeypatch.setattr(latent_pack, "write_shard_index", damage)
    options = pack_latents.PackOptions(
        tmp_path / "latents", tmp_path / "shards", "keep", 10**6, True, 1, 1 << 24
    )
    with pytest.raises(CapmergeError, match=r"member b.npz: found other bytes, expected"):
        pack_latents.pack(tmp_path / "meta.json", options)
    assert not (tmp_path / "shards").exists()
    # The bad shard is not taken over.
    monkeypatch.undo()
    pack(tmp_path, "--verify")
    assert [*members_of(tmp_path / "shards")] == ["a.npz", "b.npz"]
