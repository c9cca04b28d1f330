"""DDPM, PNDM and UniPC against the reference: timesteps, noise levels and whole trajectories, option by option."""

import pytest
import torch
from scheduler_runs import check_same_run, name, network, network_with_variance, noise, pairwise
from theirs import diffusers

import minidiff

SPACINGS = ["linspace", "leading", "trailing"]
LEARNED = ("learned", "learned_range")
TRAINED_BETAS = torch.linspace(0.001, 0.03, 1000).tolist()
OF_TRAINING = [  # fields that all of them have
    {"trained_betas": TRAINED_BETAS},
    {"beta_start": 0.00085},
    {"beta_end": 0.012},
    {"num_train_timesteps": 500},
]

DDPM = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"],
    "variance_type": ["fixed_small", "fixed_small_log", "fixed_large", *LEARNED, None],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "clip_sample": [True, False],
    "clip_sample_range": [1.0, 0.7],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
    "rescale_betas_zero_snr": [False, True],
}
PNDM = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "prediction_type": ["epsilon", "v_prediction"],
    "skip_prk_steps": [False, True],
    "set_alpha_to_one": [False, True],
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
}
UNIPC = {
    "beta_schedule": ["linear", "scaled_linear", "squaredcos_cap_v2"],
    "solver_order": [1, 2, 3, 4],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "predict_x0": [True, False],
    "solver_type": ["bh1", "bh2", "midpoint", "heun", "logrho"],
    "lower_order_final": [True, False],
    "disable_corrector": [[], [0], [1, 3]],
    "spaced_by": [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas"],
    "flow_shift": [1.0, 3.0],
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
    "final_sigmas_type": ["zero", "sigma_min"],
    "rescale_betas_zero_snr": [False, True],
    "sigma_min": [None, 0.05],
    "sigma_max": [None, 10.0],
}


def ddpm_is_valid(options: dict) -> bool:
    """epsilon without any signal is refused unless clamped: see test_errors.py."""
    blind = options["rescale_betas_zero_snr"] and options["prediction_type"] == "epsilon"
    return not (blind and (options["thresholding"] or not options["clip_sample"]))


def unipc_is_valid(options: dict) -> bool:
    """Leave out what is NaN in the reference; test_laws.py shows that ours is finite there."""
    last_is_order_1 = options["lower_order_final"] or options["solver_order"] == 1
    if not options["predict_x0"] and "flow" in f"{options['prediction_type']} {options['spaced_by']}":
        return False  # flow_prediction is refused; flow sigmas see below
    if options["final_sigmas_type"] == "zero":
        return options["solver_type"] != "bh1" and options["predict_x0"] and last_is_order_1
    return last_is_order_1 or options["solver_order"] == 2


def spell(options: dict) -> dict:
    """Turn the grid's ``spaced_by`` into the reference's four switches."""
    options = dict(options)
    switch = options.pop("spaced_by", None)
    return options | ({switch: True} if switch else {})


def ddpm_pair(options: dict) -> tuple:
    return minidiff.DDPMScheduler(**options), diffusers.DDPMScheduler(**options)


def ddpm_denoiser(options: dict):
    return network_with_variance if options.get("variance_type") in LEARNED else network


@pytest.mark.parametrize("options", pairwise(DDPM, ddpm_is_valid), ids=name)
def test_ddpm_options(options):
    for steps in (1, 3, 7):
        check_same_run(*ddpm_pair(options), steps, denoise=ddpm_denoiser(options), seeded=True)


@pytest.mark.parametrize("options", [{}, *OF_TRAINING], ids=name)
@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_options_of_training(kind, options):
    if kind == "DDPMScheduler":
        options = options | {"clip_sample": False}
    ours, theirs = getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)
    for steps in (20, 50):
        check_same_run(ours, theirs, steps, seeded=kind == "DDPMScheduler")


def test_ddpm_predicts_the_clean_sample_too():
    ours, theirs = ddpm_pair({"prediction_type": "v_prediction"})
    x, out = noise(), network(noise(), 500)
    mine, reference = ours.step(out, 500, x), theirs.step(out, 500, x)  # before set_timesteps: every training timestep
    assert torch.equal(mine.pred_original_sample, reference.pred_original_sample)
    ours.set_timesteps(10)
    assert torch.equal(ours.step(out, 500, x, return_dict=False)[1], reference.pred_original_sample)
    plan = ours.plan(10)
    assert torch.equal(ours.denoised(plan, plan.times.index(500), x, out), reference.pred_original_sample)


def test_ddpm_without_set_timesteps_visits_every_training_timestep():
    ours, theirs = ddpm_pair({"num_train_timesteps": 12})
    ways = []
    for scheduler in (ours, theirs):
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator).prev_sample
        ways.append(x)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(*ways)


def test_ddpm_draws_as_often_as_the_reference():
    states = []
    for scheduler in ddpm_pair({}):
        scheduler.set_timesteps(7)
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator).prev_sample
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_ddpm_custom_timesteps():
    ours, theirs = ddpm_pair({})
    ways = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(timesteps=[900, 411, 30, 7])
        x, generator = noise(), torch.Generator().manual_seed(1)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), int(t), x, generator).prev_sample
        ways.append(x)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(*ways)


def pndm_pair(options: dict) -> tuple:
    return minidiff.PNDMScheduler(**options), diffusers.PNDMScheduler(**options)


@pytest.mark.parametrize("options", pairwise(PNDM), ids=name)
def test_pndm_options(options):
    for steps in (1, 2, 3, 7, 20) if options["skip_prk_steps"] else (4, 5, 7, 20):
        check_same_run(*pndm_pair(options), steps)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("start", [1, 2, 5])
def test_pndm_begins_in_the_middle(skip, start):
    check_same_run(*pndm_pair({"skip_prk_steps": skip}), 20, start=start)


def unipc_pair(options: dict) -> tuple:
    return minidiff.UniPCMultistepScheduler(**options), diffusers.UniPCMultistepScheduler(**options)


@pytest.mark.parametrize("options", pairwise(UNIPC, unipc_is_valid), ids=name)
def test_unipc_options(options):
    for steps, start in ((1, 0), (3, 0), (9, 0), (7, 2)):
        check_same_run(*unipc_pair(spell(options)), steps, start=start)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_flow_that_solves_for_eps(order, prediction):
    """A flow begins at alpha = 1e-6; solving for eps divides by it, so these runs begin at the second step."""
    options = {"use_flow_sigmas": True, "predict_x0": False, "final_sigmas_type": "sigma_min"}
    for steps in (3, 7):
        check_same_run(*unipc_pair(options | {"solver_order": order, "prediction_type": prediction}), steps, start=1)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_unipc_flow_shifts(kind, terminal):
    options = {
        "use_flow_sigmas": True,
        "use_dynamic_shifting": True,
        "time_shift_type": kind,
        "shift_terminal": terminal,
    }
    ours, theirs = unipc_pair(options | {"prediction_type": "flow_prediction"})
    for arguments in ({"num_inference_steps": 9}, {"sigmas": torch.linspace(1, 0.2, 6).double().numpy()}):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(mu=0.8, **arguments)
        assert torch.equal(ours.timesteps, theirs.timesteps)
        assert torch.equal(ours.sigmas, theirs.sigmas)


def test_unipc_karras_flow():
    for steps in (1, 2, 7, 20):
        check_same_run(
            *unipc_pair({"use_flow_sigmas": True, "use_karras_sigmas": True, "prediction_type": "flow_prediction"}),
            steps,
        )


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("kind", ["DDPMScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_timesteps_of_every_count(kind, spacing, offset):
    options = {"timestep_spacing": spacing, "steps_offset": offset}
    if kind == "PNDMScheduler":
        options["skip_prk_steps"] = True
    ours, theirs = getattr(minidiff, kind)(**options), getattr(diffusers, kind)(**options)
    one_too_many = 0
    for steps in (*range(1, 24), 60, 61, 103, 121, 122, 201, 333):
        ours.set_timesteps(steps)
        theirs.set_timesteps(steps)
        expected = theirs.timesteps
        if expected.min() < 0:  # the reference asks the network about timestep -1, one step more than it was told to do
            one_too_many += 1
            if kind != "PNDMScheduler":
                assert expected[-1] == -1 and len(expected) == steps + 1
                expected = expected[:-1]
        if kind == "PNDMScheduler" and theirs.timesteps.min() < 0:
            assert ours.timesteps[-1] >= 0 and len(ours.timesteps) == steps + 1
            continue
        assert torch.equal(ours.timesteps, expected), steps
    assert one_too_many == (5 if spacing == "trailing" else 0)  # 61, 103, 121, 122, 201


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "options", [{}, {"beta_schedule": "scaled_linear"}, {"rescale_betas_zero_snr": True}], ids=name
)
def test_noising_and_velocity(options, dtype):
    ours, theirs = ddpm_pair(options)
    clean, eps, t = noise(dtype, 4), network(noise(dtype, 4), 0), torch.tensor([0, 17, 500, 999])
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))
    assert torch.equal(ours.get_velocity(clean, eps, t), theirs.get_velocity(clean, eps, t))


def test_noising_with_pndm():
    clean, eps, t = noise(batch=3), network(noise(batch=3), 0), torch.tensor([0, 17, 999])
    ours, theirs = minidiff.PNDMScheduler(), diffusers.PNDMScheduler()
    assert torch.equal(ours.add_noise(clean, eps, t), theirs.add_noise(clean, eps, t))


@pytest.mark.parametrize("options", [{}, {"use_karras_sigmas": True}, {"use_flow_sigmas": True}], ids=name)
def test_noising_to_a_step_of_a_unipc_run(options):
    ours, theirs = unipc_pair(options)
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
