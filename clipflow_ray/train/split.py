"""The parts of the features: what trains, what chooses the epoch and what calibrates."""

from dataclasses import dataclass

import numpy as np

from clipflow_ray import proxies
from clipflow_ray.config import SplitConfig
from clipflow_ray.errors import ConfigError, TrainingError
from clipflow_ray.train.features import Features


@dataclass(frozen=True)
class Split:
    """Disjoint parts of the features. `held_out` are validation proxies of the family that training never sees.

    Proxies of a pair of families that includes the held-out family are in no part.
    """

    natural: Features
    proxy: Features
    validation_natural: Features
    validation_proxy: Features
    held_out: Features
    calibration: Features


def split(features: Features, config: SplitConfig) -> Split:
    """Split by `features.part`. `config` names the held-out family, if there is one.

    Raises ConfigError for an unknown family, and TrainingError if a part is empty.
    """
    families = sorted(set(map(str, np.unique(proxies.merged(features.family)))) - {proxies.NATURAL, proxies.PAIRS})
    if config.held_out_family not in (None, *families):
        raise ConfigError(f"No proxies of family {config.held_out_family!r}; there are: {', '.join(families)}.")
    train, validation = features.part == "training", features.part == "validation"
    natural = features.family == proxies.NATURAL
    held_out = features.family == (config.held_out_family or "")
    unseen = proxies.involves(features.family, [config.held_out_family or ""])
    parts = {
        "natural": features.where(train & natural),
        "proxy": features.where(train & ~natural & ~unseen),
        "validation_natural": features.where(validation & natural),
        "validation_proxy": features.where(validation & ~natural & ~unseen),
        "held_out": features.where(validation & held_out),
        "calibration": features.where(features.part == "calibration"),
    }
    empty = [name for name, part in parts.items() if len(part) == 0 and (name != "held_out" or config.held_out_family)]
    if empty:
        raise TrainingError(f"Nothing is left for {', '.join(empty)}: give more images, or name other sources.")
    return Split(**parts)
