"""Scaling laws fitted to runs, with their uncertainty (Hoffmann et al. 2022, "Chinchilla", sections 3.2 and 3.3).

N is the FLOPs of a token over 6, so that compute is 6 · N · D exactly: the parameters of all matrix products, and
attention's scores (DeepSeek 2024, "DeepSeek LLM", section 3.2, on why). D is tokens, L the held-out loss in nats.
"""

import itertools
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

from gptjax.errors import Refused

MIN_SIZES, MIN_BUDGETS = 4, 2  # a parabola has three coefficients, and the residuals show the noise
INTERVAL = (5, 95)  # percentiles
RESAMPLES = 200
DELTA = 1e-3  # where Huber's loss turns from a square to a line (Hoffmann et al. 2022, section 3.3)


class Point(NamedTuple):
    """A run."""

    budget: float  # FLOPs asked for
    size: str  # the config's name of the size
    N: float
    D: float
    loss: float


class Parabola(NamedTuple):
    """Loss over log N at one budget."""

    budget: float
    coefficients: np.ndarray  # highest power first
    N: float  # size at the lowest point; nan without a lowest point
    edge: str  # empty, or why the lowest point is not reliable


def check(sizes: list, budgets: list) -> None:
    """Raises: Refused, for too few sizes or budgets to fit."""
    if len(set(sizes)) < MIN_SIZES:
        raise Refused(
            f"--sizes must have at least {MIN_SIZES} different sizes to fit a parabola; found {len(set(sizes))}."
        )
    if len(set(budgets)) < MIN_BUDGETS:
        raise Refused(f"--budgets must have at least {MIN_BUDGETS} different budgets; found {len(set(budgets))}.")


def parabolas(points: list[Point]) -> list[Parabola]:
    """Fits a parabola for each budget by least squares."""
    found = []
    for budget in sorted({point.budget for point in points}):
        here = sorted((point for point in points if point.budget == budget), key=lambda point: point.N)
        log_N, loss = np.log([point.N for point in here]), np.array([point.loss for point in here])
        a, b, c = np.polyfit(log_N, loss, 2)
        lowest, edge = -b / (2 * a), ""
        if (best := int(loss.argmin())) in (0, len(here) - 1):
            edge = f"the {'smallest' if best == 0 else 'largest'} size, {here[best].size}, has the lowest loss"
        elif a <= 0 or not log_N[0] < lowest < log_N[-1]:
            edge = "the parabola has no lowest point between the sizes"
        found.append(Parabola(budget, np.array([a, b, c]), float(np.exp(lowest)) if a > 0 else float("nan"), edge))
    return found


def optimum(fitted: list[Parabola]) -> tuple[float, float]:
    """Fits approach 2: (log k, a) of N = k · C^a, a line through the logarithms of the known lowest points.

    Raises: Refused, for fewer than two known points.
    """
    known = [each for each in fitted if not each.edge]
    if len(known) < MIN_BUDGETS:
        why = "; ".join(f"{each.budget:.3g}: {each.edge}" for each in fitted if each.edge)
        raise Refused(
            f"The lowest loss lies between the sizes at {len(known)} of {len(fitted)} budgets, and {MIN_BUDGETS} are "
            f"needed ({why}); give --sizes beyond these."
        )
    return line(known)


def line(known: list[Parabola]) -> tuple[float, float]:
    a, log_k = np.polyfit(np.log([each.budget for each in known]), np.log([each.N for each in known]), 1)
    return float(log_k), float(a)


class Law(NamedTuple):
    """Approach 3: L = E + A / N^α + B / D^β."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        return self.E + self.A / N**self.alpha + self.B / D**self.beta

    def best_size(self, compute):
        """Returns N of the lowest loss where 6 · N · D is `compute` (Hoffmann et al. 2022, equation 4)."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        return ratio ** (1 / (self.alpha + self.beta)) * (compute / 6) ** (self.beta / (self.alpha + self.beta))


def fit(N, D, loss, starts=None) -> tuple[Law, np.ndarray]:
    """Fits the law of least Huber loss between logarithms, from the best of `starts`. Returns law and parameters.

    log L is the log-sum-exp of three lines, e, a - α log N and b - β log D. The lines are centred on the data, where
    the five parameters hardly depend on one another. The original fit used L-BFGS, which is slow here and often
    stops too early (Besiroglu et al. 2024, "Chinchilla scaling: a replication attempt"). This fit uses a trust-region
    method for least squares.
    """
    log_N, log_D, log_loss = np.log(N), np.log(D), np.log(loss)
    from_N, from_D = log_N - log_N.mean(), log_D - log_D.mean()

    def residuals(parameters):
        e, a, b, alpha, beta = parameters
        return np.logaddexp.reduce([np.full_like(log_N, e), a - alpha * from_N, b - beta * from_D]) - log_loss

    least = log_loss.min()
    if starts is None:
        shares, powers = (-0.3, -1.0, -3.0), (0.2, 0.5, 1.0)
        starts = [
            (least + e, least + a, least + b, alpha, beta)
            for e, a, b, alpha, beta in itertools.product(shares, shares, shares, powers, powers)
        ]
        starts = sorted(starts, key=lambda start: np.abs(residuals(start)).sum())[:20]
    bounds = [least - 10] * 3 + [0.01] * 2, [least + 1] * 3 + [3] * 2
    options = {"bounds": bounds, "loss": "huber", "f_scale": DELTA, "xtol": 1e-10, "ftol": 1e-10}
    results = [least_squares(residuals, start, **options) for start in starts]
    best = min(results, key=lambda result: result.cost).x
    e, a, b, alpha, beta = map(float, best)
    return Law(*map(float, np.exp([e, a + alpha * log_N.mean(), b + beta * log_D.mean()])), alpha, beta), best


class Scaling(NamedTuple):
    """Both approaches, and both again on each of the resampled losses."""

    points: list[Point]
    parabolas: list[Parabola]
    power: tuple[float, float]  # (log k, a) of approach 2: k alone may be too small for a float
    law: Law
    powers: np.ndarray  # [resamples, 2]
    laws: list[Law]


def scaling(points: list[Point], seed: int = 0) -> Scaling:
    """Fits both approaches with uncertainty.

    The uncertainty is a bootstrap of residuals (Efron 1979). Residuals, scaled up for the fitted parameters, are drawn
    again around the fitted losses. The bootstrap covers noise only, not a wrong law, and not extrapolation.

    Raises: Refused, for too few known lowest points.
    """
    fitted = parabolas(points)
    power = optimum(fitted)
    N, D, loss = (np.array([getattr(point, name) for point in points]) for name in ("N", "D", "loss"))
    law, parameters = fit(N, D, loss)
    curve = {each.budget: each.coefficients for each in fitted}
    on_curve = np.array([np.polyval(curve[point.budget], np.log(point.N)) for point in points])
    random = np.random.default_rng(seed)
    powers = []
    around_curve = spread(loss - on_curve, 3 * len(fitted))
    known = {each.budget for each in fitted if not each.edge}
    for _ in range(RESAMPLES):
        again = on_curve + random.choice(around_curve, len(points))
        redone = parabolas([point._replace(loss=each) for point, each in zip(points, again, strict=True)])
        redone = [each for each in redone if each.budget in known]
        if np.isfinite([each.N for each in redone]).all():
            powers.append(line(redone))
    if len(powers) < RESAMPLES * 0.9:
        raise Refused(
            f"The losses scatter so much that {RESAMPLES - len(powers)} of {RESAMPLES} resampled grids have a budget "
            "without a lowest loss; give more --sizes, or larger --budgets."
        )
    on_law = law.loss(N, D)
    around_law = spread(np.log(loss / on_law), len(Law._fields))
    laws = [
        fit(N, D, on_law * np.exp(random.choice(around_law, len(points))), starts=[parameters])[0]
        for _ in range(RESAMPLES)
    ]
    return Scaling(points, fitted, power, law, np.array(powers), laws)


def spread(residuals: np.ndarray, fitted: int) -> np.ndarray:
    """Centres residuals and scales them up for the `fitted` parameters."""
    return (residuals - residuals.mean()) * np.sqrt(len(residuals) / max(1, len(residuals) - fitted))


def interval(values) -> tuple[float, float]:
    low, high = np.percentile(np.asarray(values), INTERVAL)
    return float(low), float(high)
