"""Answers that leave in one write, so that a server that dies gives the edge a whole answer or none.

uvicorn writes the head of an answer and its body by two system calls. If the process dies between the two, the edge
has a head that it has passed on, and no body to follow it: nginx can then neither answer with an error nor ask another
server. A single write to a socket is in the kernel's hands, which delivers it although the writer has died. So the
edge sees either a whole answer or a connection that closes without one, and makes a 503 of the latter.

Holds for answers that fit into the socket's send buffer: about 2 MB on loopback and 50 kB elsewhere.
"""

import asyncio
from typing import Any, Final, cast

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS, Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

# Ray Serve calls this function in every process that answers HTTP: the proxies and the replicas of the ingress.
CALLBACK: Final = "clipflow_ray.serve.whole:answer_in_one_write"


def answer_in_one_write() -> list[Middleware]:
    """Have uvicorn use `WholeAnswers` for the servers that this process starts from now on; adds no middleware."""
    HTTP_PROTOCOLS["auto"] = f"{WholeAnswers.__module__}:{WholeAnswers.__qualname__}"
    return []


class WholeAnswers(HttpToolsProtocol):
    """uvicorn's HTTP protocol, except that head and body of an answer leave together, once the body is complete."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.app: Any = self._held_back(self.app)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        self._output = _Output(transport)
        super().connection_made(cast(asyncio.Transport, self._output))

    def _held_back(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose messages reach uvicorn when the last one of an answer is there."""

        async def whole(scope: Scope, receive: Receive, send: Send) -> None:
            answer: list[Message] = []

            async def hold(message: Message) -> None:
                answer.append(message)
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    with self._output:
                        for each in answer:
                            await send(each)
                    answer.clear()

            await app(scope, receive, hold)

        return whole


class _Output:
    """A transport that, within its context, gathers what is written and writes it at once when the context ends."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._gathered: list[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def __enter__(self) -> None:
        self._gathered = []

    def __exit__(self, *error: object) -> None:
        self._flush()

    def write(self, data: bytes) -> None:
        if self._gathered is None:
            self._transport.write(data)
        else:
            self._gathered.append(data)

    def close(self) -> None:
        self._flush()  # uvicorn closes within the context, after the last write
        self._transport.close()

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered:
            self._transport.write(b"".join(gathered))
