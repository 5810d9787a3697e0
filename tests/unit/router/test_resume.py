"""Resume cursors: good for one prompt and one tenant, and with a key made by routers only."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.router.resume import Cursor, read_cursor, write_cursor

PROMPT = b"\1\0\0\0"
CURSORS = st.builds(Cursor, seed=st.integers(0, 2**64 - 1), max_tokens=st.integers(0, 2**32 - 1))


@given(CURSORS, st.binary(), st.text(max_size=128), st.binary(max_size=64))
def test_a_cursor_can_be_read_again(cursor: Cursor, prompt: bytes, tenant: str, key: bytes) -> None:
    """By whoever has the same key, for the same prompt and tenant."""
    assert read_cursor(write_cursor(cursor, prompt, tenant, key), prompt, tenant, key) == cursor


@given(CURSORS, st.integers(0, 28), st.integers(1, 255))
def test_a_changed_cursor_is_refused(cursor: Cursor, position: int, difference: int) -> None:
    """Every byte counts."""
    data = bytearray(write_cursor(cursor, PROMPT, "a", b"key"))
    data[position] ^= difference
    with pytest.raises(InvalidArgument):
        read_cursor(bytes(data), PROMPT, "a", b"key")


def test_a_cursor_is_bound() -> None:
    """Another prompt, another tenant, another key, and bytes moved between them, are refused."""
    data = write_cursor(Cursor(1, 2), PROMPT, "a", b"key")
    for prompt, tenant, key in (
        (PROMPT * 2, "a", b"key"),
        (PROMPT, "b", b"key"),
        (PROMPT, "", b"key"),
        (b"a" + PROMPT, "", b"key"),
        (PROMPT, "a", b""),
    ):
        with pytest.raises(InvalidArgument):
            read_cursor(data, prompt, tenant, key)
    for wrong in (b"", data[:-1], data + b"\0", b"\1" + data[1:]):
        with pytest.raises(InvalidArgument):
            read_cursor(wrong, PROMPT, "a", b"key")
