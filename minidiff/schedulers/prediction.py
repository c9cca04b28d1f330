"""What the network predicts, and what a solver needs instead: the one place where the two are converted.

With x = alpha x0 + sigma eps, a network may have been trained to return any of

    epsilon          out = eps
    sample           out = x0
    v_prediction     out = alpha eps - sigma x0              (Salimans & Ho 2022, https://arxiv.org/abs/2202.00512)
    flow_prediction  out = eps - x0, where alpha = 1 - sigma (Liu et al. 2022, https://arxiv.org/abs/2209.03003)

What EDM makes of a network's output (``minidiff.schedulers.edm``) is another function of the noise level.

alpha and sigma lie on the CPU, so that nothing here waits for a GPU. v_prediction assumes alpha² + sigma² = 1.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A number of a plan, () float32 on the CPU. To multiply a sample (on any device) by one is what the reference does, to
# the last bit: in half precision ``scalar * x`` rounds the scalar too, ``x * scalar`` does not. It is also 1 µs faster
# than to multiply by a Python float, 2 µs instead of 3 for a latent, and does not wait for a GPU.
Scalar = Tensor


class Thresholding(NamedTuple):
    """What to do with a predicted x0 that leaves the range of the data."""

    limit: float | None = None  # clamp to [-limit, limit]
    ratio: float | None = None  # dynamic thresholding at this quantile of |x0|, per picture
    ceiling: float = 1.0  # the largest threshold that dynamic thresholding may take

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Thresholding":
        """Return what the configuration of a scheduler asks for; thresholding goes before clamping."""
        if config.get("thresholding"):
            return cls(ratio=config["dynamic_thresholding_ratio"], ceiling=config["sample_max_value"])
        return cls(limit=config["clip_sample_range"] if config.get("clip_sample") else None)

    def __call__(self, x0: Tensor) -> Tensor:
        """Apply it to x0 (B, ...)."""
        if self.ratio is not None:
            return dynamic_threshold(x0, self.ratio, self.ceiling)
        return x0 if self.limit is None else x0.clamp(-self.limit, self.limit)


def dynamic_threshold(x0: Tensor, ratio: float, ceiling: float) -> Tensor:
    """Clamp each picture to [-s, s] and divide by s, where s is the ``ratio`` quantile of |x0|, kept in [1, ceiling].

    Saharia et al. 2022 (Imagen), https://arxiv.org/abs/2205.11487, section 2.3. x0: (B, ...).
    """
    flat = x0.flatten(1)
    if flat.dtype not in (torch.float32, torch.float64):
        flat = flat.float()  # torch.quantile knows no half precision
    s = torch.quantile(flat.abs(), ratio, dim=1, keepdim=True).clamp(min=1, max=ceiling)  # (B, 1)
    return (flat.clamp(-s, s) / s).reshape(x0.shape).to(x0.dtype)


def predict_x0(kind: str, x: Tensor, out: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
    """Return the x0 that the network's output ``out`` implies at x = alpha x0 + sigma eps."""
    if kind == "epsilon":
        return (x - sigma * out) / alpha
    if kind == "sample":
        return out
    if kind == "v_prediction":
        return alpha * x - sigma * out
    if kind == "flow_prediction":
        return x - sigma * out
    raise ValueError(f"prediction_type {kind!r} has no x0")


def predict_x0_unscaled(
    kind: str, y: Tensor, out: Tensor, sigma: Scalar, scale: Scalar, square: Scalar, ratio: Scalar
) -> Tensor:
    """Return the x0 that ``out`` implies at y = x0 + sigma eps, the sample of the solvers that do not scale it down.

    It is ``predict_x0`` of x = y / scale, with scale = sqrt(square), square = sigma² + 1 and ratio = sigma / scale.
    """
    if kind == "epsilon":
        return y - sigma * out
    if kind == "sample":
        return out
    if kind == "v_prediction":
        return y / square - out * ratio
    raise ValueError(f"prediction_type {kind!r} has no x0")


def predict_eps(kind: str, x: Tensor, out: Tensor, alpha: Scalar, sigma: Scalar) -> Tensor:
    """Return the noise that the network's output ``out`` implies at x = alpha x0 + sigma eps."""
    if kind == "epsilon":
        return out
    if kind == "sample":
        return (x - alpha * out) / sigma
    if kind == "v_prediction":
        return alpha * out + sigma * x
    raise ValueError(f"prediction_type {kind!r} has no eps")


def weighted_sum(*terms: tuple[Scalar | float, Tensor]) -> Tensor:
    """Return the sum of ``coefficient * tensor``, from left to right: what every solver's step comes down to.

    Each product is rounded before it is added, as in the reference. ``total.add_(tensor, alpha=coefficient)`` is one
    operation fewer and rounds once, which is other last bits; a steep run makes 1e-3 of 6e-8.
    """
    (coefficient, tensor), *rest = terms
    total = coefficient * tensor
    for coefficient, tensor in rest:
        total = total + coefficient * tensor
    return total
