"""Fit the small auto-encoders of the learned proxy families on the photographs that train a flow."""

import logging
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import l1_loss

from clipflow_ray import sandbox
from clipflow_ray.config import InventoryOptions, TrainConfig
from clipflow_ray.errors import InputError, ItemError
from clipflow_ray.images import by_size
from clipflow_ray.inputs.listing import rows
from clipflow_ray.inputs.reading import read_row
from clipflow_ray.model.weights import load_record
from clipflow_ray.place import places
from clipflow_ray.proxies.autoencoder import DECODERS, Autoencoder, Decoder, save

log = logging.getLogger(__name__)

_SIDE: Final = 64
_BATCH: Final = 16
_LEARNING_RATE: Final = 2e-3
_EDGE_WEIGHT: Final = 1.0
_STEPS_PER_LOG: Final = 200


def make(config: TrainConfig, steps: int) -> int:
    """Fit one auto-encoder for each decoder and write them to `config.output`, a local folder.

    `config` is a training config; sources that its split reserves are skipped. Returns the number of images used.
    Unreadable images are skipped. Raises InputError if no image is readable.
    """
    views = _training_views(config)
    for decoder in DECODERS:
        save(fit(views, decoder, steps, config.fit.seed), decoder, Path(config.output))
    return len(views)


def fit(views: NDArray[np.uint8], decoder: Decoder, steps: int, seed: int = 0) -> Autoencoder:
    """Fit on random squares of natural views, uint8 [N, H, W, 3]. Equal seeds give equal results on one machine.

    The loss is the mean absolute error of the pixels plus that of the differences between neighbouring pixels.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    autoencoder = Autoencoder(decoder)
    optimizer = torch.optim.Adam(autoencoder.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        original = _squares(views, rng)
        loss = _difference(autoencoder(original), original)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % _STEPS_PER_LOG == 0:
            log.info("auto-encoder %s, step %d of %d: loss %.4f", decoder, step + 1, steps, loss.item())
    return autoencoder


def _training_views(config: TrainConfig) -> NDArray[np.uint8]:
    """uint8 [N, S, S, 3] of the images whose source is neither for validation nor for calibration."""
    kept_out = {*config.split.validation, *config.split.calibration}
    inputs, options, views = places(config.input, config.s3), InventoryOptions(), []
    spec = load_record(config.encoder).view
    for row in rows(inputs, options):
        if row["group"] in kept_out:
            continue
        try:
            data = read_row(row, inputs[0], options, config.limits)
            views.append(by_size(sandbox.decode(data, config.limits, spec).rgb[None], spec.sizes)[0][0])
        except ItemError as error:
            log.warning("skipped %s: %s", " ".join((row["uri"], row["member"])).strip(), error)
    if not views:
        raise InputError(f"No readable image to train on under {', '.join(config.input)}.")
    return np.stack(views)


def _difference(rebuilt: Tensor, original: Tensor) -> Tensor:
    edges = sum(l1_loss(rebuilt.diff(dim=axis), original.diff(dim=axis)) for axis in (2, 3))
    return l1_loss(rebuilt, original) + _EDGE_WEIGHT * edges


def _squares(views: NDArray[np.uint8], rng: np.random.Generator) -> Tensor:
    squares = []
    for at in rng.integers(len(views), size=_BATCH):
        top, left = rng.integers(views.shape[1] - _SIDE + 1), rng.integers(views.shape[2] - _SIDE + 1)
        square = views[at, top : top + _SIDE, left : left + _SIDE]
        squares.append(square[:, ::-1] if rng.random() < 0.5 else square)
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2) / 255.0
