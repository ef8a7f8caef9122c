"""The routes of the HTTP interface, as a FastAPI application around one Service."""

import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import jinja2
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from clipflow_ray import __version__
from clipflow_ray.config import DISCLAIMER, ServeConfig
from clipflow_ray.serve import body
from clipflow_ray.serve.body import Submission
from clipflow_ray.serve.boundary import INTERNAL, Boundary, refusal, refused
from clipflow_ray.serve.failures import STATUS, RequestError
from clipflow_ray.serve.metrics import exposition
from clipflow_ray.serve.schemas import DetectResponse, ErrorBody, ErrorCode, JsonImage, ModelCard, Schema
from clipflow_ray.serve.service import Service

_HERE: Final = Path(__file__).parent
_CSP: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_FILES: Final = {"page.css": "text/css", "page.js": "text/javascript"}

Handler = Callable[[Request], Awaitable[Response]]


class Healthy(Schema):
    """Answer of /healthz and /readyz."""

    status: str = "ok"


def build_api(service: Service) -> ASGIApp:
    """The ASGI application of one ingress replica; the module `boundary` says what surrounds its routes."""
    config = service.config
    app = FastAPI(
        title="clipflow-ray",
        version=__version__,
        description=DISCLAIMER,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )

    async def detect(request: Request) -> Response:
        _refuse_parameters(request)

        async def read() -> Submission:
            submission = await body.read(request, config)
            request.scope["state"]["items"] = len(submission.uploads)
            return submission

        declared = request.headers.get("content-length", "")
        size = int(declared) if declared.isdecimal() and len(declared) < 16 else None
        return _json(await service.detect(size, read, request.scope["state"]["request_id"]))

    async def model(request: Request) -> Response:
        _refuse_parameters(request)
        return _json(await service.model_card())

    async def healthz(request: Request) -> Response:
        return _json(Healthy())

    async def readyz(request: Request) -> Response:
        await service.check_ready()
        return _json(Healthy())

    async def metrics(request: Request) -> Response:
        _refuse_parameters(request)
        return Response(await exposition(), media_type="text/plain; version=0.0.4")

    _route(app, "/v1/detect", detect, "POST", DetectResponse, _DETECT_ERRORS, _detect_body(config))
    _route(app, "/v1/model", model, "GET", ModelCard, ("validation_error", "overloaded", "not_ready"))
    _route(app, "/healthz", healthz, "GET", Healthy, ())
    _route(app, "/readyz", readyz, "GET", Healthy, ("overloaded", "not_ready"))
    app.add_api_route("/metrics", metrics, methods=["GET"], summary=_SUMMARIES["/metrics"], response_class=Response)
    _add_pages(app)
    _add_refusals(app, config)
    return Boundary(app, config, service.metrics)


def _refuse_parameters(request: Request) -> None:
    """Raise RequestError if the address has a query: no route reads one, and what is asked must not be ignored."""
    if request.url.query:
        message = "The address takes no parameters after `?`; `alpha` is a field of the body of /v1/detect."
        raise RequestError("validation_error", message)


def _json(answer: Schema) -> Response:
    return Response(answer.model_dump_json(exclude_none=True), media_type="application/json")


def _route(
    app: FastAPI,
    path: str,
    handler: Handler,
    method: str,
    model: type[Schema],
    errors: tuple[ErrorCode, ...],
    extra: dict[str, Any] | None = None,
) -> None:
    responses: dict[int | str, dict[str, Any]] = {}
    for code in ("invalid_request", "unauthorized", *errors):
        known = responses.setdefault(STATUS[code], {"model": ErrorBody, "description": ""})
        known["description"] = (known["description"] + f" {code}").strip()
    app.add_api_route(
        path,
        handler,
        methods=[method],
        response_model=model,
        responses=responses,
        summary=_SUMMARIES[path],
        openapi_extra=extra,
    )


def _add_pages(app: FastAPI) -> None:
    """`/` and its files, and `/docs`, rendered here from the OpenAPI document so that it needs no script of others."""
    page = (_HERE / "page" / "index.html").read_bytes()
    files = {name: (_HERE / "page" / name).read_bytes() for name in _PAGE_FILES}
    template = (_HERE / "templates" / "docs.html.j2").read_text(encoding="utf-8")
    docs = jinja2.Environment(autoescape=True).from_string(template)

    async def index(request: Request) -> Response:
        return _guarded(page, "text/html")

    async def page_file(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in files:
            raise HTTPException(404)
        return _guarded(files[name], _PAGE_FILES[name])

    async def documentation(request: Request) -> Response:
        return _guarded(docs.render(api=app.openapi(), json=json).encode(), "text/html")

    for path, handler in (("/", index), ("/page/{name}", page_file), ("/docs", documentation)):
        app.add_api_route(path, handler, methods=["GET"], include_in_schema=False)


def _guarded(content: bytes, media_type: str) -> Response:
    return Response(content, headers={"Content-Security-Policy": _CSP}, media_type=media_type)


def _add_refusals(app: FastAPI, config: ServeConfig) -> None:
    async def request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return refused(config, request, error)

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == STATUS["method_not_allowed"]:
            response = refusal(request.scope, "method_not_allowed", "This method is not allowed here; see /docs.")
            response.headers.update(error.headers or {})
            return response
        if error.status_code == STATUS["not_found"]:
            return refusal(request.scope, "not_found", "There is nothing at this path; see /docs.")
        return refusal(request.scope, "invalid_request", "The request cannot be read; see /docs.")

    async def invalid(request: Request, error: Exception) -> Response:
        return refusal(request.scope, "validation_error", "The request is not what the interface allows; see /docs.")

    async def internal(request: Request, error: Exception) -> Response:
        # Starlette raises the error again after it has sent this answer, and `Boundary` logs it.
        return refusal(request.scope, "internal", INTERNAL)

    app.add_exception_handler(RequestError, request_error)
    app.add_exception_handler(Exception, internal)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(RequestValidationError, invalid)


_SUMMARIES: Final = {
    "/v1/detect": "Judge up to 32 images. Results come in request order, and a bad image fails alone.",
    "/v1/model": "The model, its thresholds, the limits of a request, and the model card.",
    "/healthz": "Whether the process answers.",
    "/readyz": "Whether the model is loaded and reproduces the score of its probe image.",
    "/metrics": "Series named clipflow_serve_* as Prometheus text.",
}
_DETECT_ERRORS: Final[tuple[ErrorCode, ...]] = (
    "file_too_large",
    "batch_too_large",
    "unsupported_media_type",
    "validation_error",
    "overloaded",
    "internal",
    "not_ready",
    "timeout",
)


def _detect_body(config: ServeConfig) -> dict[str, Any]:
    """The two kinds of body. FastAPI cannot know them, because the handler reads the body itself, within limits."""
    alpha = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
    several = {"type": "array", "minItems": 1, "maxItems": config.max_images}
    files = several | {"items": {"type": "string", "format": "binary"}}
    image = JsonImage.model_json_schema()
    form = {
        "type": "object",
        "required": ["files"],
        "properties": {"files": files, "alpha": alpha},
        "additionalProperties": False,
    }
    plain = form | {"required": ["images"], "properties": {"images": several | {"items": image}, "alpha": alpha}}
    example = {"images": [{"id": "a.jpg", "b64": "iVBORw0KGgo="}], "alpha": 0.01}
    content = {"multipart/form-data": {"schema": form}, "application/json": {"schema": plain, "example": example}}
    return {"requestBody": {"required": True, "content": content}}
