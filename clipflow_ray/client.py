"""Typed HTTP client of the endpoint. It needs the schemas, and nothing else of the server.

    with Client("http://127.0.0.1:8000") as client:
        for result in client.detect(["a.jpg", "b.png"]).results:
            print(result.id, result.verdict, result.p_value)

What to send, how to read an answer and when to try again is written once, as generators that yield requests and
waiting times. `Client` and `AsyncClient` run them.
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import httpx
from pydantic import ValidationError

from clipflow_ray.errors import ClientError, ConfigError, ItemCode, ItemError
from clipflow_ray.pictures import Picture, encoded, is_picture, named, pictures
from clipflow_ray.serve.schemas import DetectResponse, ItemFailure, ItemResult, ModelCard, Schema

TOKEN_VARIABLE: Final = "CLIPFLOW_TOKEN"
MAX_IMAGES: Final = 32
MAX_BODY_BYTES: Final = 60 * 2**20  # below the 64 MiB of the endpoint, multipart's own lines included
_PART_BYTES: Final = 1024
_TOO_LARGE: Final = "The file is above {} bytes and was not sent."
_ATTEMPTS: Final = 5
_LONGEST_WAIT_SECONDS: Final = 30.0
_TIMEOUT: Final = httpx.Timeout(45.0, connect=5.0)

SchemaT = TypeVar("SchemaT", bound=Schema)


_Parts = list[tuple[str, tuple[str, bytes]]]


@dataclass(frozen=True)
class _Unread:
    """A picture that is not sent: its result, and the exception if nothing at all can be sent."""

    failure: ItemResult
    refusal: ClientError | ConfigError


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    files: _Parts | None = None
    alpha: float | None = None


# A conversation yields a request, or seconds to wait. It is sent the answer or the error of a request, and returns a T.
_Turn = _Request | float
_Answer = httpx.Response | httpx.RequestError | None
T = TypeVar("T")
_Conversation = Generator[_Turn, _Answer, T]


class Client:
    """Synchronous client. `token` defaults to the environment's CLIPFLOW_TOKEN; no repr and no log shows it.

    If the endpoint is overloaded or starting (429, 503) or a connection fails, a request is sent again, up to 5 times
    in all. The client waits for the time of Retry-After, at most 30 seconds. Other errors are not tried again. Every
    method raises ClientError.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._http = httpx.Client(**_options(url, token))

    def detect(self, images: Picture | Sequence[Picture], alpha: float | None = None) -> DetectResponse:
        """Judge pictures at the false-positive rate `alpha`, by default the endpoint's.

        A picture is bytes, the path of a file, a binary file object, a PIL image, or a uint8 array [height, width, 3].
        One picture is as a sequence of one. Any number: the client sends them in requests of at most 32 images and
        60 MiB. Results come in the order of `images`, and `index` counts over all of them. The other fields are those
        of the first answer. An image that cannot be read or scored, or is too large to send, has a result with
        `error`. Raises TypeError at once if something else than pictures is given, and ConfigError if none of the files
        can be read.
        """
        return self._run(_detect(images, alpha))

    def model(self) -> ModelCard:
        """The model that judges, its thresholds and limits, and its card."""
        return self._run(_model())

    def ready(self) -> bool:
        """Whether the endpoint could judge now; it neither waits nor raises if the endpoint is down."""
        return self._run(_ready())

    def close(self) -> None:
        """Close the connections. The end of a `with` block does the same."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._http.base_url)!r})"

    def _run(self, conversation: _Conversation[T]) -> T:
        answer: _Answer = None
        while True:
            try:
                turn = conversation.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(turn, _Request):
                try:
                    answer = self._http.request(turn.method, turn.path, files=turn.files, data=_fields(turn))
                except httpx.RequestError as error:
                    answer = error
            else:
                time.sleep(turn)
                answer = None


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._http = httpx.AsyncClient(**_options(url, token))

    async def detect(self, images: Picture | Sequence[Picture], alpha: float | None = None) -> DetectResponse:
        """See `Client.detect`."""
        return await self._run(_detect(images, alpha))

    async def model(self) -> ModelCard:
        """See `Client.model`."""
        return await self._run(_model())

    async def ready(self) -> bool:
        """See `Client.ready`."""
        return await self._run(_ready())

    async def close(self) -> None:
        """See `Client.close`."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self._http.base_url)!r})"

    async def _run(self, conversation: _Conversation[T]) -> T:
        answer: _Answer = None
        while True:
            try:
                turn = conversation.send(answer)
            except StopIteration as end:
                result: T = end.value
                return result
            if isinstance(turn, _Request):
                try:
                    answer = await self._http.request(turn.method, turn.path, files=turn.files, data=_fields(turn))
                except httpx.RequestError as error:
                    answer = error
            else:
                await asyncio.sleep(turn)
                answer = None


def _detect(images: Picture | Sequence[Picture], alpha: float | None) -> _Conversation[DetectResponse]:
    given = [images] if is_picture(images) else pictures(images)
    if not given:
        raise ConfigError("Name at least one image.")
    first: DetectResponse | None = None
    refused: ClientError | ConfigError | None = None
    results: list[ItemResult] = []
    for chunk in _chunks(given):
        error: ClientError | ConfigError
        if isinstance(chunk, _Unread):
            error, failure = chunk.refusal, chunk.failure
        else:
            try:
                answer = yield from _asked(DetectResponse, _Request("POST", "/v1/detect", chunk, alpha))
            except ClientError as caught:
                # In a request of several images, a file that is too large is one bad result. A file that was sent
                # alone gets the same, although the endpoint refuses the request.
                if len(chunk) > 1 or caught.code not in ("file_too_large", "batch_too_large"):
                    raise
                error, failure = caught, _failed(chunk[0][1][0], "too_large_bytes", str(caught))
            else:
                first = first or answer
                results += [r.model_copy(update={"index": at}) for at, r in enumerate(answer.results, len(results))]
                continue
        refused = error
        results.append(failure.model_copy(update={"index": len(results)}))
    if first is None:
        assert refused is not None
        raise refused
    return first.model_copy(update={"results": results})


def _model() -> _Conversation[ModelCard]:
    return (yield from _asked(ModelCard, _Request("GET", "/v1/model")))


def _ready() -> _Conversation[bool]:
    answer = yield _Request("GET", "/readyz")
    return isinstance(answer, httpx.Response) and answer.is_success


def _asked(kind: type[SchemaT], request: _Request) -> _Conversation[SchemaT]:
    for attempt in range(1, _ATTEMPTS + 1):
        answer = yield request
        if isinstance(answer, httpx.Response) and answer.status_code not in (429, 503):
            return _understood(kind, answer)
        if isinstance(answer, httpx.TimeoutException) and not isinstance(answer, httpx.ConnectTimeout):
            raise ClientError("timeout", "The endpoint took too long; send fewer images, or see what it is busy with.")
        if attempt < _ATTEMPTS:
            yield _wait(answer, attempt)
    if isinstance(answer, httpx.Response):
        raise _refusal(answer)
    raise ClientError(
        "unreachable",
        f"No answer after {_ATTEMPTS} attempts ({type(answer).__name__}); is the URL right, and is it up?",
    )


def _wait(answer: _Answer, attempt: int) -> float:
    """Seconds to wait: those of Retry-After, else longer each time. Random, so that clients do not return together."""
    asked = answer.headers.get("Retry-After", "") if isinstance(answer, httpx.Response) else ""
    seconds = float(asked) if asked.isascii() and asked.isdigit() else 0.25 * 2**attempt
    return min(seconds * random.uniform(1.0, 1.25), _LONGEST_WAIT_SECONDS)


def _understood(kind: type[SchemaT], answer: httpx.Response) -> SchemaT:
    if not answer.is_success:
        raise _refusal(answer)
    try:
        return kind.model_validate_json(answer.content, extra="ignore")  # a newer endpoint may say more
    except ValidationError as error:
        raise _unexpected(answer) from error


def _refusal(answer: httpx.Response) -> ClientError:
    try:
        detail = json.loads(answer.content)["error"]
        return ClientError(str(detail["code"]), str(detail["message"]), str(detail["request_id"]))
    except (ValueError, KeyError, TypeError):
        return _unexpected(answer)


def _unexpected(answer: httpx.Response) -> ClientError:
    return ClientError(
        "unexpected_answer",
        f"HTTP {answer.status_code} in a format that this client does not know: is this URL a clipflow-ray endpoint?",
        answer.headers.get("X-Request-Id"),
    )


def _chunks(images: Sequence[Picture]) -> Iterator[_Parts | _Unread]:
    """The multipart parts of each request in turn, and what cannot be sent; a file is read when its turn comes."""
    chunk: _Parts = []
    size = 0
    for number, image in enumerate(images):
        name, data = named(image, number), _content(image)
        unread = isinstance(data, ItemError)
        length = 0 if isinstance(data, ItemError) else len(data)
        if chunk and (unread or len(chunk) == MAX_IMAGES or size + length + _PART_BYTES > MAX_BODY_BYTES):
            yield chunk
            chunk, size = [], 0
        if isinstance(data, ItemError):
            yield _unread(name, data)
        else:
            chunk.append(("files", (name, data)))
            size += length + _PART_BYTES
    if chunk:
        yield chunk


def _content(image: Picture) -> bytes | ItemError:
    try:
        data = encoded(image, MAX_BODY_BYTES)
    except ItemError as error:
        return error
    return data if len(data) <= MAX_BODY_BYTES else ItemError("too_large_bytes", _TOO_LARGE.format(MAX_BODY_BYTES))


def _unread(name: str, error: ItemError) -> _Unread:
    if error.item_code == "too_large_bytes":
        message = _TOO_LARGE.format(MAX_BODY_BYTES)
        return _Unread(_failed(name, error.item_code, message), ClientError("file_too_large", message))
    return _Unread(_failed(name, error.item_code, str(error)), ConfigError(f"Cannot read {name}: {error}"))


def _failed(name: str, code: ItemCode, message: str) -> ItemResult:
    return ItemResult(id=name, index=0, status="error", error=ItemFailure(code=code, message=message))


def _fields(request: _Request) -> dict[str, str] | None:
    return None if request.alpha is None else {"alpha": repr(request.alpha)}


def _options(url: str, token: str | None) -> dict[str, Any]:
    token = token or os.environ.get(TOKEN_VARIABLE)
    try:
        base = httpx.URL(url)
    except httpx.InvalidURL:
        base = httpx.URL("")
    if base.scheme not in ("http", "https") or not base.host:
        raise ConfigError("The endpoint's URL is like http://127.0.0.1:8000.")
    if token and not (token.isascii() and token.isprintable()):
        raise ConfigError(f"The token has characters that no token contains; see {TOKEN_VARIABLE}.")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return {"base_url": base, "headers": headers, "timeout": _TIMEOUT}
