"""Which options every scheduler is compared with the reference under, and which of their combinations are valid.

The tests take any two values together (``pairwise``), ``benchmarks.parity schedulers`` random combinations of all.
"""

from functools import partial
from typing import Any

import torch

from tests.schedulers.runs import Options, pairwise

SCHEDULES = ["linear", "scaled_linear", "squaredcos_cap_v2"]
TRAINED_BETAS = torch.linspace(0.001, 0.03, 1000).tolist()
SPACINGS = ["linspace", "leading", "trailing"]
SPACED_BY = [None, "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"]  # switches, see ``spell``
LEARNED = ("learned", "learned_range")

DPM_SOLVER = {
    "beta_schedule": SCHEDULES,
    "trained_betas": [None, TRAINED_BETAS],
    "solver_order": [1, 2, 3],
    "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
    "lower_order_final": [True, False],
    "flow_shift": [1.0, 3.0],
    "final_sigmas_type": ["zero", "sigma_min"],
    "lambda_min_clipped": [-float("inf"), -5.1],
    "variance_type": [None, "learned", "learned_range"],
}
CONSISTENCY = {
    "beta_schedule": SCHEDULES,
    "trained_betas": [None, TRAINED_BETAS],
    "original_inference_steps": [50, 100],
    "clip_sample": [False, True],
    "clip_sample_range": [1.0, 0.7],
    "set_alpha_to_one": [True, False],
    "steps_offset": [0, 1],
    "prediction_type": ["epsilon", "sample", "v_prediction"],
    "thresholding": [False, True],
    "dynamic_thresholding_ratio": [0.995, 0.6],
    "sample_max_value": [1.0, 1.7],
    "timestep_spacing": ["leading", "trailing"],
    "timestep_scaling": [10.0, 0.01],
    "rescale_betas_zero_snr": [False, True],
}
IN_SIGMAS = {
    "beta_schedule": SCHEDULES,
    "trained_betas": [None, TRAINED_BETAS],
    "prediction_type": ["epsilon", "v_prediction"],
    "timestep_spacing": SPACINGS,
    "steps_offset": [0, 1],
}
EDM = {
    "sigma_min": [0.002, 0.03],
    "sigma_max": [80.0, 120.0],
    "sigma_data": [0.5, 1.0],
    "sigma_schedule": ["karras", "exponential"],
    "prediction_type": ["epsilon", "v_prediction"],
    "rho": [7.0, 3.0],
    "final_sigmas_type": ["zero", "sigma_min"],
}
GRIDS = {
    "DDIMScheduler": {
        "beta_schedule": SCHEDULES,
        "trained_betas": [None, TRAINED_BETAS],
        "prediction_type": ["epsilon", "sample", "v_prediction"],
        "clip_sample": [True, False],
        "clip_sample_range": [1.0, 0.7],
        "thresholding": [False, True],
        "dynamic_thresholding_ratio": [0.995, 0.6],
        "sample_max_value": [1.0, 1.7],
        "set_alpha_to_one": [True, False],
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
        "rescale_betas_zero_snr": [False, True],
    },
    "DDPMScheduler": {
        "beta_schedule": [*SCHEDULES, "laplace", "sigmoid"],
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
    },
    "DEISMultistepScheduler": {
        "beta_schedule": SCHEDULES,
        "trained_betas": [None, TRAINED_BETAS],
        "solver_order": [1, 2, 3],
        "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
        "thresholding": [False, True],
        "dynamic_thresholding_ratio": [0.995, 0.6],
        "sample_max_value": [1.0, 1.7],
        "algorithm_type": ["deis", "dpmsolver", "dpmsolver++"],
        "solver_type": ["logrho", "midpoint", "heun", "bh1", "bh2"],
        "lower_order_final": [True, False],
        "spaced_by": [*SPACED_BY, "use_flow_sigmas"],
        "flow_shift": [1.0, 3.0],
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
    },
    "DPMSolverSinglestepScheduler": DPM_SOLVER
    | {"algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"], "spaced_by": [*SPACED_BY, "use_flow_sigmas"]},
    "DPMSolverMultistepScheduler": DPM_SOLVER
    | {
        "algorithm_type": ["dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"],
        "euler_at_final": [False, True],
        "spaced_by": [*SPACED_BY, "use_flow_sigmas", "use_lu_lambdas"],
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
        "rescale_betas_zero_snr": [False, True],
    },
    "EDMDPMSolverMultistepScheduler": EDM
    | {
        "solver_order": [1, 2, 3],
        "thresholding": [False, True],
        "dynamic_thresholding_ratio": [0.995, 0.6],
        "sample_max_value": [1.0, 1.7],
        "algorithm_type": ["dpmsolver++", "sde-dpmsolver++", "deis"],
        "solver_type": ["midpoint", "heun", "logrho", "bh1", "bh2"],
        "lower_order_final": [True, False],
        "euler_at_final": [False, True],
    },
    "EDMEulerScheduler": EDM,
    "LCMScheduler": CONSISTENCY,
    "PNDMScheduler": {
        "beta_schedule": SCHEDULES,
        "prediction_type": ["epsilon", "v_prediction"],
        "skip_prk_steps": [False, True],
        "set_alpha_to_one": [False, True],
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
    },
    "TCDScheduler": CONSISTENCY,
    "UniPCMultistepScheduler": {
        "beta_schedule": SCHEDULES,
        "solver_order": [1, 2, 3, 4],
        "prediction_type": ["epsilon", "sample", "v_prediction", "flow_prediction"],
        "thresholding": [False, True],
        "dynamic_thresholding_ratio": [0.995, 0.6],
        "sample_max_value": [1.0, 1.7],
        "predict_x0": [True, False],
        "solver_type": ["bh1", "bh2", "midpoint", "heun", "logrho"],
        "lower_order_final": [True, False],
        "disable_corrector": [[], [0], [1, 3]],
        "spaced_by": [*SPACED_BY, "use_flow_sigmas"],
        "flow_shift": [1.0, 3.0],
        "timestep_spacing": SPACINGS,
        "steps_offset": [0, 1],
        "final_sigmas_type": ["zero", "sigma_min"],
        "rescale_betas_zero_snr": [False, True],
        "sigma_min": [None, 0.05],
        "sigma_max": [None, 10.0],
    },
    "EulerDiscreteScheduler": IN_SIGMAS
    | {
        "prediction_type": ["epsilon", "sample", "v_prediction"],
        "interpolation_type": ["linear", "log_linear"],
        "spaced_by": SPACED_BY,
        "sigma_min": [None, 0.05],
        "sigma_max": [None, 10.0],
        "timestep_type": ["discrete", "continuous"],
        "rescale_betas_zero_snr": [False, True],
        "final_sigmas_type": ["zero", "sigma_min"],
    },
    "EulerAncestralDiscreteScheduler": IN_SIGMAS | {"rescale_betas_zero_snr": [False, True]},
    "HeunDiscreteScheduler": IN_SIGMAS
    | {
        "beta_schedule": [*SCHEDULES, "exp"],
        "prediction_type": ["epsilon", "sample", "v_prediction"],
        "spaced_by": SPACED_BY,
        "clip_sample": [False, True],
        "clip_sample_range": [1.0, 0.7],
    },
    "KDPM2DiscreteScheduler": IN_SIGMAS | {"spaced_by": SPACED_BY},
    # Between levels that are far apart this one is NaN in the reference: no cosine schedule, no rough betas.
    "KDPM2AncestralDiscreteScheduler": IN_SIGMAS
    | {"beta_schedule": ["linear", "scaled_linear"], "trained_betas": [None], "spaced_by": SPACED_BY},
    "LMSDiscreteScheduler": IN_SIGMAS
    | {"prediction_type": ["epsilon", "sample", "v_prediction"], "spaced_by": SPACED_BY},
}


def _ddim(options: Options) -> bool:
    """epsilon without any signal is refused unless clamped. With all of the noise it may be NaN in the reference."""
    blind = options["rescale_betas_zero_snr"] and options["prediction_type"] == "epsilon"
    noisy = options["rescale_betas_zero_snr"] and options.get("how") == {"eta": 1.0}
    return not (noisy or (blind and (options["thresholding"] or not options["clip_sample"])))


def _ddpm(options: Options) -> bool:
    """epsilon without any signal is refused unless clamped: see test_errors.py."""
    blind = options["rescale_betas_zero_snr"] and options["prediction_type"] == "epsilon"
    return not (blind and (options["thresholding"] or not options["clip_sample"]))


def _unipc(options: Options) -> bool:
    """Leave out what is NaN in the reference; test_laws.py shows that ours is finite there."""
    last_is_order_1 = options["lower_order_final"] or options["solver_order"] == 1
    if not options["predict_x0"] and "flow" in f"{options['prediction_type']} {options['spaced_by']}":
        return False  # flow_prediction is refused; flow sigmas see below
    if options["final_sigmas_type"] == "zero":
        return options["solver_type"] != "bh1" and options["predict_x0"] and last_is_order_1
    return last_is_order_1 or options["solver_order"] == 2


def predicts_x0(options: Options) -> bool:
    """Say whether a DPM-Solver solves for x0; the others for eps."""
    return options.get("algorithm_type", "dpmsolver++").endswith("++")


def _dpm_solver(options: Options) -> bool:
    """Leave out what the reference refuses, or what is NaN in it."""
    if not predicts_x0(options):
        if options["final_sigmas_type"] == "zero":
            return False
        if options["prediction_type"] == "flow_prediction" and options["algorithm_type"] != "deis":
            return False
        if options["algorithm_type"] == "sde-dpmsolver" and options["solver_order"] == 3:
            return False
    if options["thresholding"] and "euler_at_final" not in options and not predicts_x0(options):
        return False  # the reference fails here: its singlestep solver looks for a timestep that it was not given
    if options["variance_type"] and options["prediction_type"] != "epsilon":
        return False
    # Karras, exponential, beta and Lu sigmas end at sigma_min already: the last transition has length 0, and the
    # coefficients of Heun's method and of order 3 are 0 / 0.
    respaced = options["spaced_by"] and options["spaced_by"] != "use_flow_sigmas"
    ends_low = options.get("euler_at_final") or options["final_sigmas_type"] == "zero"
    return not (respaced and not ends_low and (options["solver_type"] == "heun" or options["solver_order"] == 3))


def _edm(options: Options) -> bool:
    """Leave out what fails in the reference: noise at order 3, the name of DEIS down to 0; and 0 / 0, as above."""
    algorithm, to_zero = options.get("algorithm_type"), options["final_sigmas_type"] == "zero"
    if (algorithm == "deis" and to_zero) or (algorithm == "sde-dpmsolver++" and options["solver_order"] == 3):
        return False
    ends_low = algorithm is None or options["euler_at_final"] or to_zero
    return bool(ends_low or (options["solver_type"] != "heun" and options["solver_order"] != 3))


def _in_sigmas(options: Options) -> bool:
    """Leave out what fails in the reference: log_linear spaced anew, and NaN between levels that are far apart."""
    if "spaced_by" not in options:  # Euler ancestral
        return not (options["beta_schedule"] == "squaredcos_cap_v2" and options["timestep_spacing"] == "trailing")
    return not (options.get("interpolation_type") == "log_linear" and options["spaced_by"])


VALID = {  # by a word in the name of the class
    "DDIM": _ddim,
    "DDPM": _ddpm,
    "DPMSolver": _dpm_solver,
    "UniPC": _unipc,
    **dict.fromkeys(["Euler", "Heun", "KDPM2", "LMS"], _in_sigmas),
}


def valid(kind: str, options: Options) -> bool:
    """Leave out what the reference refuses, or what is NaN or fails in it."""
    if kind.startswith("EDM"):
        return _edm(options)
    return all(check(options) for word, check in VALID.items() if word in kind)


def pairs(kind: str, **more: list[Any]) -> list[Options]:
    """Return valid combinations in which any two values come together, with more options than those of the class."""
    return pairwise(GRIDS[kind] | more, partial(valid, kind))


def spell(options: Options) -> Options:
    """Turn a combination into arguments: ``spaced_by`` is one of the reference's switches.

    LCM and TCD refuse epsilon without any signal.
    """
    options = dict(options)
    switch = options.pop("spaced_by", None)
    if options.get("rescale_betas_zero_snr") and "original_inference_steps" in options:
        options["prediction_type"] = "v_prediction"
    return options | ({switch: True} if switch else {})
