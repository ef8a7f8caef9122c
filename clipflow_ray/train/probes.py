"""Supervised probes that separate naturals from proxies: baselines of `evaluate`, never part of a score."""

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from clipflow_ray.model.flow import Flow

_LOGISTIC_STRENGTH: Final = 0.01
_MLP_WIDTHS: Final = (128,)


def fit_probes(flow: Flow, natural: NDArray[np.float32], proxy: NDArray[np.float32]) -> dict[str, Tensor]:
    """Fit a logistic regression and an MLP on raw embeddings float32 [N, D] and [M, D], standardised by `flow`.

    Returns their float32 weights under the names of `Checkpoint.reference`. Higher outputs are more suspicious.
    """
    with torch.inference_mode():
        features = flow.standardize(torch.from_numpy(np.concatenate([natural, proxy]))).numpy()
    labels = np.r_[np.zeros(len(natural)), np.ones(len(proxy))]
    logistic = LogisticRegression(C=_LOGISTIC_STRENGTH, class_weight="balanced", max_iter=2000).fit(features, labels)
    probes: dict[str, NDArray[Any]] = {"probe": np.r_[logistic.coef_[0], logistic.intercept_]}
    mlp = MLPClassifier(_MLP_WIDTHS, early_stopping=True, n_iter_no_change=5, random_state=0).fit(features, labels)
    for at, (weight, bias) in enumerate(zip(mlp.coefs_, mlp.intercepts_, strict=True)):
        probes |= {f"mlp.{at}.weight": weight, f"mlp.{at}.bias": bias}
    return {name: torch.from_numpy(np.asarray(values, np.float32)) for name, values in probes.items()}
