"""The client's HTTP and WebSocket, with h11 and wsproto as the peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection
from wsproto.connection import Connection, ConnectionState
from wsproto.events import AcceptConnection, BytesMessage, CloseConnection, Event, Ping, Pong, Request, TextMessage

from triarch.client.http import MAX_HEAD_BYTES, BrokenProtocol, Response
from triarch.client.websocket import Close, Handshake, Messages


def arriving(data: bytes, piece_bytes: int = 1 << 20) -> Callable[[], bytes]:
    """`data` in pieces, then the end of the connection."""
    pieces = iter([data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)])
    return lambda: next(pieces, b"")


def served(body: tuple[bytes, ...], *headers: tuple[str, str], status: int = 200) -> bytes:
    """A response as h11 sends it, which is what the daemon's server uses."""
    server = h11.Connection(h11.SERVER)
    server.receive_data(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert isinstance(server.next_event(), h11.Request)
    server.next_event()
    sent = server.send(h11.Response(status_code=status, headers=list(headers))) or b""
    for piece in body:
        sent += server.send(h11.Data(data=piece)) or b""
    return sent + (server.send(h11.EndOfMessage()) or b"")


# -- HTTP


@pytest.mark.parametrize("piece_bytes", [1, 3, 1 << 20])
@pytest.mark.parametrize("headers", [(), (("Content-Length", "11"),), (("Connection", "close"),)])
def test_bodies_of_every_length_kind(headers: tuple[tuple[str, str], ...], piece_bytes: int) -> None:
    response = Response(arriving(served((b"hello ", b"", b"world"), *headers), piece_bytes))
    assert response.status == 200
    assert not response.reusable
    assert b"".join(response.body()) == b"hello world"
    assert response.reusable is (("Connection", "close") not in headers)


def test_a_body_without_a_length_ends_with_the_connection() -> None:
    response = Response(arriving(b"HTTP/1.1 200 OK\r\n\r\nall of it", 4))
    assert b"".join(response.body()) == b"all of it"
    assert not response.reusable


def test_interim_responses_and_empty_ones() -> None:
    response = Response(arriving(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nETag:  a \r\n\r\n"))
    assert (response.status, response.fields, list(response.body())) == (204, {"etag": "a"}, [])
    assert response.reusable


def test_bytes_after_a_response_make_the_connection_useless() -> None:
    response = Response(arriving(served((b"x",), ("Content-Length", "1")) + b"more"))
    assert list(response.body()) == [b"x"]
    assert not response.reusable
    assert response.take_rest() == b"more"


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 +20 OK\r\n\r\n",
        b"HTTP/1.1 20\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\na : b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1_0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a" * (MAX_HEAD_BYTES + 1),
    ],
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenProtocol):
        list(Response(arriving(data)).body())


@pytest.mark.parametrize("headers", [(), (("Content-Length", "5"),)])
def test_a_response_that_is_cut_is_told_from_a_whole_one(headers: tuple[tuple[str, str], ...]) -> None:
    whole = served((b"hello",), *headers)
    for size_bytes in range(len(whole)):
        with pytest.raises(ConnectionResetError):
            list(Response(arriving(whole[:size_bytes])).body())


# -- WebSocket


def test_the_handshake_with_a_real_server() -> None:
    server = WSConnection(ConnectionType.SERVER)
    handshake = Handshake("triarch", "/1/run")
    server.receive_data(handshake.request)
    (request,) = server.events()
    assert isinstance(request, Request)
    assert (request.host, request.target) == ("triarch", "/1/run")
    answer = server.send(AcceptConnection()) + server.send(TextMessage(data="first"))
    response = Response(arriving(answer))
    assert response.status == 101
    handshake.check(response)
    assert list(Messages().receive(response.take_rest())) == ["first"]
    with pytest.raises(BrokenProtocol):
        Handshake("triarch", "/1/run").check(response)


def peer() -> Connection:
    return Connection(ConnectionType.SERVER)


def events(server: Connection) -> Iterator[Event]:
    return server.events()


@given(st.one_of(st.text(), st.binary()), st.sampled_from((0, 125, 126, 65535, 65536)))
def test_messages_of_every_length_reach_the_peer_and_come_back(message: str | bytes, padding: int) -> None:
    message += "x" * padding if isinstance(message, str) else b"x" * padding
    server, client = peer(), Messages()
    server.receive_data(client.encode(message))
    got = "" if isinstance(message, str) else b""
    for event in events(server):
        assert isinstance(event, TextMessage | BytesMessage)
        got += event.data
    assert got == message
    sent = TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message)
    assert list(client.receive(server.send(sent))) == [message]


@pytest.mark.parametrize("piece_bytes", [1, 2, 7])
def test_parts_pings_and_the_close_in_pieces(piece_bytes: int) -> None:
    server, client = peer(), Messages()
    data = server.send(BytesMessage(data=b"one ", message_finished=False))
    data += server.send(Ping(payload=b"there?"))
    data += server.send(BytesMessage(data=b"two", message_finished=True))
    data += server.send(CloseConnection(code=1013, reason="slow"))
    got = [
        message for at in range(0, len(data), piece_bytes) for message in client.receive(data[at : at + piece_bytes])
    ]
    assert got == [b"one two", Close(1013)]
    server.receive_data(client.take_due())
    answers = list(events(server))
    assert [type(answer) for answer in answers] == [Pong, CloseConnection]
    assert bytes(answers[0].payload) == b"there?"
    assert server.state is ConnectionState.CLOSED
    assert client.take_due() == b""


def test_a_close_without_a_code() -> None:
    assert list(Messages().receive(b"\x88\x00")) == [Close(1005)]


@pytest.mark.parametrize(
    "data",
    [
        b"\x82\x81abcdx",  # masked by a server
        b"\xc2\x00",  # a reserved bit
        b"\x83\x00",  # an unknown opcode
        b"\x09\x00",  # a ping in parts
        b"\x89\x7e\x00\x80",  # a ping that is too long
        b"\x80\x00",  # a continuation of nothing
        b"\x02\x01a\x82\x01b",  # a message within another
        b"\x81\x01\xff",  # not UTF-8
        b"\x88\x01\x03",  # half a close code
        b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff",  # longer than anything
    ],
)
def test_what_is_no_websocket_is_refused(data: bytes) -> None:
    with pytest.raises(BrokenProtocol):
        list(Messages().receive(data))
