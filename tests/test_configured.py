"""Configurations: a dict that is frozen, and classes of one's own that have one, as the reference's do."""

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minidiff.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from minidiff.schedulers.scheduling_utils import AysSchedules, KarrasDiffusionSchedulers, SchedulerMixin
from torch import nn

import minidiff
from minidiff.config import Config
from minidiff.errors import CheckpointNotFoundError, ConfigError
from tests.theirs import diffusers

FIELDS = {"width": 3, "names": ["a", "b"], "deep": {"x": 1}}


def test_a_configuration_is_a_dict() -> None:
    config = Config(FIELDS)
    assert isinstance(config, dict) and config == FIELDS and FrozenDict is Config
    assert json.loads(json.dumps(config)) == FIELDS
    assert config.width == config["width"] == 3 and getattr(config, "height", 4) == 4
    assert type(config.copy()) is type(config | {"width": 4}) is dict
    assert {**config, "width": 4} == config | {"width": 4}
    for again in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(again) is Config and again == config
    assert copy.deepcopy(config)["deep"] is not config["deep"]


@pytest.mark.parametrize(
    "change",
    [
        lambda config: config.__setitem__("width", 4),
        lambda config: config.__delitem__("width"),
        lambda config: config.update(width=4),
        lambda config: config.pop("width"),
        lambda config: config.popitem(),
        lambda config: config.setdefault("height", 4),
        lambda config: config.clear(),
        lambda config: config.__ior__({"width": 4}),
        lambda config: setattr(config, "width", 4),
    ],
)
def test_it_is_frozen(change: Any) -> None:
    config = Config(FIELDS)
    with pytest.raises((TypeError, AttributeError), match="frozen"):
        change(config)
    assert config == FIELDS


def family(library: Any) -> tuple[type, type]:
    """Two classes of one's own, from the bases of either library."""
    utils = library.configuration_utils

    class One(library.SchedulerMixin, utils.ConfigMixin):
        config_name = "one.json"
        ignore_for_config = ("callback",)

        @utils.register_to_config
        def __init__(self, width=3, shape=(2, 5), names=["a"], where=Path("foo/bar"), callback=None):  # noqa: B006
            self.area = width**2

    class Other(library.SchedulerMixin, utils.ConfigMixin):
        config_name = "one.json"

        @utils.register_to_config
        def __init__(self, width=4, height=5, **kwargs):
            pass

    return One, Other


def said(config: Any) -> dict[str, Any]:
    unordered = {"_use_default_values": set(config.get("_use_default_values", ())) - {"kwargs"}}  # "kwargs" is no field
    return {**config, **unordered}


def test_classes_of_ones_own(tmp_path: Path) -> None:
    """Recorded, saved, read and handed over as there, whatever was given and how."""
    seen = []
    for library in (minidiff, diffusers):
        one_class, other_class = family(library)
        one = one_class(width=7, callback=print, _annotation="x")
        folder = tmp_path / library.__name__
        one.save_config(folder)
        loaded = one_class.load_config(folder)
        again, unused = one_class.from_config(loaded, return_unused_kwargs=True, colour="red")
        other = other_class.from_config(one.config)
        one.register_to_config(width=9)
        seen.append(
            [
                one.area,
                (folder / "one.json").read_text(),
                said(one.config),
                one_class.from_pretrained(folder).config,
                said(again.config),
                unused,
                said(other.config),
                said(one_class.from_config(other.config).config),
                one.to_json_string(),
                one_class.load_config(folder, return_unused_kwargs=True, colour="red")[1],
                one_class.load_config(folder / "one.json") == loaded,
            ]
        )
    for ours, theirs in zip(*seen, strict=True):
        assert ours == theirs


def test_fields_are_attributes_that_warn() -> None:
    for library in (minidiff, diffusers):
        scheduler = library.DDIMScheduler(num_train_timesteps=20)
        scheduler.mine = 5
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert scheduler.mine == 5 and scheduler.config.num_train_timesteps == 20
        with pytest.warns(FutureWarning, match="num_train_timesteps"):
            assert scheduler.num_train_timesteps == 20
        with pytest.raises(AttributeError, match="^'DDIMScheduler' object has no attribute 'nothing'$"):
            scheduler.nothing  # noqa: B018


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    class Net(nn.Module, ConfigMixin):
        config_name = "config.json"

        @register_to_config
        def __init__(self, width: int = 2) -> None:
            super().__init__()
            self.layer = nn.Linear(width, width)

    net = Net(3)
    net.save_config(tmp_path)
    assert Net.from_config(Net.load_config(tmp_path)).layer.weight.shape == (3, 3)


def test_what_json_does_not_know(tmp_path: Path) -> None:
    """Arrays, tensors and NumPy's numbers are written as lists and numbers."""
    betas = np.linspace(1e-4, 2e-2, 20)
    for given in (betas, torch.from_numpy(betas).float()):
        scheduler = minidiff.DDIMScheduler(num_train_timesteps=np.int64(20), trained_betas=given)
        scheduler.save_config(tmp_path)
        again = minidiff.DDIMScheduler.from_pretrained(tmp_path)
        assert torch.equal(again.betas, scheduler.betas) and again.config.num_train_timesteps == 20


def test_a_path_for_a_configuration(tmp_path: Path) -> None:
    minidiff.DDIMScheduler(beta_end=0.03).save_config(tmp_path / "scheduler")
    with pytest.warns(FutureWarning, match="load_config"):
        scheduler = minidiff.PNDMScheduler.from_config(tmp_path, subfolder="scheduler", beta_start=0.002)
    assert (scheduler.config.beta_start, scheduler.config.beta_end) == (0.002, 0.03)


def test_misspelled_fields_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Fields of compatible classes and of the class that the configuration is of are expected, others are not."""
    fields = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "interpolation_type": "linear"}
    minidiff.DDIMScheduler.from_config(fields)
    minidiff.LCMScheduler.from_config({"_class_name": "PNDMScheduler", "skip_prk_steps": True})
    assert not caplog.records
    scheduler = minidiff.DDIMScheduler.from_config({**fields, "step_offset": 1})
    assert "step_offset" in caplog.text and "skip_prk_steps" not in caplog.text
    assert scheduler.config.step_offset == 1  # kept for the way back, as there


def test_bad_calls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ConfigMixin has no config_name"):
        ConfigMixin.load_config(tmp_path)
    with pytest.raises(NotImplementedError, match="ConfigMixin has no config_name"):
        ConfigMixin().register_to_config(a=1)
    with pytest.raises(CheckpointNotFoundError, match="scheduler_config.json"):
        minidiff.DDIMScheduler.load_config(tmp_path)
    with pytest.raises(TypeError, match="unknown arguments colour"):
        minidiff.DDIMScheduler.load_config(tmp_path, colour="red")
    with pytest.raises(ConfigError, match="no option 'colour'"):
        minidiff.DDIMScheduler.from_config({}, colour="red")
    with pytest.raises(ValueError, match="push_to_hub"):
        minidiff.DDIMScheduler().save_config(tmp_path, push_to_hub=True)


def test_a_derived_scheduler_keeps_the_fields_of_its_base() -> None:
    """Its constructor names none of them: a final level other than 0 would be another picture."""

    class Mine(minidiff.DPMSolverMultistepScheduler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    mine, plain = Mine(timestep_spacing="trailing"), minidiff.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    assert torch.equal(mine.plan(5).timesteps, plain.plan(5).timesteps)
    assert torch.equal(mine.plan(5).sigmas, plain.plan(5).sigmas)


def test_a_field_that_is_changed_counts_at_once() -> None:
    """Also as the reference's own pipelines change it: they assign ``_internal_dict``."""
    x = torch.full((1, 1, 2, 2), 3.0)
    runs = []
    for library in (minidiff, diffusers):
        scheduler = library.DDIMScheduler()
        scheduler.register_to_config(clip_sample=False, prediction_type="sample")
        frozen = library.configuration_utils.FrozenDict
        scheduler._internal_dict = frozen({**scheduler.config, "timestep_spacing": "trailing"})
        scheduler.set_timesteps(4)
        runs.append([scheduler.timesteps, scheduler.step(x, scheduler.timesteps[1], x).prev_sample])
    for ours, theirs in zip(*runs, strict=True):
        assert torch.equal(ours, theirs)


def test_published_lists() -> None:
    utils = diffusers.schedulers.scheduling_utils
    assert AysSchedules == utils.AysSchedules
    assert {kind.name: kind.value for kind in KarrasDiffusionSchedulers} == {
        kind.name: kind.value for kind in utils.KarrasDiffusionSchedulers
    }
    assert issubclass(minidiff.DDIMScheduler, SchedulerMixin)
