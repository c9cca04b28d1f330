"""UniPC against the reference, over whole trajectories with any two options together."""

import pytest
import torch

import minidiff
from tests.schedulers.options import pairs, spell
from tests.schedulers.runs import check_same_run, name, network, noise
from tests.theirs import diffusers


def pair(options: dict) -> tuple:
    return minidiff.UniPCMultistepScheduler(**options), diffusers.UniPCMultistepScheduler(**options)


@pytest.mark.parametrize("options", pairs("UniPCMultistepScheduler"), ids=name)
def test_options(options):
    for steps, start in ((1, 0), (3, 0), (9, 0), (7, 2)):
        check_same_run(*pair(spell(options)), steps, start=start)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_flow_that_solves_for_eps(order, prediction):
    """A flow begins at alpha = 1e-6; solving for eps divides by it, so these runs begin at the second step."""
    options = {"use_flow_sigmas": True, "predict_x0": False, "final_sigmas_type": "sigma_min"}
    for steps in (3, 7):
        check_same_run(*pair(options | {"solver_order": order, "prediction_type": prediction}), steps, start=1)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_flow_shifts(kind, terminal):
    options = {
        "use_flow_sigmas": True,
        "use_dynamic_shifting": True,
        "time_shift_type": kind,
        "shift_terminal": terminal,
    }
    ours, theirs = pair(options | {"prediction_type": "flow_prediction"})
    for arguments in ({"num_inference_steps": 9}, {"sigmas": torch.linspace(1, 0.2, 6).double().numpy()}):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(mu=0.8, **arguments)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)


def test_karras_flow():
    for steps in (1, 2, 7, 20):
        check_same_run(
            *pair({"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"}),
            steps,
        )


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"use_flow_sigmas": True}], ids=name)
def test_noising_to_a_step_of_a_unipc_run(options):
    ours, theirs = pair(options)
    clean, eps = noise(batch=3), network(noise(batch=3), 0)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    t = ours.timesteps[[2, 5, 9]]
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))  # by timestep
    for scheduler in (ours, theirs):
        scheduler.set_begin_index(4)
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))  # to where the run begins
    for scheduler in (ours, theirs):
        scheduler.step(eps, scheduler.timesteps[4], clean)
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))  # to where it has come
