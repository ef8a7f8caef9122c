"""Which images train, choose the epoch and calibrate. The parts share no source if there are enough sources."""

import hashlib
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from clipflow_ray import proxies
from clipflow_ray.config import SplitConfig
from clipflow_ray.errors import ConfigError, TrainingError
from clipflow_ray.train.features import Features

SplitBy = Literal["source", "image"]
_MIN_SOURCES: Final = 5


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the features. `held_out` are validation proxies of the family that training never sees.

    Proxies of a pair of families that includes the held-out family are in no part. `by` is the unit of the split.
    """

    natural: Features
    proxy: Features
    validation_natural: Features
    validation_proxy: Features
    held_out: Features
    calibration: Features
    by: SplitBy

    def parts(self) -> dict[str, Features]:
        """The parts by name."""
        return {name: part for name, part in vars(self).items() if isinstance(part, Features)}


def split(features: Features, config: SplitConfig) -> Split:
    """Split by source, which is the `group` of the features.

    `config` names the sources of validation and calibration. If it names none, each of the two gets one source in five
    by a hash of the name, or one image in five if there are fewer than five sources. Calibration keeps only the view
    that inference uses. Raises ConfigError for an unknown source or family, and TrainingError if a part is empty.
    """
    sources = sorted(map(str, np.unique(features.group)))
    unknown = sorted(set((*config.validation, *config.calibration)) - set(sources))
    if unknown or set(config.validation) & set(config.calibration):
        raise ConfigError(
            f"The split must name existing sources, each once. Unknown: {unknown}. There are: {', '.join(sources)}."
        )
    families = sorted(set(map(str, np.unique(proxies.merged(features.family)))) - {proxies.NATURAL, proxies.PAIRS})
    if config.held_out_family not in (None, *families):
        raise ConfigError(f"No proxies of family {config.held_out_family!r}; there are: {', '.join(families)}.")
    named = bool(config.validation or config.calibration)
    by: SplitBy = "source" if named or len(sources) >= _MIN_SOURCES else "image"
    if named:
        validation = np.isin(features.group, config.validation)
        calibration = np.isin(features.group, config.calibration)
    else:
        fold = _folds(features.group if by == "source" else features.row_id)
        validation, calibration = fold == 0, fold == 1
    train = ~validation & ~calibration
    natural = features.family == proxies.NATURAL
    held_out = features.family == (config.held_out_family or "")
    unseen = proxies.involves(features.family, [config.held_out_family or ""])
    parts = {
        "natural": features.where(train & natural),
        "proxy": features.where(train & ~natural & ~unseen),
        "validation_natural": features.where(validation & natural),
        "validation_proxy": features.where(validation & ~natural & ~unseen),
        "held_out": features.where(validation & held_out),
        "calibration": features.where(calibration & natural & (features.view == 0)),
    }
    empty = [name for name, part in parts.items() if len(part) == 0 and (name != "held_out" or config.held_out_family)]
    if empty:
        raise TrainingError(f"Nothing is left for {', '.join(empty)}: give more images, or name other sources.")
    return Split(**parts, by=by)


def _folds(keys: NDArray[np.str_]) -> NDArray[np.int64]:
    """Return a fold, 0 to 4, for each key. Distinct keys are dealt to the folds in the order of their hashes."""
    distinct = sorted(map(str, np.unique(keys)), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    fold = {key: at % 5 for at, key in enumerate(distinct)}
    return np.array([fold[str(key)] for key in keys], np.int64)
