"""The head and the body of every answer leave in one write."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.server import ServerState

from clipflow_ray.serve.edge import nginx_path
from clipflow_ray.serve.whole import WholeAnswers, answer_in_one_write
from tests.ray.site import edge_before, free_port, until

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
HEAD = GET.replace(b"GET", b"HEAD")
LAST = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n"


@pytest.fixture(autouse=True)
def protocols() -> Iterator[None]:
    before = dict(HTTP_PROTOCOLS)
    yield
    HTTP_PROTOCOLS.update(before)


class Transport(asyncio.Transport):
    """Keeps the data of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        assert not self.closed
        self.writes.append(bytes(data))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    await Response("hello")(scope, receive, send)


async def in_parts(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for part in (b"hel", b"lo"):
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": part, "more_body": True})
    await asyncio.sleep(0)
    await send({"type": "http.response.body"})


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    message = await receive()
    await Response(message["body"])(scope, receive, send)


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    raise RuntimeError


def answered(app: ASGIApp, *received: bytes) -> Transport:
    """The writes of uvicorn's default protocol to a client that sends `received`, one part after another."""

    async def run() -> Transport:
        config = Config(app, lifespan="off", log_config=None)
        config.load()
        state = ServerState()
        protocol_class: Any = config.http_protocol_class
        protocol = protocol_class(config, state, {})
        transport = Transport()
        protocol.connection_made(transport)
        for data in received:
            protocol.data_received(data)
            for _ in range(20):
                await asyncio.sleep(0)
        await asyncio.gather(*state.tasks)
        protocol.connection_lost(None)
        return transport

    answer_in_one_write()
    return asyncio.run(run())


def test_every_answer_of_a_connection_is_one_write() -> None:
    writes = answered(plain, GET, GET, GET + GET).writes
    assert len(writes) == 4
    assert all(write.startswith(b"HTTP/1.1 200 OK\r\n") and write.endswith(b"\r\n\r\nhello") for write in writes)


def test_an_answer_without_a_body_and_one_in_parts_are_one_write() -> None:
    (head,) = answered(plain, HEAD).writes
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and head.endswith(b"\r\n\r\n")
    (parts,) = answered(in_parts, GET).writes
    assert parts.endswith(b"\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n")


def test_the_last_answer_of_a_connection_leaves_before_it_closes() -> None:
    transport = answered(plain, LAST)
    (write,) = transport.writes
    assert write.endswith(b"hello") and transport.closed


def test_a_client_that_waits_before_it_sends_its_body_is_told_to_go_on() -> None:
    go_on, answer = answered(echo, POST, b"abc").writes
    assert go_on == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n") and answer.endswith(b"abc")


def test_an_application_that_fails_before_its_body_is_a_500_and_no_head_of_a_200() -> None:
    assert b"".join(answered(failing, GET).writes).startswith(b"HTTP/1.1 500 ")


def test_uvicorns_own_choice_of_protocol_is_ours_from_then_on() -> None:
    answer_in_one_write()
    config = Config(plain)
    config.load()
    assert config.http_protocol_class is WholeAnswers


DYING_SERVER = """
import os, sys
import uvicorn
from clipflow_ray.serve.whole import answer_in_one_write

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"5")]})
    if scope["path"] == "/dies":
        os._exit(1)
    await send({"type": "http.response.body", "body": b"whole"})

answer_in_one_write()
uvicorn.run(app, port=int(sys.argv[1]), log_level="critical")
"""


@pytest.mark.skipif(nginx_path() is None, reason="no nginx: install Debian's `nginx` to test the edge")
def test_a_server_that_dies_between_head_and_body_is_a_503_of_the_interface() -> None:
    port = free_port()
    with edge_before(port) as site, subprocess.Popen([sys.executable, "-c", DYING_SERVER, str(port)]) as server:
        try:
            until(lambda: httpx.get(f"{site.url}/").status_code == 200)
            assert httpx.get(f"{site.url}/").text == "whole"
            answer = site.raw(b"GET /dies HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        finally:
            server.kill()
    assert (answer.status, answer.error["code"], answer.headers["retry-after"]) == (503, "not_ready", "2")
