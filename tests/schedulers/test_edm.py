"""The schedulers of EDM against the reference, with any two options together; and the paper's own table."""

import math

import pytest
import torch

import minidiff
from minidiff.errors import ConfigError
from tests.schedulers.options import pairs, spell
from tests.schedulers.runs import check_same_run, name, network, noise
from tests.theirs import diffusers

EULER, MULTI = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"
# As in playgroundai/playground-v2.5-1024px-aesthetic, and what the reference makes of cosxl.safetensors.
PLAYGROUND = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0, "final_sigmas_type": "zero"}
COSXL = {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 120.0, "sigma_schedule": "exponential"}


def pair(kind: str, options: dict) -> tuple:
    return getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)


@pytest.mark.parametrize("kind, options", [(k, o) for k in (EULER, MULTI) for o in pairs(k)], ids=name)
def test_options(kind, options):
    for steps, start in ((1, 0), (3, 0), (9, 0), (16, 0), (7, 2)):
        check_same_run(*pair(kind, spell(options)), steps, start=start, seeded=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"algorithm_type": "sde-dpmsolver++"}, {"solver_order": 3}, COSXL], ids=name)
def test_half_precision(options, dtype):
    """The reference's DPM-Solver stays in it, its Euler does not (``test_all.py``)."""
    check_same_run(*pair(MULTI, options), 9, dtype, seeded=True)


@pytest.mark.parametrize(
    "how", [{"s_churn": 3.0}, {"s_churn": 40.0, "s_tmin": 0.5, "s_tmax": 8.0, "s_noise": 1.01}], ids=name
)
@pytest.mark.parametrize("options", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
def test_churn(options, how):
    for steps in (1, 7, 20):
        check_same_run(*pair(EULER, options), steps, seeded=True, **how)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", [EULER, MULTI])
def test_preconditioning(kind, prediction):
    ours, theirs = pair(kind, {"sigma_data": 0.7, "prediction_type": prediction})
    x, out = noise(), network(noise(), 3)
    for sigma in (0.3, 80, torch.tensor(2.0), torch.tensor([0.1, 9.0]).reshape(2, 1, 1, 1)):
        assert torch.equal(ours.precondition_inputs(x, sigma), theirs.precondition_inputs(x, sigma))
        assert torch.equal(ours.precondition_outputs(x, out, sigma), theirs.precondition_outputs(x, out, sigma))
        assert torch.equal(ours.precondition_noise(sigma), theirs.precondition_noise(sigma))


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_places_on_the_schedule(final):
    """``sigmas=`` of the reference are no noise levels: it spaces them by Karras' formula once more."""
    ours, theirs = pair(EULER, {"final_sigmas_type": final})
    places = torch.tensor([0.0, 0.11, 0.5, 0.93])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=places)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.plan(sigmas=places.double().tolist()).sigmas, theirs.sigmas)


@pytest.mark.parametrize("churn", [0.0, 30.0])
def test_a_clean_sample_that_is_given(churn):
    ways = []
    for scheduler in pair(EULER, {}):
        scheduler.set_timesteps(4)
        x, source = noise(torch.float32) * 80, torch.Generator().manual_seed(0)
        for t in scheduler.timesteps:
            given = network(x, t)
            out = scheduler.step(x, t, x, churn, generator=source, pred_original_sample=given)
            assert torch.equal(out.pred_original_sample, given)
            x = out.prev_sample
        ways.append(x)
    assert torch.equal(*ways)


@pytest.mark.parametrize("kind", [EULER, MULTI])
def test_noise_in_a_run(kind):
    """At the step that image-to-image begins with, then at the one that inpainting has reached; and by timesteps."""
    ours, theirs = pair(kind, COSXL)
    for begin in (None, 2):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(5)
        t = theirs.timesteps[[3, 3]]
        for scheduler in (ours, theirs) if begin else ():
            scheduler.set_begin_index(begin)
        assert torch.equal(ours.add_noise(noise(), noise(), t), theirs.add_noise(noise(), noise(), t))
        for scheduler in (ours, theirs):
            scheduler.scale_model_input(noise(), theirs.timesteps[2])
            scheduler.step(noise(), theirs.timesteps[2], noise())
        assert torch.equal(ours.add_noise(noise(), noise(), t), theirs.add_noise(noise(), noise(), t))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("data", [0.5, 1.0])
def test_what_a_network_is_to_say(data, prediction):
    """A network that says v (or its negative, if it "predicts epsilon") means the clean sample, at any level."""
    scheduler = minidiff.EDMEulerScheduler(sigma_data=data, prediction_type=prediction)
    x0, eps, t = noise(), network(noise(), 3), scheduler.timesteps[[10, 900]]
    v = scheduler.get_velocity(x0, eps, t)
    sigma = (4 * t).double().exp().reshape(2, 1, 1, 1)
    found = scheduler.precondition_outputs(x0 + sigma * eps, -v if prediction == "epsilon" else v, sigma)
    assert (found - x0).abs().max() < 1e-4  # measured 2e-5: sigma is float32, and up to 77


def test_unit_variance_whatever_the_level():
    """What the network sees and is to say: c_in² (sigma² + sigma_data²) = 1, and c_out² what is left to say."""
    scheduler = minidiff.EDMEulerScheduler(sigma_data=0.7)
    for sigma in (0.002, 0.7, 80.0):
        around = scheduler._preconditioning(sigma)
        assert around.c_in**2 * (sigma**2 + 0.7**2) == pytest.approx(1, rel=1e-14)
        left = (1 - around.c_skip) ** 2 * 0.7**2 + around.c_skip**2 * sigma**2
        assert around.c_out**2 == pytest.approx(left, rel=1e-12)


def test_with_sigma_data_1_it_is_the_v_of_euler():
    """EDM's surroundings and v-prediction are the same functions of sigma then."""
    edm = minidiff.EDMEulerScheduler(sigma_data=1.0, prediction_type="v_prediction", sigma_max=14.0, sigma_min=0.1)
    euler = minidiff.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous")
    plan = edm.plan(6)
    same = euler.plan(sigmas=plan.sigmas)
    x, out = noise(), network(noise(), 3)
    for i in range(6):
        torch.testing.assert_close(edm.scale_input(plan, i, x), euler.scale_input(same, i, x), rtol=1e-6, atol=1e-6)
        for one, other in zip(edm.advance(plan, i, x, out)[:1], euler.advance(same, i, x, out)[:1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # measured 3e-7, float32 coefficients
    assert torch.equal(plan.timesteps, same.timesteps)


# --- bad input ---------------------------------------------------------------------------------------------------

REFUSED = [
    (EULER, {"sigma_schedule": "linear"}, "sigma_schedule='linear'.*'karras', 'exponential'"),
    (EULER, {"prediction_type": "sample"}, "prediction_type='sample'"),
    (MULTI, {"prediction_type": "sample"}, "prediction_type='sample'"),  # the reference says so at the first step
    (MULTI, {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
    (MULTI, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, "algorithm_type='dpmsolver'"),
    (MULTI, {"solver_type": "euler"}, "solver_type='euler'"),
    (MULTI, {"solver_order": 4}, "solver_order=4"),
    (MULTI, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, "solver_order=3"),
    (EULER, {"sigma_min": 0.0}, "needs 0 < sigma_min < sigma_max.*sigma_min=0.0"),
    (
        EULER,
        {"sigma_min": None},
        "sigma_min should be a number, found None",
    ),
    (MULTI, {"sigma_max": None}, "sigma_max should be a number, found None"),
    (EULER, {"sigma_min": 90.0}, "sigma_min=90.0, sigma_max=80.0"),
    (MULTI, {"sigma_data": -1.0}, "sigma_data=-1.0"),
    (MULTI, {"rho": 0.0}, "rho=0.0"),
]


@pytest.mark.parametrize("kind, options, words", REFUSED)
def test_a_configuration_is_refused_by_name(kind, options, words):
    with pytest.raises(ConfigError, match=words):
        getattr(minidiff, kind)(**options)


@pytest.mark.parametrize("places", [[80.0, 9.0, 0.1], [0.5, 0.2], [-0.1, 0.5], [[0.0, 1.0]], [0.1, math.nan]])
def test_noise_levels_are_no_places(places):
    with pytest.raises(ValueError, match=r"places on its Karras schedule, rising from 0.*not noise levels"):
        minidiff.EDMEulerScheduler().set_timesteps(sigmas=places)


def test_places_on_the_other_schedule():
    """The reference takes them there and only counts them."""
    with pytest.raises(ValueError, match="on 'exponential'"):
        minidiff.EDMEulerScheduler(sigma_schedule="exponential").set_timesteps(sigmas=[0.0, 1.0])


@pytest.mark.parametrize("timestep", [3, torch.tensor(3)])
def test_an_index_is_no_timestep(timestep):
    scheduler = minidiff.EDMEulerScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="EDMEulerScheduler.step.*is an integer"):
        scheduler.step(noise(), timestep, noise())
