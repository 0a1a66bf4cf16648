"""What each feature is worth to a model, as the weights its verdicts count coverage by.

Pure. Called by `app.training.describe`; the importances come from `app.training.evaluate`.
"""

from collections.abc import Mapping, Sequence


def build_weights(importance: Mapping[str, float], names: Sequence[str]) -> list[float]:
    """Returns one weight for each feature, not negative, which sum to 1.

    A weight is the feature's share of all that shuffling loses on held-out rows (permutation importance;
    Breiman, Random Forests, Machine Learning 45, 2001). A feature whose shuffling loses nothing weighs
    nothing: a lead without it is no worse known. Where no feature loses anything all weigh the same.
    """
    losses = [max(importance[name], 0.0) for name in names]
    total = sum(losses)
    if total <= 0:
        return [1 / len(names)] * len(names)
    return [loss / total for loss in losses]
