import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from builders.metadata import as_indent_2, make_records, run
from rich.cells import cell_len

from capmerge.captions.templates import MergeOptions
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.files.source import open_source
from capmerge.stats.figure import draw_figure
from capmerge.stats.histogram import histogram
from capmerge.stats.page import Made, html_page
from capmerge.stats.tables import Section, sections
from capmerge.stats.terminal_table import text_table

HOSTILE = '<script>alert("x")</script>\x1b[31m\x07\u202e&amp;$\\frac{x}'
PNG = b"\x89PNG\r\n\x1a\n"


def document_of(path: Path, records, **options):
    """Return the document of some records, as it is read back from its file."""
    path.write_bytes(as_indent_2(records))
    with open_source(str(path)) as source:
        document = measure(source, MeasureOptions(**options))
    return json.loads(json.dumps(document))


@pytest.fixture
def hostile(tmp_path):
    """Return the document of a file whose texts all try to break out of their context."""
    twice = {"caption": HOSTILE, "tags": f"{HOSTILE}, solo", "train_resolution": [HOSTILE, 1]}
    return document_of(tmp_path / "$x_y$ &lt.json", {HOSTILE: twice, "b" + HOSTILE: twice})


class _Page(HTMLParser):
    """The tags and text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data) -> None:
        self.text += data


def read_page(text):
    """Return a page, parsed."""
    page = _Page()
    page.feed(text)
    return page


def test_the_page_shows_a_script_as_text(hostile):
    """Keys, captions and tags are always text in the page; control characters are escaped."""
    text = html_page(hostile)
    page = read_page(text)
    assert "script" not in page.tags
    assert '<script>alert("x")</script>\\x1b[31m\\x07\\u202e&amp;$' in page.text
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", text)


def test_the_page_needs_nothing_else(hostile):
    """No attribute or style refers to another resource, and the policy forbids loading any."""
    text = html_page(hostile)
    page = read_page(text)
    assert not {"src", "href", "srcset", "data", "action"} & {name for name, _ in page.attributes}
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(
        page.tags
    )
    assert "url(" not in text
    assert "@import" not in text
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_every_tag_of_the_page_is_closed(tmp_path):
    """The page is well formed throughout, so that nothing depends on a browser's guesses."""
    text = html_page(document_of(tmp_path / "m.json", make_records(40)))
    body = re.sub(r"<meta[^>]*>", "", text.removeprefix("<!DOCTYPE html>\n"))
    assert ET.fromstring(body).tag == "html"


def test_the_terminal_gets_no_raw_control_character(hostile):
    """The table shows escapes as text, on the command line too."""
    assert all(char.isprintable() or char == "\n" for char in text_table(hostile))


def test_the_command_prints_no_escape(tmp_path):
    """No raw text of a hostile file reaches standard output."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({HOSTILE: {"caption": HOSTILE}, "b": {"caption": HOSTILE}}))
    done = run("stats", path)
    assert all(char.isprintable() or char == "\n" for char in done.out.decode())
    assert b"\\x1b[31m" in done.out


@pytest.mark.parametrize("family", ["sd1", "flux"])
@pytest.mark.parametrize(
    "records",
    [{}, {"a": {}}, {"a": {"caption": "x"}}, {"a": {"tags": "cat, " * 3000}}, make_records(60)],
)
def test_figures_of_any_file_are_drawn(tmp_path, records, family):
    """Files from no record to a very long one give table, page and pictures without a warning."""
    document = document_of(tmp_path / "m.json", records) | {"family": family}
    assert draw_figure(document, "png").startswith(PNG)
    assert ET.fromstring(draw_figure(document, "svg")).tag.endswith("svg")
    assert document["advice"]["text"] in text_table(document)
    assert "</html>" in html_page(document)


def test_the_same_document_gives_the_same_picture(tmp_path):
    """Pictures hold no date and no random name."""
    document = document_of(tmp_path / "m.json", make_records(30))
    for ending in ("png", "svg", "pdf"):
        assert draw_figure(document, ending) == draw_figure(document, ending)


def test_columns_align_by_the_width_of_characters(tmp_path):
    """Wide and combining characters take the cells of a terminal, in any encoding."""
    records = {
        name: {"tags": f"{name}, solo", "caption": f"{name} on a wall"}
        for name in ("猫耳と長い髪" * 9, "e\u0301te\u0301", "한국어", "cat")
    }
    document = document_of(tmp_path / "m.json", records)
    for encoding in ("utf-8", "cp437", "cp1252"):
        table = text_table(document, encoding)
        table.encode(encoding)
        rows = table[table.index("most frequent tags") :].split("\n\n")[0].splitlines()[2:7]
        assert len(rows) == 5
        starts = {cell_len(row[: row.rindex("%")]) for row in rows if row.endswith("%")}
        assert len(starts) == 1, rows
    assert "…" not in text_table(document, "cp437")


def test_the_page_tells_how_it_was_made(tmp_path):
    """The footer has version, options, date and command, and equal input gives equal bytes."""
    document = document_of(tmp_path / "m.json", make_records(3))
    made = Made("2026-01-02", "capmerge stats 'a b.json' --report <x>.html")
    text = html_page(document, made)
    assert html_page(document, made) == text
    shown = read_page(text).text
    for part in (document["capmerge"], made.date, made.command, 'underscores = "keep"'):
        assert part in shown


def test_the_page_shortens_long_options(tmp_path):
    """The footer shows the start of a list of thousands of tags, and the document all of it."""
    document = document_of(tmp_path / "m.json", make_records(3))
    tags = [f"tag {number}" for number in range(2000)]
    document["options"]["drop_tags"] = tags
    shown = read_page(html_page(document)).text
    assert 'drop_tags = ["tag 0", "tag 1"' in shown
    assert "tag 50" not in shown


def test_headers_of_the_page_are_not_broken(tmp_path):
    """Headers and short cells never wrap, long ones have a least width, and tables scroll."""
    text = html_page(document_of(tmp_path / "m.json", {"k" * 200: {"caption": "x"}}))
    assert "th, td { border-bottom: 1px solid var(--grid); white-space: pre; }" in text
    assert f'<td class="long">{"k" * 200}</td>' in text
    assert text.count("<table>") + 1 == text.count('<div class="wide">')
    assert 'class="curve"' in text


def test_each_mean_of_the_legend_is_in_the_table(tmp_path):
    """The legend and the table of token lengths name one mean per style."""
    document = document_of(tmp_path / "m.json", make_records(40))
    table = next(section for section in sections(document) if section.title == "token lengths")
    means = {row[0].strip(): row[1] for row in table.rows if row[0].startswith("  ")}
    labels = [style.label for style in histogram(document).styles]
    assert len(labels) == len(means) >= 2
    for label in labels:
        assert label.endswith(f"mean {means[label.split(':')[0]]} tokens")


@pytest.mark.filterwarnings("error")
def test_a_name_without_glyphs_is_drawn_without_a_warning(tmp_path):
    """A file name in a script that no usual font has gives a figure and no warning."""
    document = document_of(tmp_path / "画像𒀀.json", make_records(3))
    assert draw_figure(document, "pdf").startswith(b"%PDF")
    assert draw_figure(document, "png").startswith(PNG)


def test_a_picture_holds_the_name_of_the_file_as_it_is(hostile):
    """A dollar sign is not read as a formula."""
    assert hostile["source"] in "".join(ET.fromstring(draw_figure(hostile, "svg")).itertext())


def test_limits_and_shares_are_in_the_picture(tmp_path):
    """Each limit has a line with what it cuts, and each style its share in the legend."""
    records = {f"k{n}": {"tags": "cat, " * n, "caption": "dog " * 2 * n} for n in range(1, 60)}
    document = document_of(
        tmp_path / "m.json", records, merge=MergeOptions(lines=("{tags}", "{tags}, {caption}=3"))
    )
    shown = "".join(ET.fromstring(draw_figure(document, "svg")).itertext())
    page = read_page(html_page(document)).text
    for text in (
        "75: cuts",
        "150: cuts",
        "225: cuts",
        "tags: 25.0 % of what is drawn",
        "tags and caption: 75.0 % of what is drawn",
    ):
        assert text in shown
        assert text in page


def test_numbers_are_flush_right_whatever_stands_beside_them():
    """Columns of counts, shares and dashes are flush right, but not the first or one with words."""
    rows = [("75", "1,000", "over 99.9 %", "a"), ("150", "-", "", "7")]
    assert Section("title", ("",) * 4, rows).flush_right() == [False, True, True, False]
    assert Section("title", ("a", "b"), []).flush_right() == [False, True]


def test_rows_fit_their_heads(tmp_path):
    """Every row has one cell per column."""
    for section in sections(document_of(tmp_path / "m.json", make_records(200))):
        assert all(len(row) == len(section.heads) for row in section.rows), section.title
