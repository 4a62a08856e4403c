import gzip
import json
import random
from collections import Counter
from fractions import Fraction

import pytest
from builders.blocks import set_sizes
from builders.metadata import (
    LAYOUTS,
    as_compact,
    as_indent_2,
    as_jsonl,
    make_records,
    read_jsonl,
    rewritten,
    run,
    temporary_files,
)
from builders.paths import EXAMPLE_METADATA
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from capmerge.captions.tags import spaced
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import outcomes
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.commands.stats_outputs import StatsFiles
from capmerge.errors import RecordError, UsageError
from capmerge.files.source import open_source
from capmerge.metadata.parallel import run_blocks
from capmerge.stats.collector import Tokenizers
from capmerge.stats.figure import draw_figure
from capmerge.stats.lengths import LengthStats
from capmerge.tokens.load import load_clip

EXAMPLE = EXAMPLE_METADATA


def statistics(path, **options):
    """The document of a file."""
    with open_source(str(path)) as source:
        return measure(source, MeasureOptions(**options))


@pytest.fixture
def small_blocks(monkeypatch):
    """Make blocks small, so that a small file has many, for forked workers too."""
    set_sizes(monkeypatch, block_bytes=20_000, piece_bytes=4_000)
    monkeypatch.setattr("capmerge.metadata.parallel.BLOCK_BYTES", 20_000)


@pytest.fixture
def t5(tmp_path):
    """A tokenizer of whole words that adds one special token, as T5 does."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def test_every_figure_is_that_of_counting_one_by_one(tmp_path):
    """All figures are those of plain counting, which shares no code with the fast ways."""
    records = make_records(150, exotic=False)
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(records))
    found = statistics(path)
    tokenizer = load_clip("sd1")
    lines = LengthStats()
    tags, captions = Counter(), Counter()
    saved = 0
    for key, record in records.items():
        for text, share in (
            outcomes(rewritten(record)["caption"]).items() if rewritten(record)["caption"] else ()
        ):
            lines.add([len(tokenizer.encode(text))], [key], share.as_integer_ratio())
        if record.get("tags"):
            tags.update(record["tags"].split(", "))
            saved += len(tokenizer.encode(record["tags"])) - len(
                tokenizer.encode(spaced(record["tags"]))
            )
        if record.get("caption"):
            captions[
                "\n".join(line.strip() for line in record["caption"].split("\n") if line.strip())
            ] += 1
    assert found["lengths"]["lines"] == lines.as_json()
    assert {entry["tag"]: entry["texts"] for entry in found["tags"]["most_frequent"]} == dict(tags)
    assert found["underscores"]["saved_tokens"] == saved
    again = {text: count for text, count in captions.items() if count > 1}
    assert (found["duplicates"]["captions"], found["duplicates"]["distinct"]) == (
        captions.total(),
        len(captions),
    )
    assert [group["captions"] for group in found["duplicates"]["largest"]] == sorted(
        again.values(), reverse=True
    )
    kinds = Counter(
        (bool(record.get("tags")), bool(record.get("caption"))) for record in records.values()
    )
    counted = found["records"]
    assert (
        counted["both"],
        counted["tags_only"],
        counted["caption_only"],
        counted["empty"],
    ) == tuple(kinds[kind] for kind in ((True, True), (True, False), (False, True), (False, False)))
    sizes = Counter("{}x{}".format(*record["train_resolution"]) for record in records.values())
    assert {entry["resolution"]: entry["records"] for entry in found["resolutions"]} == sizes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.usefixtures("small_blocks")
def test_any_number_of_workers_gives_the_same_document(tmp_path, layout):
    """One, two and three processes write the same figures and lines, even after wrong cuts."""
    rng = random.Random(2)
    records = make_records(400)
    for record in records.values():
        record["nested"] = {f"p{j}": {"q": 1} for j in range(rng.choice((0, 0, 0, 60)))}
    path = tmp_path / "m.json"
    path.write_bytes(LAYOUTS[layout](records))
    found = []
    for jobs in (1, 2, 3):
        lines = tmp_path / f"{jobs}.jsonl"
        found.append(
            (json.dumps(statistics(path, jobs=jobs, per_record=lines)), lines.read_bytes())
        )
    assert found[0] == found[1] == found[2]
    assert json.loads(found[0][0])["records"]["counted"] == 400
    assert [line["key"] for line in read_jsonl(lines)] == list(records)


@pytest.mark.usefixtures("small_blocks")
def test_blocks_done_in_vain_count_nothing(tmp_path):
    """An error in a block that began inside a record leaves nothing to the worker's next block."""
    some = make_records(200, exotic=False)
    # These look like records inside of one. In each block many could be merged, then one could not.
    parts = {f"part {i}": {"caption": "c" * 60 if i % 150 < 149 else ["x"]} for i in range(1500)}
    records = {
        **some,
        "wide": {"caption": "c", "parts": parts},
        **{f"{key}b": record for key, record in some.items()},
    }
    path = tmp_path / "m.json"
    path.write_bytes(as_compact(records))
    found = []
    for jobs in (1, 2, 3):
        lines = tmp_path / f"{jobs}.jsonl"
        found.append((statistics(path, jobs=jobs, per_record=lines), lines.read_bytes()))
    assert [line["key"] for line in read_jsonl(lines)] == list(records)
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("stream", [False, True])
def test_workers_that_are_full_hand_their_counts_over(tmp_path, monkeypatch, stream):
    """A worker hands over its counts early when there are many tags, and no figure changes."""
    path = tmp_path / ("m.json.gz" if stream else "m.json")
    written = as_compact(make_records(600))
    path.write_bytes(gzip.compress(written) if stream else written)
    expected = statistics(path)
    monkeypatch.setattr("capmerge.stats.counts._MANY_TAGS", 3)
    monkeypatch.setattr("capmerge.stats.counts._MOST_UNCOUNTED", 10)
    calls = []

    def noted(*arguments, collect, **options):
        run_blocks(
            *arguments, collect=lambda counted: [calls.append(counted), collect(counted)], **options
        )

    monkeypatch.setattr("capmerge.commands.stats.run_blocks", noted)
    for jobs in (1, 2, 3):
        calls.clear()
        assert statistics(path, jobs=jobs) == expected
        assert len(calls) > jobs


def test_spawned_workers_count_the_same(tmp_path):
    """Workers that are spawned, as on other systems, count the same."""
    path = tmp_path / "m.json"
    path.write_bytes(as_compact(make_records(3000, exotic=False)))
    assert statistics(path, jobs=2, start_method="spawn") == statistics(path)


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--layout", "inline"],
        ["--layout", "concat"],
        ["--line", "{tags}=3", "--line", "{caption}, {tags}", "--prefix", "x "],
        [
            "--line",
            "{tags}=70",
            "--line",
            "{caption}",
            "--weights",
            "field",
            "--underscores",
            "space",
            "--caption-lines",
            "join",
        ],
        ["--line", "{tags}=70", "--line", "{caption}", "--caption-wildcards"],
        ["--fit", "75", "trim"],
    ],
)
def test_an_original_counts_as_what_is_rewritten_of_it(tmp_path, options):
    """The figures of the original are those of the file that the same options write."""
    source = tmp_path / "m.json"
    source.write_bytes(EXAMPLE.read_bytes())
    before, after, passed = (
        tmp_path / "before.json",
        tmp_path / "after.json",
        tmp_path / "out.stats.json",
    )
    run("stats", source, *options, "-o", before, "--quiet")
    run("rewrite", source, *options, "-o", tmp_path / "out.json", "--stats", "--quiet")
    run(
        "stats",
        tmp_path / "out.json",
        "-o",
        after,
        "--quiet",
        "--per-record",
        tmp_path / "lines.jsonl",
    )
    found = [json.loads(path.read_bytes()) for path in (before, passed, after)]
    for document in found:
        del document["source"], document["options"], document["records"]["rewritten_before"]
    assert found[0] == found[1] == found[2]
    assert (
        sum(len(line["tokens"]) for line in read_jsonl(tmp_path / "lines.jsonl"))
        == found[0]["lengths"]["lines"]["texts"]
    )


def test_records_written_by_hand_into_a_rewritten_file_count_too(tmp_path):
    """In a file of both kinds, rewritten records are counted as they are, the others as merged."""
    path = tmp_path / "m.jsonl"
    path.write_bytes(
        as_jsonl(
            {
                "a": {"caption": "x {{y}}\nz z", "capmerge": "tc", "capmerge_weights": [3, 1]},
                "b": {"tags": "one"},
            }
        )
    )
    found = statistics(path)
    assert (found["records"]["counted"], found["records"]["rewritten_before"]) == (2, 1)
    assert found["styles"]["tags"]["share"] == float(Fraction(7, 8))
    assert found["lengths"]["lines"]["mean"] == (4 * 0.75 + 2 * 0.25 + 1) / 2


def test_wildcards_count_at_their_longest(tmp_path):
    """An intended {a|b} is counted at its longest text; shortest and mean are given too."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({"a": {"caption": "a {red|very very blue} hat"}}))
    found = statistics(path, merge=MergeOptions(caption_wildcards=True))
    assert found["lengths"]["lines"]["max"] == 5
    assert found["wildcards"] == {
        "alternatives": 1,
        "not_listed": 0,
        "mean_longest": 5,
        "mean_shortest": 3,
        "mean": 4,
    }


@pytest.mark.parametrize(("family", "tokens"), [("sd1", 3), ("sdxl", 3), ("sd2", 4), ("flux", 3)])
def test_the_family_counts(tmp_path, family, tokens):
    """SD2 reads "!!" as two tokens, the others as one; SD3 and FLUX have one chunk."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({"a": {"caption": "a cat!!"}}))
    found = statistics(path, tokenizers=Tokenizers(family))
    assert found["lengths"]["lines"]["max"] == tokens
    assert [cut["limit"] for cut in found["limits"]] == (
        [75] if family == "flux" else [75, 150, 225]
    )


def test_a_t5_counts_beside_clip(tmp_path, t5):
    """With a T5 tokenizer the loss at 256 and 512 tokens is given; other figures stay CLIP's."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({"a": {"caption": "cat_ " * 300}}))
    found = statistics(path, tokenizers=Tokenizers("flux", t5))
    assert [
        (cut["limit"], cut["room_tokens"], cut["dropped_tokens"]) for cut in found["t5"]["limits"]
    ] == [(256, 255, 45), (512, 511, 0)]
    assert found["lengths"]["lines"]["max"] == 600
    assert statistics(path, tokenizers=Tokenizers("flux"))["t5"] is None
    with pytest.raises(UsageError, match="found a tokenizer that is not CLIP"):
        statistics(path, tokenizers=Tokenizers("sd1", t5))


def test_the_advice_is_the_smallest_length_that_loses_little(tmp_path):
    """The advice is the smallest limit that fits, or what would do when the family has none."""
    path = tmp_path / "m.json"
    found = {}
    for tokens in (0, 10, 100, 400):
        path.write_bytes(as_indent_2({"a": {"caption": "cat " * tokens}}))
        found[tokens] = statistics(path)["advice"]
    assert [advice["max_tokens"] for advice in found.values()] == [None, 75, 150, None]
    assert "450 would lose under 1 %" in found[400]["text"]


def test_special_literals_are_told(tmp_path):
    """Alternatives with texts that mean something to a tokenizer or a trainer are counted."""
    path = tmp_path / "m.json"
    path.write_bytes(
        as_indent_2(
            {
                "a": {"tags": "x <|ENDOFTEXT|>, y", "caption": "left BREAK right ||| {braces}"},
                "b": {"tags": "BREAKFAST"},
            }
        )
    )
    assert statistics(path)["literals"] == {"<|endoftext|>": 1, "BREAK": 1, "{ or }": 1, "|||": 1}


@pytest.mark.parametrize("kind", ["gz", "pipe"])
def test_a_stream_counts_as_its_file(tmp_path, kind):
    """Gzip and standard input give the same figures, but cannot show the first of duplicates."""
    path, out = tmp_path / "m.json.gz", tmp_path / "s.json"
    path.write_bytes(gzip.compress(EXAMPLE.read_bytes()))
    if kind == "gz":
        run("stats", path, "-o", out, "--quiet")
    else:
        run("stats", "-", "-o", out, "--quiet", stdin=EXAMPLE.read_bytes())
    found, expected = json.loads(out.read_bytes()), statistics(EXAMPLE)
    for group, named in zip(
        found["duplicates"]["largest"], expected["duplicates"]["largest"], strict=True
    ):
        assert (group["key"], group["caption"]) == (None, None)
        group |= {"key": named["key"], "caption": named["caption"]}
    assert {**found, "source": ""} == {**expected, "source": ""}


def test_the_first_of_a_group_is_named(tmp_path):
    """Captions that occur more than once are shown with the key and text of the first."""
    path = tmp_path / "m.json"
    path.write_bytes(
        as_indent_2(
            {
                f"k{n}": {
                    "caption": ("same\n\ntext" if n % 3 == 1 else f"other {n}"),
                    "tags": f"t{n}",
                }
                for n in range(9)
            }
        )
    )
    found = statistics(path)["duplicates"]
    assert found["largest"] == [{"captions": 3, "record": 1, "key": "k1", "caption": "same\ntext"}]
    assert (found["captions"], found["distinct"], found["duplicated"], found["share"]) == (
        9,
        7,
        3,
        1 / 3,
    )


BROKEN = {
    "a": {"caption": "fine"},
    "b": {"caption": ["no"]},
    "c": {"caption": "one\ntwo", "capmerge": "t"},
    "d": {"caption": "fine"},
}


def test_a_broken_record_stops_or_is_left_out(tmp_path):
    """A record that cannot be merged or read stops the run, or is in no figure."""
    path = tmp_path / "m.json"
    for broken in ("b", "c"):
        path.write_bytes(
            as_indent_2({key: record for key, record in BROKEN.items() if key in ("a", broken)})
        )
        with pytest.raises(RecordError, match=f'record "{broken}"'):
            statistics(path)
    path.write_bytes(as_indent_2(BROKEN))
    found = statistics(path, on_error="skip")
    assert (
        found["records"]["counted"],
        found["records"]["rejected"],
        found["duplicates"]["captions"],
    ) == (2, 2, 2)
    assert (found["duplicates"]["largest"][0]["key"], found["lengths"]["lines"]["texts"]) == (
        "a",
        2,
    )


def test_nothing_is_left_of_a_run_that_fails(tmp_path):
    """A broken file leaves neither figures nor lines, finished or not."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(make_records(50))[:-40])
    done = run("stats", path, "--per-record", tmp_path / "lines.jsonl", fails=1)
    assert "the file ends inside a record" in done.err
    assert temporary_files(tmp_path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


def test_an_empty_file_has_statistics(tmp_path):
    """A file of no records is no error: every figure is there, and nothing divides by zero."""
    path = tmp_path / "m.json"
    path.write_bytes(b"{}")
    done = run("stats", path, "--plot", tmp_path / "p.png", "--report", tmp_path / "r.html")
    assert b"There is no text" in done.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plot", "p.jpg"], "expected a name that ends in .png, .svg or .pdf"),
        (["--report", "x.pdf"], "expected a name that ends in .html or .htm"),
        (["--report", "x"], "expected a name that ends in .html or .htm"),
        (["-o", "x.html"], "expected a name that ends in .json"),
        (["--per-record", "x.json"], "expected a name that ends in .jsonl or .ndjson"),
        (["-o", "a.json", "--plot", "p.png", "-o", "b.txt"], "expected a name that ends in .json"),
        (["-o", "meta_lat.json"], "the output is the source itself"),
        (["--report", "there.html"], "the file exists"),
        (["--tokenizer", "nowhere"], "no such file or folder"),
        (["--family", "sd9"], "sd9"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_work(tmp_path, options, message):
    """Impossible options end with 2, and nothing is written."""
    (tmp_path / "meta_lat.json").write_bytes(as_indent_2(make_records(5)))
    (tmp_path / "there.html").write_bytes(b"mine")
    done = run("stats", *options, fails=2, cwd=tmp_path)
    assert message in done.err
    assert {path.name for path in tmp_path.iterdir()} == {"meta_lat.json", "there.html"}
    assert (tmp_path / "there.html").read_bytes() == b"mine"


def test_rewrite_wants_stats_for_its_options(tmp_path):
    """--plot without --stats is an error of usage."""
    path = tmp_path / "m.json"
    path.write_bytes(b"{}")
    assert "Give --stats too" in run("rewrite", path, "--plot", "p.png", fails=2, cwd=tmp_path).err


def test_the_default_file_and_all_that_is_written(tmp_path):
    """Without SRC, meta_lat.json in this folder is counted; every file written is named."""
    (tmp_path / "meta_lat.json").write_bytes(EXAMPLE.read_bytes())
    done = run(
        "stats", "--plot", "p.svg", "--report", "r.html", "--per-record", "l.jsonl", cwd=tmp_path
    )
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"meta_lat.json", "meta_lat.stats.json", "p.svg", "r.html", "l.jsonl"}
    assert all(f"{name}\n".encode() in done.out for name in names - {"meta_lat.json"})


def test_files_of_earlier_statistics_are_replaced_and_no_others(tmp_path):
    """A second run replaces what the first wrote; a file of somebody else needs --force."""
    source = tmp_path / "meta_lat.json"
    outputs = ["--report", "r.html", "--per-record", "l.jsonl", "--quiet"]
    for count in (5, 6):
        source.write_bytes(as_indent_2(make_records(count)))
        run("stats", *outputs, "--plot", "p.pdf", cwd=tmp_path)
        written = json.loads((tmp_path / "meta_lat.stats.json").read_text())
        assert written["records"]["counted"] == count
        assert len((tmp_path / "l.jsonl").read_bytes().splitlines()) == count
    for ending in ("png", "svg"):
        (tmp_path / f"p.{ending}").write_bytes(draw_figure(written, ending))
    with open_source(str(source)) as opened:
        for option, name in (
            ("document", "meta_lat.stats.json"),
            ("plot", "p.png"),
            ("plot", "p.svg"),
            ("plot", "p.pdf"),
            ("report", "r.html"),
            ("per_record", "l.jsonl"),
        ):
            path = tmp_path / name
            files = StatsFiles(**{option: path})
            assert files.checked(opened, force=False) == files
            for foreign in (b'{"key": 1}\n', b"\xff\x00", b"[" * 100_000):
                path.write_bytes(foreign)
                with pytest.raises(UsageError, match="the file exists"):
                    files.checked(opened, force=False)
                assert files.checked(opened, force=True) == files
                assert path.read_bytes() == foreign
