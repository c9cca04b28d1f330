"""DDIM: the implicit sampler, deterministic by default; the reference point of all the others.

With alpha_bar_t at this timestep, alpha_bar_s at the next, and eps and x0 as the network predicts them:

    x_s = sqrt(alpha_bar_s) x0 + sqrt(1 - alpha_bar_s - std²) eps + std noise
    std = eta sqrt((1 - alpha_bar_s) / (1 - alpha_bar_t) (1 - alpha_bar_t / alpha_bar_s))

eta = 0 is Euler's method in sigma = sqrt((1 - alpha_bar) / alpha_bar); eta = 1 is DDPM.

Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12 and 16. Checked against ``diffusers.DDIMScheduler``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from minidiff.configured import register_to_config
from minidiff.noise import Generators
from minidiff.schedulers.base import Grid, Past, Plan, Scheduler, SchedulerOutput, Update
from minidiff.schedulers.prediction import Scalar, predict_eps, weighted_sum


class DDIMStep(NamedTuple):
    """The numbers of one DDIM step."""

    alpha: Scalar  # sqrt(alpha_bar_t)
    sigma: Scalar  # sqrt(1 - alpha_bar_t)
    to_x0: Scalar  # the coefficients of the predicted x0,
    to_eps: Scalar  # the predicted eps,
    std: Scalar  # and the noise


class DDIMScheduler(Scheduler):
    """Sample with DDIM. ``eta`` (0 to 1) says how much noise each step replaces; the default is none.

    The next timestep is always ``T // steps`` below this one, as in the reference, even where the spacing is not.
    """

    finds_by_timestep = any_time = True
    run_options: ClassVar[Mapping[str, Any]] = {"eta": 0.0, "use_clipped_model_output": False}

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        clip_sample: bool = True,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        super().__init__()

    def _grid(self, count: int) -> Grid:
        return self._grid_of(self._spaced_timesteps(count), self.final_alpha_cumprod)

    def _coefficients(self, plan: Plan) -> tuple[DDIMStep, ...]:
        eta = plan.options["eta"]
        if not 0 <= eta <= 1:
            raise ValueError(f"eta should lie between 0 (DDIM) and 1 (DDPM), found {eta}")
        stride = self.config.num_train_timesteps // plan.num_inference_steps
        alpha_bar_t = self._alpha_bar(plan.times)
        alpha_bar_s = self._alpha_bar([t - stride for t in plan.times])
        self._require_signal(alpha_bar_t)
        std = eta * ((1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)) ** 0.5
        columns = (
            alpha_bar_t**0.5,
            (1 - alpha_bar_t) ** 0.5,
            alpha_bar_s**0.5,
            # With eta = 1 and no signal at t this is 0, or by rounding below 0 and NaN in the reference.
            (1 - alpha_bar_s - std**2).clamp(min=0) ** 0.5,
            std,
        )
        return tuple(map(DDIMStep, *columns))

    def _get_variance(self, timestep: int, prev_timestep: int) -> Tensor:
        """Return the variance of the noise between two timesteps at eta = 1, by the name that programs call."""
        alpha_bar_t, alpha_bar_s = self._alpha_bar([timestep, prev_timestep])
        return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)

    def wants_noise(self, plan: Plan, i: int) -> bool:
        return plan.options["eta"] > 0

    def _update(self, plan: Plan, i: int, x: Tensor, out: Tensor, past: Past, noise: Tensor | None) -> Update:
        step = plan.coefficients[i]
        x0 = self.denoised(plan, i, x, out)
        if plan.options["use_clipped_model_output"]:
            eps = predict_eps("sample", x, x0, step.alpha, step.sigma)
        else:
            eps = predict_eps(self._predicts, x, out, step.alpha, step.sigma)
        terms = [(step.to_x0, x0), (step.to_eps, eps)]
        if self.wants_noise(plan, i):
            terms.append((step.std, noise))
        return Update(weighted_sum(*terms), (), x0)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor, ...]:
        """Take the step at ``timestep``, with ``variance_noise`` for its noise if given; see ``Scheduler.step``.

        ``use_clipped_model_output`` works out eps anew from the clipped x0, as GLIDE does.
        """
        return self._take_step(
            model_output,
            timestep,
            sample,
            generator,
            return_dict,
            variance_noise,
            eta=eta,
            use_clipped_model_output=use_clipped_model_output,
        )
