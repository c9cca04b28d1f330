"""Configurations travel between scheduler classes, and between minidiff and the reference, as in the reference."""

import json

import pytest

import minidiff
from tests.theirs import diffusers

EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")  # have no betas
KINDS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
STABLE_DIFFUSION = {  # the scheduler file of Stable Diffusion 1.5
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SDXL = {  # the one of Stable Diffusion XL, an Euler file with fields of other classes
    "_class_name": "EulerDiscreteScheduler",
    "_diffusers_version": "0.19.0.dev0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def fields(config) -> dict:
    """The fields that matter: the list of defaults has no order, an empty tuple is an empty list."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in dict(config).items()}
    return plain | {"_use_default_values": sorted(plain.get("_use_default_values", []))}


@pytest.mark.parametrize("kind", KINDS)
def test_the_constructor_records_what_it_was_given(kind):
    options = {"beta_start": 0.001, "prediction_type": "v_prediction"}
    options |= {"sigma_data": options.pop("beta_start")} if kind in EDM else {}
    assert fields(getattr(minidiff, kind)(**options).config) == fields(getattr(diffusers, kind)(**options).config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file", [STABLE_DIFFUSION, SDXL], ids=["sd", "sdxl"])
def test_any_file_makes_any_scheduler(kind, file):
    ours, theirs = getattr(minidiff, kind).from_config(file), getattr(diffusers, kind).from_config(file)
    assert fields(ours.config) == fields(theirs.config)


@pytest.mark.parametrize("there", KINDS)
@pytest.mark.parametrize("here", KINDS)
def test_from_class_to_class_and_back(here, there):
    def journey(library):  # of 20 timesteps, because some constructors of the reference plan a run over all of them
        file = STABLE_DIFFUSION | {"beta_end": 0.013, "num_train_timesteps": 20}
        first = getattr(library, here).from_config(file)
        second = getattr(library, there).from_config(first.config)
        return fields(second.config), fields(getattr(library, here).from_config(second.config).config)

    assert journey(minidiff) == journey(diffusers)


def test_defaults_do_not_travel():
    """PNDM's own default spacing is leading; UniPC takes its own, linspace, not PNDM's."""
    assert (
        minidiff.UniPCMultistepScheduler.from_config(minidiff.PNDMScheduler().config).config.timestep_spacing
        == "linspace"
    )
    explicit = minidiff.PNDMScheduler(timestep_spacing="leading").config
    assert minidiff.UniPCMultistepScheduler.from_config(explicit).config.timestep_spacing == "leading"


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_exchanged_with_the_reference(kind, tmp_path):
    ours = getattr(minidiff, kind).from_config(STABLE_DIFFUSION, prediction_type="v_prediction")
    ours.save_pretrained(tmp_path / "ours" / "scheduler")
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "ours", subfolder="scheduler")
    theirs.save_pretrained(tmp_path / "theirs")
    written = [
        json.loads((tmp_path / name / "scheduler_config.json").read_text()) for name in ("ours/scheduler", "theirs")
    ]
    assert written[0] == written[1]
    override = {"sigma_min" if kind in EDM else "beta_start": 0.003}
    again = getattr(minidiff, kind).from_pretrained(tmp_path / "theirs", **override)
    theirs = getattr(diffusers, kind).from_pretrained(tmp_path / "theirs", **override)
    assert fields(again.config) == fields(theirs.config)


def test_unipc_reads_the_file_of_pndm(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(STABLE_DIFFUSION))
    ours = minidiff.UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    theirs = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert fields(ours.config) == fields(theirs.config)
    assert ours.config["skip_prk_steps"] is True  # unknown to UniPC, kept for the way back


@pytest.mark.parametrize("spacing", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("kind", ["LMSDiscreteScheduler", "HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_bounds_of_another_class(kind, spacing):
    """sigma_min and sigma_max of another class's config count, but not for the Karras levels of LMS, as there."""
    runs = []
    for library in (minidiff, diffusers):
        source = library.UniPCMultistepScheduler(
            sigma_min=0.1, sigma_max=9.0, rescale_betas_zero_snr=True, prediction_type="v_prediction", **{spacing: True}
        )
        runs.append(getattr(library, kind).from_config(source.config))
        runs[-1].set_timesteps(7)
    ours, theirs = runs
    assert (ours.sigmas == theirs.sigmas).all()
    assert (ours.alphas_cumprod == theirs.alphas_cumprod).all()


@pytest.mark.parametrize("kind", KINDS)
def test_attributes(kind):
    ours, theirs = getattr(minidiff, kind)(), getattr(diffusers, kind)()
    assert (ours.order, ours.init_noise_sigma, len(ours)) == (theirs.order, theirs.init_noise_sigma, len(theirs))
    assert {one.__name__ for one in ours.compatibles} == {
        one.__name__ for one in theirs.compatibles if one.__name__ in minidiff.__all__
    }
    if kind not in EDM:
        assert {"betas", "alphas", "alphas_cumprod"} <= set(vars(ours))
        assert (ours.alphas_cumprod == theirs.alphas_cumprod).all()
    assert ours.num_inference_steps is None
