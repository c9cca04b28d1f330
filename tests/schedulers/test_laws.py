"""What must hold of the schedulers whatever the reference does."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import minidiff
from minidiff.schedulers.by_hand import ByHandScheduler
from minidiff.schedulers.place import OfPlace
from tests.schedulers.runs import by_hand, error, network, noise, pairwise, through_core

SCHEDULERS = {
    "deis": minidiff.DEISMultistepScheduler(solver_order=3),
    "edm-euler": minidiff.EDMEulerScheduler(),
    "edm-dpm++": minidiff.EDMDPMSolverMultistepScheduler(
        solver_order=3, prediction_type="v_prediction", sigma_data=1.0
    ),
    "edm-dpm++-sde": minidiff.EDMDPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    "lcm": minidiff.LCMScheduler(),
    "tcd": minidiff.TCDScheduler(),
    "dpm2": minidiff.KDPM2DiscreteScheduler(),
    "dpm2-ancestral": minidiff.KDPM2AncestralDiscreteScheduler(use_karras_sigmas=True),
    "heun": minidiff.HeunDiscreteScheduler(),
    "lms": minidiff.LMSDiscreteScheduler(),
    "dpm-singlestep": minidiff.DPMSolverSinglestepScheduler(solver_order=3),
    "dpm-singlestep-sde": minidiff.DPMSolverSinglestepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm++": minidiff.DPMSolverMultistepScheduler(solver_order=3),
    "dpm++-sde": minidiff.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type="heun"),
    "dpm": minidiff.DPMSolverMultistepScheduler(algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    "euler": minidiff.EulerDiscreteScheduler(),
    "euler-ancestral": minidiff.EulerAncestralDiscreteScheduler(),
    "ddim": minidiff.DDIMScheduler(),
    "ddpm": minidiff.DDPMScheduler(),
    "pndm": minidiff.PNDMScheduler(),
    "plms": minidiff.PNDMScheduler(skip_prk_steps=True, steps_offset=1),
    "unipc": minidiff.UniPCMultistepScheduler(solver_order=3),
    "unipc-eps": minidiff.UniPCMultistepScheduler(predict_x0=False, final_sigmas_type="sigma_min"),
}
DRAWS = {
    "DDPMScheduler",
    "EDMDPMSolverMultistepScheduler",
    "EDMEulerScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
    "EulerAncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
}
every = pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)


@every
def test_both_faces_take_the_same_steps(scheduler):
    assert torch.equal(through_core(scheduler, 9), by_hand(scheduler, 9, seeded=type(scheduler).__name__ in DRAWS))


@every
def test_interleaved_runs_are_separate_runs(scheduler):
    def run(steps, first):
        plan, generator = scheduler.plan(steps), torch.Generator().manual_seed(steps)
        x, past = first, ()
        for i in range(len(plan.coefficients)):
            out = network(x, plan.timesteps[i])
            x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x, generator))
            yield x

    firsts = (noise(), noise().flip(0))
    apart = [list(run(steps, first)) for steps, first in zip((8, 11), firsts, strict=True)]
    together = list(itertools.zip_longest(run(8, firsts[0]), run(11, firsts[1])))
    assert torch.equal(torch.stack(apart[0]), torch.stack([x for x, _ in together if x is not None]))
    assert torch.equal(torch.stack(apart[1]), torch.stack([x for _, x in together]))


@every
def test_threads_share_a_scheduler(scheduler):
    counts = [5, 8, 13, 21, 5, 8, 13, 21]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda steps: through_core(scheduler, steps)[-1], counts))
    for steps, result in zip(counts, results, strict=True):
        assert torch.equal(result, through_core(scheduler, steps)[-1])


@every
def test_a_step_changes_nothing_that_it_was_given(scheduler):
    plan = scheduler.plan(9)
    x, past = noise(), ()
    for i in range(len(plan.coefficients)):
        out = network(x, plan.timesteps[i])
        before = [tensor.clone() for tensor in (x, out, *_tensors(past))]
        after, next_past = scheduler.advance(plan, i, x, out, past, noise())
        assert all(torch.equal(a, b) for a, b in zip(before, (x, out, *_tensors(past)), strict=True))
        x, past = after, next_past


class NothingWaits(TorchDispatchMode):
    """Refuses what a GPU would have to be waited for: to read a value, and to copy between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        assert func is not torch.ops.aten._local_scalar_dense.default, "reads a value"
        if func is torch.ops.aten._to_copy.default:
            assert kwargs.get("device") in (None, args[0].device), "copies between devices"
        if func is torch.ops.aten.copy_.default:
            assert args[0].device == args[1].device, "copies between devices"
        return func(*args, **kwargs)


EVERY_OPTION_OF_A_STEP = {
    **SCHEDULERS,
    "ddim, eta": minidiff.DDIMScheduler(thresholding=True, prediction_type="v_prediction"),
    "ddpm, learned": minidiff.DDPMScheduler(variance_type="learned_range"),
    "dpm++, learned": minidiff.DPMSolverMultistepScheduler(variance_type="learned", thresholding=True),
    "heun, clipped": minidiff.HeunDiscreteScheduler(clip_sample=True, prediction_type="sample"),
    "pndm, v": minidiff.PNDMScheduler(prediction_type="v_prediction"),
    "unipc, flow": minidiff.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
}


@pytest.mark.parametrize("scheduler", EVERY_OPTION_OF_A_STEP.values(), ids=EVERY_OPTION_OF_A_STEP)
def test_nothing_in_a_step_waits_for_the_device(scheduler):
    """Stand-in for a GPU: tensors of the meta device have no values to wait for, and do not mix with those of the CPU.

    Numbers of the CPU, () tensors, mix with any device: the kernel is handed the value.
    """
    options = {"eta": 0.5} if "eta" in scheduler.run_options else {}
    options |= {"s_churn": 40.0} if "s_churn" in scheduler.run_options else {}
    plan = scheduler.plan(9, device="meta", **options)
    x, past = noise().to("meta"), ()
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    with NothingWaits():
        for i in range(len(plan.coefficients)):
            shown = scheduler.scale_input(plan, i, x)
            out = torch.cat([shown, shown], dim=1) if learned else shown
            assert scheduler.denoised(plan, i, x, out).device.type == "meta"
            x, past = scheduler.advance(plan, i, x, out, past, scheduler.draw_noise(plan, i, x))
    assert x.device.type == "meta" and x.shape == noise().shape


def _tensors(past) -> list[Tensor]:
    return [past] if isinstance(past, Tensor) else [t for part in past or () for t in _tensors(part)]


@every
def test_gradients_pass_through_a_run(scheduler):
    start = noise().requires_grad_()
    plan = scheduler.plan(5)
    x, past = start, ()
    for i in range(len(plan.coefficients)):
        x, past = scheduler.advance(plan, i, x, network(x, plan.timesteps[i]), past, noise())
    (gradient,) = torch.autograd.grad(x.sum(), start)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def ddim(scheduler, way: Tensor, plan) -> Tensor:
    """Return where DDIM (Song et al. 2021, eq. 12, eta = 0) goes from each x of a run, one step each."""
    sigma = plan.sigmas.double()
    alpha_bar = 1 / (1 + sigma**2)
    nexts = []
    for i, x in enumerate(way[:-1]):
        eps = network(x, plan.timesteps[i])
        x0 = (x - (1 - alpha_bar[i]).sqrt() * eps) / alpha_bar[i].sqrt()
        nexts.append(alpha_bar[i + 1].sqrt() * x0 + (1 - alpha_bar[i + 1]).sqrt() * eps)
    return torch.stack([way[0], *nexts])


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_of_order_1_without_corrector_is_ddim(final, solver_type):
    scheduler = minidiff.UniPCMultistepScheduler(
        solver_order=1, disable_corrector=list(range(20)), final_sigmas_type=final, solver_type=solver_type
    )
    way = through_core(scheduler, 20)
    assert error(ddim(scheduler, way, scheduler.plan(20)), way) < 1e-6  # measured 3e-7: the coefficients are float32


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_dpm_solver_of_order_1_is_ddim(final):
    scheduler = minidiff.DPMSolverMultistepScheduler(solver_order=1, final_sigmas_type=final)
    way = through_core(scheduler, 20)
    assert error(ddim(scheduler, way, scheduler.plan(20)), way) < 1e-6  # measured 3e-7


def test_the_first_step_of_plms_is_ddim():
    scheduler = minidiff.PNDMScheduler(skip_prk_steps=True)
    way, plan = through_core(scheduler, 20), scheduler.plan(20)
    assert error(ddim(scheduler, way[:2], plan), way[:2]) < 1e-6  # measured 5e-8


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim_with_all_of_the_noise_is_ddpm(spacing):
    options = {"timestep_spacing": spacing, "clip_sample": False}
    ways = [
        through_core(minidiff.DDIMScheduler(**options), 20, eta=1.0)[:-1],  # DDPM does not draw in the last step
        through_core(minidiff.DDPMScheduler(**options), 20)[:-1],
    ]
    assert error(*ways) < 1e-5  # measured 2e-6: float32 coefficients, in another order


def test_ddim_is_euler_in_sigma():
    """Karras et al. 2022, Algorithm 1 with x / sqrt(alpha_bar) as the sample, in float64."""
    scheduler = minidiff.DDIMScheduler(clip_sample=False)
    plan = scheduler.plan(20)
    sigma = plan.sigmas.double()
    y = noise() * (1 + sigma[0] ** 2).sqrt()
    way = [noise()]
    for i in range(20):
        eps = network(y / (1 + sigma[i] ** 2).sqrt(), plan.timesteps[i])
        y = y + (sigma[i + 1] - sigma[i]) * eps
        way.append(y / (1 + sigma[i + 1] ** 2).sqrt())
    assert error(through_core(scheduler, 20), torch.stack(way)) < 1e-6  # measured 2e-7


def test_euler_is_ddim():
    """On timesteps they share: linspace to whole numbers."""
    ddim = minidiff.DDIMScheduler(clip_sample=False)
    euler = minidiff.EulerDiscreteScheduler(timestep_spacing="leading")
    plan = euler.plan(20)
    way, scale = through_core(euler, 20), (1 + plan.sigmas.double() ** 2).sqrt().reshape(-1, 1, 1, 1, 1)
    assert torch.equal(plan.timesteps, ddim.plan(20).timesteps.float())
    assert error(way / scale, through_core(ddim, 20)) < 1e-6  # measured 3e-7


def test_ancestral_steps_from_very_high_levels_are_finite():
    """Between 20,000 and 20 nothing is left of sigma_down; the reference takes the root of a rounding error, NaN."""
    options = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    for kind in (minidiff.EulerAncestralDiscreteScheduler, minidiff.KDPM2AncestralDiscreteScheduler):
        for steps in range(1, 40):
            assert through_core(kind(**options), steps).isfinite().all()


NAN_IN_THE_REFERENCE = {
    "solver_type": ["bh1", "bh2"],
    "predict_x0": [True, False],
    "lower_order_final": [True, False],
    "solver_order": [1, 2, 3, 4],
    "final_sigmas_type": ["zero", "sigma_min"],
    "timestep_spacing": ["linspace", "leading", "trailing"],
    "rescale_betas_zero_snr": [False, True],
    "spaced_by": ["timestep_spacing", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"],
}


def test_every_unipc_run_is_finite_and_ends_where_it_should():
    for options in pairwise(NAN_IN_THE_REFERENCE):
        switch = options.pop("spaced_by")
        scheduler = minidiff.UniPCMultistepScheduler(
            **options, **({switch: True} if switch != "timestep_spacing" else {})
        )
        for steps in (1, 2, 4, 13):
            way = through_core(scheduler, steps)
            assert way.isfinite().all(), (options, steps)
            sigmas = scheduler.plan(steps).sigmas
            repeats = options["final_sigmas_type"] == "sigma_min" and switch != "timestep_spacing"
            assert (sigmas.diff()[:-1] < 0).all() and (sigmas[-1] < sigmas[-2] or repeats), (options, steps)


PERFECT = {
    "dpm2": minidiff.KDPM2DiscreteScheduler(),
    "dpm2-ancestral": minidiff.KDPM2AncestralDiscreteScheduler(),
    "heun": minidiff.HeunDiscreteScheduler(use_karras_sigmas=True),
    "lms": minidiff.LMSDiscreteScheduler(),
    "dpm-singlestep": minidiff.DPMSolverSinglestepScheduler(solver_order=3, solver_type="heun"),
    "dpm++": minidiff.DPMSolverMultistepScheduler(solver_order=3, solver_type="heun"),
    "dpm++-sde": minidiff.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "euler": minidiff.EulerDiscreteScheduler(),
    "euler-ancestral": minidiff.EulerAncestralDiscreteScheduler(),
    "ddim": minidiff.DDIMScheduler(clip_sample=False),
    "ddpm": minidiff.DDPMScheduler(clip_sample=False),
    "pndm": minidiff.PNDMScheduler(set_alpha_to_one=True),
    "plms": minidiff.PNDMScheduler(set_alpha_to_one=True, skip_prk_steps=True),
    **{
        f"unipc-{order}-{predict_x0}-{solver_type}": minidiff.UniPCMultistepScheduler(
            solver_order=order, predict_x0=predict_x0, solver_type=solver_type
        )
        for order in (1, 2, 3)
        for predict_x0 in (True, False)
        for solver_type in ("bh1", "bh2")
    },
}


@pytest.mark.parametrize("steps", [4, 5, 20, 100])
@pytest.mark.parametrize("scheduler", PERFECT.values(), ids=PERFECT)
def test_a_perfect_denoiser_returns_the_picture(scheduler, steps):
    picture = noise().flip(0).clamp(-1, 1)

    def perfect(x: Tensor, t: Tensor) -> Tensor:
        low, part = int(t), float(t) % 1  # linspace leaves fractions to some solvers
        levels = scheduler._training_sigmas().astype(float)
        sigma = levels[low] if not part else levels[low] * (1 - part) + levels[low + 1] * part
        return (x * math.sqrt(1 + sigma**2) - picture) / sigma

    # Coefficients are float32, and a run begins with x0 = (x - ...) / 0.006: 6e-8 becomes 1e-5. Worst measured: 4e-4.
    assert (through_core(scheduler, steps, denoise=perfect)[-1] - picture).abs().max() < 1e-3


@every
def test_previews_are_what_the_output_means(scheduler):
    """``denoised`` is the x0 that the network's output implies, by definition, for the x that it was shown."""
    plan = scheduler.plan(8)
    x, past = noise() * plan.init_noise_sigma, ()
    for i in range(len(plan.coefficients)):
        shown = scheduler.scale_input(plan, i, x)
        out = network(shown, plan.timesteps[i])
        sigma = plan.coefficients[i].level.sigma if hasattr(plan.coefficients[i], "level") else plan.sigmas[i].item()
        alpha_bar = torch.as_tensor(1 / (1 + sigma**2), dtype=torch.float64)
        x0 = (shown - (1 - alpha_bar).sqrt() * out) / alpha_bar.sqrt()
        if type(scheduler).__name__ in ("DDPMScheduler", "DDIMScheduler"):
            x0 = x0.clamp(-1, 1)
        if type(scheduler).__name__.startswith("EDM"):  # Karras et al. 2022, table 1
            square, data = sigma.double() ** 2, scheduler.config.sigma_data
            sign = 1 if scheduler.config.prediction_type == "epsilon" else -1
            x0 = (data**2 * x + sign * sigma.double() * data * (square + data**2).sqrt() * out) / (square + data**2)
        assert error(scheduler.denoised(plan, i, x, out), x0) < 1e-5  # measured 4e-7
        x, past = scheduler.advance(plan, i, x, out, past, noise())


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_level_is_what_noise_is_added_at(scheduler, dtype):
    """In the type of the sample, as ``add_noise`` does it; and the level after the last step is that of the plan."""
    scheduler.set_timesteps(8)
    plan, x0, eps = scheduler.plan(8), noise(dtype), noise(dtype).flip(0)
    for i in range(len(plan.times)):
        alpha, sigma = scheduler.level(plan, i, dtype)
        scheduler.set_begin_index(i)
        added = scheduler.add_noise(x0, eps, plan.timesteps[[i, i]])
        assert torch.equal(added, alpha * x0 + sigma * eps)
        assert torch.equal(added, scheduler.noised(plan._replace(start=i), x0, eps))
    alpha, sigma = scheduler.level(plan, len(plan.times))
    assert (sigma / alpha).item() == pytest.approx(plan.sigmas[len(plan.times)].item(), rel=1e-7)  # measured 1e-8


@every
def test_the_core_knows_nothing_of_the_face(scheduler, monkeypatch):
    """A whole run by the core's functions, with everything forbidden that loops by hand use."""
    kind = type(scheduler)

    def forbidden(self, *args):
        raise AssertionError("the core used the face")

    expected = through_core(scheduler, 9)
    for cls in kind.__mro__:
        for name in set(vars(cls)) & (set(vars(ByHandScheduler)) | {"timesteps", "sigmas"}):
            if not name.startswith("__"):
                value = property(forbidden) if isinstance(vars(cls)[name], property | OfPlace) else forbidden
                monkeypatch.setattr(cls, name, value)
    assert torch.equal(through_core(scheduler, 9), expected)
    plan = scheduler.start_at(scheduler.plan(9), 4)
    assert scheduler.noised(plan, noise(), noise()).isfinite().all()
    assert scheduler.denoised(plan, 4, noise(), noise()).isfinite().all()
    with pytest.raises(AssertionError, match="used the face"):
        scheduler.set_timesteps(9)


def test_dynamic_thresholding_keeps_pictures_apart():
    from minidiff.schedulers.prediction import dynamic_threshold

    x0 = noise() * torch.tensor([1.0, 9.0]).reshape(2, 1, 1, 1)
    together = dynamic_threshold(x0, 0.9, 5.0)
    assert torch.equal(together, torch.cat([dynamic_threshold(one[None], 0.9, 5.0) for one in x0]))
    assert together.abs().max() <= 1


def test_the_beta_quantile_inverts_the_beta_distribution():
    from minidiff.schedulers.beta_distribution import beta_cdf, beta_quantile

    q = np.linspace(0.001, 0.999, 101)
    for a, b in ((0.6, 0.6), (2.0, 3.5), (0.6, 2.0)):
        np.testing.assert_allclose(beta_cdf(beta_quantile(q, a, b), a, b), q, rtol=0, atol=1e-14)  # measured 2e-15
    np.testing.assert_allclose(beta_quantile(q, 1.0, 1.0), q, atol=1e-14)  # the uniform distribution
    np.testing.assert_allclose(beta_quantile(q, 0.5, 0.5), np.sin(np.pi * q / 2) ** 2, atol=1e-14)  # the arcsine law
