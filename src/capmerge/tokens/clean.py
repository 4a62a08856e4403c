"""The clean-up that stands between a caption and CLIP's byte-pair encoding.

Owns what sd-scripts' tokenizer does to a text before it looks for tokens, and the proof obligation
of the shortcut around ftfy. Knows nothing of vocabularies, ids or counts.
"""

import re

# What ftfy does to these characters depends on nothing but the neighbours inside the same
# space-separated piece: alone it changes none of them but the quotes and the kind of line break,
# and none composes with a neighbour under NFC. Left out although harmless alone: the accented
# capitals A-circumflex and A-tilde, the ligature oe and Cyrillic, because ftfy's heuristic for
# mojibake looks from them across a space; capital sigma, whose lower case depends on the letters
# around it.
_LOCAL = re.compile(
    "["
    "\t\n\r -~"  # printable ASCII; white space that ftfy keeps white
    "\u00a1-\u00ac\u00ae-\u00c1\u00c4-\u0131\u0134-\u0148\u014a-\u0151\u0154-\u017e"  # accents, signs of Latin-1 and Latin Extended-A
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2122"  # dashes, quotes, bullets, ellipsis; currencies; trade mark
    "\u2190-\u2328\u2500-\u27bf"  # arrows, mathematics, boxes, geometric shapes, stars, hearts, dingbats
    "\u3001-\u3029\u3041-\u3096\u30a1-\u30ff\u4e00-\u9fff\uac00-\ud7a3"  # CJK punctuation, kana, ideographs, Hangul syllables
    "\u200d\ufe0f\U0001f300-\U0001faff"  # emoji, and what joins them
    "]*"
)
# Of these no sequence at all is suspicious to ftfy: the characters that describing models write
# most. 600 of them are seen through in 3 us where is_bad takes 80 us.
_TYPOGRAPHIC = re.compile("[\t\n\r -~\u2010-\u201f\u2022\u2026]*")
# ftfy's uncurl_quotes over the characters of _LOCAL; eight calls of replace take 1 us where one of
# translate takes 60 us.
_UNCURL = tuple((curly, "'") for curly in "\u2018\u2019\u201a\u201b") + tuple(
    (curly, '"') for curly in "\u201c\u201d\u201e\u201f"
)


def clean(text: str) -> str:
    r"""The text that CLIP's byte-pair encoding reads: mended by ftfy, one space for every run of white space, none at the ends, lower case.

    For every string equal to `whitespace_clean(ftfy.fix_text(text)).lower()` of the slow
    CLIPTokenizer that sd-scripts uses (transformers 4). ftfy itself runs at about 2 MB/s and is
    asked only where it could do more than uncurl quotes.

    >>> clean('She said \u201cIt\u2019s  &lt;3\u201d')
    'she said "it\'s <3"'
    """
    if not is_local(text):
        from ftfy import fix_text

        text = fix_text(text)
    elif not text.isascii():
        for curly, straight in _UNCURL:
            text = text.replace(curly, straight)
    # ftfy has removed \x1c-\x1f, the only characters that split() takes for white space and CLIP's
    # pattern does not.
    return " ".join(text.split()).lower()


def is_local(text: str) -> bool:
    """Whether ftfy would only uncurl quotes in `text`, also when `text` stands between spaces in a text whose other pieces are local.

    So the clean-up of a caption is the clean-up of its pieces if every piece of `caption.split("
    ")` is local. Why that holds: ftfy 6 touches the encoding only where `is_bad` finds a suspicious
    sequence, and over these characters the sequences that reach across a space start with one; it
    unescapes HTML only from "&" to ";" without a space between; all its other steps work on single
    characters or on neighbours that are left out here. Control characters other than tab and line
    break are never local.
    """
    if "&" in text and ";" in text:
        return False
    if (text.isascii() and text.isprintable()) or _TYPOGRAPHIC.fullmatch(text):
        return True
    if _LOCAL.fullmatch(text) is None:
        return False
    from ftfy.badness import is_bad

    return not is_bad(f" {text} ")
