"""What the schedulers of EDM share: noise levels without a table of betas, and what stands around the network.

The network F sees and answers tensors of about unit variance, whatever the noise level sigma, for data of standard
deviation sigma_data:

    x0      = c_skip y + c_out F(c_in y, c_noise)               y = x0 + sigma eps
    c_in    = 1 / sqrt(sigma² + sigma_data²)                    the variance of y becomes 1
    c_skip  = sigma_data² / (sigma² + sigma_data²)              as much of y as lets F amplify its errors the least
    c_out   = ±sigma sigma_data / sqrt(sigma² + sigma_data²)    the variance of what F is to say becomes 1
    c_noise = log(sigma) / 4                                    what it is told instead of a timestep

with + for networks that "predict epsilon" and - for those that predict v, whose F at sigma_data = 1 is the v of
``minidiff.schedulers.prediction``. A run goes down from sigma_max to sigma_min, evenly in sigma^(1/rho) (``karras``) or
in log sigma (``exponential``).

Karras et al. 2022, https://arxiv.org/abs/2206.00364, eq. 5 and 7, table 1.
"""

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from minidiff.errors import ConfigError
from minidiff.schedulers.base import Grid, Plan
from minidiff.schedulers.prediction import Scalar
from minidiff.schedulers.sigma_space import SigmaSpaceScheduler


class Preconditioning(NamedTuple):
    """A noise level and what stands around the network there; see the head of this file."""

    sigma: Scalar
    scale: Scalar  # sqrt(sigma² + sigma_data²)
    c_in: Scalar
    c_skip: Scalar
    c_out: Scalar


class EdmScheduler(SigmaSpaceScheduler):
    """Base of the two. A solver says in ``_grid`` where a run ends, in ``_training_grid`` what is there before it."""

    _compatibles = ()
    prediction_types = ("epsilon", "v_prediction")
    ramp_dtype: ClassVar[torch.dtype] = torch.float32  # that the levels are worked out in

    def __init__(self) -> None:  # no super().__init__(): there are no betas
        config = self.config
        self._require("sigma_schedule", ("karras", "exponential"))
        self._require("prediction_type", self.prediction_types)
        self._require("final_sigmas_type", ("zero", "sigma_min"))
        if not (0 < config.sigma_min < config.sigma_max and config.sigma_data > 0 and config.rho > 0):
            raise ConfigError(
                f"{type(self).__name__} needs 0 < sigma_min < sigma_max, sigma_data > 0 and rho > 0; found "
                f"sigma_min={config.sigma_min}, sigma_max={config.sigma_max}, sigma_data={config.sigma_data}, "
                f"rho={config.rho}"
            )

    # ---- the noise levels of a run ------------------------------------------------------------------------------

    def _levels(self, ramp: Tensor) -> Tensor:
        """Return the noise levels (N,) at places between sigma_max, 0, and sigma_min, 1: float32.

        The exponential ones are spread over as many as there are places, and so one alone is sigma_min: as there.
        """
        config = self.config
        if config.sigma_schedule == "exponential":
            return torch.linspace(math.log(config.sigma_min), math.log(config.sigma_max), len(ramp)).exp().flip(0)
        high, low = config.sigma_max ** (1 / config.rho), config.sigma_min ** (1 / config.rho)
        return ((high + ramp * (low - high)) ** config.rho).float()

    def _ramp(self, count: int) -> Tensor:
        return torch.linspace(0, 1, count, dtype=self.ramp_dtype)

    def _ended(self, levels: Tensor, last: float) -> Grid:
        """Return the grid over ``levels`` (N,), to the level ``last`` after the last step."""
        return Grid(self.precondition_noise(levels), torch.cat([levels, torch.tensor([last])]))

    def _init_noise_sigma(self, sigmas: Tensor) -> float:
        return (self.config.sigma_max**2 + 1) ** 0.5

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the sample that a run starts from."""
        return self._init_noise_sigma(self.sigmas)

    # ---- the network's surroundings -----------------------------------------------------------------------------

    def _preconditioning(self, sigma: Any) -> Preconditioning:
        """Return the functions of noise levels: a number, () or (N,)."""
        data = self.config.sigma_data
        scale = (sigma**2 + data**2) ** 0.5
        sign = 1 if self._predicts == "epsilon" else -1
        return Preconditioning(sigma, scale, 1 / scale, data**2 / (sigma**2 + data**2), sign * sigma * data / scale)

    def _at_each(self, sigmas: Tensor) -> list[Preconditioning]:
        """Return those of each of sigmas (N,)."""
        return list(map(Preconditioning, *self._preconditioning(sigmas)))

    def precondition_inputs(self, sample: Tensor, sigma: float | Tensor) -> Tensor:
        """Return what the network is shown of a sample (B, ...) at noise level ``sigma``: c_in y."""
        return sample * self._preconditioning(sigma).c_in

    def precondition_noise(self, sigma: float | Tensor) -> Tensor:
        """Return what the network is told of noise levels, as float32 of their shape, (1,) for a number: c_noise."""
        return 0.25 * torch.log(sigma if isinstance(sigma, Tensor) else torch.tensor([sigma]))

    def precondition_outputs(self, sample: Tensor, model_output: Tensor, sigma: float | Tensor) -> Tensor:
        """Return the x0 that the network's answer at noise level ``sigma`` means: c_skip y + c_out F."""
        around = self._preconditioning(sigma)
        return around.c_skip * sample + around.c_out * model_output

    def scale_input(self, plan: Plan, i: int, x: Tensor) -> Tensor:
        return x * plan.coefficients[i].level.c_in

    def _x0(self, level: Preconditioning, y: Tensor, out: Tensor) -> Tensor:
        return self._thresholding(level.c_skip * y + level.c_out * out)

    # ---- training -----------------------------------------------------------------------------------------------

    def _where(self, timesteps: Tensor) -> list[int]:
        return [self._index_of(t) for t in timesteps.reshape(-1).tolist()]  # before a run too: log(sigma) / 4

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return what F is to say if it predicts v, (sigma_data noise - sigma x0 / sigma_data) / scale."""
        sigma, data = self._levels_at(timesteps, sample), self.config.sigma_data
        return (data * noise - sigma / data * sample) / self._preconditioning(sigma).scale
