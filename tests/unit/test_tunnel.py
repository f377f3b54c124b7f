"""``emp.agent.tunnel``: frames become messages and messages frames; ``test_forwarding`` has what becomes of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emp.agent import tunnel
from emp.agent.tunnel import pack, unpack
from emp.host import packet

frames = st.binary(min_size=packet.HEADER_BYTES + 14, max_size=200)


@given(nic=st.integers(0, 255), sent=st.lists(frames, max_size=20), chunk=st.integers(1, 500))
def test_frames_come_out_of_messages_as_they_went_in(nic: int, sent: list[bytes], chunk: int) -> None:
    before, tunnel._CHUNK_BYTES = tunnel._CHUNK_BYTES, chunk
    try:
        messages = list(pack(nic, sent))
    finally:
        tunnel._CHUNK_BYTES = before
    assert [one for message, _ in messages for one in unpack(message)] == [(nic, one) for one in sent]
    assert [count for _, count in messages] == [len(list(unpack(message))) for message, _ in messages]


@pytest.mark.parametrize("message", [b"\0", b"\0\0\0\0\x08" + bytes(8), b"\0\0\0\0\x40" + bytes(63)])
def test_what_is_no_message_of_frames_is_refused(message: bytes) -> None:
    with pytest.raises(ValueError, match="frame"):
        list(unpack(message))
