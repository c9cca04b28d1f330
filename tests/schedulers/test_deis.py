"""DEIS against the reference, over whole trajectories with any two options together."""

import pytest

import minidiff
from tests.schedulers.options import pairs, spell
from tests.schedulers.runs import check_same_run, name
from tests.theirs import diffusers


def pair(options: dict) -> tuple:
    return minidiff.DEISMultistepScheduler(**options), diffusers.DEISMultistepScheduler(**options)


@pytest.mark.parametrize("options", pairs("DEISMultistepScheduler"), ids=name)
def test_options(options):
    for steps, start in ((1, 0), (3, 0), (15, 0), (7, 2)):  # from 15 steps on the order stays at the end
        check_same_run(*pair(spell(options)), steps, start=start)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"algorithm_type": "ddim"}, "algorithm_type='ddim'"),
        ({"solver_type": "euler"}, "solver_type='euler'"),
        ({"solver_order": 4}, "solver_order=4"),
        ({"use_flow_sigmas": True, "use_karras_sigmas": True}, "use_flow_sigmas cannot be combined"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ],
)
def test_refused(options, words):
    with pytest.raises(ValueError, match=words):
        minidiff.DEISMultistepScheduler(**options)
