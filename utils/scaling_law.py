"""Throughput beyond what was measured: the universal scalability law, fitted, with an interval for every prediction.

    X(N) = lambda * N / (1 + sigma * (N - 1) + kappa * N * (N - 1))

N is the number of replicas or nodes, X the throughput. lambda is what one alone does, sigma the share of the work that
waits for something shared (contention), kappa the cost of keeping each pair consistent (coherency). With kappa = 0 it
is Amdahl's law and flattens; with kappa > 0 the throughput has a maximum and falls beyond it.
Source: N. J. Gunther, Guerrilla Capacity Planning (Springer, 2007), chapters 4 to 6.

The law turned over is linear in its three coefficients, N / X = (1 + sigma * (N - 1) + kappa * N * (N - 1)) / lambda,
so the fit is a least-squares problem with bounds, which SciPy solves exactly; no start values, no local minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from utils.errors import CourseError

PARAMETERS = 3
LEAST_GAIN = 0.05  # with less gain than this share over the smallest size there is no growth to extrapolate
MOST_ERROR = 0.3  # points that are further off than this share do not follow the law
UNBOUNDED = 1e-6  # a share of the best estimate; what is below it is 0 to the solver
RELATIVE_FLOOR = 1e-6  # points that lie on a curve to the last digit would else leave nothing to search in

Array = NDArray[np.float64]


class ScalingError(CourseError):
    """The measured points do not say how the throughput scales."""


@dataclass(frozen=True)
class Prediction:
    """The throughput at `nodes`, with an interval for the mean of the law there.

    Attributes:
        nodes: replicas or nodes.
        throughput: best estimate, in the unit of the points.
        low: lower end of the interval.
        high: upper end; infinite where the points set no limit.
        level: how often such an interval holds the truth if the law holds, such as 0.95.
    """

    nodes: float
    throughput: float
    low: float
    high: float
    level: float


@dataclass(frozen=True)
class ScalingLaw:
    """A fitted universal scalability law.

    Attributes:
        lambda_: throughput of one node, in the unit of the points.
        sigma: contention, 0 or more.
        kappa: coherency cost, 0 or more.
        nodes: of the points, shape (n,).
        throughput: of the points, shape (n,).
    """

    lambda_: float
    sigma: float
    kappa: float
    nodes: Array
    throughput: Array

    def at(self, nodes: float | Array) -> Array:
        """Fitted throughput for these numbers of nodes."""
        n = np.asarray(nodes, dtype=float)
        return self.lambda_ * n / (1 + self.sigma * (n - 1) + self.kappa * n * (n - 1))

    @property
    def peak(self) -> float:
        """The number of nodes with the highest throughput, sqrt((1 - sigma) / kappa); infinite if kappa is 0."""
        if self.kappa == 0:
            return float("inf")
        return max(1.0, float(np.sqrt(max(0.0, 1 - self.sigma) / self.kappa)))

    @property
    def ceiling(self) -> float:
        """The throughput that no number of nodes exceeds: that of the peak, else lambda / sigma, else infinite."""
        if self.kappa > 0:
            return float(self.at(self.peak))
        return self.lambda_ / self.sigma if self.sigma > 0 else float("inf")

    @property
    def relative_error(self) -> float:
        """Standard deviation of a point around the curve, as a share of the throughput."""
        return float(np.sqrt(self._least / (len(self.nodes) - PARAMETERS)))

    def predict(self, nodes: float, level: float = 0.95) -> Prediction:
        """The throughput at `nodes` with an interval.

        The interval holds every value for which some law with sigma, kappa >= 0 fits the points almost as well as the
        best one (profile likelihood, with the t distribution for the few points that there are). It is not symmetric,
        and far from the points it is wide, because it should be. It is for the mean, not for one more measurement.

        Args:
            nodes: 1 or more.
            level: between 0 and 1.

        Raises:
            ScalingError: `nodes` or `level` is out of range.
        """
        if not nodes >= 1 or not 0 < level < 1:
            raise ScalingError("A prediction needs 1 node or more and a level between 0 and 1.")
        freedom = len(self.nodes) - PARAMETERS
        allowed = self._least * (1 + float(stats.t.ppf((1 + level) / 2, freedom)) ** 2 / freedom)
        target = _design(np.array([nodes]))[0]
        slowest, fastest = (_extreme(self._weighted, target, sign, allowed, self._best) for sign in (1, -1))
        high = nodes / fastest if fastest > 0 else float("inf")
        return Prediction(nodes, float(self.at(nodes)), nodes / slowest, high, level)

    @cached_property
    def _weighted(self) -> Array:
        return _design(self.nodes) * (self.throughput / self.nodes)[:, None]

    @cached_property
    def _best(self) -> Array:
        return np.array([1, self.sigma, self.kappa]) / self.lambda_

    @cached_property
    def _least(self) -> float:
        residuals = self._weighted @ self._best - 1
        return max(float(residuals @ residuals), len(self.nodes) * RELATIVE_FLOOR**2)


def fit(points: Sequence[tuple[float, float]]) -> ScalingLaw:
    """Fit the law to measured points.

    The error of a measured throughput is taken as a share of it, the same for every point.

    Args:
        points: (nodes, throughput), repeated measurements as points of their own; at least three different numbers of
            nodes, and one point more than the law's three coefficients.

    Raises:
        ScalingError: too few points, a value that is no throughput, or a throughput that does not grow.
    """
    data = np.asarray(points, dtype=float).reshape(-1, 2)
    if not np.isfinite(data).all() or (data[:, 0] < 1).any() or (data[:, 1] <= 0).any():
        raise ScalingError("Every point needs 1 node or more and a throughput above 0: remove the runs that failed.")
    nodes, throughput = data.T.copy()
    sizes = np.unique(nodes)
    if len(sizes) < PARAMETERS or len(nodes) <= PARAMETERS:
        raise ScalingError(
            f"{len(nodes)} points at {len(sizes)} numbers of nodes fix no law with three coefficients: measure at "
            "three numbers or more, and four points or more (repetitions count)."
        )
    means = [float(throughput[nodes == size].mean()) for size in sizes]
    if max(means) < (1 + LEAST_GAIN) * means[0]:
        raise ScalingError(
            f"The throughput does not grow with the nodes ({means[0]:.4g} at {sizes[0]:g}, {max(means[1:]):.4g} at "
            "best with more): something else is the bottleneck, so find it first, there is nothing to extrapolate."
        )
    weighted = _design(nodes) * (throughput / nodes)[:, None]
    fitted = optimize.lsq_linear(weighted, np.ones(len(nodes)), bounds=(0, np.inf), method="bvls").x
    one, contention, coherency = (float(coefficient) for coefficient in fitted)
    law = ScalingLaw(1 / one, contention / one, coherency / one, nodes, throughput) if one > 0 else None
    if law is None or law.relative_error > MOST_ERROR:
        raise ScalingError(
            "The points do not follow the law (they grow faster than the nodes, jump, or fall at once), so it predicts "
            "nothing: plot them, repeat the measurements that stand out, and start from one node."
        )
    return law


def _design(nodes: Array) -> Array:
    """Rows (1, N - 1, N (N - 1)): what multiplies the coefficients 1, sigma and kappa, all over lambda, in N / X."""
    return np.stack([np.ones_like(nodes), nodes - 1, nodes * (nodes - 1)], axis=1)


def _extreme(weighted: Array, target: Array, sign: int, allowed: float, best: Array) -> float:
    """The largest (sign 1) or smallest (-1) N / X at `target` of all laws whose squared error is at most `allowed`."""
    # In units of the best estimate every variable is of the order of 1, however far away the target is.
    scale = float(target @ best) / target.clip(1)
    columns, weights = weighted * scale, target * scale / float(target @ best)
    found = optimize.minimize(
        lambda x: -sign * float(weights @ x),
        best / scale,
        jac=lambda x: -sign * weights,
        bounds=[(0, None)] * PARAMETERS,
        constraints={
            "type": "ineq",
            "fun": lambda x: 1 - float(np.sum((columns @ x - 1) ** 2)) / allowed,
            "jac": lambda x: -2 * (columns @ x - 1) @ columns / allowed,
        },
        method="SLSQP",
        options={"maxiter": 1000, "ftol": 1e-10},
    )
    extreme = float(target @ (found.x * scale))
    return extreme if extreme > UNBOUNDED * float(target @ best) else 0.0
