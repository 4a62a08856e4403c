import itertools
import random
import unicodedata

import ftfy
import regex
from builders.tokens import TYPOGRAPHIC, hostile_text
from ftfy.badness import is_bad
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.tokens import clean as tokens_clean
from capmerge.tokens.clean import clean, is_local


def slow_clean(text: str) -> str:
    """The text as transformers' slow CLIPTokenizer cleans it."""
    return regex.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()


@settings(max_examples=600, deadline=None)
@given(hostile_text)
def test_clean_equals_the_slow_way(text: str) -> None:
    """The shortcut around ftfy changes no text, hostile or not."""
    assert clean(text) == slow_clean(text)


@settings(max_examples=400, deadline=None)
@given(
    st.text(
        st.sampled_from(
            TYPOGRAPHIC + " \t\n\raA.,'\"5<&;\u00e9\u00e0\u00c9\u00d7\u00b2\u20ac\u2122\u00b0\u2588"
        ),
        max_size=30,
    )
)
def test_clean_of_typographic_text(text: str) -> None:
    """Mixtures of mojibake and of what captioning models write are cleaned as by ftfy."""
    assert clean(text) == slow_clean(text)


def test_white_space_and_controls() -> None:
    """White space and control characters are cleaned as by the slow way, anywhere in a text."""
    for char in map(chr, range(0x10000)):
        if char.isspace() or (
            unicodedata.category(char)[0] in "CZ" and unicodedata.category(char) not in ("Co", "Cn")
        ):
            assert clean(f"{char}a{char}B{char}") == slow_clean(f"{char}a{char}B{char}"), ascii(
                char
            )


def test_local_characters_stand_alone() -> None:
    """Ftfy changes no local character except quotes, and none joins a neighbour under NFC."""
    seconds = {
        int(parts[1], 16)
        for parts in (unicodedata.decomposition(chr(code)).split() for code in range(0x110000))
        if len(parts) == 2 and not parts[0].startswith("<")
    }
    local = [code for code in range(0x110000) if tokens_clean._LOCAL.fullmatch(chr(code))]
    assert len(local) > 30_000
    assert not seconds.intersection(local)
    for char in map(chr, local):
        assert unicodedata.combining(char) == 0
        fixed = ftfy.fix_text(f"a{char}b")
        assert fixed == f"a{char}b" or (
            char in "\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\r" and fixed[1] in "'\"\n"
        )


def test_no_sequence_of_typographic_characters_is_bad() -> None:
    """No three typographic characters look like mojibake to ftfy."""
    # With these characters, no sequence that ftfy looks for is longer than three.
    characters = TYPOGRAPHIC + " aA.,5'"
    assert all(tokens_clean._TYPOGRAPHIC.fullmatch(char) for char in characters)
    assert not any(is_bad("".join(chars)) for chars in itertools.product(characters, repeat=3))


def test_local_pieces_add_up() -> None:
    """A text of local pieces is not suspicious to ftfy, and its clean-up is that of its pieces."""
    rng = random.Random(1)
    codes = itertools.chain(
        range(0x20, 0x7F),
        range(0xA1, 0x180),
        range(0x2010, 0x2060),
        range(0x2550, 0x25A0),
        (0x20AC, 0x2122),
    )
    alphabet = list(map(chr, codes))
    n_local = 0
    for _ in range(30_000):
        text = "".join(
            rng.choices(rng.choice([alphabet, alphabet[95:] + [" "] * 60]), k=rng.randint(1, 12))
        )
        if all(map(is_local, text.split(" "))):
            n_local += 1
            assert not is_bad(text), ascii(text)
            assert " ".join(filter(None, map(clean, text.split(" ")))) == slow_clean(text), ascii(
                text
            )
    assert n_local > 5_000
