"""Finds columns that say what another column says already: the same values, or a recoding one to one.

Decided on the training rows alone. Pure.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from app.ai.domain import Column, IntArray
from app.ai.feature_transforms import normalise_text


def find_repeats(columns: Mapping[str, Column]) -> dict[str, str]:
    """Returns, for each column that repeats another, the name of the one to keep.

    Two columns repeat each other if equal cells of one are equal cells of the other, missing ones being
    cells like any other. Where most values occur once that alone is chance, so the values must also come in
    the same order, or the reverse. The column with the fewest missing cells is kept, of equals the first. A
    column that never varies repeats nothing.
    """
    kept: dict[bytes, str] = {}
    repeats: dict[str, str] = {}
    for name in sorted(columns, key=lambda name: -int(columns[name].present.sum())):
        codes = distinct_codes(columns[name])
        if len(codes) == 0 or (codes == codes[0]).all():
            continue
        key = _pattern(codes).tobytes()
        if key in kept:
            repeats[name] = kept[key]
        else:
            kept[key] = name
    return repeats


def distinct_codes(cells: Column) -> IntArray:
    """Numbers the distinct cells of a column (n,) in the order of their values; all missing cells are 0."""
    codes = np.zeros(len(cells.present), dtype=np.int64)
    values: Any = cells.values[cells.present]
    if cells.kind != "text":
        codes[cells.present] = np.unique(values, return_inverse=True)[1] + 1
        return codes
    # No array of texts: in one of NumPy's each takes as much as the longest.
    texts = [normalise_text(text) for text in values]
    number = {text: place for place, text in enumerate(sorted(set(texts)), 1)}
    codes[cells.present] = [number[text] for text in texts]
    return codes


def _pattern(codes: IntArray) -> IntArray:
    """Returns numbers (n,) that are equal for two columns exactly when they repeat each other."""
    _, first, place = np.unique(codes, return_index=True, return_inverse=True)
    if len(first) <= len(codes) / 2:
        # Numbered by first appearance, so that the names and the order of the values do not matter.
        return np.argsort(np.argsort(first))[place]
    present = codes[codes > 0]
    others = present[present != present[0]]
    # Counted downwards if the second value met is smaller than the first: a reversed column looks the same.
    falling = len(others) > 0 and others[0] < present[0]
    return np.where(codes == 0, 0, codes.max() + 1 - codes) if falling else codes
