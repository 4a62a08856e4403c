"""The generated metadata of the benchmarks, and the reference that they compare with."""

import argparse
import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from capmerge.captions.wildcard import outcomes
from deceptive import SHAPES, deceptive_records
from synthetic import (
    HOSTILE,
    KINDS,
    MIXED,
    kinds_of,
    records_of,
    write_deceptive,
    write_huge_record,
    write_metadata,
)

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
NON_LATIN = re.compile("[\u03b1-\u03c9\u0430-\u044f\u0627-\u064a\u3042-\u3093\u4e00-\u5fff가-힣]")
SURROGATE = re.compile("[\ud800-\udfff]")


def _records(kind, count):
    return [record for _, record in islice(records_of(kind), count)]


def _share(records, holds):
    return sum(map(bool, map(holds, records))) / len(records)


def _text(record):
    return record.get("caption", "") + record.get("tags", "")


def _hash(path):
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("indent2", "68c5faf18101be4f45e0f93eac80976e"),
        ("indent4", "568e209e31652e9ef31d5ff998bdabde"),
        ("compact", "f20901e27e214858d59435511fba7839"),
        ("jsonl", "52045f8fa81b9851f24d753da47beaf1"),
    ],
)
def test_plain_files_have_not_changed(tmp_path, layout, expected):
    """Figures of earlier measurements stay comparable: plain files are the same to the byte."""
    write_metadata(tmp_path / "plain", 2_000_000, layout)
    assert _hash(tmp_path / "plain") == expected


def test_plain_files_of_another_seed_and_with_huge_records_have_not_changed(tmp_path):
    """The seed, the number of records and the huge records keep their meaning."""
    write_metadata(tmp_path / "seed", 2_000_000, seed=7, records=1000)
    assert _hash(tmp_path / "seed") == "c2656e42e8dedbf51fa510929c2867b1"
    write_huge_record(tmp_path / "huge", 2_000_000, 100_000, 500)
    assert _hash(tmp_path / "huge") == "55f3db3e018f9e444b989591691a646a"


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_the_same_records_in_every_layout(tmp_path, kind):
    """A kind depends on its seed alone, and a file of any layout holds the same records."""
    for name, seed in (("first", 3), ("other", 4)):
        write_metadata(tmp_path / name, 1 << 40, seed=seed, records=300, kind=kind)
    assert _hash(tmp_path / "first") != _hash(tmp_path / "other")
    records = dict(islice(records_of(kind, 3), 300))
    assert json.loads((tmp_path / "first").read_text()) == records
    for layout in ("indent4", "compact"):
        write_metadata(tmp_path / layout, 1 << 40, layout, seed=3, records=300, kind=kind)
        assert json.loads((tmp_path / layout).read_text(encoding="utf-8")) == records
    write_metadata(tmp_path / "jsonl", 1 << 40, "jsonl", seed=3, records=300, kind=kind)
    lines = (tmp_path / "jsonl").read_text(encoding="utf-8").splitlines()
    assert {line.pop("image_path"): line for line in map(json.loads, lines)} == records


def test_raw_layout_writes_lone_surrogates_as_escapes(tmp_path):
    """A raw UTF-8 file stays valid UTF-8 where the text has a lone surrogate."""
    write_metadata(tmp_path / "raw", 1 << 40, "indent4", records=8000, kind="mixed")
    written = json.loads((tmp_path / "raw").read_text(encoding="utf-8"))
    assert any(SURROGATE.search(_text(record)) for record in written.values())
    assert written == dict(islice(records_of("mixed"), 8000))


def test_mixed_has_its_shares():
    """Each irregularity occurs as often as the kind promises, within four standard deviations."""
    records = _records("mixed", 20_000)
    captions = [record["caption"] for record in records if "caption" in record]
    tags = [record["tags"] for record in records if "tags" in record]
    near = {"abs": 0.015}
    assert _share(records, lambda record: "caption" not in record) == pytest.approx(0.05, abs=0.007)
    assert _share(records, lambda record: "tags" not in record) == pytest.approx(0.03, abs=0.005)
    marked = sum(bool(re.search(r"[|{}]", text)) for text in tags) / len(records)
    assert marked == pytest.approx(0.02, abs=0.004)
    assert _share(captions, lambda text: "\n" in text) == pytest.approx(0.35, **near)
    assert _share(captions, lambda text: "\n\n" in text) == pytest.approx(0.175, **near)
    assert _share(captions, lambda text: "\u201c" in text) == pytest.approx(0.30, **near)
    assert _share(captions, NON_LATIN.search) == pytest.approx(0.10, abs=0.009)
    lone = _share(records, lambda record: SURROGATE.search(_text(record)))
    assert lone == pytest.approx(0.0005, abs=0.0007)
    assert lone > 0
    assert sum(MIXED.values()) == pytest.approx(0.8505)


def test_hostile_has_its_shares():
    """Each obstacle occurs as often as the kind promises, within four standard deviations."""
    records = _records("hostile", 10_000)

    def braces_and_pipes(record):
        return re.search(r"[{}]", _text(record)) and "|" in _text(record)

    def has_equal_lines(record):
        lines = [record["tags"], *record["caption"].split("\n")]
        return len(lines[1]) < 5000 and len(set(lines)) < len(lines)

    assert _share(records, braces_and_pipes) == pytest.approx(0.5, abs=0.02)
    assert _share(records, lambda r: re.search("[{}|]", _text(r))) == pytest.approx(0.5, abs=0.02)
    stand_ins = _share(records, lambda r: re.search("[\u2985\u2986]", _text(r)))
    assert stand_ins == pytest.approx(0.1, abs=0.012)
    assert _share(records, lambda r: "\u2985" in _text(r)) > 0.03
    assert _share(records, lambda r: "regions" in r) == pytest.approx(0.3, abs=0.02)
    assert min(len(r["regions"]) for r in records if "regions" in r) >= 5
    assert _share(records, lambda r: len(r["caption"]) > 4000) > 0.05
    # A long caption of several lines repeats its sentences, so its lines are often equal too.
    assert 0.17 < _share(records, has_equal_lines) < 0.28
    assert sum(HOSTILE.values()) == pytest.approx(1.2)


@pytest.mark.parametrize("kind", ["mixed", "hostile"])
def test_kinds_differ_from_plain_only_where_they_say(kind):
    """Keys and sizes of all kinds are those of the plain records."""
    for (key, record), (plain_key, plain) in islice(
        zip(records_of(kind), records_of("plain"), strict=True), 10
    ):
        assert key == plain_key
        assert record.keys() <= {*plain, "regions"}


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "huge"])
def test_deceptive_records_of_each_shape_are_valid_in_every_layout(tmp_path, shape):
    """A file of a deceptive shape holds whole records, and is read by any JSON library."""
    expected = dict(islice(deceptive_records(0, shape), 1))
    for layout in ("indent2", "indent0", "compact", "jsonl"):
        write_deceptive(tmp_path / layout, 1, shape, layout)
        written = json.loads((tmp_path / layout).read_text())
        if layout == "jsonl":
            written = {written.pop("image_path"): written}
        assert written == expected


def test_deceptive_records_look_like_records_inside():
    """Most small records hold borders that a search for records finds, and some hold long runs."""
    texts = [json.dumps({key: record}) for key, record in islice(deceptive_records(), 60)]
    borders = re.compile(r'\},\s*"[^"]*":\s*\{')
    assert sum(len(borders.findall(text)) > 10 for text in texts) == 30
    assert sum('},", ": {' in text for text in texts) == 30
    assert sum(bool(re.search(r"([^ ]{1,6})\1{200}", text)) for text in texts) == 10


def test_kinds_of_a_command_line():
    """`--kinds` takes some of the kinds, in the order of the tables, and names a wrong one."""
    assert kinds_of("deceptive,plain,mixed,hostile") == KINDS
    assert kinds_of("hostile,plain") == ("plain", "hostile")
    with pytest.raises(argparse.ArgumentTypeError, match="unknown kind 'mixde', expected some of"):
        kinds_of("plain,mixde")


def test_reference_imports_nothing_of_the_package():
    """The reference of the benchmarks shares no code with the package that they measure."""
    assert not re.search(
        r"^\s*(?:import|from) (?:capmerge|trainer)",
        (SCRIPTS / "reference_rewrite.py").read_text(encoding="utf-8"),
        re.MULTILINE,
    )


def test_reference_writes_the_texts_of_a_rewrite(tmp_path):
    """The reference gives sd-scripts the same texts with the same probabilities as `rewrite`."""
    source = tmp_path / "mixed.json"
    write_metadata(source, 1 << 40, records=8000, kind="mixed")
    commands = (
        [str(SCRIPTS / "reference_rewrite.py"), str(source)],
        ["-m", "capmerge", "rewrite", str(source), "-o", "-", "--quiet"],
    )
    reference, rewritten = (
        json.loads(
            subprocess.run([sys.executable, *command], check=True, capture_output=True).stdout
        )
        for command in commands
    )
    assert list(reference) == list(rewritten)
    surrogates = 0
    for key, record in reference.items():
        # ijson's C backend turns a lone surrogate into a question mark.
        expected, count = SURROGATE.subn("?", rewritten[key]["caption"])
        assert _drawn(record["caption"]) == _drawn(expected), key
        assert outcomes(record["caption"]).keys() == outcomes(expected).keys()
        assert "tags" not in record
        surrogates += bool(count)
    assert surrogates


def _drawn(caption):
    lines = Counter(caption.split("\n"))
    return {line: Fraction(count, lines.total()) for line, count in lines.items()}
