"""`collect` makes the metadata that sd-scripts makes of the same files, and tells what it found."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
from builders.metadata import run

from capmerge.commands.pictures import PictureWalk
from capmerge.files import sorted_entries

CASES = json.loads((Path(__file__).parents[2] / "data" / "sd_scripts_collected.json").read_bytes())
"""Folders of files, and the metadata that the two scripts of sd-scripts make of each."""


def fill(folder, files):
    """Write the texts, and empty files for pictures, which are None."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else (text or "").encode())


def collected(folder, *options, out="out.json", **files):
    """The metadata of the pictures in `folder`/pics, as pairs, and what the command told."""
    told = run("collect", "pics", "-o", out, *options, cwd=folder, **files).out.decode()
    return json.loads((folder / out).read_bytes()), told


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("chunk", [1 << 17, 3])
def test_the_metadata_is_that_of_sd_scripts(tmp_path, monkeypatch, number, chunk):
    """Keys, their order, fields and texts are those of the two scripts, spilled to disk or not."""
    case = CASES[number]
    fill(tmp_path / "pics", case["files"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sorted_entries, "_SORTED_AT_ONCE", chunk)
    options = ["--recursive"] * case["recursive"] + ["--full-path"] * case["full_path"]
    found, _ = collected(tmp_path, *options)
    assert json.dumps(found) == json.dumps(case["metadata"])
    # The walk alone, in this process, where names wait on disk.
    walk = PictureWalk(
        Path("pics"),
        {"caption": ".caption", "tags": ".txt"},
        tmp_path / "out.json",
        recursive=case["recursive"],
    )
    keys = [str(p.path) if case["full_path"] else p.stem for p in walk]
    assert list(dict.fromkeys(keys)) == list(case["metadata"])
    assert all(len(picture.texts) == 2 for picture in walk)


def test_everything_is_counted(tmp_path):
    """Missing texts, texts alone, equal stems, empty texts and byte order marks are told."""
    fill(
        tmp_path / "pics",
        {
            "1.png": None,
            "1.caption": "one",
            "1.txt": "",
            "2.jpg": None,
            "2.caption": b"\xef\xbb\xbftwo\r\n",
            "3.png": None,
            "3.webp": None,
            "3.txt": "three",
            "4.png": None,
            "5.caption": "alone",
            "6.txt": "alone",
            "notes.md": "x",
        },
    )
    found, told = collected(tmp_path)
    assert found == {
        "1": {"caption": "one", "tags": ""},
        "2": {"caption": "two"},
        "3": {"tags": "three"},
    }
    counts = dict(line.rsplit(maxsplit=1) for line in told.splitlines() if "note:" not in line)
    counts = {name.strip(): number for name, number in counts.items()}
    expected = {"pictures": 5, "records": 3, "with caption": 2, "with tags": 2}
    expected |= {"texts in utf-8": 4, "empty texts": 1}
    assert {name: int(counts[name]) for name in expected} == expected
    for note in (
        '2 pictures (the first: "pics/3.png", "pics/4.png") have no .caption file',
        '2 pictures (the first: "pics/2.jpg", "pics/4.png") have no .txt file',
        '1 picture ("pics/4.png") has no text at all: left out.',
        '2 texts (the first: "pics/5.caption", "pics/6.txt") have no picture',
        '1 picture ("pics/3.webp") has the stem of an earlier one in the same folder: they share',
        "1 of the texts began with a byte order mark",
    ):
        assert note in told
    found, told = collected(tmp_path, "--full-path", "--force", "--tags", ".txt")
    assert found == {
        str(Path("pics/1.png")): {"tags": ""},
        str(Path("pics/3.png")): {"tags": "three"},
        str(Path("pics/3.webp")): {"tags": "three"},
    }
    assert "each has a record of its own" in told


def test_no_text_of_a_kind_is_one_note(tmp_path):
    """Where no picture has captions, one note says so instead of a count of all."""
    fill(tmp_path / "pics", {"1.png": None, "1.txt": "a"})
    _, told = collected(tmp_path)
    assert "no picture has a readable text that ends in .caption" in told
    assert "have no .caption" not in told


def test_texts_of_other_encodings(tmp_path):
    """A text that is no UTF-8 is named with the encoding tried; another encoding is told."""
    fill(
        tmp_path / "pics",
        {"1.png": None, "1.txt": "ok", "2.png": None, "2.txt": "猫の絵".encode("cp932")},
    )
    error = run("collect", "pics", "-o", "o.json", cwd=tmp_path, fails=1).err
    place = Path("pics") / "2.txt"
    assert f"{place}, byte 0: found the byte 0x94, expected text in utf-8. Name its" in error
    assert [path.name for path in tmp_path.iterdir()] == ["pics"]
    found, told = collected(tmp_path, "--encoding", "utf-8", "--encoding", "cp932")
    assert found == {"1": {"tags": "ok"}, "2": {"tags": "猫の絵"}}
    assert told.split("texts in cp932")[1].split()[0] == "1"

    found, told = collected(tmp_path, "--on-error", "skip", "--force")
    assert found == {"1": {"tags": "ok"}}
    assert "1 of the texts could not be read: left out and listed in OUT.rejects.jsonl" in told
    (line,) = (tmp_path / "out.json.rejects.jsonl").read_text().splitlines()
    rejected = json.loads(line)
    assert (rejected["key"], rejected["file"]) == ("2", str(place))
    assert "expected text in utf-8" in rejected["reason"]
    for wrong in ("no-such", "base64", ""):
        error = run("collect", "pics", "-o", "o.json", "--encoding", wrong, cwd=tmp_path, fails=2)
        assert "Python knows no such encoding" in error.err


def test_many_names_that_share_a_beginning(tmp_path):
    """Names with dots, where texts and pictures of one stem lie far apart in the order."""
    rng = random.Random(3)
    files = {"v.png": None, "v.txt": "all"}
    for number in range(300):
        files |= {f"v.{number:03}.png": None, f"v.{number:03}.txt": str(number)}
    names = list(files)
    rng.shuffle(names)
    fill(tmp_path / "pics", {name: files[name] for name in names})
    found, _ = collected(tmp_path, "--tags", ".txt")
    expected = sorted(name for name, text in files.items() if text is None)
    assert list(found) == [name.removesuffix(".png") for name in expected]
    assert all(
        record["tags"] == (key[2:].lstrip("0") or ("0" if "." in key else "all"))
        for key, record in found.items()
    )


@pytest.mark.parametrize("name", ["out.jsonl", "out.json.zst", "out.parquet"])
def test_every_format(tmp_path, name):
    """The same records in any format."""
    fill(tmp_path / "pics", CASES[0]["files"])
    run("collect", "pics", "-o", name, cwd=tmp_path)
    run("convert", name, "-o", "back.json", cwd=tmp_path)
    assert json.loads((tmp_path / "back.json").read_bytes()) == CASES[0]["metadata"]
    standard = run("collect", "pics", "-o", "-", "--format", "json", cwd=tmp_path).out
    assert standard == (tmp_path / "back.json").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="names of any bytes")
def test_odd_files(tmp_path):
    """Names that are not UTF-8, links, folders with the names of pictures, and no pictures."""
    pics = tmp_path / "pics"
    fill(pics, {"1.png": None, "1.txt": "a", "\udcff.png": None, "\udcff.txt": "b"})
    (pics / "link.png").symlink_to("1.png")
    (pics / "link.txt").symlink_to("1.txt")
    (pics / "nowhere.png").symlink_to("missing")
    (pics / "folder.png").mkdir()
    (pics / "deep").mkdir()
    (pics / "deep" / "again").symlink_to(pics)
    found, _ = collected(tmp_path, "--tags", ".txt")
    assert found == {"1": {"tags": "a"}, "link": {"tags": "a"}, "\udcff": {"tags": "b"}}
    found, _ = collected(tmp_path, "--tags", ".txt", "--recursive", "--full-path", "--force")
    assert len(found) == 3  # links to folders are not followed
    (pics / "1.txt").unlink()
    os.mkfifo(pics / "1.txt")  # no file: opening it would wait
    found, _ = collected(tmp_path, "--tags", ".txt", "--force")
    assert list(found) == ["link", "\udcff"] or list(found) == ["\udcff"]
    (tmp_path / "none").mkdir()
    run("collect", "none", "-o", "none.json", cwd=tmp_path)
    assert (tmp_path / "none.json").read_bytes() == b"{}"


def test_folders_of_any_depth(tmp_path):
    """Folders in folders are walked through to the last, and the way back keeps the order."""
    deepest = tmp_path / "pics"
    for _ in range(400):
        deepest /= "d"
    deepest.mkdir(parents=True)
    (deepest / "1.png").touch()
    (deepest / "1.txt").write_text("deep")
    fill(tmp_path / "pics", {"e.png": None, "e.txt": "last", "c.png": None, "c.txt": "first"})
    found, _ = collected(tmp_path, "--recursive", "--full-path", "--tags", ".txt")
    assert [record["tags"] for record in found.values()] == ["first", "deep", "last"]


LINES = [
    {"file_name": "a.png", "text": "a cat", "n": 10**30},
    {"n": 1, "file_name": "b/ü.png", "text": "\ud83d", "x": [None, float("inf")]},
    {"file_name": "a.png", "text": None},
    {"file_name": "", "license": "cc0"},
]


@pytest.mark.parametrize("encoded", ["utf-8", "utf-8-sig"])
def test_json_lines_of_another_kind(tmp_path, encoded):
    """The file name becomes the key and the text the caption; all other fields are kept."""
    text = "\n\n".join(map(json.dumps, LINES))
    (tmp_path / "l.jsonl").write_bytes(text.encode(encoded))
    told = run("collect", "l.jsonl", "-o", "out.jsonl", cwd=tmp_path).out.decode()
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert list(map(json.dumps, found)) == list(
        map(
            json.dumps,
            [
                {"image_path": "a.png", "caption": "a cat", "n": 10**30},
                {"image_path": "b/ü.png", "n": 1, "caption": "\ud83d", "x": [None, float("inf")]},
                {"image_path": "a.png"},
                {"image_path": "", "license": "cc0"},
            ],
        )
    )
    assert '2 records (the first: "a.png", "") have no text' in told
    assert "1 record has a key that occurs again further on" in told
    folder = tmp_path / "sub"
    folder.mkdir()
    (tmp_path / "l.jsonl").rename(folder / "l.jsonl")
    run("collect", folder / "l.jsonl", "-o", "o.json", "--full-path", cwd=tmp_path)
    assert next(iter(json.loads((tmp_path / "o.json").read_bytes()))) == str(folder / "a.png")


def test_other_fields_of_json_lines(tmp_path):
    """--key-field and --caption-field name the fields; image_path and caption may be theirs."""
    (tmp_path / "l.jsonl").write_text('{"id": "1", "prompt": "x", "text": 5}\n')
    (tmp_path / "m.jsonl").write_text('{"image_path": "1", "caption": "x"}\n')
    options = ["--key-field", "id", "--caption-field", "prompt"]
    out = run("collect", "l.jsonl", "-o", "-", "--format", "jsonl", *options, cwd=tmp_path).out
    assert json.loads(out) == {"image_path": "1", "caption": "x", "text": 5}
    options = ["--key-field", "image_path", "--caption-field", "caption"]
    out = run("collect", "m.jsonl", "-o", "-", "--format", "jsonl", *options, cwd=tmp_path).out
    assert json.loads(out) == {"image_path": "1", "caption": "x"}


@pytest.mark.parametrize(
    ("line", "place", "message"),
    [
        ('{"text": "x"}', 31, 'the field "file_name" is missing, expected the name'),
        ('{"file_name": 5}', 31, 'the field "file_name" is a number'),
        ('{"file_name": "b", "text": ["x"]}', 31, 'the field "text" is a list, expected a text'),
        ('{"file_name": "b", "text": "x", "caption": "y"}', 31, 'a field "caption" besides "text"'),
        ('{"file_name": "b", "image_path": "y"}', 31, '"image_path" besides "file_name"'),
        ("[1]", 31, "the line is no object"),
        ('{"file_name": "b"', 48, "expected"),
    ],
)
def test_a_line_that_is_no_record(tmp_path, line, place, message):
    """The error names the byte of the line and what to do, and nothing is written."""
    (tmp_path / "l.jsonl").write_text(f'{{"file_name": "a", "text": ""}}\n{line}\n')
    error = run("collect", "l.jsonl", "-o", "out.json", cwd=tmp_path, fails=1).err
    assert error.startswith(f"capmerge: l.jsonl, byte {place}")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["l.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pics", "--recursive"], "--recursive needs --full-path"),
        (["pics", "--caption", "caption"], "its dot"),
        (["pics", "--tags", ".png"], "the ending of a picture"),
        (["pics", "--tags", ".txt", "--caption", ".txt"], "are both"),
        (["pics", "--key-field", "x"], "--key-field has no effect on a folder"),
        (["l.jsonl", "--tags", ".txt"], "--tags has no effect on a file"),
        (["l.jsonl", "--recursive"], "--recursive has no effect on a file"),
        (["missing"], "no such file"),
    ],
)
def test_options_that_cannot_be_carried_out(tmp_path, arguments, message):
    """The message says which option is wrong, before anything is written."""
    (tmp_path / "pics").mkdir()
    (tmp_path / "l.jsonl").write_text("{}\n")
    assert message in run("collect", *arguments, "-o", "out.json", cwd=tmp_path, fails=2).err
    assert not (tmp_path / "out.json").exists()
