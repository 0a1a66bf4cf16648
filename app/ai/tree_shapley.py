"""Exact Shapley values of trees: what each player adds to the sum of trees for one lead.

The game is path-dependent TreeSHAP's (Lundberg et al., From local explanations to global understanding with
explainable AI for trees, Nature Machine Intelligence 2, 2020, algorithm 2): where a tree asks for a player
that is in the coalition it follows the lead, and else it goes both ways, by the shares of the training rows.
A player is one feature or several that come and go together.

A leaf with the value v, whose path asks players j, then pays v times the product, over j, of o_j if j is in
the coalition (1 if the lead meets all that the path asks of j, else 0), else of w_j, the share of training
rows that do. The Shapley value of that product is an integral (Owen, Multilinear extensions of games,
Management Science 18, 1972):

    phi_i = v (o_i - w_i) * integral over t in [0, 1] of the product over j != i of (t o_j + (1 - t) w_j)

Its integrand is a polynomial of at most one degree less than the path has players, so Gauss and Legendre's
rule with half as many points gives it exactly. Products grow edge by edge from the root and leaves are summed
on the way back, so a node costs a few operations a point, however deep it lies (after Yu et al., Linear
TreeShap, NeurIPS 2022).

Pure: NumPy, no I/O; a lead's values depend on that lead alone, to the last bit. Called by `score_shapley`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from app.ai.domain import BoolArray, FloatArray, IntArray
from app.ai.fitted_trees import Tree

_CELLS = 1 << 17
"""Leads are taken together as long as they fill this many numbers an array, which stay in the cache."""


@dataclass(frozen=True, slots=True, eq=False)
class TreeGame:
    """The trees as one list of `e` edges, level by level, the two of a node side by side, left first.

    `feature`, `threshold` and `missing_left` (e / 2,) are what the edges' upper nodes ask. `parent` and
    `previous` (e,) are the edge above, and the nearest edge above that asks the same player; `e` for none.
    `factors` and `gains` (points, 3 e) hold, for each edge, what it multiplies the product by and what its
    player gains from a leaf below: if the lead met neither what `previous` asks nor this, only the former,
    or both. `value` (e,) is the leaf's at the lower end, `levels` are the first edges of each level and `e`.
    `by_player` orders the edges by player; `starts` are the places where another one of `players` begins.
    """

    baseline: float
    n_players: int
    feature: IntArray
    threshold: FloatArray
    missing_left: BoolArray
    parent: IntArray
    previous: IntArray
    value: FloatArray
    factors: FloatArray
    gains: FloatArray
    levels: tuple[int, ...]
    by_player: IntArray
    starts: IntArray
    players: IntArray

    def values(self, rows: FloatArray) -> FloatArray:
        """Returns the Shapley values (n, players) of feature values (n, k).

        With `baseline` they add up to what the trees give for each row.
        """
        phi = np.zeros((len(rows), self.n_players))
        if not len(self.parent):
            return phi
        step = max(1, _CELLS // len(self.parent))
        for start in range(0, len(rows), step):
            phi[start : start + step, self.players] = self._explain(rows[start : start + step])
        return phi

    def _explain(self, rows: FloatArray) -> FloatArray:
        edges = len(self.parent)
        cases = 3 * np.arange(edges) + self._count_met(rows)
        product, gained = np.ones((len(rows), edges + 1)), np.zeros((len(rows), edges))
        spans = list(zip(self.levels, self.levels[1:], strict=False))
        for factors, gains in zip(self.factors, self.gains, strict=True):
            factor = factors.take(cases)
            for start, end in spans:
                product[:, start:end] = product.take(self.parent[start:end], 1) * factor[:, start:end]
            product[:, :edges] *= self.value
            for start, end in spans[:0:-1]:
                both = product[:, start:end:2] + product[:, start + 1 : end : 2]
                product[:, self.parent[start:end:2]] = both
            gained += product[:, :edges] * gains.take(cases)
        sums: FloatArray = np.add.reduceat(gained.take(self.by_player, 1), self.starts, axis=1)
        return sums

    def _count_met(self, rows: FloatArray) -> IntArray:
        """Returns, for each lead and edge (n, e), 0 if not even `previous` is met, 1 if only that, else 2."""
        asked = rows.take(self.feature, 1)
        goes_left = (asked <= self.threshold) | (np.isnan(asked) & self.missing_left)
        met = np.ones((len(rows), len(self.parent) + 1), np.bool_)
        met[:, :-1:2], met[:, 1:-1:2] = goes_left, ~goes_left
        for start, end in zip(self.levels, self.levels[1:], strict=False):
            met[:, start:end] &= met.take(self.previous[start:end], 1)
        return met[:, :-1].astype(np.int64) + met.take(self.previous, 1)


def build_tree_game(trees: Sequence[Tree], player_of: IntArray) -> TreeGame:
    """Lays out the trees for the players of each feature (k,), numbered from 0.

    Raises:
        ValueError: a node has no training rows, so there is no share to go by.
    """
    n_players = int(player_of.max(initial=-1)) + 1
    whole = _join(trees)
    frontier = np.cumsum([0, *(len(tree.left) for tree in trees[:-1])])
    nowhere = len(whole.left) - len(trees)  # every node but the roots has one edge above
    above, weight = np.full(len(trees), nowhere), np.ones(nowhere + 1)
    asked, distinct = np.full((len(trees), n_players), nowhere), np.zeros(len(trees), np.int64)
    reach = np.ones(len(trees))
    baseline, levels, parts = 0.0, [0], []
    while True:
        leaf = whole.left[frontier] < 0
        baseline += float((reach * whole.value[frontier])[leaf].sum())
        upper = frontier[~leaf]
        if not upper.size:
            break
        lower = np.column_stack([whole.left[upper], whole.right[upper]]).ravel()
        edges, rows = levels[-1] + np.arange(len(lower)), np.arange(len(lower))
        player = player_of[whole.feature[upper]].repeat(2)
        share = _shares(whole.cover[lower])
        parent, reach = above[~leaf].repeat(2), reach[~leaf].repeat(2) * share
        asked, distinct = asked[~leaf].repeat(2, axis=0), distinct[~leaf].repeat(2)
        previous = asked[rows, player]
        distinct = distinct + (previous == nowhere)
        weight[edges] = weight[previous] * share
        asked[rows, player] = edges
        parts.append((upper, parent, previous, player, whole.value[lower], distinct))
        levels.append(levels[-1] + len(lower))
        frontier, above = lower, edges
    if not parts:
        parts = [(frontier[:0],) * 6]
    upper, parent, previous, player, value, distinct = map(np.concatenate, zip(*parts, strict=True))
    factors, gains = _tabulate(weight, previous, int(distinct.max(initial=1)))
    by_player = np.argsort(player, kind="stable")
    players, starts = np.unique(player[by_player], return_index=True)
    return TreeGame(
        baseline, n_players, whole.feature[upper], whole.threshold[upper], whole.missing_left[upper],
        parent, previous, value, factors, gains, tuple(levels), by_player, starts, players,
    )  # fmt: skip


def _join(trees: Sequence[Tree]) -> Tree:
    places = np.cumsum([0, *(len(tree.left) for tree in trees)])
    moved = [
        tree._replace(
            left=np.where(tree.left < 0, -1, tree.left + place),
            right=np.where(tree.right < 0, -1, tree.right + place),
        )
        for tree, place in zip(trees, places.tolist(), strict=False)
    ]
    return Tree(*map(np.concatenate, zip(*moved, strict=True)))


def _shares(cover: FloatArray) -> FloatArray:
    """Returns each node's share of the training rows it has together with its sibling, side by side."""
    if not np.all(cover >= 1):
        raise ValueError("a tree has a node without training rows")
    pairs = cover.reshape(-1, 2)
    shares: FloatArray = (pairs / pairs.sum(axis=1, keepdims=True)).ravel()
    return shares


def _tabulate(weight: FloatArray, previous: IntArray, most_players: int) -> tuple[FloatArray, FloatArray]:
    """Returns `factors` and `gains` of a `TreeGame` at each point.

    `weight` (e + 1,) is the share of training rows that meet all the path has asked of the player so far; the
    last, which `previous` names where nothing was asked before, is 1.
    """
    nodes, masses = np.polynomial.legendre.leggauss((most_players + 1) // 2)
    here, before = weight[:-1], weight[previous]
    factors, gains = np.empty((len(nodes), len(here), 3)), np.zeros((len(nodes), len(here), 3))
    for point, (t, mass) in enumerate(zip((nodes + 1) / 2, masses / 2, strict=True)):
        # t o + (1 - t) w, and (o - w) divided by it, for o = 1; for o = 0 the latter is -1 / (1 - t).
        met, met_before = t + (1 - t) * here, t + (1 - t) * before
        missed, met_gain = (1 - t) * here, (1 - before) / met_before
        factors[point] = np.column_stack([here / before, missed / met_before, met / met_before])
        gains[point, :, 1] = mass * (-1 / (1 - t) - met_gain)
        gains[point, :, 2] = mass * ((1 - here) / met - met_gain)
    return factors.reshape(len(nodes), -1), gains.reshape(len(nodes), -1)
