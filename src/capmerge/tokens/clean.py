"""Cleans a caption as sd-scripts' tokenizer does before CLIP's byte-pair encoding.

ftfy does most of that. This module takes a shortcut around ftfy where it can, and states why the
result is the same.
"""

import re

# The characters for which ftfy's work depends only on their neighbours inside the same
# space-separated piece. Alone, ftfy changes none of them except quotes and the kind of line break,
# and none composes with a neighbour under NFC. Some are left out although they are harmless alone:
# the accented capitals A-circumflex and A-tilde, the ligature oe and the Cyrillic letter dje,
# because ftfy's heuristic for mojibake looks from them across a space; and capital sigma, whose
# lower case depends on the letters around it.
_LOCAL = re.compile(
    "["
    # Printable ASCII, and white space that ftfy keeps white.
    "\t\n\r -~"
    # Accents and signs of Latin-1 and Latin Extended-A.
    "\u00a1-\u00ac\u00ae-\u00c1\u00c4-\u0131\u0134-\u0148\u014a-\u0151\u0154-\u017e"
    # Greek, Cyrillic, Armenian, Hebrew, Arabic, Devanagari and Thai letters.
    "\u0384-\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a4-\u0401\u0403-\u0482\u048a-\u052f"
    "\u0531-\u0556\u0561-\u0587\u05d0-\u05ea\u0621-\u064a\u0660-\u0669\u0671-\u06d3"
    "\u0904-\u0939\u0e01-\u0e30"
    # Letters of Vietnamese, and other Latin letters with more than one sign.
    "\u1e00-\u1eff"
    # Dashes, quotes, bullets and the ellipsis; currencies; the trade mark.
    "\u2010-\u2027\u2030-\u205e\u20a0-\u20bf\u2122"
    # Arrows, mathematics, boxes, geometric shapes, stars, hearts and dingbats.
    "\u2190-\u2328\u2500-\u2adb\u2add-\u2bff"
    # CJK punctuation, kana, ideographs and Hangul syllables.
    "\u3001-\u3029\u3041-\u3096\u30a1-\u30ff\u4e00-\u9fff\uac00-\ud7a3"
    # Emoji, and the characters that join them.
    "\u200d\ufe0f\U0001f300-\U0001faff"
    "]*"
)
# The characters that captioning models write most; no sequence of them is suspicious to ftfy. 600
# characters take 3 us here, 80 us in `is_bad`.
_TYPOGRAPHIC = re.compile("[\t\n\r -~\u2010-\u201f\u2022\u2026]*")
# ftfy's uncurl_quotes for the characters of _LOCAL. Eight calls of replace take 1 us, one of
# translate 60 us.
_UNCURL = tuple((curly, "'") for curly in "\u2018\u2019\u201a\u201b") + tuple(
    (curly, '"') for curly in "\u201c\u201d\u201e\u201f"
)


def clean(text: str) -> str:
    r"""The text that CLIP's byte-pair encoding reads.

    It is repaired by ftfy, with one space for every run of white space and none at the ends, in
    lower case. For every string it equals `whitespace_clean(ftfy.fix_text(text)).lower()` of the
    slow CLIPTokenizer that sd-scripts uses (transformers 4). ftfy itself runs at about 2 MB/s and
    is called only where it could do more than uncurl quotes.

    >>> clean('She said \u201cIt\u2019s  &lt;3\u201d')
    'she said "it\'s <3"'
    """
    if not is_local(text):
        from ftfy import fix_text

        text = fix_text(text)
    elif not text.isascii():
        for curly, straight in _UNCURL:
            text = text.replace(curly, straight)
    # ftfy has removed \x1c-\x1f, the only characters that are white space to split() but not to
    # CLIP's pattern.
    return " ".join(text.split()).lower()


def is_plain(text: str) -> bool:
    """True when `text` is printable ASCII without entities: only its case and spaces can change."""
    return text.isascii() and text.isprintable() and not ("&" in text and ";" in text)


def is_local(text: str) -> bool:
    """True when ftfy would only uncurl quotes in `text`, alone and between other local pieces.

    So the clean-up of a caption is that of its pieces if every piece of `caption.split(" ")` is
    local. The reasons: ftfy 6 changes the encoding only where `is_bad` finds a suspicious sequence,
    and with these characters the sequences that reach across a space start with one; it unescapes
    HTML only from "&" to ";" without a space between; and all its other steps work on single
    characters or on neighbours that are left out here. Control characters other than tab and line
    break are never local.
    """
    if is_plain(text):
        return True
    if "&" in text and ";" in text:
        return False
    if _TYPOGRAPHIC.fullmatch(text):
        return True
    if _LOCAL.fullmatch(text) is None:
        return False
    from ftfy.badness import is_bad

    return not is_bad(f" {text} ")
