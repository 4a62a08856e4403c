"""Records are kept by several tests, and the others are listed with every reason."""

import json

import pytest
from builders.metadata import LAYOUTS, make_records, read_jsonl, run

MISFIT = 'found 2 lines and 1 letters in "capmerge", expected one letter per line.'
MANY = make_records(2500, nested=True)
"""Several blocks of records with all kinds of values."""


def dropped_in(folder, name="out.json"):
    """The reasons of each record that was left out, by its key."""
    lines = read_jsonl(folder / f"{name}.dropped.jsonl")
    return {line["key"]: line["reasons"] for line in lines}


def names_in(folder):
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def write(folder, records, name="meta.json"):
    """Write these records to a file of the folder."""
    (folder / name).write_text(json.dumps(records, indent=2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("out", ["out.json", "out.jsonl"])
def test_fields_are_required(tmp_path, layout, out):
    """Kept records are as they were, in any layout and format, with the same bytes for any -j."""
    (tmp_path / "meta").write_bytes(LAYOUTS[layout](MANY))
    outputs = []
    for jobs in ("1", "3"):
        done = run(
            "filter", "meta", "-o", out, "--require", "tags", "--require", "caption", "--force",
            "-j", jobs, cwd=tmp_path,
        )  # fmt: skip
        lists = (tmp_path / out, tmp_path / f"{out}.dropped.jsonl")
        outputs.append([path.read_bytes() for path in lists])
    assert outputs[0] == outputs[1]
    kept = {key: one for key, one in MANY.items() if "tags" in one and "caption" in one}
    if out == "out.json":
        found = json.loads((tmp_path / out).read_bytes())
    else:
        found = {line.pop("image_path"): line for line in read_jsonl(tmp_path / out)}
    assert repr(found) == repr(kept)
    assert dropped_in(tmp_path, out) == {
        key: [f"no {name}" for name in ("tags", "caption") if name not in one]
        for key, one in MANY.items()
        if key not in kept
    }
    table = " ".join(done.out.decode().split())
    assert f"records 2,500 kept {len(kept):,} dropped {2500 - len(kept)}" in table


def test_what_is_empty_is_missing(tmp_path):
    """Blank texts, null and empty lists are missing; a record that is no object has no field."""
    values = [" \n", "\u00a0", None, [], {}, 0, False, "x", [0], "\u00a0x"]
    records = {str(number): {"f": value} for number, value in enumerate(values)}
    write(tmp_path, {**records, "list": ["f"], "none": {}})
    run("filter", "meta.json", "-o", "out.json", "--require", "f", cwd=tmp_path)
    assert list(json.loads((tmp_path / "out.json").read_text())) == ["5", "6", "7", "8", "9"]


def test_a_rewritten_record_has_the_tags_of_its_mark(tmp_path):
    """Rewritten records have no field of tags, and are judged by their letters."""
    write(
        tmp_path,
        {"t": {"tags": "a"}, "c": {"caption": "a"}, "tc": {"tags": "a", "caption": "b"}, "": {}},
    )
    run("rewrite", "meta.json", "-o", "marked.json", cwd=tmp_path)
    for fields, kept in (
        (["tags"], ["t", "tc"]),
        (["caption"], ["c", "tc"]),
        (["tags", "caption"], ["tc"]),
    ):
        options = [word for field in fields for word in ("--require", field)]
        run("filter", "marked.json", "-o", "out.json", *options, "--force", cwd=tmp_path)
        assert list(json.loads((tmp_path / "out.json").read_text())) == kept
    done = run("rewrite", "out.json", "-o", "again.json", cwd=tmp_path, fails=1)
    assert "the record is rewritten already" in done.err


@pytest.mark.parametrize("marked", [False, True])
def test_tokens_are_those_of_stats(tmp_path, marked):
    """Every alternative must be within the limits, as `stats --per-record` counts it."""
    records = {
        "wild": {"caption": "a {b|c d e f g h i j k l m n o p} {{x}}", "tags": "y"},
        "empty": {"train_resolution": [64, 64]},
        "no": {"caption": ["x"]},
        **dict(list(MANY.items())[:400]),
    }
    if marked:
        del records["no"]
    write(tmp_path, records)
    source = "meta.json"
    if marked:
        run("rewrite", "meta.json", "-o", "marked.json", "--layout", "inline", cwd=tmp_path)
        source = "marked.json"
    run("stats", source, "--per-record", "lengths.jsonl", "--on-error", "skip", cwd=tmp_path)
    lengths = {line["key"]: line["tokens"] for line in read_jsonl(tmp_path / "lengths.jsonl")}
    assert min(lengths["wild"]) < max(lengths["wild"])
    for least, most in ((0, 60), (3, 200), (40, 90), (120, 130)):
        run(
            "filter", source, "-o", "out.json", "--min-tokens", str(least), "--max-tokens",
            str(most), "--force", "-j", "2", cwd=tmp_path,
        )  # fmt: skip
        expected = [
            key
            for key, found in lengths.items()
            if least <= min(found, default=0) and max(found, default=0) <= most
        ]
        assert list(json.loads((tmp_path / "out.json").read_text())) == expected
        assert len(expected) < len(lengths)
    if not marked:
        assert dropped_in(tmp_path)["no"][0].startswith("cannot be counted: ")
    assert dropped_in(tmp_path)["empty"] == ["an alternative of 0 tokens, expected at least 120"]


def test_a_broken_mark_is_a_reason(tmp_path):
    """A rewritten record that cannot be read is listed with what is wrong, and the run goes on."""
    write(tmp_path, {"a": {"caption": "x\ny", "capmerge": "t"}, "b": {"caption": "x"}})
    run("filter", "meta.json", "-o", "out.json", "--max-tokens", "9", cwd=tmp_path)
    assert dropped_in(tmp_path) == {"a": ["cannot be counted: " + MISFIT]}


def test_latents_have_any_name_of_sd_scripts(tmp_path):
    """Stems, sizes in names, sub-folders, links and absolute keys find their file."""
    folder = tmp_path / "latents"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "far").mkdir()
    for name in (
        "a.npz",
        "sub/b_0064x0128_sdxl.npz",
        "sub/d_0064x0064_flux.npz",
        "e.x.npz",
        "f.txt",
    ):
        (folder / name).write_bytes(b"")
    (tmp_path / "far" / "g.npz").write_bytes(b"")
    (folder / "link").symlink_to("../far")
    keys = [
        "a", "a.png", "sub/b.webp", "sub/d", "e.x", "link/g", "./sub//b", f"{folder}/a.png",
        "f", "b", "A", "../far/g", f"{tmp_path}/far/g", "a_0064x0064_sdxl", "",
    ]  # fmt: skip
    write(tmp_path, {key: {"tags": "t"} for key in keys})
    done = run("filter", "meta.json", "-o", "out.json", "--latents", "latents", cwd=tmp_path)
    assert list(json.loads((tmp_path / "out.json").read_text())) == keys[:8]
    reasons = dropped_in(tmp_path)
    assert reasons["f"] == ["no latents"]
    outside = "no latents in the folder, which the key leads out of"
    assert reasons["../far/g"] == reasons[f"{tmp_path}/far/g"] == [outside]
    assert "latents files 5" in " ".join(done.out.decode().split())


def test_keys_are_listed_in_any_form(tmp_path):
    """Text, JSON lines of several kinds and a metadata file say which keys are meant."""
    keys = ["a", "é b", "\ud83d", '{"', "x\ny"]
    write(tmp_path, {key: {} for key in keys})
    (tmp_path / "k.txt").write_bytes(b"\xef\xbb\xbfa\r\n\n\xc3\xa9 b\nunknown")
    (tmp_path / "k.jsonl").write_text(
        '"x\\ny"\n{"key": "\\ud83d"}\n{"image_path": "a", "tags": 1}\n'
    )
    (tmp_path / "k.json").write_text('{"{\\"": {}}')
    (tmp_path / "none.txt").write_text("")
    for name, listed in (
        ("k.txt", keys[:2]),
        ("k.jsonl", ["a", "\ud83d", "x\ny"]),
        ("k.json", ['{"']),
        ("none.txt", []),
    ):
        run("filter", "meta.json", "-o", "out.json", "--keys", name, "--force", cwd=tmp_path)
        assert list(json.loads((tmp_path / "out.json").read_text())) == listed
        run("filter", "meta.json", "-o", "out.json", "--exclude", name, "--force", cwd=tmp_path)
        rest = [key for key in keys if key not in listed]
        assert list(json.loads((tmp_path / "out.json").read_text())) == rest
    # What a filter lists can be given to the next.
    run("filter", "meta.json", "-o", "out.json", "--keys", "k.txt", "--force", cwd=tmp_path)
    run("filter", "meta.json", "-o", "rest.json", "--keys", "out.json.dropped.jsonl", cwd=tmp_path)
    assert list(json.loads((tmp_path / "rest.json").read_text())) == keys[2:]


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ([], 2, "nothing says which records to keep"),
        (["--min-tokens", "5", "--max-tokens", "4"], 2, "is more than --max-tokens 4"),
        (["--require", "x", "--family", "sd2"], 2, "nothing counts them"),
        (["--latents", "none"], 2, "there is no such folder"),
        (["--latents", "empty"], 2, "found no latents"),
        (["--keys", "none.txt"], 2, "no such file"),
        (["--keys", "bad.txt"], 1, "byte 2: found the byte 0xff, expected UTF-8"),
        (["--keys", "bad.jsonl"], 1, "byte 4: the line holds no key"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, code, message):
    """Each mistake has a message that says what to do, and nothing is written."""
    write(tmp_path, {})
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff")
    (tmp_path / "bad.jsonl").write_bytes(b'"a"\n1\n')
    before = names_in(tmp_path)
    done = run("filter", "meta.json", "-o", "out.json", *options, cwd=tmp_path, fails=code)
    assert message in done.err
    assert names_in(tmp_path) == before


def test_side_files_of_an_earlier_output_do_not_stay(tmp_path):
    """An output that is replaced has no list, receipt or index of another one beside it."""
    write(tmp_path, {"a": {"tags": "t"}, "b": {}})
    run("rewrite", "meta.json", "-o", "out.json", "--index", cwd=tmp_path)
    run("filter", "meta.json", "-o", "out.json", "--require", "tags", "--force", cwd=tmp_path)
    assert names_in(tmp_path) == ["meta.json", "out.json", "out.json.dropped.jsonl"]
    run("filter", "out.json", "-o", "all.json", "--require", "tags", cwd=tmp_path)
    assert not (tmp_path / "all.json.dropped.jsonl").exists()
