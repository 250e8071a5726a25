"""The universal scalability law: known fits, intervals that hold what they promise, and points that say nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from utils.errors import CourseError
from utils.scaling_law import ScalingError, ScalingLaw, fit

SIZES = (1, 2, 3, 4, 6, 8)


def law(nodes: float, sigma: float, kappa: float) -> float:
    return 100 * nodes / (1 + sigma * (nodes - 1) + kappa * nodes * (nodes - 1))


def points(
    sigma: float, kappa: float, noise: float = 0, sizes: tuple[int, ...] = SIZES, repeats: int = 3, seed: int = 0
) -> list[tuple[float, float]]:
    random = np.random.default_rng(seed)
    return [(n, law(n, sigma, kappa) * (1 + noise * random.standard_normal())) for n in sizes for _ in range(repeats)]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 0.05))
def test_the_parameters_of_a_perfect_curve_are_found(sigma: float, kappa: float) -> None:
    found = fit(points(sigma, kappa, repeats=1))
    assert found.lambda_ == pytest.approx(100)
    assert (found.sigma, found.kappa) == pytest.approx((sigma, kappa), abs=1e-9)
    assert found.at(20.0) == pytest.approx(law(20, sigma, kappa))
    assert found.relative_error < 1e-5


@pytest.mark.parametrize(
    ("sigma", "kappa", "peak", "ceiling"),
    [(0, 0, math.inf, math.inf), (0.1, 0, math.inf, 1000), (0.05, 0.002, 21.79, 739.8), (0.4, 0.5, 1.095, 100.4)],
)
def test_peak_and_ceiling(sigma: float, kappa: float, peak: float, ceiling: float) -> None:
    made = ScalingLaw(100, sigma, kappa, np.array(SIZES, float), np.array([law(n, sigma, kappa) for n in SIZES]))
    assert made.peak == pytest.approx(peak, rel=1e-3) and made.ceiling == pytest.approx(ceiling, rel=1e-3)
    assert all(made.at(n) <= made.ceiling * (1 + 1e-9) for n in (1.0, 2.0, 5.0, 50.0, 1e6))


@pytest.mark.parametrize(
    ("sigma", "kappa", "sizes"),
    [(0.05, 0.0, (1, 2, 3)), (0.05, 0.002, SIZES), (0.0, 0.0, (1, 2, 3)), (0.3, 0.01, (1, 2, 4, 8))],
    ids=["Amdahl, three replicas", "with a peak", "in proportion", "contended"],
)
def test_a_95_percent_interval_holds_the_truth_95_times_in_100(
    sigma: float, kappa: float, sizes: tuple[int, ...]
) -> None:
    """Of 60 experiments: an interval of 95 percent holds the truth in fewer than 53 of them once in 100 such tests."""
    held = {10: 0, 100: 0}
    for seed in range(60):
        found = fit(points(sigma, kappa, 0.03, sizes, 4, seed))
        for nodes in held:
            prediction = found.predict(nodes)
            held[nodes] += prediction.low <= law(nodes, sigma, kappa) <= prediction.high
    assert min(held.values()) >= 53, held


def extremes(found: ScalingLaw, nodes: int) -> tuple[float, float]:
    """The interval in closed form: on each face of the allowed region the extreme of a linear function is known."""
    freedom = len(found.nodes) - 3
    rows = np.stack([np.ones_like(found.nodes), found.nodes - 1, found.nodes * (found.nodes - 1)], 1)
    rows *= (found.throughput / found.nodes)[:, None]
    target = np.array([1.0, nodes - 1, nodes * (nodes - 1)])
    least = float(np.sum((rows @ (np.array([1, found.sigma, found.kappa]) / found.lambda_) - 1) ** 2))
    allowed = least * (1 + stats.t.ppf(0.975, freedom) ** 2 / freedom)
    values = []
    for face in itertools.chain.from_iterable(itertools.combinations(range(3), size) for size in (1, 2, 3)):
        columns = rows[:, face]
        inverse = np.linalg.inv(columns.T @ columns)
        centre = inverse @ columns.sum(axis=0)
        spare = allowed - float(np.sum((columns @ centre - 1) ** 2))
        step = inverse @ target[list(face)]
        reach = float(target[list(face)] @ step)
        for sign in (-1, 1):
            corner = centre + sign * np.sqrt(max(spare, 0) / reach) * step if reach > 0 else centre
            if spare >= 0 and (corner >= 0).all():
                values.append(float(target[list(face)] @ corner))
    return nodes / max(values), nodes / min(values)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sigma", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("kappa", [0.0, 0.005])
def test_the_interval_is_the_one_of_the_closed_form(sigma: float, kappa: float, seed: int) -> None:
    found = fit(points(sigma, kappa, 0.03, (1, 2, 3), 4, seed))
    for nodes in (2, 10, 100):
        prediction = found.predict(nodes)
        assert (prediction.low, prediction.high) == pytest.approx(extremes(found, nodes), rel=1e-3)


def test_the_interval_grows_with_the_distance_and_with_the_level() -> None:
    found = fit(points(0.05, 0.001, 0.03))
    near, far, surer = found.predict(5), found.predict(100), found.predict(5, 0.99)
    assert near.low < near.throughput < near.high and near.high / near.low < far.high / far.low
    assert surer.low < near.low < near.high < surer.high


def test_a_peak_beyond_the_points_is_seen_by_them_only_if_they_bend() -> None:
    straight, bent = (fit(points(0.02, 0.002, 0.02, sizes, 4)).predict(100) for sizes in ((1, 2, 3), SIZES))
    assert straight.high > 10 * straight.low, "three replicas do not tell 100"
    assert bent.high / bent.low < 0.3 * straight.high / straight.low


def test_points_that_set_no_limit_have_an_infinite_upper_end() -> None:
    # Published for Milvus 2.2: 1, 2, 4 and 8 replicas. One point more than coefficients leaves one degree of freedom.
    found = fit([(1, 7153), (2, 15903), (4, 19281), (8, 30655)])
    assert found.predict(100).high == math.inf and 0 < found.predict(100).low < 7153
    assert found.predict(10, 0.5).high < math.inf


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ([], "measure at three"),
        ([(1, 100), (2, 190)], "2 points at 2 numbers"),
        ([(1, 100), (2, 190), (3, 270)], "3 points at 3 numbers"),
        ([(1, 100), (1, 101), (2, 190), (2, 191), (2, 192)], "5 points at 2 numbers"),
        ([(n, 100) for n in SIZES], "does not grow"),
        (points(1, 0, 0.01), "does not grow"),
        ([(n, 100 / n) for n in SIZES], "does not grow"),
        ([(n, 10 * n * n) for n in SIZES], "do not follow the law"),
        ([(10, 100), (11, 106), (50, 2), (100, 1)], "do not follow the law"),
        ([(1, 100), (2, 190), (3, 0), (4, 300)], "throughput above 0"),
        ([(1, 100), (2, math.nan), (3, 270), (4, 300)], "throughput above 0"),
        ([(0, 100), (2, 190), (3, 270), (4, 300)], "1 node or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_points_that_say_nothing_are_refused_in_one_sentence(
    measured: list[tuple[float, float]], sentence: str
) -> None:
    with pytest.raises(ScalingError, match=sentence) as refused:
        fit(measured)
    assert isinstance(refused.value, CourseError) and str(refused.value).count(". ") == 0


@pytest.mark.parametrize(("nodes", "level"), [(0.5, 0.95), (math.nan, 0.95), (10, 0.0), (10, 1.0)])
def test_a_prediction_outside_of_what_the_law_knows_is_refused(nodes: float, level: float) -> None:
    with pytest.raises(ScalingError, match="1 node or more"):
        fit(points(0.05, 0.001, 0.03)).predict(nodes, level)
