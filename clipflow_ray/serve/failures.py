"""A refusal of a whole request, as the status and code that the client gets."""

from typing import Final

from clipflow_ray.serve.schemas import ErrorBody, ErrorCode, ErrorDetail

STATUS: Final[dict[ErrorCode, int]] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "file_too_large": 413,
    "batch_too_large": 413,
    "unsupported_media_type": 415,
    "validation_error": 422,
    "overloaded": 429,
    "internal": 500,
    "not_ready": 503,
    "timeout": 504,
}


class RequestError(Exception):
    """The request as a whole is refused. The message is for the client: it holds nothing that the client sent."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


def error_body(code: ErrorCode, message: str, request_id: str) -> bytes:
    """The JSON of an error answer."""
    detail = ErrorDetail(code=code, message=message, request_id=request_id)
    return ErrorBody(error=detail).model_dump_json().encode()
