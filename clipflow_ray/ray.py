"""The detector as a stage of your own Ray Data pipeline; docs/operating.md has an example.

ray.data.read_images("photos/").map_batches(Detect, fn_constructor_kwargs={"column": "image"}, concurrency=2)
"""

from typing import Any, Final

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from clipflow_ray.config import CAP_PRONE_STRATA, DEFAULT_CHECKPOINT, ImageLimits
from clipflow_ray.errors import ItemError
from clipflow_ray.model.checkpoint import load_checkpoint
from clipflow_ray.model.detector import Detector
from clipflow_ray.model.finding import Finding, refused

PREFIX: Final = "clipflow_"
_EMPTY: Final = ItemError("empty", "The cell is null.")
Batch = dict[str, NDArray[Any]]


class Detect:
    """A class for `Dataset.map_batches`, whose instances each hold the detector of one checkpoint.

    `column` holds a picture a row, as `Detector.detect` takes them: bytes, a path, or a uint8 array [height, width, 3].
    The default is the column of `ray.data.read_binary_files`. Every row is kept, and these columns are added:

    - `clipflow_verdict` and `clipflow_stratum`: text, null in a row with an error.
    - `clipflow_score`, `clipflow_p_value` and `clipflow_log_likelihood`: float64, NaN in a row with an error.
    - `clipflow_error_code` and `clipflow_error_message`: text, null in a row without an error.

    Give `concurrency`, the number of instances. An instance computes on the CPUs of its `num_cpus`, by default one, or
    on a GPU if `num_gpus` gives it one. Raises CalibrationError at the start if `alpha` is too small for the
    calibration, KeyError if the batch has no such column, and TypeError if a cell is neither null nor a picture.
    """

    def __init__(
        self,
        column: str = "bytes",
        checkpoint: str = DEFAULT_CHECKPOINT,
        alpha: float = 0.01,
        cap_prone_strata: bool = CAP_PRONE_STRATA,
        limits: ImageLimits | None = None,
    ) -> None:
        assigned = ray.get_runtime_context().get_assigned_resources()
        threads = max(1, int(assigned.get("CPU", 1)))
        torch.set_num_threads(1)
        device = None if assigned.get("GPU") else "cpu"
        self._detector = Detector(load_checkpoint(checkpoint), device, threads, limits=limits)
        self._detector.calibration.rule(alpha, cap_prone_strata)
        self._column = column
        self._alpha = alpha
        self._cap = cap_prone_strata

    def __call__(self, batch: Batch) -> Batch:
        """A batch of N rows as numpy arrays, Ray Data's default format -> the same with the columns of the findings."""
        cells = list(batch[self._column])
        found = iter(self._detector.detect([cell for cell in cells if cell is not None], self._alpha, self._cap))
        findings = [refused(at, None, _EMPTY) if cell is None else next(found) for at, cell in enumerate(cells)]
        errors = [finding.error for finding in findings]
        texts = {
            "verdict": [finding.verdict for finding in findings],
            "stratum": [finding.stratum for finding in findings],
            "error_code": [error and error["code"] for error in errors],
            "error_message": [error and error["message"] for error in errors],
        }
        return {
            **batch,
            **{PREFIX + name: _numbers(findings, name) for name in ("score", "p_value", "log_likelihood")},
            **{PREFIX + name: np.array(values, object) for name, values in texts.items()},
        }


def _numbers(findings: list[Finding], name: str) -> NDArray[np.float64]:
    return np.array([np.nan if finding.error else getattr(finding, name) for finding in findings], np.float64)
