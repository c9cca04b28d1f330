"""The noise schedule: betas of the forward process, which timesteps a run visits, and which noise levels.

The forward process of DDPM (Ho et al. 2020, https://arxiv.org/abs/2006.11239, eq. 2 and 4), for t = 0 ... T - 1:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    alpha_bar_t      = prod_{s <= t} (1 - beta_s)
    x_t              = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) noise
    sigma_t          = sqrt((1 - alpha_bar_t) / alpha_bar_t)        noise level of x_t / sqrt(alpha_bar_t)

Everything is computed in float32 and in the reference's order of operations: its own tables are float32, so a table
computed in float64 would differ from it by 6e-8 and a chained float64 comparison could not reach 1e-10.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.schedulers.beta_distribution import beta_quantile

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # what every scheduler has; some have more
ALMOST_NO_SIGNAL = 2**-24  # alpha_bar where zero-SNR rescaling leaves none: the smallest positive half-precision number


def betas(schedule: str, beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Return the ``steps`` betas (T,) of a named schedule, float32.

    ``linear``             evenly spaced betas (Ho et al. 2020)
    ``scaled_linear``      evenly spaced square roots of betas (latent diffusion, Rombach et al. 2022)
    ``squaredcos_cap_v2``  alpha_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2) (Nichol & Dhariwal 2021, eq. 17)
    ``exp``                alpha_bar(u) = exp(-12 u)
    ``laplace``            log signal-to-noise ratio with a Laplace distribution (Hang et al. 2024)
    ``sigmoid``            a sigmoid between the two ends (GeoDiff, Xu et al. 2022)
    """
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        return _betas_for(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, steps)
    if schedule == "exp":
        return _betas_for(lambda u: math.exp(u * -12.0), steps)
    if schedule == "laplace":
        return _betas_for(_laplace_alpha_bar, steps)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (beta_end - beta_start) + beta_start
    raise ValueError(f"there is no beta schedule {schedule!r}")


def _laplace_alpha_bar(u: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6))
    return math.sqrt(snr / (1 + snr))


def _betas_for(alpha_bar: Callable[[float], float], steps: int, max_beta: float = 0.999) -> Tensor:
    """Return the betas whose running product of (1 - beta) follows ``alpha_bar`` on [0, 1], capped at ``max_beta``."""
    edges = [alpha_bar(i / steps) for i in range(steps + 1)]
    return torch.tensor([min(1 - edges[i + 1] / edges[i], max_beta) for i in range(steps)], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that the last step is pure noise and the first is unchanged.

    Lin et al. 2023, https://arxiv.org/abs/2305.08891, Algorithm 1.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()  # sqrt(alpha_bar), (T,)
    first, last = root[0].clone(), root[-1].clone()
    alpha_bar = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


def noise_level(alpha_bar: Tensor) -> Tensor:
    """Return sigma = sqrt((1 - alpha_bar) / alpha_bar), the ratio of noise to picture."""
    return ((1 - alpha_bar) / alpha_bar) ** 0.5


def training_betas(
    schedule: str,
    beta_start: float,
    beta_end: float,
    steps: int,
    trained_betas: Sequence[float] | None = None,
    zero_snr: bool = False,
) -> Tensor:
    """Return the betas (T,) a model was trained with: given ones or a named schedule, then zero-SNR rescaling."""
    if trained_betas is None:
        table = betas(schedule, beta_start, beta_end, steps)
    else:
        table = torch.as_tensor(trained_betas, dtype=torch.float32).clone()
    if not (table.isfinite() & (table >= 0)).all():
        raise ConfigError(f"betas should be finite and not negative, found {table.min():g} ... {table.max():g}")
    return rescale_zero_terminal_snr(table) if zero_snr else table


SPACINGS = ("linspace", "leading", "trailing")


def spaced_timesteps(
    spacing: str, steps: int, train_steps: int, offset: int = 0, *, extra: bool = False, last: int | None = None
) -> Tensor:
    """Return ``steps`` training timesteps, largest first, int64 (Lin et al. 2023, table 2).

    ``linspace``  0 ... T - 1 evenly, both ends included
    ``leading``   multiples of T // steps from 0, plus ``offset``: never visits the last training timesteps
    ``trailing``  T - 1 downwards in strides of T / steps: always begins at the last training timestep

    With ``extra`` (the multistep solvers), linspace and leading space one more timestep and leave out the smallest.

    ``last`` (T by default) is one more than the noisiest timestep that may be visited; trailing keeps its stride and
    so returns fewer.

    Raises ValueError if there are more steps than training timesteps or if the offset leads beyond the last of them.
    """
    last = train_steps if last is None else last
    if steps > last:
        raise ValueError(f"{steps} inference steps are more than the {last} timesteps of training")
    count = steps + extra
    if spacing == "leading" and count > last:
        raise ValueError(f"timestep spacing 'leading' has room for at most {last - 1} steps here, found {steps}")
    if spacing == "linspace":
        times = np.linspace(0, last - 1, count).round()[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(count) * (last // count))[::-1][:steps] + offset
    elif spacing == "trailing":
        # NumPy's arange has one element too many for 62 of the counts up to 1000 (61, 103, 121...), a rounding error
        # that makes the reference call the network at timestep -1. `steps` were asked for: the rest is cut off.
        times = np.arange(last, 0, -train_steps / steps).round()[:steps] - 1
    else:
        raise ValueError(f"timestep spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    times = times.astype(np.int64)
    if times[0] >= train_steps:
        raise ValueError(
            f"steps_offset={offset} with {steps} steps begins at timestep {times[0]}, beyond the last of training "
            f"({train_steps - 1}): use fewer steps or a smaller steps_offset"
        )
    return torch.from_numpy(times.copy())


def custom_timesteps(timesteps: Sequence[float], train_steps: int, *, whole: bool = True) -> Tensor:
    """Check timesteps that a user gives, largest first, and return them as int64, or as float32 unless ``whole``.

    Raises ValueError if they do not descend or leave 0 ... T - 1.
    """
    times = np.asarray(timesteps)
    if times.ndim != 1 or not np.issubdtype(times.dtype, np.integer if whole else np.number):
        raise ValueError(f"timesteps should be a list of {'integers' if whole else 'numbers'}, found {timesteps!r}")
    if (np.diff(times) >= 0).any():
        raise ValueError(f"timesteps should descend, found {times.tolist()}")
    if times[0] >= train_steps or times[-1] < 0:
        raise ValueError(f"timesteps should lie in 0 ... {train_steps - 1}, found {times.max()} ... {times.min()}")
    return torch.from_numpy(times.astype(np.int64 if whole else np.float32))


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int, rho: float = 7.0) -> np.ndarray:
    """Return noise levels (N,), largest first, spaced evenly in sigma^(1/rho).

    Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (high + np.linspace(0, 1, steps) * (low - high)) ** rho


def exponential_sigmas(sigma_min: float, sigma_max: float, steps: int) -> np.ndarray:
    """Return noise levels (N,), largest first, spaced evenly in log sigma."""
    return np.exp(np.linspace(math.log(sigma_max), math.log(sigma_min), steps))


def beta_sigmas(sigma_min: float, sigma_max: float, steps: int, a: float = 0.6, b: float = 0.6) -> np.ndarray:
    """Return noise levels (N,), largest first, at evenly spaced quantiles of a beta distribution.

    Lee et al. 2024 ("Beta Sampling is All You Need"), https://arxiv.org/abs/2407.12173.
    """
    return sigma_min + beta_quantile(1 - np.linspace(0, 1, steps), a, b) * (sigma_max - sigma_min)


SIGMA_SPACINGS = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def chosen_spacing(config: Mapping[str, Any]) -> Callable[[float, float, int], np.ndarray] | None:
    """Return which of ``SIGMA_SPACINGS`` a scheduler's configuration asks for, None for the training timesteps' own.

    Raises ConfigError if it asks for several.
    """
    given = [name for name in SIGMA_SPACINGS if config.get(name)]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: set one of them")
    return SIGMA_SPACINGS[given[0]] if given else None


def sigma_to_timestep(sigmas: np.ndarray, log_sigmas: np.ndarray, *, single: bool = False) -> np.ndarray:
    """Return the fractional training timesteps (N,) of noise levels (N,), interpolating in log sigma.

    log_sigmas: those of training, smallest first (T,). Levels outside their range go to its ends.
    ``single`` computes in float32 to the end, as the reference does for the midpoints of DPM2.
    """
    wanted = np.log(np.maximum(sigmas, 1e-10))
    # The last one that is not larger. Zero-SNR levels do not ascend at their end, so a binary search would not do.
    reached = log_sigmas[:, None] <= wanted  # (T, N)
    low = len(log_sigmas) - 1 - reached[::-1].argmax(axis=0)
    low = np.where(reached.any(axis=0), low, 0).clip(max=len(log_sigmas) - 2)
    below, above = log_sigmas[low], log_sigmas[low + 1]
    part = ((below - wanted) / (below - above)).clip(0, 1)
    low = low.astype(np.float32 if single else np.float64)
    return (1 - part) * low + part * (low + 1)
