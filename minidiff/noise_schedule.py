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
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")


def betas(schedule: str, beta_start: float, beta_end: float, steps: int) -> Tensor:
    """Return the ``steps`` betas (T,) of one of ``BETA_SCHEDULES``, float32.

    ``linear``             evenly spaced betas (Ho et al. 2020)
    ``scaled_linear``      evenly spaced square roots of betas (latent diffusion, Rombach et al. 2022)
    ``squaredcos_cap_v2``  alpha_bar(u) = cos^2((u + 0.008) / 1.008 pi / 2) (Nichol & Dhariwal 2021, eq. 17)
    ``laplace``            log signal-to-noise ratio with a Laplace distribution (Hang et al. 2024)
    ``sigmoid``            a sigmoid between the two ends (GeoDiff, Xu et al. 2022)
    """
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
    if schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
    if schedule == "squaredcos_cap_v2":
        return _betas_for(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, steps)
    if schedule == "laplace":
        return _betas_for(_laplace_alpha_bar, steps)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, steps)) * (beta_end - beta_start) + beta_start
    raise ValueError(f"beta schedule {schedule!r} is not one of {', '.join(BETA_SCHEDULES)}")


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
        if table.shape != (steps,):
            raise ValueError(f"trained_betas has shape {tuple(table.shape)}, num_train_timesteps is {steps}")
    return rescale_zero_terminal_snr(table) if zero_snr else table


SPACINGS = ("linspace", "leading", "trailing")


def spaced_timesteps(spacing: str, steps: int, train_steps: int, offset: int = 0, *, extra: bool = False) -> Tensor:
    """Return ``steps`` training timesteps, largest first, int64 (Lin et al. 2023, table 2).

    ``linspace``  0 ... T - 1 evenly, both ends included
    ``leading``   multiples of T // steps from 0, plus ``offset``: never visits the last training timesteps
    ``trailing``  T - 1 downwards in strides of T / steps: always begins at the last training timestep

    With ``extra`` (the multistep solvers), linspace and leading space one more timestep and leave out the smallest.

    Raises ValueError if there are more steps than training timesteps or if the offset leads beyond the last of them.
    """
    if steps > train_steps:
        raise ValueError(f"{steps} inference steps are more than the {train_steps} timesteps of training")
    count = steps + extra
    if spacing == "linspace":
        times = np.linspace(0, train_steps - 1, count).round()[::-1][:steps]
    elif spacing == "leading":
        times = (np.arange(count) * (train_steps // count))[::-1][:steps] + offset
    elif spacing == "trailing":
        # NumPy's arange has one element too many for 62 of the counts up to 1000 (61, 103, 121...), a rounding error
        # that makes the reference call the network at timestep -1. `steps` were asked for: the rest is cut off.
        times = np.arange(train_steps, 0, -train_steps / steps).round()[:steps] - 1
    else:
        raise ValueError(f"timestep spacing {spacing!r} is not one of {', '.join(SPACINGS)}")
    times = times.astype(np.int64)
    if times[0] >= train_steps:
        raise ValueError(
            f"steps_offset={offset} with {steps} steps begins at timestep {times[0]}, beyond the last of training "
            f"({train_steps - 1}): use fewer steps or a smaller steps_offset"
        )
    return torch.from_numpy(times.copy())


def custom_timesteps(timesteps: Sequence[int], train_steps: int) -> Tensor:
    """Check timesteps that a user gives, largest first, and return them as int64.

    Raises ValueError if they do not descend or leave 0 ... T - 1.
    """
    times = np.asarray(timesteps)
    if times.ndim != 1 or not np.issubdtype(times.dtype, np.integer):
        raise ValueError(f"timesteps should be a list of integers, found {timesteps!r}")
    if (np.diff(times) >= 0).any():
        raise ValueError(f"timesteps should descend, found {times.tolist()}")
    if times[0] >= train_steps or times[-1] < 0:
        raise ValueError(f"timesteps should lie in 0 ... {train_steps - 1}, found {times.max()} ... {times.min()}")
    return torch.from_numpy(times.astype(np.int64))
