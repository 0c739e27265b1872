"""GLUE's metrics, under the names of the `evaluate` library; imported late, since scikit-learn takes a second."""

import math
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from scipy import stats
from sklearn import metrics


def scores(names: Iterable[str], labels: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """The metrics called `names` of predictions (n,) against labels (n,), n ≥ 1."""
    with warnings.catch_warnings(action="ignore"):  # about constant answers, which untrained models give
        return {name: float(METRICS[name](labels, predicted)) for name in names}


def correlation(test: Callable[..., Any], labels: np.ndarray, predicted: np.ndarray) -> float:
    """The coefficient of a test such as `scipy.stats.pearsonr`; 0 where one side is constant, NaN where a prediction
    is."""
    if not np.isfinite(predicted).all():
        return math.nan
    value = float(test(labels, predicted).statistic) if len(labels) > 1 else math.nan
    return 0.0 if math.isnan(value) else value


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {  # (labels, predicted) → number
    "accuracy": metrics.accuracy_score,
    "f1": partial(metrics.f1_score, zero_division=0.0),  # of label 1
    "matthews_correlation": metrics.matthews_corrcoef,
    "pearson": partial(correlation, stats.pearsonr),
    "spearmanr": partial(correlation, stats.spearmanr),
}
