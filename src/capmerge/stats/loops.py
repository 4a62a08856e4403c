"""Finds captions in which a describing model went round in a circle.

Such a model repeats one phrase until its limit ends the caption. The definition is in
docs/stats.md.
"""

MIN_PHRASE, MAX_PHRASE = 4, 240
"""The shortest and the longest phrase, in characters."""
TIMES = 5
"""How often in a row a phrase must stand there."""
_PROBES = 8
_MOST_TRIES = 8


def has_loop(text: str) -> bool:
    """True if a phrase repeats so often in a row in `text` that these are a quarter of it.

    >>> has_loop("A girl. " + "She has red hair, red eyes. " * 5)
    True

    The time is bounded for a text without a loop, however long it is.
    """
    # Repetitions of a quarter of the text reach over one of the probed places with at least an
    # eighth of the text behind it. There the letters stand again one phrase further on.
    size = len(text)
    if size < TIMES * MIN_PHRASE:
        return False
    probe_size = min(16, max(MIN_PHRASE, size // 16))
    window = MAX_PHRASE + probe_size
    find = text.find
    for number in range(_PROBES):
        place = size * number // _PROBES
        probe = text[place : place + probe_size]
        again = find(probe, place + 1, place + window)
        if again >= 0 and _loops_at(text, place, probe, again):
            return True
    return False


def _loops_at(text: str, place: int, probe: str, again: int) -> bool:
    """True if a phrase at `place` loops; its first letters, the `probe`, stand `again` there."""
    for _ in range(_MOST_TRIES):
        if row := _row(text, place, again - place):
            return row >= len(text) / 4
        again = text.find(probe, again + 1, place + MAX_PHRASE + len(probe))
        if again < 0:
            return False
    return False


def _row(text: str, place: int, period: int) -> int:
    """How many characters around `place` repeat each other with this period.

    It is 0 if they are no phrase, or repeat it less often than a loop does.
    """
    period *= -(-MIN_PHRASE // period)
    phrase = text[place : place + period]
    if not any(map(str.isalpha, phrase)):
        return 0
    end = place + period
    while text.startswith(phrase, end):
        end += period
    if end < place + 2 * period:
        return 0
    start = place
    while start >= period and text.startswith(phrase, start - period):
        start -= period
    # Then the parts of a phrase before and behind.
    while start and text[start - 1] == text[start - 1 + period]:
        start -= 1
    while end < len(text) and text[end] == text[end - period]:
        end += 1
    return end - start if end - start >= TIMES * period else 0
