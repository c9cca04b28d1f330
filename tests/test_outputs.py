"""Output records as programs use them: by name, by index, as mappings, as pytrees, pickled and copied."""

import copy
import pickle
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from minidiff import DDPMScheduler, UNet2DConditionModel
from minidiff.networks.clip import CLIPTextOutput, CLIPTextProjectionOutput
from minidiff.networks.unet import UNet2DConditionOutput
from minidiff.networks.unet_unconditional import UNet2DOutput
from minidiff.networks.vae import AutoencoderKLOutput, DecoderOutput
from minidiff.outputs import Output
from minidiff.pipelines.ddpm import ImagePipelineOutput
from minidiff.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from minidiff.schedulers.base import SchedulerOutput
from minidiff.schedulers.lcm import LCMSchedulerOutput
from minidiff.schedulers.tcd import TCDSchedulerOutput
from tests.theirs import diffusers


@dataclass
class Ours(Output):
    """A user's own record."""

    sample: Tensor
    extra: Any = None


@dataclass
class Theirs(diffusers.utils.BaseOutput):
    sample: Tensor
    extra: Any = None


PAIR = pytest.mark.parametrize("kind", [Ours, Theirs])
RECORDS = [
    Ours,
    Theirs,
    AutoencoderKLOutput,
    CLIPTextOutput,
    CLIPTextProjectionOutput,
    DecoderOutput,
    ImagePipelineOutput,
    LCMSchedulerOutput,
    SchedulerOutput,
    StableDiffusionPipelineOutput,
    StableDiffusionXLPipelineOutput,
    TCDSchedulerOutput,
    UNet2DConditionOutput,
    UNet2DOutput,
]


@PAIR
def test_a_record_is_a_mapping(kind: type) -> None:
    x = torch.arange(3.0)
    out = kind(x)
    assert isinstance(out, (dict, OrderedDict, Mapping)) and dict(out) == {"sample": x} == {**out}
    assert list(out) == ["sample"] and next(iter(out.values())) is x and list(out.items()) == [("sample", x)]
    assert out.get("extra") is None and "extra" not in out and len(out) == 1 and out
    assert out[0] is out["sample"] is out.sample is out.to_tuple()[0] and out[:1] == (x,)
    with pytest.raises(KeyError):
        out["extra"]
    with pytest.raises(IndexError):
        out[1]


@PAIR
def test_a_field_can_be_given_another_value(kind: type) -> None:
    out = kind(torch.zeros(2), extra=1)
    out.sample = x = torch.ones(2)
    assert out["sample"] is x
    out["extra"] = 2
    assert out.extra == 2 and out.to_tuple() == (x, 2)


@PAIR
@pytest.mark.parametrize(
    "change", [lambda out: out.pop("sample"), lambda out: out.update(extra=1), lambda out: out.setdefault("extra", 1)]
)
def test_a_field_cannot_be_added_or_taken_out(kind: type, change: Any) -> None:
    out = kind(torch.zeros(2))
    with pytest.raises(Exception, match="Theirs|be added or taken out"):
        change(out)
    with pytest.raises(Exception, match="Theirs|be added or taken out"):
        del out["sample"]


@pytest.mark.parametrize("kind", RECORDS)
def test_what_walks_through_outputs_can_rebuild_each(kind: type) -> None:
    """accelerate's mixed precision calls ``type(out)({name: other})``; torch flattens and unflattens."""
    name = fields(kind)[0].name
    out = kind(**{field.name: torch.zeros(2, dtype=torch.float16) for field in fields(kind)[:1]})
    for other in (
        type(out)({key: value.float() for key, value in out.items()}),
        pytree.tree_map(Tensor.float, out),
    ):
        assert type(other) is kind and list(other) == [name] and getattr(other, name) is other[0]
    assert pytree.tree_flatten(out)[0] == [out[0]]


@pytest.mark.parametrize("kind", RECORDS)
def test_pickled_and_copied(kind: type) -> None:
    out = kind(**{field.name: index for index, field in enumerate(fields(kind))})
    for other in (pickle.loads(pickle.dumps(out)), copy.deepcopy(out), copy.copy(out)):
        assert type(other) is kind and other == out and dict(other) == dict(out) and vars(other) == vars(out)


def test_a_scheduler_step_is_a_mapping() -> None:
    step = DDPMScheduler().step(torch.zeros(1, 1, 2, 2), 0, torch.ones(1, 1, 2, 2))
    assert list(step) == [name for name, _ in step.items()] == ["prev_sample", "pred_original_sample"]


def test_exported_and_traced_through() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options = {"block_out_channels": [4], "norm_num_groups": 2, "cross_attention_dim": 4, "layers_per_block": 1}
            blocks = {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]}
            self.unet = UNet2DConditionModel(**options, **blocks, attention_head_dim=2)

        def forward(self, x: Tensor, t: Tensor, ctx: Tensor) -> Output:
            return self.unet(x, t, ctx)

    network = Network().eval()
    inputs = (torch.ones(2, 4, 4, 4), torch.tensor(3), torch.ones(2, 3, 4))
    exported = torch.export.export(network, inputs).module()(*inputs)
    assert type(exported) is UNet2DConditionOutput
    assert torch.allclose(exported.sample, network(*inputs).sample, atol=1e-5)  # measured: 1.5e-7
