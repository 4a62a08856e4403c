"""Statistics in words and columns: the sections of the page and of the table for a terminal.

They come from the document alone.
"""

from collections.abc import Iterator
from typing import Any

from capmerge.errors import quoted
from capmerge.html_page import Section
from capmerge.stats.counts import LONGEST_TAG, MOST_TAGS
from capmerge.stats.document import STYLE_WORDS, Document, percent
from capmerge.tokens.chunks import CHUNK_IDS
from capmerge.tokens.families import ONE_CHUNK, T5_IDS

_SHOWN = 10
LENGTH_COLUMNS = ("mean", "median", "p90", "p99", "p99.9", "max")


def sections(document: Document, shown: int = _SHOWN) -> Iterator[Section]:
    """Yield all figures of the document, with lists cut after `shown` entries.

    The texts in them are as in the file, not made safe for a terminal or a page.
    """
    yield _records(document)
    yield _lengths(document)
    yield _chunks(document)
    yield _limits(document)
    if document["family"] in T5_IDS:
        yield _t5(document)
    if document["wildcards"]["alternatives"]:
        yield _wildcards(document)
    yield _longest(document, shown)
    yield _tags(document, shown)
    yield _duplicates(document, shown)
    yield _resolutions(document, shown)
    yield _literals(document)


def _records(document: Document) -> Section:
    records, styles = document["records"], document["styles"]
    rows = [
        ("records", f"{records['counted']:,}", ""),
        *((f"  {name}", *_of(records[key], records["counted"])) for name, key in _RECORD_ROWS),
        *(
            [("  rewritten before", *_of(records["rewritten_before"], records["counted"]))]
            if records["rewritten_before"]
            else []
        ),
        *(
            [("rejected, not in the figures", f"{records['rejected']:,}", "")]
            if records["rejected"]
            else []
        ),
        ("without tags", *_of(records["caption_only"] + records["empty"], records["counted"])),
        ("without caption", *_of(records["tags_only"] + records["empty"], records["counted"])),
        ("alternatives, by style", f"{document['lengths']['lines']['texts']:,}", ""),
        *(
            (f"  {STYLE_WORDS[name]}", f"{style['texts']:,}", percent(style["share"]))
            for name, style in styles.items()
            if style["texts"]
        ),
    ]
    note = (
        "An alternative is one of the texts that can be drawn for a record. Its style says what it "
        "is made of. The share of a style is the probability that one of its alternatives is drawn."
    )
    return Section(
        f"{document['source']}: records and alternatives", ("", "number", "share"), rows, note
    )


_RECORD_ROWS = (
    ("tags and caption", "both"),
    ("tags only", "tags_only"),
    ("caption only", "caption_only"),
    ("neither", "empty"),
)


def _lengths(document: Document) -> Section:
    lengths = document["lengths"]
    measured = [
        ("tags, once per record", lengths["tags"]),
        ("caption lines, each once", lengths["captions"]),
        ("alternatives", lengths["lines"]),
        *(
            (f"  {STYLE_WORDS[name]}", style)
            for name, style in document["styles"].items()
            if style["texts"]
        ),
    ]
    rows = [
        (name, *(_number(found[column]) for column in LENGTH_COLUMNS), found["max_key"] or "")
        for name, found in measured
    ]
    note = (
        f"Tokenizer: {document['tokenizer']} ({document['family']}). "
        "Alternatives are weighted by their probability."
    )
    return Section("token lengths", ("", *LENGTH_COLUMNS, "key of the longest"), rows, note)


def _chunks(document: Document) -> Section:
    rows = [
        (f"{row['chunks']}", f"{row['texts']:,}", percent(row["share"]))
        for row in document["chunks"]
    ]
    if len(rows) > _SHOWN:
        texts, share = (
            sum(row["texts"] for row in document["chunks"][_SHOWN:]),
            sum(row["share"] for row in document["chunks"][_SHOWN:]),
        )
        rows = [*rows[:_SHOWN], ("more", f"{texts:,}", percent(share))]
    return Section("chunks needed", ("chunks", "alternatives", "share"), rows)


_LIMIT_HEADS = ("max length", "cut", "share cut", "tokens dropped", "share dropped", "padding")


def _limits(document: Document) -> Section:
    note = "Padding: the share of token positions left empty when texts are encoded at that length."
    if document["family"] in ONE_CHUNK:
        note += f" This family has one chunk of {CHUNK_IDS} positions, start and end included."
    return Section(
        "what a max length cuts",
        _LIMIT_HEADS,
        [_limit_row(str(cut["limit"]), cut) for cut in document["limits"]],
        note,
    )


def _limit_row(name: str, cut: dict[str, Any]) -> tuple[str, ...]:
    shares = [percent(cut[key]) for key in ("share", "dropped_share", "padding_share")]
    return name, f"{cut['texts']:,}", shares[0], f"{cut['dropped_tokens']:,}", shares[1], shares[2]


def _t5(document: Document) -> Section:
    t5 = document["t5"]
    title = "what a T5 length cuts"
    if t5 is None:
        return Section(
            title,
            (),
            [],
            "Not counted: give --tokenizer the folder of a T5, or its tokenizer.json.",
        )
    rows = [_limit_row(str(cut["limit"]), cut) for cut in t5["limits"]]
    figures = ", ".join(f"{name} {_number(t5['lengths'][name])}" for name in LENGTH_COLUMNS)
    special = t5["limits"][0]["limit"] - t5["limits"][0]["room_tokens"]
    return Section(
        title,
        _LIMIT_HEADS,
        rows,
        f"Tokenizer: {t5['tokenizer']}. Special tokens within each length: {special}. "
        f"Alternatives: {figures}.",
    )


def _wildcards(document: Document) -> Section:
    found = document["wildcards"]
    rows = [
        (name, f"{found[key]:,.1f}")
        for name, key in (
            ("longest", "mean_longest"),
            ("mean", "mean"),
            ("shortest", "mean_shortest"),
        )
    ]
    note = (
        f"{found['alternatives']:,} alternatives have in-line wildcards; "
        "every other figure takes them at their longest."
    )
    if found["not_listed"]:
        note += (
            f" {found['not_listed']:,} of them have too many outcomes to list; "
            "their longest and shortest are chosen by characters."
        )
    return Section("in-line wildcards, mean tokens", ("outcome", "tokens"), rows, note)


def _longest(document: Document, shown: int) -> Section:
    rows = [
        (f"{entry['tokens']:,}", entry["key"])
        for entry in document["lengths"]["lines"]["longest"][: 2 * shown]
    ]
    return Section("longest alternatives", ("tokens", "key"), rows)


def _tags(document: Document, shown: int) -> Section:
    tags, underscores = document["tags"], document["underscores"]
    if tags is None:
        return Section(
            "most frequent tags",
            (),
            [],
            f"Not counted: more than {MOST_TAGS:,} distinct tags were found; they are hardly tags.",
        )
    rows = [
        (entry["tag"], f"{entry['texts']:,}", percent(entry["share"]))
        for entry in tags["most_frequent"][:shown]
    ]
    note = f"{tags['distinct']:,} distinct tags, {tags['occurrences']:,} in all."
    if underscores["saved_tokens"]:
        note += (
            f" --underscores space would save {underscores['saved_tokens']:,} tokens, "
            f"{percent(underscores['share'])} of those of all tags."
        )
    if tags["long"]:
        note += (
            f" {tags['long']:,} over {LONGEST_TAG} characters are left out; they are hardly tags."
        )
    return Section("most frequent tags", ("tag", "number", "of records with tags"), rows, note)


def _duplicates(document: Document, shown: int) -> Section:
    found = document["duplicates"]
    rows = [
        (
            f"{group['captions']:,}",
            group["key"] or f"record {group['record']:,}",
            group["caption"] or "",
        )
        for group in found["largest"][:shown]
    ]
    note = (
        f"{found['duplicated']:,} of {found['captions']:,} whole captions "
        f"({percent(found['share'])}) occur more than once; duplicates promote memorization "
        "(arXiv 2305.20086)."
    )
    loops = document["loops"]
    if loops["records"]:
        first = ", ".join(quoted(shown["key"]) for shown in loops["first"])
        have = "1 record has" if loops["records"] == 1 else f"{loops['records']:,} records have"
        note += f" {have} a caption that loops (the first: {first})."
    return Section(
        "exact duplicates",
        ("captions", "first", "caption") if rows else (),
        rows,
        note if found["captions"] else "No captions.",
    )


def _resolutions(document: Document, shown: int) -> Section:
    found = document["resolutions"]
    if found is None:
        return Section(
            "resolutions",
            (),
            [],
            "Not counted: there are too many distinct resolutions to be buckets.",
        )
    total = document["records"]["counted"]
    rows = [(entry["resolution"], *_of(entry["records"], total)) for entry in found[:shown]]
    if len(found) > shown:
        rows.append(
            (
                f"{len(found) - shown:,} others",
                *_of(sum(entry["records"] for entry in found[shown:]), total),
            )
        )
    return Section("resolutions", ("size", "records", "share"), rows, _whose_sizes(document))


def _whose_sizes(document: Document) -> str:
    """A sentence for each kind of size that is shown."""
    fields = document["size_fields"]
    told = []
    if fields["train_resolution"]:
        told.append(
            f"Of {fields['train_resolution']:,} records it is the size of the latents "
            "(train_resolution)."
        )
    if pictures := fields["image_size"] + fields["width_and_height"]:
        told.append(
            f"Of {pictures:,} records it is the size of the picture (image_size, or width and "
            "height); their latents decide the bucket."
        )
    return " ".join(told)


def _literals(document: Document) -> Section:
    rows = [(f"{name}", f"{count:,}") for name, count in document["literals"].items()]
    return Section(
        "special literals",
        ("text", "alternatives") if rows else (),
        rows,
        "" if rows else "None found.",
    )


def _of(count: int, total: int) -> tuple[str, str]:
    return f"{count:,}", percent(count / total) if total else ""


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
