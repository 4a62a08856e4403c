"""Records with equal keys are all kept by every command, at any distance and with any options."""

import json

import pytest
from builders.metadata import make_records, run

from capmerge.errors import OutputError
from capmerge.stats.repeated_keys import KeyCheck


def many_with_equal_keys(kind, count=3200):
    """The bytes of a file with equal keys side by side, far apart and escaped; and all its pairs.

    It has several blocks, and one key stands in the first and the last of them.
    """
    pairs = list(make_records(count, exotic=False).items())
    for place, key in {1: 0, 2: 0, 700: 699, count - 1: 5, count - 2: 5, 1500: 5}.items():
        pairs[place] = pairs[key][0], pairs[place][1]
    texts = []
    for place, (key, record) in enumerate(pairs):
        shown = (
            json.dumps(key) if place != 2 else '"' + "".join(f"\\u{ord(c):04x}" for c in key) + '"'
        )
        if kind == "json":
            texts.append(f"  {shown}: {json.dumps(record)}")
        else:
            texts.append(f'{{"image_path": {shown}, {json.dumps(record)[1:]}')
    text = ",\n".join(texts).join(("{\n", "\n}\n")) if kind == "json" else "\n".join(texts) + "\n"
    return text.encode(), pairs


def written_keys(path, kind):
    """The keys of all records in a file, equal ones included."""
    text = path.read_text()
    if kind == "jsonl":
        return [json.loads(line)["image_path"] for line in text.splitlines()]
    found = json.loads(text, object_pairs_hook=list)
    return [key for key, _ in found]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("json", ()), ("json", ("--fit", "75", "trim")), ("jsonl", ("--stats", "--index"))],
)
def test_all_records_of_equal_keys_are_kept(tmp_path, kind, options):
    """Rewriting keeps them in their order, tells them, and its bytes are the same for any -j."""
    source, out = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    data, pairs = many_with_equal_keys(kind)
    source.write_bytes(data)
    outputs = []
    for jobs in ("1", "2"):
        done = run("rewrite", source, "-o", out, "--force", "-j", jobs, *options)
        outputs.append(out.read_bytes())
    assert outputs[0] == outputs[1]
    assert written_keys(out, kind) == [key for key, _ in pairs]
    shown = done.out.decode()
    assert "6 records have a key that occurs again further on" in shown
    assert 'the first: "danbooru/1000000", "danbooru/1000005", "danbooru/1000699")' in shown
    receipt = json.loads((tmp_path / f"out.{kind}.capmerge.json").read_bytes())
    assert receipt["counts"]["repeated_keys"] == 6
    assert "3,200 records are as expected" in run("verify", source, out).out.decode()
    assert "repeated keys                     6" in run("index", out).out.decode()


def test_statistics_and_previews_of_equal_keys(tmp_path):
    """Statistics count every record and tell of equal keys; a preview shows the first of them."""
    source = tmp_path / "in.json"
    source.write_bytes(b'{"a": {"tags": "one"}, "b": {"tags": "x"}, "a": {"tags": "two"}}')
    done = run("stats", source)
    assert '1 record has a key that occurs again further on (the first: "a")' in done.err
    assert json.loads((tmp_path / "in.stats.json").read_bytes())["records"]["counted"] == 3
    shown = run("preview", source, "--key", "a").out.decode()
    assert "one" in shown
    assert "two" not in shown


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_field_twice_in_a_record(tmp_path, kind):
    """The last of equal fields counts, as for json.load, and the others are told."""
    record = '"caption": "first", "tags": "t", "c\\u0061ption": "last"}'
    text = '{"k": {%s}' if kind == "json" else '{"image_path": "k", %s'
    source, out = tmp_path / f"in.{kind}", tmp_path / "out.json"
    source.write_text(text % record)
    done = run("rewrite", source, "-o", out)
    assert '1 record has the same field more than once (the first: "k")' in done.out.decode()
    assert json.loads(out.read_bytes())["k"]["caption"] == "t\nlast"
    receipt = json.loads((tmp_path / "out.json.capmerge.json").read_bytes())
    assert receipt["counts"]["repeated_fields"] == 1
    assert "with a field more than once" in run("verify", source, out).out.decode()
    assert "the same field more than once" in run("stats", source).err


def test_no_folder_for_temporary_files(tmp_path, monkeypatch):
    """Without any folder for temporary files a run to standard output says what it needs."""
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(OutputError, match="TMPDIR"):
        KeyCheck(None)
