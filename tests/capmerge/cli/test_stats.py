"""`capmerge stats` and `rewrite --stats`, from the command line on the example data."""

import json
import subprocess
import sys

import pytest
from builders.paths import EXAMPLE_METADATA

from capmerge.tokens.load import load_clip

EXAMPLES = EXAMPLE_METADATA


def run(folder, *arguments, code=0):
    """Run capmerge in `folder`; its standard output."""
    command = [sys.executable, "-m", "capmerge", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with the examples as meta_lat.json."""
    (tmp_path / "meta_lat.json").write_bytes(EXAMPLES.read_bytes())
    return tmp_path


def test_the_default_source_and_the_json_beside_it(folder):
    """Without SRC, meta_lat.json in this folder is counted into a table and a .stats.json."""
    printed = run(folder, "stats")
    assert "token lengths" in printed
    assert "records                    213" in printed
    assert (folder / "meta_lat.stats.json").stat().st_size > 1000


def test_any_number_of_workers_gives_the_same_json(folder):
    """The JSON of a file of several blocks does not depend on --jobs."""
    records = json.loads(EXAMPLES.read_text())
    many = {f"{n}/{key}": record for n in range(15) for key, record in records.items()}
    (folder / "many.json").write_text(json.dumps(many, indent=2))
    documents = []
    for jobs in (1, 2, 3):
        run(folder, "stats", "many.json", "-j", jobs, "-o", f"{jobs}.json", "--quiet")
        documents.append((folder / f"{jobs}.json").read_bytes())
    assert documents[0] == documents[1] == documents[2]


def test_rewrite_with_stats_counts_what_stats_counts(folder):
    """The same pass gives the same per-record figures as counting the rewritten file afterwards."""
    run(folder, "rewrite", "meta_lat.json", "-o", "out.json", "--stats", "--quiet")
    run(folder, "stats", "out.json", "-o", "after.json", "--quiet")
    same_pass, after = (
        json.loads((folder / name).read_text()) for name in ("out.stats.json", "after.json")
    )
    assert (
        same_pass["records"].pop("rewritten_before"),
        after["records"].pop("rewritten_before"),
    ) == (0, 213)
    assert same_pass == after


def test_rewrite_with_stats_shows_the_table(folder):
    """After the end table come the statistics and their files; --quiet prints none of it."""
    printed = run(
        folder, "rewrite", "meta_lat.json", "-o", "out.json", "--stats", "--report", "r.html"
    )
    assert (
        printed.index("rewritten   ")
        < printed.index("out.json: records and alternatives")
        < printed.index("written: ")
    )
    assert printed.endswith("r.html\n")
    assert (
        run(
            folder,
            "rewrite",
            "meta_lat.json",
            "-o",
            "out.json",
            "--stats",
            "--force",
            "--quiet",
        )
        == ""
    )


def test_per_record_tokens_are_those_of_the_tokenizer(folder):
    """Each line of --per-record holds the token length of each alternative, in line order."""
    run(folder, "rewrite", "meta_lat.json", "-o", "out.json", "--quiet")
    run(folder, "stats", "out.json", "--per-record", "tokens.jsonl", "--quiet")
    tokenizer = load_clip("sd1")
    written = json.loads((folder / "out.json").read_text())
    lines = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == list(written)
    for line in lines:
        caption = written[line["key"]]["caption"]
        texts = dict.fromkeys(caption.split("\n")) if caption else {}
        plain = [text.replace("{{", "{").replace("}}", "}") for text in texts]
        assert line["tokens"] == [len(tokenizer.encode(text)) for text in plain]


def test_figure_and_page_are_whole_and_safe(folder):
    """The figure is a PNG, and a hostile caption acts neither on the page nor on the terminal."""
    key = "<script>alert(1)</script>\x1b[31m"
    (folder / "bad.json").write_text(
        json.dumps({key: {"caption": "<script>alert(2)</script> " * 60, "tags": "a\x1b[2J"}})
    )
    printed = run(folder, "stats", "bad.json", "--plot", "p.png", "--report", "r.html")
    assert (folder / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (folder / "r.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "\x1b" not in printed
    assert "\x1b" not in page


def test_existing_files_need_force(folder):
    """A file that is not one of statistics is not replaced unless told to."""
    (folder / "meta_lat.stats.json").write_text("{}")
    assert "--force" in run(folder, "stats", "--quiet", code=2)
    run(folder, "stats", "--quiet", "--force")
