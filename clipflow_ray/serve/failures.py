"""Errors that refuse a whole request, with the status and the code that the client gets."""

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
    """The request as a whole is refused. The message goes to the client and holds nothing that the client sent."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


def error_body(code: ErrorCode, message: str, request_id: str) -> bytes:
    """The JSON of an error answer."""
    detail = ErrorDetail(code=code, message=message, request_id=request_id)
    return ErrorBody(error=detail).model_dump_json().encode()
