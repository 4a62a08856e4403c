import gzip
import json
import os
import pty
import re
import subprocess
import sys
from collections import Counter

import pytest
from builders.paths import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from capmerge.captions.draw import draw_line
from capmerge.captions.templates import MergeOptions
from capmerge.cli.preview_text import Screen
from capmerge.commands import preview_records
from capmerge.commands.preview import Previewer
from capmerge.commands.preview_options import PreviewOptions, Sampling
from capmerge.commands.preview_records import random_records
from capmerge.files.source import BytesSource, FileSource
from capmerge.metadata.blocks import read_layout
from capmerge.rng import SampleId
from capmerge.tokens.chunk_text import chunk_text
from capmerge.tokens.chunks import Chunker
from capmerge.tokens.load import load_clip

MAIN = [sys.executable, "-c", "from capmerge.cli.app import main; main()"]
CHUNK = re.compile(r"⟦(\d+|dropped)\| (.*?) ⟧")
TAGS = "1girl, solo"
RECORDS = {
    "set/1.png": {"tags": TAGS, "caption": "A girl.\nA {red} hat.", "train_resolution": [512, 512]},
    "set/2.png": {"tags": "cat, " * 90, "caption": "cat " * 300},
    "set/3.png": {"tags": "\x1b[31mred\x07", "caption": "\x9b2Jclear \ud83d \u202e"},
    "set/4.png": {},
    "set/5.png": {"caption": ["a list"]},
    "set/6.png": {"caption": "six"},
}


def run(*arguments, env=None):
    """The finished process of `capmerge` with `arguments`."""
    return subprocess.run(
        [*MAIN, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=env,
    )


@pytest.fixture
def source(tmp_path):
    """A file of ordinary, long, hostile, empty and broken records."""
    path = tmp_path / "meta_lat.json"
    path.write_text(json.dumps(RECORDS, indent=2))
    return path


def preview_of(record, **options):
    """The preview of one record."""
    merge = options.pop("merge", MergeOptions())
    return Previewer(PreviewOptions(merge, **options)).preview("k", record)


def test_first_records_before_and_after(source):
    """Without a key the first five records are shown, with all fields and alternatives."""
    done = run("preview", source)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.split("\n") if line.startswith('"')] == [
        json.dumps(f"set/{n}.png") for n in range(1, 6)
    ]
    assert (
        '  before:\n    "tags": "1girl, solo"\n    "caption": "A girl.\\nA {red} hat."'
        in done.stdout
    )
    assert '    "caption": "1girl, solo\\n1girl, solo\\nA girl.\\nA {{red}} hat."' in done.stdout
    assert (
        "  1. tags, 50.00%, on 2 lines: 4 tokens in 1 chunk\n     ⟦1| 1girl, solo ⟧" in done.stdout
    )
    assert "  3. caption, 25.00%: 6 tokens in 1 chunk\n     ⟦1| a {red} hat. ⟧" in done.stdout
    assert "no alternatives: the empty caption is trained." in done.stdout
    assert 'cannot be merged: "caption" is a list, expected a string.' in done.stdout
    assert run("preview", source, "-n", 2).stdout.count("before:") == 2


def test_what_is_dropped_is_marked(source):
    """300 tokens lose 75 at a limit of 225, and 225 at 75; a1111 has no limit by default."""
    done = run("preview", source, "--key", "set/2.png")
    assert "caption, 50.00%: 300 tokens in 3 chunks, 75 dropped" in done.stdout
    assert [(name, text.split().count("cat")) for name, text in CHUNK.findall(done.stdout)][
        -4:
    ] == [
        ("1", 75),
        ("2", 75),
        ("3", 75),
        ("dropped", 75),
    ]
    assert (
        "300 tokens in 1 chunk, 225 dropped"
        in run("preview", source, "--key", "set/2.png", "--max-tokens", 75).stdout
    )
    a1111 = run("preview", source, "--key", "set/2.png", "--chunking", "a1111").stdout
    assert "300 tokens in 4 chunks\n" in a1111
    assert "180 tokens in 3 chunks\n" in a1111
    assert (
        "300 tokens in 2 chunks, 150 dropped"
        in run(
            "preview", source, "--key", "set/2.png", "--chunking", "a1111", "--max-tokens", 150
        ).stdout
    )


def test_nothing_in_a_file_reaches_the_terminal_raw(source):
    """Every character that acts on a terminal is shown as an escape, with and without colour."""
    plain = run("preview", source).stdout
    allowed = {"\n"}
    assert {char for char in plain if not char.isprintable()} == allowed
    assert "\\u001b[31m" in plain
    coloured = "\n".join(Screen(colour=True).lines(preview_of(RECORDS["set/3.png"])))
    assert {
        char for char in re.sub(r"\x1b\[\d+m", "", coloured) if not char.isprintable()
    } == allowed
    assert "\x1b[31mred" not in coloured


def test_colours_only_on_a_terminal(source):
    """A terminal gets colours, with the dropped part in red, or plain marks with NO_COLOR."""

    def on_terminal(**env):
        main, child = pty.openpty()
        process = subprocess.Popen(
            [*MAIN, "preview", str(source), "--key", "set/2.png", "--max-tokens", "75"],
            stdout=child,
            stderr=subprocess.DEVNULL,
            env={
                **{name: value for name, value in os.environ.items() if name != "NO_COLOR"},
                "TERM": "xterm",
                **env,
            },
        )
        os.close(child)
        output = b""
        try:
            while more := os.read(main, 1 << 16):
                output += more
        except OSError:  # how a pty says that the other end is closed
            pass
        os.close(main)
        assert process.wait(60) == 0
        return output.decode()

    coloured = on_terminal()
    assert "⟦" not in coloured
    assert re.search(r"\x1b\[36mcat( cat){74}\x1b\[0m \x1b\[31mcat( cat){224}\x1b\[0m", coloured)
    assert "\x1b" not in on_terminal(NO_COLOR="1")
    assert "⟦dropped| cat" in on_terminal(NO_COLOR="1")
    assert "\x1b" not in on_terminal(TERM="dumb")


@pytest.mark.parametrize("ending", [".json", ".json.gz", ".jsonl", ".jsonl.gz"])
def test_a_key_is_found_in_every_format(tmp_path, ending):
    """Records far into a file are found by their keys, and shown in the order of the file."""
    pairs = [(f"k/{n}.png", {"tags": f"tag {n}", "caption": "x" * 300}) for n in range(8000)]
    if ending.startswith(".jsonl"):
        text = "\n".join(json.dumps({"image_path": key, **record}) for key, record in pairs)
    else:
        text = json.dumps(dict(pairs), indent=2)
    path = tmp_path / f"meta{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    done = run("preview", path, "--key", "k/7000.png", "--key", "k/30.png")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.split("\n") if line.startswith('"')] == [
        '"k/30.png"',
        '"k/7000.png"',
    ]
    assert "⟦1| tag 7000 ⟧" in done.stdout


def test_a_missing_key_is_named(source):
    """The error names the key, the file, its number of records, and a similar key."""
    done = run("preview", source, "--key", "set/1.png", "--key", "other/2.jpg", "--key", "\x1bno")
    assert done.returncode == 2
    assert done.stdout.startswith('"set/1.png"')
    assert (
        'found no record "other/2.jpg", "\\u001bno" among 6. Did you mean "set/2.png"?'
        in done.stderr
    )
    assert (
        "Give whole keys, with folder and ending."
        in run("preview", source, "--key", "nothing").stderr
    )


def test_a_rewritten_file_shows_what_is_there(source, tmp_path):
    """A rewritten file is shown as it is, and merge options are said to change nothing in it."""
    out = tmp_path / "out.json"
    assert (
        run(
            "rewrite",
            source,
            "-o",
            out,
            "--on-error",
            "skip",
            "--weights",
            "field",
            "--line",
            "{tags}=9",
            "--line",
            "{tags}. {caption}",
        ).returncode
        == 0
    )
    done = run("preview", out, "--key", "set/1.png", "--layout", "concat")
    assert "already rewritten, shown as it is:" in done.stdout
    assert "after:" not in done.stdout
    assert "  1. tags, 90.00%: 4 tokens" in done.stdout
    assert "  2. both, 5.00%: 8 tokens" in done.stdout
    assert "records that are already rewritten are shown as they are (1 here)" in done.stderr
    records = json.loads(out.read_text())
    records["set/1.png"]["capmerge"] = "t"
    records["set/2.png"]["capmerge_weights"] = [1]
    records["set/3.png"]["capmerge"] = ["t"]
    records["set/4.png"]["capmerge"] = "q"
    out.write_text(json.dumps(records))
    broken = run("preview", out).stdout
    assert (
        'cannot be read: found 3 lines and 1 letters in "capmerge", expected one letter per line.'
        in broken
    )
    assert broken.count("cannot be read") == 4


def test_the_line_that_is_drawn(source):
    """--seed and --epoch show the line that `draw_line` draws, at random and in turn."""
    captions = "1girl, solo\n1girl, solo\nA girl.\nA {{red}} hat."
    for epoch in range(6):
        shown = run("preview", source, "--key", "set/1.png", "--seed", 3, "--epoch", epoch).stdout
        drawn = draw_line(captions, SampleId(3, epoch, "set/1.png"))
        assert f"  drawn: {drawn.text}\n" in shown
        assert shown.count("<- drawn") == 1
    cycle = run(
        "preview",
        source,
        "--key",
        "set/1.png",
        "--seed",
        3,
        "--epoch",
        2,
        "--pick",
        "cycle",
        "--repeat",
        1,
        "--dataset",
        4,
    ).stdout
    sample = SampleId(3, 2, "set/1.png", dataset=4, repeat=1)
    assert f"  drawn: {draw_line(captions, sample, pick='cycle').text}\n" in cycle


def test_the_drawn_alternative_is_pointed_at():
    """The alternative that is marked is the drawn one, in every way to write lines."""
    record = {"tags": TAGS, "caption": "One.\nTwo {x}."}
    for options in (
        {},
        {"layout": "inline"},
        {"lines": ("{tags}=3", "{caption}")},
        {"lines": ("{tags}=3", "{caption}"), "weights": "field"},
    ):
        for epoch in range(12):
            found = preview_of(record, merge=MergeOptions(**options), sampling=Sampling(1, epoch))
            written = found.alternatives[found.drawn_number].written
            assert written.line.replace("{{", "{").replace("}}", "}") == found.drawn.text


def test_what_fit_did_is_shown():
    """Alternatives left out are shown with their text, those cut with the part cut off."""
    record = {"tags": TAGS, "caption": "A girl stands here. She smiles."}
    dropped = list(
        Screen(colour=False).lines(
            preview_of(record, merge=MergeOptions(fit_tokens=5, fit_by="drop"))
        )
    )
    assert dropped[-2:] == [
        "  left out by --fit: caption, 8 tokens",
        "     ⟦dropped| A girl stands here. She smiles. ⟧",
    ]
    cut = list(
        Screen(colour=False).lines(
            preview_of(record, merge=MergeOptions(fit_tokens=5, fit_by="trim"))
        )
    )
    assert cut[-2:] == ["  cut by --fit: caption, 8 tokens", "     ⟦dropped| She smiles. ⟧"]
    vanished = list(
        Screen(colour=False).lines(
            preview_of(record, merge=MergeOptions(layout="concat", fit_tokens=5, fit_by="trim"))
        )
    )
    assert vanished[-2:] == [
        "  cut by --fit: both, 13 tokens",
        "     ⟦dropped| A girl stands here. She smiles. ⟧",
    ]


def test_an_intended_wildcard_is_shown_at_its_longest():
    """The longest text of an in-line wildcard is cut, and the number of texts is shown."""
    found = preview_of(
        {"caption": "a {cat|very big dog}"}, merge=MergeOptions(caption_wildcards=True)
    )
    lines = list(Screen(colour=False).lines(found))
    assert "  1. caption, 100.00%: 4 tokens in 1 chunk, longest of 2 texts" in lines
    assert "     ⟦1| a very big dog ⟧" in lines


def golden(name):
    """The cases of a golden file."""
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl_g"])
@pytest.mark.parametrize("max_tokens", [75, 150, 225])
def test_kohya_chunks_are_the_golden_ones(family, max_tokens):
    """The chunks hold as many tokens as those of sd-scripts, and the rest is shown as dropped."""
    chunker = Chunker((load_clip(family),), "kohya", max_tokens // 75)
    for case in golden("token_chunks.jsonl"):
        cut = chunk_text(case["text"], chunker)
        assert cut.tokens == case[f"tokens_{family}"]
        assert cut.dropped == max(0, cut.tokens - max_tokens)
        kept = [part.tokens for part in cut.parts if part.chunk]
        golden_chunks = case[f"{family}_{max_tokens}"]
        assert len(kept) <= len(golden_chunks)
        if family == "sd1":
            ids = load_clip(family).encode(case["text"])
            for number, (count, chunk) in enumerate(
                zip(kept, golden_chunks, strict=False)  # the others hold padding alone
            ):
                assert chunk[1 : 1 + count] == ids[75 * number : 75 * number + count]


def test_a1111_chunks_are_the_golden_ones(tmp_path):
    """Every golden text is cut where the web UI cuts it."""
    cases = [
        case
        for case in golden("a1111_chunks.jsonl")
        if case["text"].strip() and "\n" not in case["text"]
    ]
    path = tmp_path / "meta.json"
    path.write_text(
        json.dumps({f"{number:05}": {"caption": case["text"]} for number, case in enumerate(cases)})
    )
    done = run("preview", path, "-n", len(cases), "--chunking", "a1111")
    assert done.returncode == 0, done.stderr
    shown = re.split(r'^"\d{5}"$', done.stdout, flags=re.MULTILINE)[1:]
    assert len(shown) == len(cases) > 20
    tokenizer = load_clip("sd1")
    for case, text in zip(cases, shown, strict=True):
        parts = dict(CHUNK.findall(text))
        for number, ids in enumerate(case["chunks"], 1):
            expected = ids[1 : ids.index(49407)]
            if expected or number == 1:
                assert tokenizer.encode(parts[str(number)]) == expected, case["text"]


@settings(deadline=None)
@given(st.text(max_size=300), st.sampled_from(["kohya", "a1111"]), st.sampled_from([75, 150]))
def test_a_cut_loses_no_text(text, chunking, max_tokens):
    """The parts hold all tokens and, joined, the text as CLIP reads it."""
    tokenizer = load_clip("sd1")
    chunker = Chunker((tokenizer,), chunking, max_tokens // 75)
    cut = chunk_text(text, chunker)
    assert cut.tokens == chunker.cut(text).tokens
    if chunking == "kohya":
        assert "".join(part.text for part in cut.parts) == "".join(
            piece for _, piece in tokenizer.encode_with_text(text)
        )
    assert all(part.tokens <= 75 for part in cut.parts if part.chunk)


@settings(deadline=None, max_examples=60)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.text() | st.sampled_from(["caption", "tags", "capmerge", "capmerge_weights"]),
                inner,
            )
        ),
    )
)
def test_any_record_can_be_shown(record):
    """Any JSON value in place of a record is shown, on printable lines."""
    sampling = Sampling(1, 0)
    for line in Screen(colour=False).lines(preview_of(record, sampling=sampling)):
        assert line.isprintable()


def test_families_that_crop(source):
    """sd3 and flux read 75 CLIP tokens and T5; options that do not fit them are an error."""
    done = run("preview", source, "--key", "set/2.png", "--family", "flux")
    assert "300 tokens in 1 chunk, 225 dropped" in done.stdout
    assert (
        "T5 reads 512 tokens by its own count. Give a T5 tokenizer with --tokenizer to see"
        in done.stdout
    )
    assert (
        "180 tokens in 3 chunks"
        in run("preview", source, "--key", "set/2.png", "--family", "sd2").stdout
    )


@pytest.fixture
def t5(tmp_path):
    """A tokenizer of whole words that adds one special token, as T5 does."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "cat": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_t5_crops_too(source, t5):
    """With a T5 tokenizer the tokens that it drops are shown too; its special token counts."""
    done = run("preview", source, "--key", "set/2.png", "--family", "sd3", "--tokenizer", t5)
    assert "T5, 300 tokens in 1 chunk, 45 dropped: ⟦1| cat" in done.stdout
    assert "T5: 255 tokens are read." in done.stdout
    wrong = run("preview", source, "--tokenizer", t5)
    assert wrong.returncode == 2
    assert "found a tokenizer that is not CLIP's" in wrong.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "100"), "expected a multiple of 75"),
        (("--seed", "1"), "--seed and --epoch belong together"),
        (("--pick", "cycle"), "Give --seed and --epoch with them"),
        (("--seed", "-1", "--epoch", "0"), "--seed -1: expected a whole number from 0"),
        (("--key", "a", "-n", "3"), "--key and -n both say"),
        (("--family", "sd3", "--chunking", "a1111"), "captions are not cut into chunks"),
        (("--family", "flux", "--max-tokens", "150"), "reads 75 tokens of a caption"),
        (("--fit", "75", "maybe"), "'maybe' is not one of 'drop', 'trim'"),
        (("--tokenizer", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_options_are_usage_errors(source, arguments, message):
    """Each mistake ends with exit code 2 and one message."""
    done = run("preview", source, *arguments)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert message in done.stderr
    assert done.stdout == ""


def test_a_scan_needs_little_memory(tmp_path):
    """Searching 40 MB for a key takes at most 24 MB more memory than showing the first record."""
    path = tmp_path / "big.json"
    with path.open("w") as file:
        file.write("{\n")
        for number in range(40_000):
            file.write(json.dumps({f"{number}": {"caption": "x" * 1000}}, indent=2)[2:-2] + ",\n")
        file.write('  "last": {\n    "caption": "x"\n  }\n}')
    code = (
        "import resource, sys; from capmerge.cli.app import app; "
        "app(sys.argv[1:], standalone_mode=False); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    peaks = []
    for arguments in (("-n", "1"), ("--key", "last")):
        done = subprocess.run(
            [sys.executable, "-c", code, "preview", str(path), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(int(done.stderr) * (1 if sys.platform == "darwin" else 1024))
    assert peaks[1] - peaks[0] < 24 << 20


@pytest.mark.parametrize("encoding", ["cp437", "cp1252"])
def test_chunks_have_marks_that_the_terminal_can_show(encoding):
    """On a code page of Windows, brackets of ASCII stand for the marks that it lacks."""
    lines = "\n".join(Screen(colour=False, encoding=encoding).lines(preview_of({"tags": "a, 猫"})))
    assert "[1| a, 猫 ]" in lines
    assert "⟦" not in lines


def shown_keys(done):
    """The keys of the records in the output of a preview, in their order."""
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('"')]


def test_random_and_longest_records(tmp_path):
    """--random draws from the whole file by its seed, and --longest shows the most tokens first."""
    source = tmp_path / "many.json"
    words = {number: 5 + number * 37 % 50 for number in range(600)}
    records = {f"k{number}": {"caption": "word " * count} for number, count in words.items()}
    records["k7"] = {"tags": ["broken"]}
    source.write_text(json.dumps(records, indent=2))
    drawn = shown_keys(run("preview", source, "--random", "5", "--seed", "3", "--epoch", "0"))
    numbers = [int(key[1:]) for key in drawn]
    assert len(drawn) == 5
    assert numbers == sorted(numbers)
    assert max(numbers) > 100
    assert shown_keys(run("preview", source, "--random", "5", "--seed", "3")) == drawn
    assert shown_keys(run("preview", source, "--random", "5")) != drawn
    assert len(shown_keys(run("preview", source, "--random", "9999", "--quiet"))) == 600
    longest = sorted(records, key=lambda key: (-words[int(key[1:])], int(key[1:])))[:4]
    assert shown_keys(run("preview", source, "--longest", "4")) == longest


def test_random_records_are_drawn_evenly():
    """Over many seeds every record is drawn about as often as any other."""
    data = json.dumps({str(number): {} for number in range(10)}).encode()
    source = BytesSource("s", data, 0)
    layout = read_layout(source)
    counts = Counter(
        key for seed in range(2000) for key, _ in random_records(source, layout, 3, seed, None)
    )
    assert len(counts) == 10
    assert all(500 < count < 700 for count in counts.values())


def test_a_file_without_records_says_so(tmp_path):
    """An empty object is told, instead of nothing at all."""
    source = tmp_path / "empty.json"
    source.write_text("{}")
    assert "empty.json: the file holds no records." in run("preview", source).stdout


@pytest.mark.parametrize("repeated", [False, True])
def test_a_key_is_looked_up_in_the_index(tmp_path, monkeypatch, repeated):
    """With an index that fits, no other record is read; not if it lacks records of equal keys."""
    source, out = tmp_path / "in.json", tmp_path / "out.json"
    members = [(f"k{n}", {"tags": f"tag {n}"}) for n in range(100)]
    if repeated:
        members.append(("k7", {"tags": "another"}))
    source.write_text(f"{{{', '.join(json.dumps({key: r})[1:-1] for key, r in members)}}}")
    assert run("rewrite", source, "-o", out, "--index").returncode == 0
    searched = []
    monkeypatch.setattr(
        preview_records, "find_record", lambda *given: searched.append(given[2]) or 4
    )
    with FileSource(out) as opened:
        layout = read_layout(opened)
        found = dict(preview_records.named_records(opened, layout, ("k99", "k7"), None))
    if repeated:
        assert searched == ["k99", "k7"]
    else:
        assert {key: record["caption"] for key, record in found.items()} == {
            "k7": "tag 7",
            "k99": "tag 99",
        }
        assert searched == []
        # An index of other content is not used.
        out.write_text(out.read_text().replace("tag 99", "tag 100"))
        shown = run("preview", out, "--key", "k99")
        assert "tag 100" in shown.stdout, shown.stderr


def test_the_search_for_several_keys_tells_its_progress(tmp_path):
    """The file counts as read once, however many keys are searched for."""
    path = tmp_path / "m.json"
    path.write_text(json.dumps({f"k{n}": {"tags": "t" * 40} for n in range(100_000)}))
    told = []
    with FileSource(path) as source:
        layout = read_layout(source)
        found = dict(
            preview_records.named_records(source, layout, ("k99999", "k99998"), told.append)
        )
    assert list(found) == ["k99998", "k99999"]
    assert told == sorted(told)
    assert len(told) > 10
    assert path.stat().st_size * 0.9 < told[-1] <= path.stat().st_size
