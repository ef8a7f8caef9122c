"""One exception tree. Every error has a stable snake_case code and a sentence that says what to do next."""

from typing import Literal, get_args

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
ITEM_CODES: tuple[str, ...] = get_args(ItemCode)


class ClipflowError(Exception):
    """Base of all errors that this package raises on purpose."""

    code: str = "internal"


class ItemError(ClipflowError):
    """One object cannot be scored; the others go on. `item_code` is the ledger's `error_code`."""

    def __init__(self, item_code: ItemCode, message: str) -> None:
        super().__init__(message)
        self.item_code: ItemCode = item_code

    def __reduce__(self) -> tuple[type["ItemError"], tuple[str, str]]:
        return (type(self), (self.item_code, str(self)))


class ImageError(ItemError):
    """The bytes are not an image that we score."""


class ReadError(ItemError):
    """The bytes could not be read from storage."""


class ConfigError(ClipflowError):
    """A setting is missing, unknown or contradicts another."""

    code = "invalid_config"


class InputError(ClipflowError):
    """The input names nothing that can be audited or trained on."""

    code = "invalid_input"


class WeightsError(ClipflowError):
    """Encoder weights are missing, unreachable or not what they should be."""

    code = "weights_unavailable"


class EncoderMismatchError(ClipflowError):
    """A checkpoint or cache was made with another encoder than the one at hand."""

    code = "encoder_mismatch"


class CheckpointError(ClipflowError):
    """A checkpoint directory is missing, incomplete or altered."""

    code = "invalid_checkpoint"


class CalibrationError(ClipflowError):
    """The calibration cannot support what was asked of it."""

    code = "not_calibrated"


class ResourceError(ClipflowError):
    """The cluster cannot run the plan; it would hang."""

    code = "plan_does_not_fit"


class RunConflictError(ClipflowError):
    """The output already holds a run that is not this one."""

    code = "run_conflict"


class TrainingError(ClipflowError):
    """Training gave no usable flow."""

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
