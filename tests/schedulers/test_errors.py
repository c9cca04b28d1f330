"""Bad input to a scheduler: each its own error, naming what was found and what to do."""

import inspect
import json
import math

import numpy as np
import pytest
import torch

import minidiff
from minidiff.configured import register_to_config
from minidiff.errors import CheckpointNotFoundError, ConfigError
from minidiff.noise import randn
from tests.schedulers.runs import noise

DDPM, PNDM, UNIPC = minidiff.DDPMScheduler, minidiff.PNDMScheduler, minidiff.UniPCMultistepScheduler
SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]

REFUSED = [  # class, options, words of the message
    (DDPM, {"beta_schedule": "cubic"}, "beta_schedule='cubic'.*'sigmoid'"),
    (PNDM, {"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid'"),
    (UNIPC, {"beta_schedule": "laplace"}, "beta_schedule='laplace'"),
    (DDPM, {"variance_type": "small"}, "variance_type='small'"),
    (DDPM, {"prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
    (PNDM, {"prediction_type": "sample"}, "PNDMScheduler.*prediction_type='sample'.*'v_prediction'"),
    (UNIPC, {"prediction_type": "noise"}, "prediction_type='noise'"),
    (UNIPC, {"prediction_type": "flow_prediction", "predict_x0": False}, "prediction_type='flow_prediction'"),
    (DDPM, {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    (PNDM, {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    (UNIPC, {"timestep_spacing": "even"}, "timestep_spacing='even'"),
    (UNIPC, {"final_sigmas_type": "one"}, "final_sigmas_type='one'"),
    (UNIPC, {"solver_type": "bh3"}, "solver_type='bh3'"),
    (UNIPC, {"solver_p": DDPM()}, "solver_p="),
    (UNIPC, {"solver_order": 0}, "solver_order.*0"),
    (UNIPC, {"solver_order": 2.0}, "solver_order.*2.0"),
    (UNIPC, {"time_shift_type": "cubic"}, "time_shift_type='cubic'"),
    (UNIPC, {"shift_terminal": 0.1}, "shift_terminal needs use_flow_sigmas"),
    (UNIPC, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_karras_sigmas and use_beta_sigmas"),
    (UNIPC, {"use_flow_sigmas": True, "use_beta_sigmas": True}, "use_flow_sigmas goes with use_karras_sigmas"),
]


@pytest.mark.parametrize("kind, options, words", REFUSED)
def test_a_configuration_is_refused_by_name(kind, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options)


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "20"])
@pytest.mark.parametrize("kind", [DDPM, PNDM, UNIPC])
def test_the_number_of_steps_is_a_positive_integer(kind, steps):
    with pytest.raises(ValueError, match="num_inference_steps should be a positive integer"):
        kind().set_timesteps(steps)


@pytest.mark.parametrize("kind", [DDPM, PNDM, UNIPC])
def test_more_steps_than_training_had(kind):
    with pytest.raises(ValueError, match="1001 inference steps are more than the 1000"):
        kind().set_timesteps(1001)


def test_the_offset_leads_beyond_training():
    with pytest.raises(ValueError, match="steps_offset=1 with 1000 steps begins at timestep 1000"):
        DDPM(steps_offset=1).set_timesteps(1000)


def test_leading_spacing_has_no_room_for_as_many_steps_as_training():
    with pytest.raises(ValueError, match="'leading'.*at most 999"):
        UNIPC(timestep_spacing="leading").set_timesteps(1000)


@pytest.mark.parametrize(
    "timesteps, words",
    [
        ([10, 10], r"should descend, found \[10, 10\]"),
        ([1, 5], "should descend"),
        ([1000, 5], r"should lie in 0 ... 999, found 1000 ... 5"),
        ([5, -1], "should lie in 0 ... 999"),
        ([5.5, 1.0], "list of integers"),
        ([], "num_inference_steps"),
    ],
)
def test_custom_timesteps(timesteps, words):
    with pytest.raises(ValueError, match=words):
        DDPM().set_timesteps(timesteps=timesteps)


def test_one_way_to_say_how_long_a_run_is():
    with pytest.raises(ValueError, match="exactly one of"):
        DDPM().set_timesteps(10, timesteps=[5, 1])
    with pytest.raises(ValueError, match="exactly one of"):
        DDPM().set_timesteps()
    with pytest.raises(ValueError, match="PNDMScheduler cannot plan from timesteps="):
        PNDM().plan(timesteps=[5, 1])
    with pytest.raises(ValueError, match="DDPMScheduler cannot plan from eta="):
        DDPM().plan(5, eta=0.5)
    with pytest.raises(ValueError, match="sigmas= needs use_flow_sigmas=True"):
        UNIPC().set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="use_dynamic_shifting=True, mu=None"):
        UNIPC(use_dynamic_shifting=True, use_flow_sigmas=True).set_timesteps(5)
    with pytest.raises(ValueError, match="use_dynamic_shifting=False, mu=1.0"):
        UNIPC(use_flow_sigmas=True).set_timesteps(5, mu=1.0)


@pytest.mark.parametrize("sigmas", [[1.0], [1.0, 1.0, 0.0], [2.0, 1.0, 1.5], [[2.0, 0.0]]])
def test_given_noise_levels(sigmas):
    with pytest.raises(ValueError, match="sigmas should descend, and end with the level after the last step"):
        minidiff.EulerDiscreteScheduler().set_timesteps(sigmas=sigmas)


def test_the_runge_kutta_start_needs_four_steps():
    with pytest.raises(ValueError, match="at least 4 inference steps, found 3.*skip_prk_steps=True"):
        PNDM().set_timesteps(3)


def test_no_signal_to_predict_noise_from():
    scheduler = DDPM(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    with pytest.raises(ValueError, match="no signal at the last training timestep"):
        scheduler.set_timesteps(10)


def test_the_logarithm_of_a_variance_is_no_variance():
    with pytest.raises(ValueError, match="fixed_large_log.*NaN"):
        DDPM(variance_type="fixed_large_log").set_timesteps(10)


def test_a_learned_variance_needs_its_channels():
    scheduler = DDPM(variance_type="learned_range")
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match="needs a network with 6 output channels.*found 3"):
        scheduler.step(noise(), 900, noise())


@pytest.mark.parametrize("kind", [PNDM, UNIPC])
def test_step_before_set_timesteps(kind):
    with pytest.raises(ValueError, match="call set_timesteps"):
        kind().step(noise(), 10, noise())


@pytest.mark.parametrize("kind, timestep", [(DDPM, 123), (UNIPC, 123), (PNDM, 1000), (minidiff.DDIMScheduler, -1)])
def test_a_timestep_that_is_not_in_the_run(kind, timestep):
    scheduler = kind()
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=f"timestep {timestep} is not one of the run's"):
        scheduler.step(noise(), torch.tensor(timestep), noise())


def test_too_few_betas():
    with pytest.raises(ValueError, match="trained_betas has 2 entries, num_train_timesteps is 1000"):
        DDPM(trained_betas=[0.1, 0.2]).set_timesteps(1)


def test_training_timesteps_of_a_call():
    with pytest.raises(ValueError, match="num_train_timesteps=500 is not the configuration's 1000"):
        minidiff.HeunDiscreteScheduler().set_timesteps(5, None, 500)


def test_a_step_too_many():
    scheduler = UNIPC()
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(noise(), t, noise())
    with pytest.raises(ValueError, match="all 2 steps are done"):
        scheduler.step(noise(), t, noise())


def test_a_run_cannot_start_after_its_end():
    with pytest.raises(ValueError, match="a run of 5 steps cannot start at step 5"):
        UNIPC().plan(5, start=5)


def test_a_step_without_its_noise():
    scheduler = DDPM()
    with pytest.raises(ValueError, match="step 0 of DDPMScheduler needs noise"):
        scheduler.advance(scheduler.plan(5), 0, noise(), noise())


def test_training_timesteps_are_integers():
    with pytest.raises(TypeError, match="integers.*float32"):
        DDPM().add_noise(noise(), noise(), torch.tensor([0.5, 1.0]))
    with pytest.raises(ValueError, match="call set_timesteps first"):
        UNIPC(use_flow_sigmas=True).add_noise(noise(), noise(), torch.tensor([1, 2]))


def test_from_config():
    with pytest.raises(
        ConfigError, match="DDPMScheduler has no option 'predition_type'; did you mean 'prediction_type'"
    ):
        DDPM.from_config({}, predition_type="epsilon")
    with pytest.raises(ValueError, match="needs a configuration"):
        DDPM.from_config(None)
    with pytest.warns(FutureWarning, match="load_config"), pytest.raises(CheckpointNotFoundError):
        DDPM.from_config("runwayml/stable-diffusion-v1-5")


def test_from_pretrained(tmp_path):
    with pytest.raises(CheckpointNotFoundError, match="scheduler_config.json"):
        DDPM.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("{not json")
    with pytest.raises(ConfigError, match="not valid JSON"):
        DDPM.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text(json.dumps({"prediction_type": "noise"}))
    with pytest.raises(ConfigError, match="prediction_type='noise'"):
        DDPM.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match="is a file"):
        DDPM().save_pretrained(tmp_path / "scheduler_config.json")


def test_configurations_are_frozen():
    with pytest.raises(AttributeError, match="frozen"):
        DDPM().config.beta_start = 0.1


def test_generators():
    with pytest.raises(TypeError, match="torch.Generator"):
        randn((2, 3), 7)
    with pytest.raises(ValueError, match="3 generators for a batch of 2"):
        randn((2, 3), [torch.Generator()] * 3)
    scheduler = DDPM()
    scheduler.set_timesteps(5)
    with pytest.raises(TypeError, match="torch.Generator"):
        scheduler.step(noise(), 800, noise(), False)  # return_dict in the place of the generator


WRONG = {  # field -> values that are not of its type
    "num_train_timesteps": [0.5, "1000", None, True, 2 * 10**8, [1000], float("nan")],
    "beta_start": ["x", None, False, [1.0], float("nan"), {}],
    "beta_schedule": [None, 1, ["linear"]],
    "trained_betas": ["abc", 0.1, [0.1, None], [0.1, float("nan")], [[0.1]], {"a": 1}],
    "clip_sample": [None, 0, "false", []],
    "clip_sample_range": [[1.0], None, "1"],
    "use_karras_sigmas": [0, "no"],
    "disable_corrector": [[0.5], "12", 1],
    "shift_terminal": ["x", True],
    "variance_type": [1, False],
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_fields_of_a_wrong_type(name):
    """They failed at the first step, in a call of torch, or took 8 GB for their tables."""
    kind = getattr(minidiff, name)
    known = inspect.signature(kind).parameters
    for field, values in WRONG.items():
        for value in values if field in known else ():
            with pytest.raises(ConfigError, match=f"^{name}: {field} should be "):
                kind(**{field: value})
    with pytest.raises(
        ConfigError, match="num_train_timesteps should be .*; prediction_type should be a string, found 1"
    ):
        kind(num_train_timesteps="x", prediction_type=1)


def test_numbers_of_other_libraries_are_numbers():
    scheduler = UNIPC(beta_start=np.float32(1e-4), num_train_timesteps=np.int64(10), use_karras_sigmas=np.bool_(False))
    for betas in (np.linspace(0.1, 0.2, 10), torch.linspace(0.1, 0.2, 10), tuple(np.linspace(0.1, 0.2, 10))):
        assert torch.equal(UNIPC(num_train_timesteps=10, trained_betas=betas).betas, torch.linspace(0.1, 0.2, 10))
    assert len(scheduler.betas) == 10
    assert minidiff.DPMSolverMultistepScheduler(lambda_min_clipped=-math.inf).config.lambda_min_clipped == -math.inf


@pytest.mark.parametrize("wrong", [{"beta_start": -1.0}, {"beta_end": math.inf}, {"trained_betas": [-0.1] * 1000}])
def test_betas_of_which_nothing_comes(wrong):
    with pytest.raises(ConfigError, match="betas should be finite and not negative, found|list of finite numbers"):
        DDPM(**wrong)


def test_a_scheduler_of_a_program_may_have_any_fields():
    class Mine(DDPM):
        @register_to_config
        def __init__(self, num_train_timesteps=1000, anything: object = None, **others):
            super().__init__(num_train_timesteps)

    assert Mine(anything={"a": [1]}).config.anything == {"a": [1]}
