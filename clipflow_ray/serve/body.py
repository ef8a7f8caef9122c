"""The body of POST /v1/detect -> images and alpha. Limits apply while it streams; it stays in memory, never on disk."""

import base64
import binascii
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from fastapi.concurrency import run_in_threadpool
from pydantic import Field, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from clipflow_ray.config import ServeConfig
from clipflow_ray.errors import ItemError
from clipflow_ray.serve.failures import RequestError
from clipflow_ray.serve.schemas import DetectRequest

_ALPHA: Final[TypeAdapter[float]] = TypeAdapter(Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)])
_MAX_NAME: Final = 255
_MAX_FIELD: Final = 64
_KEYS: Final = {"images", "alpha", "id", "b64"}


@dataclass
class Upload:
    """One image of a request: its bytes, or why they are not there."""

    id: str
    data: bytes | ItemError


@dataclass
class Submission:
    """One request: judge `uploads` in this order at `alpha`, or at the server's own alpha."""

    uploads: list[Upload]
    alpha: float | None = None


async def read(request: Request, config: ServeConfig) -> Submission:
    """Read a multipart or JSON body; raises RequestError if the interface does not allow it."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestError("unsupported_media_type", "Send the body without Content-Encoding.")
    if kind == b"multipart/form-data":
        submission = await _multipart(_capped(request, config.max_body_bytes), options, config)
    elif kind == b"application/json":
        parts = [chunk async for chunk in _capped(request, config.max_json_bytes)]
        submission = await run_in_threadpool(_json, b"".join(parts), config)
    else:
        raise RequestError("unsupported_media_type", "Send multipart/form-data with `files`, or application/json.")
    _check(submission, config)
    return submission


def _check(submission: Submission, config: ServeConfig) -> None:
    if not submission.uploads:
        raise RequestError("validation_error", "files: send at least one image.")
    only = submission.uploads[0].data if len(submission.uploads) == 1 else b""
    if isinstance(only, ItemError) and only.item_code == "too_large_bytes":
        raise RequestError("file_too_large", str(only))


def _too_large(size: int, config: ServeConfig) -> ItemError:
    return ItemError("too_large_bytes", f"{size} bytes; the limit is {config.limits.max_bytes}.")


async def _capped(request: Request, limit: int) -> AsyncIterator[bytes]:
    message = f"The request is above {limit} bytes; send fewer or smaller images at once."
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise RequestError("batch_too_large", message)
    seen = 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen > limit:
            raise RequestError("batch_too_large", message)
        yield chunk


def _too_many(config: ServeConfig) -> RequestError:
    return RequestError("batch_too_large", f"More than {config.max_images} images; send fewer at once.")


def _json(body: bytes, config: ServeConfig) -> Submission:
    try:
        parsed = DetectRequest.model_validate_json(body)
    except ValidationError as error:
        raise _refusal(error) from error
    if len(parsed.images) > config.max_images:
        raise _too_many(config)
    return Submission([Upload(image.id, _from_base64(image.b64, config)) for image in parsed.images], parsed.alpha)


def _from_base64(text: str, config: ServeConfig) -> bytes | ItemError:
    size = len(text) // 4 * 3 - text[-2:].count("=")
    if size > config.limits.max_bytes:
        return _too_large(size, config)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return ItemError("decode_failed", "b64: this is not standard base64.")


def _refusal(error: ValidationError) -> RequestError:
    """Place and cause of the error in pydantic's words, without keys that the client made up."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return RequestError("invalid_request", "The body is not valid JSON.")
    where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _KEYS)
    return RequestError("validation_error", f"{where or 'body'}: {first['msg']}.")


@dataclass
class _Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    key: str = ""
    name: str | None = None
    content: bytearray = field(default_factory=bytearray)
    size: int = 0


class _Form:
    """Callbacks of python-multipart. Files are kept in memory; oversized files are counted, not kept."""

    def __init__(self, boundary: bytes, config: ServeConfig) -> None:
        self.submission = Submission([])
        self.ended = False
        self._config = config
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def write(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def _part_begin(self) -> None:
        self._part = _Part()

    def _header_end(self) -> None:
        self._part.headers[bytes(self._header[0]).lower()] = bytes(self._header[1])
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition"))
        self._part.key = options.get(b"name", b"").decode("utf-8", "replace")
        if b"filename" in options:
            self._part.name = options[b"filename"].decode("utf-8", "replace")[:_MAX_NAME]
        if self._part.key == "files":
            if self._part.name is None:
                raise RequestError("validation_error", "files: each part needs a file name.")
            if len(self.submission.uploads) == self._config.max_images:
                raise _too_many(self._config)
        elif self._part.key != "alpha" or self._part.name is not None:
            raise RequestError("validation_error", "The fields are `files` and `alpha`, and no others.")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        part, limit = self._part, _MAX_FIELD if self._part.name is None else self._config.limits.max_bytes
        part.size += end - start
        if part.size <= limit:
            part.content += data[start:end]
        else:
            part.content.clear()

    def _part_end(self) -> None:
        part = self._part
        if part.name is not None:
            whole = part.size <= self._config.limits.max_bytes
            data = bytes(part.content) if whole else _too_large(part.size, self._config)
            self.submission.uploads.append(Upload(part.name, data))
            return
        if self.submission.alpha is not None:
            raise RequestError("validation_error", "alpha: give it once.")
        try:
            self.submission.alpha = _ALPHA.validate_python(part.content.decode("ascii", "replace"))
        except ValidationError as error:
            raise RequestError("validation_error", "alpha: a number between 0 and 1, such as 0.01.") from error

    def _end(self) -> None:
        self.ended = True


async def _multipart(stream: AsyncIterator[bytes], options: dict[bytes, Any], config: ServeConfig) -> Submission:
    if b"boundary" not in options:
        raise RequestError("invalid_request", "The Content-Type names no multipart boundary.")
    try:
        form = _Form(options[b"boundary"], config)
        async for chunk in stream:
            form.write(chunk)
    except FormParserError as error:
        raise RequestError("invalid_request", "The body is not valid multipart/form-data.") from error
    if not form.ended:
        raise RequestError("invalid_request", "The multipart body ends before its last boundary.")
    return form.submission
