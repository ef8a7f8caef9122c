"""The application with the tiny checkpoint and the edge in front of it, as a client reaches them."""

import json
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import ray
from ray import serve

from clipflow_ray.serve.app import build_app
from clipflow_ray.serve.edge import edge
from clipflow_ray.serve.upstreams import APPLICATION, edge_of_serve

T = TypeVar("T")
ALPHA = 0.1  # large enough for the tiny calibration


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, str]:
        """The error of the interface; fails if the body has another format."""
        assert self.headers["content-type"] == "application/json"
        error: dict[str, str]
        (error,) = json.loads(self.body).values()
        assert set(error) == {"code", "message", "request_id"}
        assert error["request_id"] == self.headers["x-request-id"]
        return error


@dataclass
class Site:
    url: str
    port: int
    folder: Path

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        """Connect from `source`, an address of the loopback network; the edge counts it as the client's address."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=10, source_address=(source, 0))

    def raw(self, request: bytes) -> Answer:
        """Send these bytes and read until the edge closes."""
        with self.connect() as connection:
            connection.sendall(request)
            return received(connection)


def received(connection: socket.socket) -> Answer:
    data = b""
    with suppress(ConnectionResetError):
        while part := connection.recv(65536):
            data += part
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Answer(int(status.split()[1]), headers, body)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def edge_before(upstream: int) -> Iterator[Site]:
    """The edge in front of a port of this machine."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        edge(f"127.0.0.1:{port}", [f"127.0.0.1:{upstream}"], folder) as made,
    ):
        yield Site(made.url, port, Path(folder))


@contextmanager
def asking(client: Callable[[], httpx.Client], ask: Callable[[httpx.Client], T]) -> Iterator[list[T]]:
    """Three clients that send one request after another until the context ends; yields their answers."""
    answers: list[T] = []
    done = threading.Event()

    def go_on() -> None:
        with client() as own:
            while not done.is_set():
                answers.append(ask(own))

    with ThreadPoolExecutor(3) as pool:
        clients = [pool.submit(go_on) for _ in range(3)]
        try:
            yield answers
        finally:
            done.set()
        for each in clients:
            each.result()


def until(condition: Callable[[], object], seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)


def replicas(deployment: str) -> set[str]:
    """Names of the deployment's actors, in the namespace `serve`."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if f"#{deployment}#" in actor["name"]}


def deploy(checkpoint: str, **changes: Any) -> None:
    """Deploy the application with small replicas; returns when replicas with these settings are running."""
    settings = {"checkpoint": checkpoint, "alpha": ALPHA, "ingress_cpus": 0.2, "detector_cpus": 0.2, "decoders": 2}
    serve.run(build_app(settings | changes), name=APPLICATION, route_prefix="/")


@contextmanager
def whole_site(checkpoint: str) -> Iterator[Site]:
    """Serve with one small replica of each kind, behind the edge."""
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port, "request_timeout_s": 40})
    deploy(checkpoint)
    front = free_port()
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            edge_of_serve(f"127.0.0.1:{front}", f"127.0.0.1:{port}", folder) as url,
        ):
            yield Site(url, front, Path(folder))
    finally:
        serve.shutdown()
