"""Each deterministic solver converges to the exact solution with the order that theory gives it."""

import math

import pytest
import torch

import minidiff
from tests.schedulers.convergence import CASES, RANDOM, existing, slope
from tests.schedulers.mixture import SHARES, TWO_PEAKS, signal_and_noise

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]


@pytest.mark.parametrize("case", existing(), ids=lambda case: case.name)
def test_order_of_convergence(case):
    """A high order is reached from above or below, as the low-order first steps still count: hence the width."""
    found = slope(case)
    assert found == pytest.approx(case.measured, abs=0.05)
    assert found == pytest.approx(case.order, abs=0.3)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_every_scheduler_converges_or_has_a_reason_not_to(kind):
    assert (kind in RANDOM) != (kind in {case.kind for case in CASES})
    if kind in RANDOM:
        scheduler = getattr(minidiff, kind)()
        plan = scheduler.plan(4)
        assert any(scheduler.wants_noise(plan, i) for i in range(len(plan.coefficients)))


@pytest.mark.parametrize("level", [0.1, 1.0, 30.0])
def test_the_denoiser_is_that_of_the_density(level):
    """Tweedie: E[eps | x] = -sigma d/dx log p(x), with p the derivative of the distribution function."""
    x = TWO_PEAKS.quantile(SHARES, level).requires_grad_()
    (p,) = torch.autograd.grad(TWO_PEAKS.cdf(x, level).sum(), x, create_graph=True)
    (score,) = torch.autograd.grad(p.log().sum(), x)
    _, sigma = signal_and_noise(level)
    assert (TWO_PEAKS.eps(x, level) + sigma * score).abs().max() < 1e-12  # measured 1e-14


def test_the_exact_solution_is_that_of_the_differential_equation():
    """dy / dsigma = eps for y = x / alpha, by 2000 steps of the classical Runge-Kutta method in log sigma."""
    start, end, count = 5.0, 0.1, 2000
    first = TWO_PEAKS.quantile(SHARES, start)
    y, h = first * math.sqrt(1 + start**2), math.log(end / start) / count

    def velocity(y, log_sigma):
        sigma = math.exp(log_sigma)
        return sigma * TWO_PEAKS.eps(y / math.sqrt(1 + sigma**2), sigma)

    for k in range(count):
        at = math.log(start) + k * h
        a = velocity(y, at)
        b = velocity(y + h / 2 * a, at + h / 2)
        c = velocity(y + h / 2 * b, at + h / 2)
        d = velocity(y + h * c, at + h)
        y = y + h / 6 * (a + 2 * b + 2 * c + d)
    assert (y / math.sqrt(1 + end**2) - TWO_PEAKS.flow(first, start, end)).abs().max() < 1e-10  # measured
