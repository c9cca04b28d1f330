"""The face that loops written by hand use, where programs go beyond the loop: what is there before a run, times that
the run does not visit, numbers of other libraries, the methods and attributes of single solvers."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

import minidiff
from tests.schedulers.runs import network, noise
from tests.theirs import diffusers

KINDS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
SIGMA_SPACE = [name for name in KINDS if "Discrete" in name]
X, OUT = noise(torch.float32), network(noise(torch.float32), 500)


def both(name: str, **options: Any) -> tuple[Any, Any]:
    return tuple(getattr(library, name)(**options) for library in (minidiff, diffusers))


def seeded(step: Any) -> dict[str, Any]:
    """A fresh generator for a ``step`` that takes one."""
    draws = "generator" in step.__code__.co_varnames[: step.__code__.co_argcount]
    return {"generator": torch.Generator().manual_seed(3)} if draws else {}


@pytest.mark.parametrize("name", KINDS)
def test_return_dict_where_the_reference_has_it(name: str) -> None:
    """By position, whatever stands before it; the fourth of DEIS, Heun, KDPM2, PNDM and UniPC."""
    for ours, theirs in [both(name)]:
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(10)
        t = theirs.timesteps[0]
        names = theirs.step.__code__.co_varnames[: theirs.step.__code__.co_argcount]
        after = len(names) - 1 - names.index("return_dict")  # EDM's Euler has one more
        defaults = theirs.step.__defaults__[: -1 - after]
        torch.manual_seed(0)
        one = ours.step(OUT, t, X, *defaults, False)
        torch.manual_seed(0)
        other = theirs.step(OUT, t, X, *defaults, False)
        assert type(one) is type(other) is tuple
        assert torch.equal(one[0], other[0])


@pytest.mark.parametrize("name", [name for name in KINDS if name != "PNDMScheduler"])  # has no timesteps there
def test_what_is_there_before_a_run(name: str) -> None:
    ours, theirs = both(name)
    assert ours.timesteps.dtype == theirs.timesteps.dtype
    assert type(ours.init_noise_sigma) is type(theirs.init_noise_sigma)
    assert ours.init_noise_sigma == theirs.init_noise_sigma
    t = theirs.timesteps[8]  # no midpoint of KDPM2
    assert torch.equal(ours.scale_model_input(X, t), theirs.scale_model_input(X, t))
    if "Heun" not in name and "KDPM2" not in name:  # two evaluations for each, there
        assert torch.equal(ours.timesteps, theirs.timesteps)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(3)
    assert type(ours.init_noise_sigma) is type(theirs.init_noise_sigma)
    assert torch.equal(torch.as_tensor(ours.init_noise_sigma), torch.as_tensor(theirs.init_noise_sigma))


@pytest.mark.parametrize("name", [*SIGMA_SPACE, "DDPMScheduler"])
def test_steps_before_a_run(name: str) -> None:
    """Over every training timestep."""
    ours, theirs = both(name)
    steps = []
    for scheduler in (ours, theirs):
        x, way = X * theirs.init_noise_sigma, []
        generator = seeded(theirs.step)
        for t in theirs.timesteps[:4]:
            out = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(out, t, x, **generator).prev_sample
            way.append(x)
        steps.append(torch.stack(way))
    assert torch.equal(*steps)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_steps_from_any_time(eta: float) -> None:
    """Inversion and other programs step from times that the run does not visit."""
    ours, theirs = both("DDIMScheduler", clip_sample=False)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in (999, 555, np.int64(7), torch.tensor(123), 0, 900):
        results = [
            scheduler.step(OUT, t, X, eta=eta, generator=torch.Generator().manual_seed(1))
            for scheduler in (ours, theirs)
        ]
        assert torch.equal(results[0].prev_sample, results[1].prev_sample)
        assert torch.equal(results[0].pred_original_sample, results[1].pred_original_sample)
    assert torch.equal(ours._get_variance(555, 455), theirs._get_variance(555, 455))
    assert torch.equal(ours._get_variance(5, -95), theirs._get_variance(5, -95))


@pytest.mark.parametrize("skip", [False, True])
def test_pndm_steps_from_any_time(skip: bool) -> None:
    ours, theirs = both("PNDMScheduler", skip_prk_steps=skip)
    runs = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        x, way = X, []
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x, t), t + k % 3, x).prev_sample
            way.append(x)
        runs.append(torch.stack(way))
    assert torch.equal(*runs)


@pytest.mark.parametrize("skip", [False, True])
def test_both_halves_of_pndm(skip: bool) -> None:
    ours, theirs = both("PNDMScheduler", skip_prk_steps=skip)
    assert ours.prk_timesteps is ours.plms_timesteps is theirs.prk_timesteps is None
    runs = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        x, way = X, []
        for times, step in (
            (scheduler.prk_timesteps, scheduler.step_prk),
            (scheduler.plms_timesteps, scheduler.step_plms),
        ):
            for t in times:
                x = step(network(x, t), t, x).prev_sample
                way.append(x)
        runs.append(torch.stack([*way, *scheduler.ets]))
    assert torch.equal(*runs)
    assert list(ours.prk_timesteps) == list(theirs.prk_timesteps)
    assert list(ours.plms_timesteps) == list(theirs.plms_timesteps)
    if not skip:  # step_plms is step: the Runge-Kutta start is due
        return
    steps = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        scheduler.ets = [X, 2 * X, OUT, X - OUT]
        steps.append(scheduler.step_plms(OUT, 1, X).prev_sample)
    assert torch.equal(*steps)


@pytest.mark.parametrize("name", ["DDPMScheduler", "LCMScheduler", "TCDScheduler"])
def test_the_timestep_before(name: str) -> None:
    ours, theirs = both(name)
    assert ours.previous_timestep(500) == theirs.previous_timestep(500) == 499
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps:
        assert ours.previous_timestep(t) == theirs.previous_timestep(t)


@pytest.mark.parametrize("name", [name for name in KINDS if hasattr(getattr(diffusers, name), "index_for_timestep")])
def test_where_a_timestep_is(name: str) -> None:
    ours, theirs = both(name)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
    for t in theirs.timesteps[1:]:
        assert ours.index_for_timestep(t) == theirs.index_for_timestep(t)
    among = torch.tensor([9.0, 5.0, 5.0, 1.0])
    for t in (9.0, 5.0, 1.0):
        assert ours.index_for_timestep(t, among) == theirs.index_for_timestep(t, among)


def test_noise_levels_whose_last_is_repeated() -> None:
    """As a run to ``sigma_min`` has them, which people hand back."""
    ours, theirs = both("EulerDiscreteScheduler", final_sigmas_type="sigma_min", timestep_spacing="trailing")
    theirs.set_timesteps(6)
    given = theirs.sigmas.tolist()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(sigmas=given)
    assert torch.equal(ours.sigmas, theirs.sigmas) and torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("betas", [np.linspace(1e-4, 2e-2, 1000), torch.linspace(1e-4, 2e-2, 1100), [0.1, 0.3]])
@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_trained_betas_of_another_number(name: str, betas: Any) -> None:
    ours, theirs = both(name, trained_betas=betas)
    assert torch.equal(ours.betas, theirs.betas)
    if len(betas) >= 1000:
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(5)
        assert torch.equal(ours.timesteps, theirs.timesteps)


NUMBERS = {"NumPy": np.int64, "0-d tensor": torch.tensor, "0-d array": np.array}


@pytest.mark.parametrize("kind", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize("name", KINDS)
def test_numbers_of_other_libraries(name: str, kind: Any) -> None:
    """Where a number is asked for: steps, times, begin, fields of the configuration."""
    make, field = getattr(minidiff, name), "rho" if name.startswith("EDM") else "beta_start"
    plain = make(num_train_timesteps=100, **{field: 0.5})
    other = make(num_train_timesteps=np.int64(100), **{field: np.float64(0.5)})
    plain.set_timesteps(5)
    other.set_timesteps(kind(5))
    assert torch.equal(plain.timesteps, other.timesteps)
    results = []
    for scheduler in (plain, other):
        scheduler.set_begin_index(1 if scheduler is plain else kind(1))
        t = scheduler.timesteps[1].item()
        as_given = t if scheduler is plain else (np.float64(t) if isinstance(t, float) else kind(int(t)))
        options = seeded(getattr(diffusers, name).step)
        results.append(scheduler.step(OUT, as_given, X, **options).prev_sample)
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", [np.array, torch.tensor, tuple], ids=["NumPy", "torch", "tuple"])
@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "LCMScheduler"]
)
def test_timesteps_in_arrays(name: str, kind: Any) -> None:
    ours, theirs = both(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.set_timesteps(timesteps=[799, 499, 99])
    ours.set_timesteps(timesteps=kind([799, 499, 99]))
    assert torch.equal(ours.timesteps, theirs.timesteps)


@pytest.mark.parametrize("name", KINDS)
def test_noise_at_one_time(name: str) -> None:
    """Before a run and in it, at a timestep (1,) or (): one for all pictures."""
    ours = getattr(minidiff, name)()
    for _ in range(2):
        t = ours.timesteps[2]
        assert torch.equal(ours.add_noise(X, OUT, t), ours.add_noise(X, OUT, t[None]))
        ours.set_timesteps(9)
