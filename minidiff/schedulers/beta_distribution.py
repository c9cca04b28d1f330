"""The beta distribution: its cumulative distribution function and the inverse of it, which torch and NumPy lack."""

import math

import numpy as np


def beta_cdf(x: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return the regularised incomplete beta function I_x(a, b) for x in (0, 1), by its continued fraction.

    DLMF 8.17.22, evaluated by Lentz's method; I_x(a, b) = 1 - I_{1-x}(b, a) keeps to the side where it converges fast.
    """
    x = np.asarray(x, dtype=np.float64)
    mirrored = x > (a + 1) / (a + b + 2)
    z, p, q = np.where(mirrored, 1 - x, x), np.where(mirrored, b, a), np.where(mirrored, a, b)
    c = np.ones_like(z)
    d = 1 / (1 - (p + q) * z / (p + 1))
    fraction = d
    for m in range(1, 200):
        for term in (
            m * (q - m) * z / ((p + 2 * m - 1) * (p + 2 * m)),
            -(p + m) * (p + q + m) * z / ((p + 2 * m) * (p + 2 * m + 1)),
        ):
            d, c = 1 / (1 + term * d), 1 + term / c
            fraction = fraction * c * d
        if np.abs(c * d - 1).max(initial=0) < 4e-16:  # two ulp
            break
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    below = np.exp(p * np.log(z) + q * np.log1p(-z) - log_beta) * fraction / p
    return np.where(mirrored, 1 - below, below)


def beta_quantile(q: np.ndarray, a: float, b: float) -> np.ndarray:
    """Return the x (N,) at which I_x(a, b) = q: the inverse of ``beta_cdf``, for q in [0, 1].

    Newton's method in u, where x = sin²(u): the density, infinite at both ends for a, b < 1, is tame in u.
    """
    q = np.asarray(q, dtype=np.float64)
    inside = (q > 0) & (q < 1)
    quantile = q.copy()  # 0 and 1 are their own
    q = q[inside]
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high, u = np.zeros_like(q), np.full_like(q, math.pi / 2), np.full_like(q, math.pi / 4)
    for _ in range(60):
        error = beta_cdf(np.sin(u) ** 2, a, b) - q
        low, high = np.where(error < 0, u, low), np.where(error < 0, high, u)
        slope = 2 * np.exp((2 * a - 1) * np.log(np.sin(u)) + (2 * b - 1) * np.log(np.cos(u)) - log_beta)
        newton = u - error / slope
        newton = np.where((newton > low) & (newton < high), newton, (low + high) / 2)  # bisect where Newton leaves
        step, u = np.abs(newton - u).max(initial=0), newton
        if step < 4e-15:  # the rounding of the cdf, so nothing is left to gain
            break
    quantile[inside] = np.sin(u) ** 2
    return quantile
