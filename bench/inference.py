"""What scoring costs: compiled loops against scikit-learn's own `predict_proba` and a loop over its trees.

python bench/inference.py [SECONDS]     for each model and batch size, half a second unless told

One process, one thread, the three ways in turn, so that a busy machine slows all alike: read the ratios. The
answers are compared before anything is timed.
"""

import os
import sys
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"  # before the first import that makes a pool

import numpy as np
from numpy.typing import NDArray
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from app.ai.estimators import build_scorer
from app.ai.score_kernels import installed_kernels

Array = NDArray[np.float64]
Score = Callable[[Array], Array]

SIZES = (1, 10, 100, 2_000, 100_000)
MODELS = {
    "random forest, 100 trees, depth 10": RandomForestClassifier(100, max_depth=10, random_state=0),
    "histogram boosting, 100 x 31 leaves": HistGradientBoostingClassifier(random_state=0),
    "logistic regression with scaler": make_pipeline(StandardScaler(), LogisticRegression()),
}


def make_leads(n: int) -> tuple[Array, NDArray[np.int64]]:
    """Returns `n` made-up leads with 20 features, and outcomes that depend on some of them."""
    random = np.random.default_rng(0)
    rows = random.normal(size=(n, 20))
    return rows, (rows[:, :5].sum(axis=1) + 2 * random.normal(size=n) > 0).astype(np.int64)


def measure(ways: dict[str, Score], rows: Array, seconds: float) -> dict[str, float]:
    """Returns the median time of a call (seconds) of each way, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    until = time.perf_counter() + seconds
    while len(times["compiled"]) < 3 or time.perf_counter() < until:
        for name, score in ways.items():
            began = time.perf_counter()
            score(rows)
            times[name].append(time.perf_counter() - began)
    return {name: float(np.median(taken)) for name, taken in times.items()}


def main() -> None:
    """Prints for each model: median microseconds of a call, and how many times those of compiled."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    if installed_kernels() is None:
        raise SystemExit("the compiled loops are not installed")
    rows, outcomes = make_leads(max(SIZES))
    for title, estimator in MODELS.items():
        estimator.fit(rows[:25_000], outcomes[:25_000])
        began = time.perf_counter()
        compiled = build_scorer(estimator)
        built_ms = (time.perf_counter() - began) * 1000
        ways: dict[str, Score] = {
            "compiled": compiled,
            "tree loop": build_scorer(estimator, lambda: None),
            "predict_proba": lambda values, model=estimator: model.predict_proba(values)[:, 1],
        }
        answers = {name: score(rows) for name, score in ways.items()}
        apart = {name: np.abs(answer - answers["compiled"]).max() for name, answer in answers.items()}
        assert apart["tree loop"] == 0
        assert apart["predict_proba"] <= 1e-15
        print(f"\n{title}: built in {built_ms:.1f} ms, {apart['predict_proba']:.0e} from predict_proba")
        print(f"{'rows':>8} {'compiled us':>12} {'tree loop':>18} {'predict_proba':>18}")
        for size in SIZES:
            taken = measure(ways, rows[:size], seconds)
            others = "".join(
                f"{taken[name] * 1e6:>10.0f} ({taken[name] / taken['compiled']:>4.1f}x)"
                for name in list(ways)[1:]
            )
            print(f"{size:>8,} {taken['compiled'] * 1e6:>12.1f} {others}")


if __name__ == "__main__":
    main()
