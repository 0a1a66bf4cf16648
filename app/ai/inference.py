"""Raw scores: from the arrays of a fitted model to a function of feature values, built once at each load.

Row i of a batch is scored as if it were alone, bit for bit, on one thread, with the bits scikit-learn gives.
Pure. This is where another inference engine would be put in.
"""

from collections.abc import Callable

from app.ai.domain import FloatArray
from app.ai.fitted_model import FittedModel
from app.ai.score_kernels import ScoreKernels

Scorer = Callable[[FloatArray], FloatArray]
"""Feature values (n, k), float64, to raw scores of the positive class (n,), in [0, 1]."""


def build_compiled_scorer(model: FittedModel, kernels: ScoreKernels) -> Scorer:
    """Returns the scorer of a model whose arrays are checked.

    Raises:
        ValueError: its trees have more nodes than an index can name.
    """
    scaling = model.scaling
    if model.kind == "logistic":
        sum_terms = kernels.build_linear_sum(model.weights, model.start, scaling.means, scaling.scales)
        return lambda values: kernels.logistic(sum_terms(values))
    sum_trees = kernels.build_tree_sum(
        model.trees, model.n_features, start=model.start, single_precision=model.kind == "forest"
    )
    if model.kind == "forest":
        count = len(model.trees)
        return lambda values: sum_trees(scaling(values)) / count
    return lambda values: kernels.logistic(sum_trees(scaling(values)))
