"""One exception tree. Every error has a stable snake_case code and a sentence that says what to do next."""

from typing import Final, Literal

ItemCode = Literal[
    "bad_uri",
    "not_found",
    "access_denied",
    "read_timeout",
    "read_failed",
    "changed",
    "empty",
    "unsupported_format",
    "decode_failed",
    "decode_timeout",
    "decoder_crash",
    "truncated",
    "too_large_bytes",
    "too_large_pixels",
    "too_small",
    "non_finite",
    "internal",
]
# What each code means and what to do; docs/formats.md shows these sentences.
ITEM_CODES: Final[dict[ItemCode, str]] = {
    "bad_uri": "The URI is empty, is not UTF-8, or is neither `s3://` nor a local path. Correct the input.",
    "not_found": "The object does not exist, or no longer. Correct the input, or list it again with a new output.",
    "access_denied": "The credentials do not allow reading the object. Grant access, or leave the object out.",
    "read_timeout": "The object did not arrive in time. Check the store and repeat the audit with a new output.",
    "read_failed": "The object, or the archive or table that holds it, cannot be read. Check it and the store, and "
    "repeat the audit with a new output.",
    "changed": "The object changed after it was listed. Repeat the audit with a new output.",
    "empty": "The object has no bytes, or the row of the parquet file holds no image. Restore it or leave it out.",
    "unsupported_format": "The first bytes are of no format that is decoded; the message names it. Convert the file.",
    "decode_failed": "The image or its base64 is damaged, or decoding needs more memory or JPEG scans than allowed.",
    "decode_timeout": "Decoding took longer than allowed. Raise `--max-seconds` if you trust the image.",
    "decoder_crash": "The decoder process died on this image on every attempt. Treat the image as damaged or hostile.",
    "truncated": "The file is cut off before its end. Fetch it again.",
    "too_large_bytes": "The file is larger than allowed. Raise `--max-bytes` or shrink the file.",
    "too_large_pixels": "The image has more pixels than allowed. Raise `--max-pixels` or `--max-side`.",
    "too_small": "The shorter side is below `--min-side`. Use a larger image.",
    "non_finite": "The encoder gave no finite embedding. Check the encoder's weights if this is frequent.",
    "internal": "An error in this program, such as a decoder process that does not start. See the log and report it.",
}


class ClipflowError(Exception):
    """Base of all errors that this package raises on purpose. The class itself: an error without a code of its own."""

    code: str = "internal"


class ItemError(ClipflowError):
    """One object cannot be scored; the others still are. `item_code` is the `error_code` in the ledger."""

    def __init__(self, item_code: ItemCode, message: str) -> None:
        super().__init__(message)
        self.item_code: ItemCode = item_code

    def __reduce__(self) -> tuple[type["ItemError"], tuple[str, str]]:
        return (type(self), (self.item_code, str(self)))


class ImageError(ItemError):
    """The bytes are not an image that can be scored."""


class ReadError(ItemError):
    """The bytes could not be read from storage."""


class NotAnImage(ReadError):
    """The object is no image and does not call itself one. It is counted, but it is no error of the input."""

    def __init__(self, message: str) -> None:
        super().__init__("unsupported_format", message)

    def __reduce__(self) -> tuple[type["NotAnImage"], tuple[str]]:  # type: ignore[override]
        return (type(self), (str(self),))


class ConfigError(ClipflowError):
    """A setting is missing, unknown or contradicts another."""

    code = "invalid_config"


class InputError(ClipflowError):
    """The input holds nothing that can be read, or is not in the given format."""

    code = "invalid_input"


class WeightsError(ClipflowError):
    """Encoder weights are missing, cannot be fetched, or are altered."""

    code = "weights_unavailable"


class EncoderMismatchError(ClipflowError):
    """A checkpoint or a cache of embeddings was made with another encoder."""

    code = "encoder_mismatch"


class CheckpointError(ClipflowError):
    """A checkpoint directory is missing, incomplete or altered."""

    code = "invalid_checkpoint"


class CalibrationError(ClipflowError):
    """The checkpoint has no calibration, or it has too few images for the requested alpha."""

    code = "not_calibrated"


class ResourceError(ClipflowError):
    """The cluster is too small for the run, which would wait forever."""

    code = "plan_does_not_fit"


class RunConflictError(ClipflowError):
    """The output holds a run with other inputs or settings, or another run writes to it now."""

    code = "run_conflict"


class TrainingError(ClipflowError):
    """Training had no usable images or gave no usable flow."""

    code = "training_failed"


class EdgeError(ClipflowError):
    """The reverse proxy in front of the endpoint cannot run."""

    code = "edge_unavailable"


class ClientError(ClipflowError):
    """The endpoint refused a request or could not be reached.

    `code` is the endpoint's own, or `unreachable` and `unexpected_answer`; `request_id` finds the request in its log.
    """

    def __init__(self, code: str, message: str, request_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.request_id = request_id
