"""Which images train, choose the epoch and calibrate, decided before any image is read."""

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from clipflow_ray.config import Closed, SplitConfig
from clipflow_ray.errors import ConfigError, TrainingError

log = logging.getLogger(__name__)

Part = Literal["training", "validation", "calibration", "unused"]
SplitBy = Literal["source", "image"]
# With fewer sources, one in five would be a single source.
_MIN_SOURCES: Final = 7
MIN_CALIBRATION: Final = 20
MIN_CALIBRATION_SOURCES: Final = 2


class Parts(Closed):
    """The images that do not train. All others train."""

    by: SplitBy = Field(description="`source` if the two lists name sources, `image` if they name row ids.")
    validation: tuple[str, ...] = Field(description="Kept for validation, in alphabetical order.")
    calibration: tuple[str, ...] = Field(description="Kept for calibration, in alphabetical order.")
    last: dict[str, str] = Field(
        {}, description="For each source with more photographs than may train, the last row id that trains."
    )

    def of(self, row_ids: Sequence[str], groups: Sequence[str]) -> NDArray[np.str_]:
        """The Part of each of N images, [N]."""
        keys = np.array(groups if self.by == "source" else row_ids, dtype=np.str_)
        kept_out = [np.isin(keys, np.array(names, np.str_)) for names in (self.validation, self.calibration)]
        surplus = [
            row_id > self.last.get(group, row_id)  # row ids are hashes, so their order is random
            for row_id, group in zip(row_ids, groups, strict=True)
        ]
        return np.select([*kept_out, np.array(surplus, bool)], ["validation", "calibration", "unused"], "training")


def assigned(images: Iterable[tuple[str, str]], config: SplitConfig, allow_small: bool) -> Parts:
    """Split images, given as (row id, source), so that the parts share no source if there are enough sources.

    `config` names the sources of validation and calibration. If it names none, each of the two gets one source in five
    by a hash of the name, or one image in five if there are fewer than seven sources. Raises ConfigError for a source
    that does not exist or if only one part is named. Raises TrainingError if the calibration has fewer than 20 images
    or fewer than two sources, unless `allow_small` is set.
    """
    source_of = dict(images)
    sources = sorted(set(source_of.values()))
    named = (*config.validation, *config.calibration)
    unknown = sorted(set(named) - set(sources))
    if unknown or set(config.validation) & set(config.calibration):
        raise ConfigError(
            f"The split must name existing sources, each once. Unknown: {unknown}. There are: {', '.join(sources)}."
        )
    if named and not (config.validation and config.calibration):
        raise ConfigError("Name sources for both `split.validation` and `split.calibration`, or for neither.")
    by: SplitBy = "source" if named or len(sources) >= _MIN_SOURCES else "image"
    if named:
        parts = Parts(by=by, validation=_sorted(config.validation), calibration=_sorted(config.calibration))
    else:
        fold = _folds(sources if by == "source" else list(source_of))
        chosen = [_sorted(name for name, at in fold.items() if at == number) for number in (0, 1)]
        parts = Parts(by=by, validation=chosen[0], calibration=chosen[1])
    if by == "image":
        log.warning(
            "there are only %d sources, so images and not sources are split: false positives on photographs of another "
            "source will be more frequent than the calibration says",
            len(sources),
        )
    _check_calibration(parts, source_of, allow_small)
    return parts.model_copy(update={"last": _last(parts, source_of, config.per_source)})


def _last(parts: Parts, source_of: dict[str, str], most: int | None) -> dict[str, str]:
    """`Parts.last` if at most this many photographs of a source train."""
    if most is None:
        return {}
    training: defaultdict[str, list[str]] = defaultdict(list)
    for (row_id, source), part in zip(
        source_of.items(), parts.of(list(source_of), list(source_of.values())), strict=True
    ):
        if part == "training":
            training[source].append(row_id)
    last = {source: sorted(row_ids)[most - 1] for source, row_ids in training.items() if len(row_ids) > most}
    log.info(
        "%d photographs train, at most %d of each source; %d more are not read",
        sum(min(most, len(row_ids)) for row_ids in training.values()),
        most,
        sum(max(0, len(row_ids) - most) for row_ids in training.values()),
    )
    return last


def _check_calibration(parts: Parts, source_of: dict[str, str], allow_small: bool) -> None:
    """Raise TrainingError if the calibration is too small to hold the tool to its verdicts."""
    part = parts.of(list(source_of), list(source_of.values()))
    sources = Counter(source for source, name in zip(source_of.values(), part, strict=True) if name == "calibration")
    count = sources.total()
    log.info(
        "calibration: %d images of %d sources, so the smallest alpha is %.2g", count, len(sources), 1 / (count + 1)
    )
    if not allow_small and (count < MIN_CALIBRATION or len(sources) < MIN_CALIBRATION_SOURCES):
        raise TrainingError(
            f"The calibration needs {MIN_CALIBRATION} images from {MIN_CALIBRATION_SOURCES} sources; it would have "
            f"{count} from {len(sources)}. Give more images in more folders, name other sources in "
            "`split.calibration`, or set --allow-small to train for a trial."
        )


def _folds(keys: Sequence[str]) -> dict[str, int]:
    """A fold, 0 to 4, for each of the distinct keys, dealt in the order of their hashes."""
    ordered = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    return {key: at % 5 for at, key in enumerate(ordered)}


def _sorted(names: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(names))
