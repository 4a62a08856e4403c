"""A set of digests says of every text whether it was among those of the set."""

from hypothesis import given
from hypothesis import strategies as st

from capmerge.files.digest_set import DigestSet


@given(st.lists(st.binary(max_size=3)), st.lists(st.binary(max_size=3)))
def test_it_holds_what_was_put_in(texts, others):
    """Membership and size are those of a set, also of an empty one and with equal texts."""
    found = DigestSet(texts)
    assert len(found) == len(set(texts))
    assert found.contains(texts + others) == [text in set(texts) for text in texts + others]
