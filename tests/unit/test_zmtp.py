"""The frames that the zmq transport's reader speaks, without sockets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_connector.errors import RemoteProtocolError
from pd_connector.transport.zmtp import (
    GREETING,
    Header,
    check_greeting,
    check_ready,
    decode_header,
    encode_message,
    ping,
    pong,
    ready,
    split_command,
)


def changed(at: int, value: bytes) -> bytes:
    return GREETING[:at] + value + GREETING[at + len(value) :]


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH".ljust(64), "does not speak ZeroMQ"),
        (changed(9, b"\x00"), "does not speak ZeroMQ"),
        (changed(10, b"\x01"), "ZMTP 1"),
        (changed(12, b"CURVE"), "CURVE"),
    ],
)
def test_a_greeting_that_is_not_ours_is_refused(greeting: bytes, words: str) -> None:
    assert len(GREETING) == len(greeting) == 64
    assert check_greeting(GREETING)
    assert not any(check_greeting(GREETING[:size]) for size in range(64))
    with pytest.raises(RemoteProtocolError, match=words):
        check_greeting(greeting)


def body_of(command: bytes) -> bytes:
    header = decode_header(command)
    assert header is not None
    assert header.command
    assert not header.more
    return command[header.length :]


def test_the_handshake_names_the_socket() -> None:
    check_ready(body_of(ready(b"ROUTER")), b"ROUTER")
    with pytest.raises(RemoteProtocolError, match="not that of a ROUTER"):
        check_ready(body_of(ready(b"PUB")), b"ROUTER")
    with pytest.raises(RemoteProtocolError, match="not that of a ROUTER"):
        check_ready(body_of(ping()), b"ROUTER")
    with pytest.raises(RemoteProtocolError, match="no room"):
        check_ready(b"\x05ERROR\x07no room", b"ROUTER")


@pytest.mark.parametrize("command", [b"", b"\x04PIN", b"\xffx"])
def test_a_command_without_a_name(command: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        split_command(command)


def test_a_pong_carries_the_context_of_its_ping() -> None:
    assert split_command(body_of(pong(b"\x00\x10context"))) == (b"PONG", b"context")
    assert split_command(body_of(pong(b"\x00\x10" + bytes(99)))) == (b"PONG", bytes(16))
    assert split_command(body_of(ping())) == (b"PING", bytes(2))


@given(st.lists(st.binary(max_size=600), min_size=1, max_size=5))
def test_messages_come_back(frames: list[bytes]) -> None:
    data, out, more = encode_message(frames), [], True
    while more:
        header = decode_header(data)
        assert header is not None
        assert not header.command
        out.append(data[header.length : header.length + header.size])
        data, more = data[header.length + header.size :], header.more
    assert out == frames
    assert not data


@given(st.binary(max_size=12))
def test_any_bytes_are_a_header_too_few_or_refused(data: bytes) -> None:
    try:
        header = decode_header(data)
    except RemoteProtocolError:
        assert data[0] & 0xF8 or data[0] & 5 == 5
        return
    if header is None:
        assert len(data) < (9 if data and data[0] & 2 else 2)
    else:
        size = int.from_bytes(data[1:9], "big") if data[0] & 2 else data[1]
        assert header == Header(9 if data[0] & 2 else 2, size, bool(data[0] & 1), bool(data[0] & 4))
