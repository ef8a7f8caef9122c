"""What surrounds every request: its id, its token, its log line and metrics, and an error body for any exception."""

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any, Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from clipflow_ray.config import ServeConfig
from clipflow_ray.serve.failures import STATUS, RequestError, error_body
from clipflow_ray.serve.metrics import IngressMetrics
from clipflow_ray.serve.schemas import ErrorCode
from clipflow_ray.serve.tokens import accepted

_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9-]{1,64}")
_OPEN: Final = re.compile(r"/(healthz|readyz|docs|openapi\.json|v1/model|page/[a-z.]+)?")
_CLIENT_GONE: Final = 499
INTERNAL: Final = "This is an error in the service; report it with this request_id."


class Boundary:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: IngressMetrics) -> None:
        self._app = app
        self._config = config
        self._metrics = metrics
        self._log = _json_log()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.monotonic()
        given = _header(scope, b"x-request-id")
        known = _REQUEST_ID.fullmatch(given) is not None
        request_id = given.decode() if known else uuid.uuid4().hex
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(request_id=request_id, items=0, code=None)
        status = 0

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
                headers.setdefault("Cache-Control", "no-store")
                if not known:  # if it was, Serve's proxy adds the header itself
                    headers["X-Request-Id"] = request_id
            await send(message)

        try:
            await self._guarded(scope, receive, answer)
        except asyncio.CancelledError:
            status = status or _CLIENT_GONE
            raise
        except Exception as error:  # the last layer: log any unhandled error and answer 500
            self._log.error(json.dumps({"request_id": request_id, "error": type(error).__name__}), exc_info=True)
            if not status:
                await refusal(scope, "internal", INTERNAL)(scope, receive, answer)
        finally:
            self._record(scope, status, time.monotonic() - start)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        tokens = self._config.tokens
        if tokens and not _OPEN.fullmatch(scope["path"]) and not accepted(_header(scope, b"authorization"), tokens):
            response = refusal(scope, "unauthorized", "Send `Authorization: Bearer` with a token of this server.")
            response.headers["WWW-Authenticate"] = "Bearer"
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """One log line and two samples. The path is that of the route, so that nothing a client made up is kept."""
        path = getattr(scope.get("route"), "path", "")
        state = scope["state"]
        self._metrics.requests.inc(1, {"path": path, "status": str(status)})
        self._metrics.request_seconds.observe(max(seconds, 1e-6), {"path": path})
        if state["code"]:
            self._metrics.errors.inc(1, {"scope": "request", "code": state["code"]})
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": state["request_id"],
            "path": path,
            "status": status,
            "code": state["code"],
            "items": state["items"],
            "ms": round(1000.0 * seconds, 1),
        }
        self._log.info(json.dumps(line))


def refusal(scope: Scope, code: ErrorCode, message: str, retry_after: int | None = None) -> Response:
    """The answer to a request that is refused as a whole; keeps the code for the log line."""
    scope["state"]["code"] = code
    body = error_body(code, message, scope["state"]["request_id"])
    headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
    return Response(body, STATUS[code], headers, "application/json")


def refused(config: ServeConfig, request: Request, error: RequestError) -> Response:
    """As `refusal`, with Retry-After if a later request may succeed."""
    temporary = error.code in ("overloaded", "not_ready")
    return refusal(request.scope, error.code, str(error), config.retry_after_seconds if temporary else None)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((bytes(value) for key, value in scope["headers"] if key.lower() == name), b"")


def _json_log() -> logging.Logger:
    """A logger of JSON lines to stderr, which Ray writes to a file per worker."""
    log = logging.getLogger("clipflow_ray.serve")
    if not log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    return log
