"""Rewards of n alternatives from comparisons of them, without a network.

i is preferred over j with probability σ(r_i - r_j) (Bradley and Terry, Biometrika 39, 1952). Only differences of
rewards can be seen, so Σ r = 0 fixes the rest. `maximum_likelihood` is the model itself, `davidson` knows ties too,
`plackett_luce` whole rankings, and `rank_centrality` is the spectral estimator.

Of all three likelihoods the information, -∂²/∂r² of the logarithm, is the Laplacian of a graph whose edges are the
pairs, each with a weight: the variance of what a comparison says of their difference. So they share a solver, and the
standard errors: the roots of the diagonal of its inverse on Σ r = 0, at the maximum. These take n² numbers and of the
order of n³ operations, where the rewards take passes over the comparisons; `errors=False` has None in their place.

`regulariser` is λ of a Gaussian prior with the logarithm -λ/2 Σ r². Without it the rewards have a finite maximum only
where the graph with an edge from each loser to its winner is strongly connected (Ford 1957); where it is not, all raise
a ValueError that says who stands apart, as they do where an argument makes no sense.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

WALK = 1000  # steps of Rank Centrality's walk, after which its place is solved for
SWEEPS = 10  # of Hunter's algorithm, before Newton's


def maximum_likelihood(
    winners: Sequence[int], losers: Sequence[int], n: int, *, regulariser: float = 0.0, errors: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rewards [n] and their standard errors [n] from the alternatives that won [m] and those that lost [m] to them."""
    return davidson(winners, losers, (), n, regulariser=regulariser, errors=errors)[:2]


def davidson(
    winners: Sequence[int],
    losers: Sequence[int],
    tied: Sequence[Sequence[int]],
    n: int,
    *,
    regulariser: float = 0.0,
    errors: bool = True,
) -> tuple[np.ndarray, np.ndarray | None, float]:
    """Rewards [n], their standard errors [n] and ν, from comparisons [m] and [m] and from the pairs [t, 2] that tied.

    Davidson (JASA 65, 1970), π = exp(r): P(tie) = ν √(π_i π_j) / (π_i + π_j + ν √(π_i π_j)), and what is left is shared
    as π_i : π_j. The errors allow for log ν being estimated too. Without a tie ν is 0 and the model Bradley and
    Terry's; with nothing else it has no finite maximum, which is a ValueError with a regulariser as well.
    """
    tied = np.asarray(tied) if np.size(tied) else np.zeros((0, 2), dtype=int)
    if tied.ndim != 2 or tied.shape[1] != 2:
        raise ValueError(f"tied must be pairs [t, 2], not {tied.shape}")
    winners, losers = _compared(winners, losers, n)
    i, j, (i_won, j_won, ties) = _pairs(winners, losers, *_compared(*tied.T, n), n)
    _check(n, regulariser, i)
    if not len(winners):
        raise ValueError(f"no finite ν is the best: all {len(tied)} comparisons are ties")
    if not regulariser:
        (lost, won), (a, b) = _losses(i, j, i_won, j_won), (i[ties > 0], j[ties > 0])
        _require_connected(np.concatenate([lost, a, b]), np.concatenate([won, b, a]), n)
        if len(tied):
            _require_more_wins_than_ties(lost, won, a, b, n)
    start, games = np.zeros(n + (len(tied) > 0)), i_won + j_won + ties
    if len(tied):
        start[n] = np.log(2 * len(tied) / len(winners))  # where all rewards are equal

    def outcomes(x: np.ndarray) -> tuple[np.ndarray, "Information"]:
        """The outcomes are a softmax of d/2, -d/2 and log ν, of which the information is the covariance."""
        half, log_nu = (x[i] - x[j]) / 2, x[n] if len(x) > n else -np.inf
        most = np.maximum(np.abs(half), log_nu)
        p = np.exp([half - most, -half - most, log_nu - most])
        wins_i, wins_j, tie = p / p.sum(0)
        gradient = _flow(i, j, (i_won - j_won - games * (wins_i - wins_j)) / 2, len(x))
        weights = games * (wins_i * wins_j + tie * (wins_i + wins_j) / 4)
        if len(x) == n:
            return gradient, Information(n, i, j, weights, regulariser)
        gradient[n] = (ties - games * tie).sum()
        row = _flow(i, j, games * tie * (wins_j - wins_i) / 2, len(x))
        row[n] = (games * tie * (wins_i + wins_j)).sum()
        return gradient, Information(n, i, j, weights, regulariser, row)

    x, information = _maximise(outcomes, start)
    nu = float(np.exp(x[n])) if len(tied) else 0.0
    return x[:n], information.standard_errors() if errors else None, nu


def plackett_luce(
    rankings: Sequence[Sequence[int]], n: int, *, regulariser: float = 0.0, errors: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    """Rewards [n] and their standard errors [n] from rankings of any lengths, each with the best first.

    The best is chosen of all, the next of the rest … (Plackett 1975), each with probability π_i / Σ π of those that are
    left, π = exp(r). Hunter's sweeps begin, whose likelihood rises from anywhere; what they would do in the many more
    that a thin graph takes them, Newton's method does in a few steps.
    """
    groups = _by_length(rankings, n)
    _check(n, regulariser, groups)
    if not regulariser:  # who is ahead of the next is so, by steps, of all behind
        ahead, behind = (np.concatenate([g[:, part].ravel() for g in groups]) for part in (np.s_[:-1], np.s_[1:]))
        _require_connected(behind, ahead, n)
    rewards = np.zeros(n)
    for _ in range(SWEEPS):
        rewards = minorise_maximise(groups, rewards, regulariser)
    corners = [np.triu_indices(g.shape[1], 1) for g in groups]
    i, j = (np.concatenate([g[:, c[k]].ravel() for g, c in zip(groups, corners, strict=True)]) for k in (0, 1))

    def choices(r: np.ndarray) -> tuple[np.ndarray, Information]:
        """Each choice is a softmax, of whose covariance the entry of i and j is -π_i π_j / (Σ π)²."""
        wins, expected, weights = *_wins(groups, r), []
        for g, (a, b) in zip(groups, corners, strict=True):
            squares = np.logaddexp.accumulate(-2 * _left(r[g])[:, :-1], axis=1)
            weights.append(np.exp(r[g[:, a]] + r[g[:, b]] + squares[:, a]).ravel())
        return wins - expected, Information(n, i, j, np.concatenate(weights), regulariser)

    rewards, information = _maximise(choices, rewards)
    return rewards, information.standard_errors() if errors else None


def minorise_maximise(groups: Sequence[np.ndarray], rewards: np.ndarray, regulariser: float = 0.0) -> np.ndarray:
    """Rewards [n] after a sweep of the MM algorithm of Hunter (Annals of Statistics 32, 2004), for rankings [G, K].

    It maximises what touches the likelihood from below, in which each alternative stands by itself: where as many
    choices fall on it as are expected, e^δ expected + λ (r + δ) = wins. With a prior Newton's method finds the step δ.
    """
    wins, expected = _wins(groups, rewards)
    if not regulariser:
        rewards = rewards + np.log(wins / expected)
        return rewards - rewards.mean()
    step = np.zeros(len(rewards))
    for _ in range(20):
        falls = expected * np.exp(step)
        missing = wins - falls - regulariser * (rewards + step)
        step += np.clip(missing / (falls + regulariser), -1, 1)  # an exponential is left far behind, and far ahead
    return rewards + step - (rewards + step).mean()


def rank_centrality(winners: Sequence[int], losers: Sequence[int], n: int) -> np.ndarray:
    """Rewards [n] from comparisons [m] and [m], the logarithm of where a random walk is found.

    It goes from i to j at the rate at which j beats i where the two are compared; of each pair the share counts and not
    the number (Negahban, Oh and Shah, Operations Research 65, 2017; their divisor d_max leaves the place as it is).
    """
    i, j, (i_won, j_won, _) = _pairs(*_compared(winners, losers, n), *np.zeros((2, 0), dtype=int), n)
    _check(n, 0.0, i)
    _require_connected(*_losses(i, j, i_won, j_won), n, mend="")
    # 16 digits hold no places that differ by more; relative to the likely ones, and to the best's, all are about 1
    rewards, _ = maximum_likelihood(winners, losers, n, errors=False)
    share, ratio, place = i_won / (i_won + j_won), np.exp(rewards[j] - rewards[i]), np.ones(n)
    to_i, to_j, leaves = share * ratio, (1 - share) / ratio, np.bincount(j, share, n) + np.bincount(i, 1 - share, n)
    for _ in range(WALK):  # half of the walkers rest, or between two alternatives all would only change places
        before, comes = place, np.bincount(i, to_i * place[j], n) + np.bincount(j, to_j * place[i], n)
        place = (place + comes / leaves) / 2
        if np.abs(place / before - 1).max() <= 1e-13:
            rewards += np.log(place)
            return rewards - rewards.mean()
    balance = np.diag(leaves)  # where the comparisons hang together by little, the walk is long
    balance[i, j], balance[j, i] = -to_i, -to_j  # what comes to the row from the column
    best = rewards.argmax()
    rest = np.arange(n) != best
    rewards[rest] += np.log(np.linalg.solve(balance[np.ix_(rest, rest)], -balance[rest, best]))
    return rewards - rewards.mean()


# ---- what was said ---------------------------------------------------------------------------------------------------


def _indices(values, n: int) -> np.ndarray:
    values = np.asarray(values)
    if values.size and (values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= n):
        raise ValueError(f"alternatives are whole numbers from 0 to {n - 1}: {_short(np.unique(values))}")
    return values.astype(np.int64)


def _compared(winners, losers, n: int) -> tuple[np.ndarray, np.ndarray]:
    winners, losers = _indices(winners, n), _indices(losers, n)
    if winners.ndim != 1 or winners.shape != losers.shape:
        raise ValueError(f"each comparison has a winner and a loser, not {winners.shape} and {losers.shape} of them")
    if (same := winners[winners == losers]).size:
        raise ValueError(f"nothing can be compared with itself: {_short(np.unique(same))}")
    return winners, losers


def _check(n: int, regulariser: float, said: Sequence) -> None:
    if n < 2:
        raise ValueError(f"at least two alternatives are needed to compare them, not {n}")
    if not 0 <= regulariser < np.inf:
        raise ValueError(f"regulariser must be a finite number of at least 0: {regulariser}")
    if not len(said):
        raise ValueError("nothing was compared")


def _pairs(winners, losers, first, second, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct pairs i < j [P] and [P], and of each how often i won, j won and neither [3, P]."""
    a, b = np.concatenate([winners, first]), np.concatenate([losers, second])
    kind = np.where(np.arange(len(a)) < len(winners), a > b, 2)
    codes, number = np.unique((np.minimum(a, b) * n + np.maximum(a, b)) * 3 + kind, return_counts=True)
    pairs, place = np.unique(codes // 3, return_inverse=True)
    counts = np.zeros((3, len(pairs)))
    counts[codes % 3, place] = number
    return pairs // n, pairs % n, counts


def _losses(i, j, i_won, j_won) -> tuple[np.ndarray, np.ndarray]:
    """Of the distinct pairs, who lost to whom: the edges of the graph of comparisons, each once."""
    return np.concatenate([j[i_won > 0], i[j_won > 0]]), np.concatenate([i[i_won > 0], j[j_won > 0]])


def _by_length(rankings: Sequence[Sequence[int]], n: int) -> list[np.ndarray]:
    """Rankings [G, K] of each length K > 1; one of a single alternative says nothing."""
    lengths = np.array([len(ranking) for ranking in rankings], dtype=np.int64)
    flat, starts = _indices(list(chain.from_iterable(rankings)), n), np.cumsum(lengths) - lengths
    groups = [flat[starts[lengths == K, None] + np.arange(K)] for K in np.unique(lengths) if K > 1]
    for group in groups:
        ordered = np.sort(group, axis=1)
        if (twice := ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]]).size:
            raise ValueError(f"a ranking names an alternative once: {_short(np.unique(twice))}")
    return groups


def _left(rewards: np.ndarray) -> np.ndarray:
    """log Σ π [G, K] of those that are left at each choice, for the rewards [G, K] of rankings."""
    return np.logaddexp.accumulate(rewards[:, ::-1], axis=1)[:, ::-1]


def _wins(groups: Sequence[np.ndarray], rewards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many choices fell on each alternative [n], and how many are expected to [n]; their difference is the
    gradient. The last of a ranking was not chosen: it was left."""
    n, wins, expected = len(rewards), 0, 0
    for g in groups:
        chances = np.logaddexp.accumulate(-_left(rewards[g])[:, :-1], axis=1)
        chances = np.concatenate([chances, chances[:, -1:]], axis=1)
        wins = wins + np.bincount(g[:, :-1].ravel(), minlength=n)
        expected = expected + np.bincount(g.ravel(), np.exp(rewards[g] + chances).ravel(), n)
    return wins, expected


# ---- whether there is a maximum --------------------------------------------------------------------------------------


def _short(values) -> str:
    values = [str(value) for value in values]
    return ", ".join(values) if len(values) <= 6 else f"{', '.join(values[:5])} … ({len(values):,} in all)"


def _require_connected(lost: np.ndarray, won: np.ndarray, n: int, mend="; with a regulariser above 0 some are") -> None:
    """Raise a ValueError that names who stands apart, unless each of n can be reached from each by edges lost → won."""
    part = _strong_parts(lost, won, n)
    _, first, size = np.unique(part, return_index=True, return_counts=True)
    if len(size) == 1:
        return
    between = part[lost] != part[won]
    lose, win = (np.bincount(part[side[between]], minlength=len(size)) > 0 for side in (lost, won))
    reasons = []
    for k in np.lexsort([first, size]):
        if not (lose[k] and win[k]):
            never = "lost to" if win[k] else "won against" if lose[k] else "met"
            reasons.append(f"{_short(np.flatnonzero(part == k))} never {never} the rest")
            if len(reasons) > 4:
                break
    more = f"; … of {len(size):,} parts" if len(reasons) > 4 else ""
    raise ValueError(f"no finite rewards are the best: {'; '.join(reasons[:4])}{more}{mend}")


def _strong_parts(source: np.ndarray, target: np.ndarray, n: int) -> np.ndarray:
    """Which strongly connected part each vertex is in [n] (Tarjan 1972, with the recursion written out)."""
    targets = target[np.argsort(source, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(source, minlength=n)).tolist()
    following, seen, low, part = [0, *ends[:-1]], [0] * n, [0] * n, [-1] * n
    parts, count, open_ones = 0, 0, []
    for root in range(n):
        path = [] if seen[root] else [root]
        while path:
            v = path[-1]
            if not seen[v]:
                count += 1
                seen[v] = low[v] = count
                open_ones.append(v)
            for edge in range(following[v], ends[v]):
                w = targets[edge]
                if not seen[w]:
                    following[v] = edge  # to come back to it, for low[w]
                    path.append(w)
                    break
                if part[w] < 0 and low[w] < low[v]:
                    low[v] = low[w]
            else:
                path.pop()
                if low[v] == seen[v]:
                    while part[v] < 0:
                        part[open_ones.pop()] = parts
                    parts += 1
    return np.array(part)


def _require_more_wins_than_ties(lost, won, first, second, n: int) -> None:
    """Raise a ValueError where Davidson's ν could grow for ever, and rewards with it.

    That is where there are heights with each winner by 1 above its loser, at least, and those that tied within 1 of
    each other: at ν = e^(t/2), r = t × height every comparison's own chance rises with t. There are none where a circle
    of wins and ties has more wins than ties, as have all those of wins alone.
    """
    if _strong_parts(lost, won, n).max() < n - 1:
        return
    height = np.zeros(n)
    for _ in range(n):  # Bellman and Ford: after n rounds, what still rises goes round in a circle
        before = height.copy()
        np.maximum.at(height, won, before[lost] + 1)
        np.maximum.at(height, first, before[second] - 1)
        np.maximum.at(height, second, before[first] - 1)
        if (height == before).all():
            reason = "no circle of comparisons has more wins than ties"
            raise ValueError(f"no finite ν is the best: {reason}; with a regulariser above 0 one is")


# ---- the maximum -----------------------------------------------------------------------------------------------------


def _flow(i: np.ndarray, j: np.ndarray, along: np.ndarray, n: int) -> np.ndarray:
    """What comes out of each of n [n], where so much flows from i [P] to j [P]."""
    return np.bincount(i, along, n) - np.bincount(j, along, n)


class Information(NamedTuple):
    """-∂²/∂x² of a log-likelihood and its prior, x the n rewards and perhaps one parameter more, whose row [n + 1] is
    given: the Laplacian of the pairs i [P], j [P] with these weights [P], plus the regulariser on the diagonal."""

    n: int
    i: np.ndarray
    j: np.ndarray
    weights: np.ndarray
    regulariser: float
    row: np.ndarray | None = None

    def product(self, x: np.ndarray) -> np.ndarray:
        out = _flow(self.i, self.j, self.weights * (x[self.i] - x[self.j]), len(x))
        out[: self.n] += self.regulariser * x[: self.n]
        if self.row is not None:
            out += self.row * x[self.n]
            out[self.n] += self.row[: self.n] @ x[: self.n]
        return out

    def diagonal(self) -> np.ndarray:
        degrees = np.bincount(self.i, self.weights, self.n) + np.bincount(self.j, self.weights, self.n)
        return np.append(degrees + self.regulariser, [] if self.row is None else self.row[self.n])

    def standard_errors(self) -> np.ndarray:
        """Of the rewards [n] on Σ r = 0: with c 11ᵀ/n added the matrix has an inverse, which is that on Σ r = 0 plus
        11ᵀ/(n (c + λ)). The other parameter is left out by its Schur complement."""
        n, degrees = self.n, self.diagonal()[: self.n]
        lower = np.maximum(self.i, self.j) * n + np.minimum(self.i, self.j)  # the half that Cholesky's method reads
        matrix = torch.from_numpy(np.bincount(lower, self.weights, n * n)).view(n, n).neg_()
        matrix.diagonal().add_(torch.from_numpy(degrees))
        if self.row is not None:
            row = torch.from_numpy(self.row[:n])
            matrix.addr_(row, row, alpha=-1 / self.row[n])
        c = degrees.mean()
        factor, failed = torch.linalg.cholesky_ex(matrix.add_(c / n))
        if failed:
            raise ValueError("the comparisons hold too little information for standard errors in float64")
        del matrix  # its place is needed
        return np.sqrt(_inverse_squares(factor).numpy() - 1 / (n * (c + self.regulariser)))


def _inverse_squares(triangle: torch.Tensor) -> torch.Tensor:
    """The squares in each column [n] of the inverse of a lower triangle [n, n], together: for Cholesky's factor the
    diagonal of the inverse. By halves this takes half as long as to solve for the identity."""
    n = len(triangle)
    if n <= 256:
        return torch.linalg.solve_triangular(triangle, torch.eye(n, dtype=triangle.dtype), upper=False).square().sum(0)
    a, b = slice(0, n // 2), slice(n // 2, n)
    corner = torch.linalg.solve_triangular(triangle[b, b], triangle[b, a], upper=False)
    corner = torch.linalg.solve_triangular(triangle[a, a], corner, upper=False, left=False)  # but for the sign
    above = corner.square_().sum(0)
    del corner
    return torch.cat([_inverse_squares(triangle[a, a]) + above, _inverse_squares(triangle[b, b])])


def _maximise(
    objective: Callable[[np.ndarray], tuple[np.ndarray, Information]], x: np.ndarray
) -> tuple[np.ndarray, Information]:
    """Where a concave log-likelihood with its prior is highest, and its information there, by damped Newton steps.

    `objective` gives the likelihood's gradient and the information with the prior. Each step is as exact as it needs to
    be for quadratic convergence. It is halved while the slope at its end shows that it went too far; the values
    themselves agree to all their digits long before the gradient is 0.
    """

    def at(x: np.ndarray) -> tuple[np.ndarray, Information]:
        gradient, information = objective(x)
        n = information.n
        gradient[:n] -= information.regulariser * x[:n]
        gradient[:n] -= gradient[:n].mean()  # 0 but for rounding
        return gradient, information

    gradient, information = at(x)
    heaviest, before = information.diagonal().max(), np.inf
    for _ in range(1000):
        size = np.abs(gradient).max() / heaviest
        if size <= 1e-13 or before / 2 < size <= 1e-8:  # or what is left is rounding
            return x, information
        before = size
        step = _conjugate_gradients(information, gradient, min(0.1, size))
        step[: information.n] -= step[: information.n].mean()
        slope = gradient @ step
        gradient, information = at(x + step)
        while gradient @ step < -slope / 4:
            step, slope = step / 2, slope / 2
            gradient, information = at(x + step)
        x = x + step
    raise ArithmeticError("Newton's method did not converge: the regulariser is too small for float64")


def _conjugate_gradients(information: Information, gradient: np.ndarray, tolerance: float) -> np.ndarray:
    """The solution x of information · x = gradient to a relative tolerance, preconditioned by the diagonal."""
    diagonal, x, residual = information.diagonal(), np.zeros(len(gradient)), gradient
    direction = scaled = residual / diagonal
    now = start = residual @ scaled
    for _ in range(10 * len(x)):
        if now <= tolerance**2 * start:
            break
        product = information.product(direction)
        rate = now / (direction @ product)
        x, residual = x + rate * direction, residual - rate * product
        scaled = residual / diagonal
        before, now = now, residual @ scaled
        direction = scaled + now / before * direction
    return x
