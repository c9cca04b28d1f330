"""The solvers on unscaled samples (Euler, Heun, LMS, DPM2) against the reference, with any two options together."""

import math

import numpy as np
import pytest
import torch

import minidiff
from tests.schedulers.options import GRIDS, SPACINGS, pairs, spell
from tests.schedulers.runs import check_same_run, error, name, network, noise
from tests.theirs import diffusers

KINDS = [kind for kind in GRIDS if kind.startswith(("Euler", "Heun", "KDPM2", "LMS"))]
REFUSES_INDICES = {"EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"}
DRAWS = {"EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"}


def pair(kind: str, options: dict) -> tuple:
    return getattr(minidiff, kind)(**spell(options)), getattr(diffusers, kind)(**spell(options))


@pytest.mark.parametrize("kind, options", [(k, o) for k in KINDS for o in pairs(k)], ids=name)
def test_options(kind, options):
    ours, reference = pair(kind, options)  # once: the constructor of DPM2 plans 1000 steps in the reference, 0.1 s
    # The reference integrates at every step of LMS, which takes 10 ms, and so as long as 100 steps of the others.
    for steps, start in ((1, 0), (6, 2)) if kind == "LMSDiscreteScheduler" else ((1, 0), (3, 0), (12, 0), (7, 2)):
        theirs = reference
        if ours.plan(steps).timesteps.dtype == torch.float64:  # DPM2's; beta spacing has scipy's quantile function
            reference.set_timesteps(steps)
            torch.testing.assert_close(ours.plan(steps).timesteps, reference.timesteps, rtol=1e-14, atol=1e-12)
            theirs = _WithTimesteps(reference, ours)
        check_same_run(ours, theirs, steps, start=start * ours.order, seeded=kind in DRAWS)
        assert ours.init_noise_sigma == float(theirs.init_noise_sigma)


class _WithTimesteps:
    """A reference scheduler that tells the network the timesteps of another, which differ in their last bits."""

    def __init__(self, scheduler, other):
        self.scheduler, self.other = scheduler, other

    def __getattr__(self, name):
        return getattr(self.scheduler, name)

    def set_timesteps(self, steps):
        self.scheduler.set_timesteps(steps)
        self.scheduler.timesteps = self.other.plan(steps).timesteps


@pytest.mark.parametrize("kind", KINDS)
def test_many_steps(kind):
    schedulers = pair(kind, {"beta_schedule": "scaled_linear"})
    for steps in (2, 7) if kind == "LMSDiscreteScheduler" else (20, 50):
        check_same_run(*schedulers, steps, seeded=kind in DRAWS)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_lms(order):
    check_same_run(*pair("LMSDiscreteScheduler", {}), 4, order=order)


@pytest.mark.parametrize("order", [0, 1.5])
def test_the_order_of_lms_is_a_positive_integer(order):
    with pytest.raises(ValueError, match=f"order should be a positive integer, found {order}"):
        minidiff.LMSDiscreteScheduler().plan(5, order=order)


@pytest.mark.parametrize(
    "how", [{"s_churn": 3.0}, {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 8.0, "s_noise": 1.01}], ids=name
)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_churn(prediction, how):
    for steps in (1, 7, 20):
        check_same_run(*pair("EulerDiscreteScheduler", {"prediction_type": prediction}), steps, seeded=True, **how)


@pytest.mark.parametrize(
    "kind, how", [("EulerDiscreteScheduler", {"s_churn": 5.0, "s_tmin": 1.0}), *((k, {}) for k in KINDS)]
)
def test_draws_and_predicted_sample(kind, how):
    results = []
    for scheduler in (getattr(minidiff, kind)(), getattr(diffusers, kind)()):
        scheduler.set_timesteps(7)
        x, generator = noise(torch.float32) * float(scheduler.init_noise_sigma), torch.Generator().manual_seed(1)
        draws = {"generator": generator} if kind in DRAWS or how else {}
        for t in scheduler.timesteps:
            out = network(scheduler.scale_model_input(x, t), t)
            x, x0 = scheduler.step(out, t, x, return_dict=False, **draws, **how)
        results.append((x, x0, generator.get_state()))
    for mine, reference in zip(*results, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 20]}, {"sigmas": [9.0, 3.0, 0.4, 0.0]}], ids=name)
def test_euler_by_given_timesteps_or_levels(given):
    ways = []
    for scheduler in pair("EulerDiscreteScheduler", {}):
        scheduler.set_timesteps(**given)
        x = noise(torch.float32) * float(scheduler.init_noise_sigma)
        for t in scheduler.timesteps:
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
        ways.append((x, scheduler.timesteps, scheduler.sigmas))
    for mine, reference in zip(*ways, strict=True):
        assert torch.equal(mine, reference)


@pytest.mark.parametrize("kind", KINDS)
def test_noising(kind):
    ours, theirs = pair(kind, {})
    clean, eps = noise(torch.float32, 3), network(noise(torch.float32, 3), 0)
    t = torch.tensor([0, 17, 999])
    if kind in REFUSES_INDICES:  # in training, before set_timesteps
        assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    t = ours.timesteps[[2, 5, 9]]
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(4)
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))


def test_velocity_of_euler_is_not_the_references():
    """The reference returns the velocity of the mirrored timestep; ours is that of DDPM."""
    ours, theirs = pair("EulerDiscreteScheduler", {})
    clean, eps, t = noise(batch=3), network(noise(batch=3), 0), torch.tensor([0, 17, 999])
    assert error(ours.get_velocity(clean, eps, 999 - t), theirs.get_velocity(clean, eps, t.float())) < 1e-6
    assert error(ours.get_velocity(clean, eps, t), minidiff.DDPMScheduler().get_velocity(clean, eps, t)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_of_every_count(kind, spacing):
    ours, theirs = pair(kind, {"timestep_spacing": spacing, "beta_schedule": "scaled_linear"})
    for steps in (1, 2, 3, 8, 13, 60, 333, *([1000] if spacing == "trailing" else [])):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        assert torch.equal(ours.timesteps, theirs.timesteps), steps
        assert torch.equal(ours.sigmas, theirs.sigmas), steps


@pytest.mark.parametrize("kind", sorted(REFUSES_INDICES))
def test_an_index_is_no_timestep(kind):
    ours, _ = pair(kind, {})
    ours.set_timesteps(5)
    for index in (0, torch.tensor(0)):
        with pytest.raises(ValueError, match=f"{kind}.step.*integer"):
            ours.step(noise(), index, noise())


@pytest.mark.parametrize(
    "given, words",
    [
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas should descend"),
        ({"timesteps": [5.0, 9.0]}, "timesteps should descend"),
        ({"timesteps": [math.pi, -1.0]}, "should lie in 0"),
    ],
)
def test_levels_that_do_not_descend(given, words):
    with pytest.raises(ValueError, match=words):
        minidiff.EulerDiscreteScheduler().set_timesteps(**given)
    with pytest.raises(ValueError, match="timesteps= cannot be combined"):
        minidiff.EulerDiscreteScheduler(use_karras_sigmas=True).set_timesteps(timesteps=np.array([5.0, 1.0]))
