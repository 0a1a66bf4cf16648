"""Parts rows into those to learn from and those to be measured on, the way a model will be used.

Where the source says in which order leads came to be, the past foretells the future: no training row is later
than a test row. Elsewhere rows are drawn, both classes evenly. Copies, rows equal in every column a feature
could read, never sit on both sides, nor do rows of one lead: a model may know them by heart. Rows that chance
alone makes equal may, as the next lead is like known ones, too. Pure, and the seed is a parameter. Called by
`app.training.train` and wherever a fit is cross-validated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from app.ai.domain import FloatArray, IntArray
from app.errors import TrainingError
from app.training.derive import reason_to_drop
from app.training.repeats import distinct_codes
from app.training.rows import TrainingRows

FOLDS = 5
_FIRST_SHARE = 1 / 3
"""The share of rows, from the earliest on, that every time-ordered fold learns from."""

_NEW_SHARE = 0.25
"""With fewer rows that copy no earlier one, the last fifth would be tested on its odd ones only."""

_EXPECTED_EQUALS = 0.1
"""Where as many others are expected to equal a lead by chance, those that do need not be copies."""

_MOST_COPIES = 10
"""Nobody enters the same lead more often; leads that are equal in larger numbers happen to be alike."""


class Fold(NamedTuple):
    """Places of the rows to fit on and of the rows to measure on."""

    train: IntArray
    test: IntArray


def split_rows(rows: TrainingRows, seed: int) -> tuple[TrainingRows, TrainingRows]:
    """Returns the part to fit and calibrate on, and the fifth to test on once: one row of each lead there.

    Rows of one lead tell nearly the same, and a test that counted them all would seem surer than it is.
    With an order the test part is the last fifth, less the copies of earlier rows, which are in neither part.
    Otherwise, or where fewer than a quarter of the last fifth are no such copies, it is drawn at random, and
    neither part has an order.

    Raises:
        TrainingError: a part would hold leads of one class only.
    """
    group, learnt = group_rows(rows), np.ones(rows.leads.n, dtype=np.bool_)
    where = "the most recent fifth of the leads, less those identical to an earlier one,"
    if rows.order is not None:
        latest = np.argsort(rows.order, kind="stable")[rows.leads.n - rows.leads.n // FOLDS :]
        learnt[latest] = False
        held_out = ~learnt & ~np.isin(group, group[learnt])
        if held_out.sum() < len(latest) * _NEW_SHARE:
            rows = replace(rows, order=None)
    if rows.order is None:
        held_out = _random_folds(group, rows.outcome, np.random.default_rng(seed)) == 0
        learnt = ~held_out
        where = "the fifth drawn to test on, with identical leads kept together,"
    parts = rows.take(learnt), rows.take(held_out).take_one_a_lead()
    for part, name in zip(parts, ("what is left to learn from", where), strict=True):
        if not _both_classes(part.outcome):
            raise TrainingError(
                f"{name} holds {part.leads.n} leads, and not both some with the outcome and some without: "
                "nothing could be measured. More leads are needed, or another order (--order-by) or other "
                "columns, as these part the outcomes."
            )
    return parts


def build_folds(rows: TrainingRows, seed: int) -> list[Fold]:
    """Returns the folds to cross-validate on; both classes occur in each part of each.

    As in `split_rows`, one row of each lead is measured on.

    Without an order five stratified folds. With one, windows that grow: the first third of the rows foretells
    the next block, both together the one after, up to five; a block without both classes is joined with the
    next, and a copy of an earlier row is in no test part.

    Raises:
        TrainingError: there is no fold with both classes in both parts.
    """
    group = group_rows(rows)
    found = list(
        _expanding_windows(rows, rows.order, group)
        if rows.order is not None
        else _drawn_folds(rows, group, seed)
    )
    if not found:
        raise TrainingError(
            "no way to part the leads leaves some with the outcome and some without on both sides: in the "
            "order they came, or with identical ones kept together, the outcomes are apart. More leads are "
            "needed."
        )
    return found


def group_rows(rows: TrainingRows) -> IntArray:
    """Numbers the groups of rows (n,) that stay together: copies, equal in every column, and those of a lead.

    Columns that could never become a feature, as they number the leads or name them, do not count. Equal rows
    are no copies where others are expected to equal them by chance. Nor are they where half of the rows still
    have more equals than anybody enters twice: columns that go together, or one of few values, cannot tell
    leads apart. Kept together, whole values would be held out, unheard of, and in order the common ones would
    be missing from every test part.
    """
    one_a_lead = rows.take_one_a_lead().leads.columns
    columns = [
        distinct_codes(cells)
        for name, cells in rows.leads.columns.items()
        if reason_to_drop(one_a_lead[name]) is None
    ]
    each, group = np.arange(rows.leads.n), np.zeros(rows.leads.n, dtype=np.int64)
    for codes in columns:
        group = _refine(group, codes)
    by_chance = _expect_equals(columns, group) >= _EXPECTED_EQUALS
    group = np.unique(np.where(by_chance[group], len(each) + each, group), return_inverse=True)[1]
    if not _are_copies(group, each if rows.lead is None else rows.lead):
        group = each
    return group if rows.lead is None else _join_leads(group, rows.lead)


def _refine(group: IntArray, codes: IntArray) -> IntArray:
    """Parts groups (n,) by the distinct cells of one more column."""
    finer: IntArray = np.unique(group * (codes.max() + 1) + codes, return_inverse=True)[1]
    return finer


def _expect_equals(columns: Sequence[IntArray], group: IntArray) -> FloatArray:
    """Returns how many other rows would equal those of each group (groups,) if columns were independent.

    How common a value is the rows outside the group say: copies would vouch for themselves. A column that
    parts no rows that those of more values have not parted, as a city's country, tells nothing of its own.
    """
    _, first, size = np.unique(group, return_index=True, return_counts=True)
    expected, parted = np.full(len(size), len(group) - 1.0), np.zeros_like(group)
    for codes in sorted(columns, key=lambda codes: -codes.max()):
        finer = _refine(parted, codes)
        if finer.max() > parted.max():
            expected *= (np.bincount(codes)[codes[first]] - size) / len(group)
        parted = finer
    return expected


def _are_copies(group: IntArray, lead: IntArray) -> bool:
    """Tells whether equal rows (n,) may be copies of a lead: half of them have no more equals than that."""
    leads = np.bincount(np.unique(np.stack((group, lead)), axis=1)[0])
    return bool(np.median(leads[group]) <= _MOST_COPIES)


def _join_leads(group: IntArray, lead: IntArray) -> IntArray:
    """Joins groups (n,) of equal rows that have rows of one lead in common; `lead` (n,) numbers the leads.

    Where leads begin alike, that chains nearly all of them together, and hardly any could be held out: if it
    adds more than a fold to the largest group, the rows of a lead are a group and nothing else is.
    """
    _, lead = np.unique(lead, return_inverse=True)
    leads, groups = lead.max(initial=-1) + 1, group.max(initial=-1) + 1
    if leads == len(lead):
        return group
    links = coo_array((np.ones(len(lead)), (lead, leads + group)), shape=(leads + groups, leads + groups))
    joined: IntArray = connected_components(links, directed=False)[1][lead]
    chained = np.bincount(joined).max() - np.bincount(group).max()
    return joined if chained <= len(lead) / FOLDS else lead


def _drawn_folds(rows: TrainingRows, group: IntArray, seed: int) -> Iterator[Fold]:
    fold, outcome = _random_folds(group, rows.outcome, np.random.default_rng(seed)), rows.outcome
    for number in range(FOLDS):
        train, test = np.flatnonzero(fold != number), rows.draw_one_a_lead(np.flatnonzero(fold == number))
        if _both_classes(outcome[train]) and _both_classes(outcome[test]):
            yield Fold(train, test)


def _random_folds(group: IntArray, outcome: IntArray, random: np.random.Generator) -> IntArray:
    """Returns the fold of each row (n,): whole groups, largest first, each fold in proportion to its room.

    Groups alike in size and in outcomes are dealt out evenly, so single rows are stratified as usual. But no
    fold makes up for the outcomes of a large group: choosing the others by their outcomes would leave a fold
    in which leads that look alike apply more often, or less, than they do.
    """
    size, positives = np.bincount(group), np.bincount(group, weights=outcome)
    fold_of, room = np.empty(len(size), dtype=np.int64), np.full(FOLDS, len(group) / FOLDS)
    for rows in np.unique(size)[::-1]:
        share = np.cumsum(np.maximum(room, 0.0))
        for won in np.unique(positives[size == rows]):
            alike = random.permutation(np.flatnonzero((size == rows) & (positives == won)))
            # Systematic sampling: evenly spaced places from a random start, as many in a fold as its share.
            places = (np.arange(len(alike)) + random.random()) / len(alike) * share[-1]
            fold_of[alike] = np.searchsorted(share, places, side="right")
        room -= rows * np.bincount(fold_of[size == rows], minlength=FOLDS)
    return fold_of[group]


def _expanding_windows(rows: TrainingRows, order: FloatArray, group: IntArray) -> Iterator[Fold]:
    turn, outcome = np.argsort(order, kind="stable"), rows.outcome
    cuts = np.linspace(len(turn) * _FIRST_SHARE, len(turn), FOLDS + 1).astype(int)
    start = cuts[0]
    for end in cuts[1:]:
        train, block = turn[:start], turn[start:end]
        test = rows.draw_one_a_lead(block[~np.isin(group[block], group[train])])
        if not _both_classes(outcome[train]):
            start = end
        elif _both_classes(outcome[test]):
            yield Fold(np.sort(train), np.sort(test))
            start = end


def _both_classes(outcome: IntArray) -> bool:
    return bool(outcome.min(initial=1) == 0 and outcome.max(initial=0) == 1)
