"""Errors that refuse a whole request, with the status and the code that the client gets."""

from typing import Final

from clipflow_ray.serve.schemas import ErrorBody, ErrorCode, ErrorDetail

# HTTP status of each code, and what it means; docs/formats.md shows these sentences.
CODES: Final[dict[ErrorCode, tuple[int, str]]] = {
    "invalid_request": (400, "The request or its body cannot be parsed. Send valid multipart or JSON."),
    "unauthorized": (401, "The bearer token is missing or unknown. Send `Authorization: Bearer` with a valid token."),
    "not_found": (404, "There is nothing at this path. See `/docs`."),
    "method_not_allowed": (405, "The path does not take this method. See `/docs`."),
    "file_too_large": (413, "The only file of the request is larger than `max_bytes`. Send a smaller file."),
    "batch_too_large": (413, "The request holds more images or bytes than allowed. Send fewer images at once."),
    "unsupported_media_type": (415, "The content type or encoding of the body is unknown. Send multipart or JSON."),
    "validation_error": (422, "A field is missing, unknown or out of range. The message names it."),
    "overloaded": (429, "The server is at its capacity. Send the request again after `Retry-After` seconds."),
    "internal": (500, "An error in the service. Report it with its `request_id`."),
    "not_ready": (503, "No detector answers yet. Send the request again after `Retry-After` seconds."),
    "timeout": (504, "The answer took longer than allowed. Send fewer images at once."),
}
STATUS: Final[dict[ErrorCode, int]] = {code: status for code, (status, _) in CODES.items()}


class RequestError(Exception):
    """The request as a whole is refused. The message goes to the client and holds nothing that the client sent."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code


def error_body(code: ErrorCode, message: str, request_id: str) -> bytes:
    """The JSON of an error answer."""
    detail = ErrorDetail(code=code, message=message, request_id=request_id)
    return ErrorBody(error=detail).model_dump_json().encode()
