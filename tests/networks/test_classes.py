"""Conditional UNets that are told a class: bad input, loops by hand, pipelines, optimized ones, single files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import minidiff.fast
from minidiff import DDIMScheduler, UNet2DConditionModel
from minidiff.checkpoints.tools.convert import convert
from minidiff.errors import CheckpointError
from minidiff.threads import computing
from tests.fast_ways import a_run
from tests.networks.test_unet import BOUND, inputs, labels, make_pair, tiny
from tests.pictures import load_both
from tests.theirs import diffusers, relative_error
from tests.tiny import save_tiny

KINDS = {
    "table": {"num_class_embeds": 9},
    "timestep": {"class_embed_type": "timestep"},
    "identity": {"class_embed_type": "identity"},
    "projection": {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 5},
    "simple": {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 5},
}
UPSCALER = tiny(num_class_embeds=9, only_cross_attention=True, in_channels=7, use_linear_projection=True)


@pytest.mark.parametrize("kind", KINDS)
def test_missing_labels(kind: str) -> None:
    """The reference's message begins ours."""
    ours, theirs = make_pair(tiny(**KINDS[kind]))
    x, ctx = inputs(ours)
    with pytest.raises(ValueError, match="class_labels should be provided when num_class_embeds > 0") as error:
        theirs(x, 3, ctx)
    with pytest.raises(ValueError, match=f"{error.value} or there is a class_embed_type.*knows classes"):
        ours(x, 3, ctx)


WRONG: dict[str, tuple[str | None, Tensor, type[Exception], str]] = {
    "no classes": (None, torch.tensor([1, 2]), ValueError, "class_labels given to a network without classes"),
    "too large": ("table", torch.tensor([1, 9]), ValueError, r"class_labels should be from 0 to 8, found \[1, 9\]"),
    "fractions": ("table", torch.tensor([1.0, 2.0]), TypeError, "class_labels should be integers from 0 to 8"),
    "flags": ("table", torch.tensor([True, False]), TypeError, "class_labels should be integers .*torch.bool"),
    "a number": ("table", 3, TypeError, r"class_labels should be a tensor \(2,\), found 3"),
    "three for two": ("timestep", torch.tensor([1, 2, 3]), ValueError, r"class_labels should be \(2,\), found \(3,\)"),
    "width": ("projection", torch.ones(2, 6), ValueError, r"class_labels should be \(2, 5\), found \(2, 6\)"),
    "embedded": ("identity", torch.ones(2, 5), ValueError, r"class_labels should be \(2, 32\), found \(2, 5\)"),
    "numbers": ("simple", torch.tensor([1, 2]), ValueError, r"class_labels should be \(2, 5\), found \(2,\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_labels_that_do_not_fit(name: str) -> None:
    kind, given, error, message = WRONG[name]
    model = UNet2DConditionModel(**tiny(**(KINDS[kind] if kind else {})))
    with pytest.raises(error, match=message):
        model(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 5, 6), class_labels=given)


@torch.no_grad()
@pytest.mark.parametrize("concat", [False, True])
def test_one_class_for_all(concat: bool) -> None:
    """The reference repeats one label where it adds, and not where it concatenates."""
    ours, theirs = make_pair(tiny(num_class_embeds=9, class_embeddings_concat=concat))
    x, ctx = inputs(ours)
    expected = theirs(x, 3, ctx, class_labels=torch.tensor([4, 4])).sample
    assert relative_error(ours(x, 3, ctx, class_labels=torch.tensor([4])).sample, expected) <= BOUND
    assert relative_error(ours(x, 3, ctx, class_labels=torch.tensor([4, 5])).sample, expected) > 1e-3


@torch.no_grad()
def test_sizes_and_a_class() -> None:
    """Both come in beside the time; the original spelling has one name for the two, so the class keeps the Hub's."""
    sizes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    ours, theirs = make_pair(tiny(**KINDS["projection"] | sizes | {"projection_class_embeddings_input_dim": 20}))
    x, ctx = inputs(ours)
    told: dict[str, Any] = {"class_labels": torch.randn(2, 20).double()}
    told["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 8).double(), "time_ids": torch.tensor([[1.0, 2, 3]] * 2)}
    assert relative_error(ours(x, 3, ctx, **told).sample, theirs(x, 3, ctx, **told).sample) <= BOUND
    names = [name for row in ours.rows() for name in row.ldm]
    assert len(set(names)) == len(names) and {"label_emb.0.0.weight", "class_embedding.linear_1.weight"} <= {*names}
    identity, _ = make_pair(tiny(**KINDS["identity"] | sizes | {"projection_class_embeddings_input_dim": 20}))
    told["class_labels"] = torch.randn(2, 32).double()  # as wide as the time, whatever the width of the sizes
    identity(x, 3, ctx, **told)


@torch.no_grad()
def upscale(model: nn.Module, scheduler: Any) -> Tensor:
    """Run the loop of the x4 upscaler, in which the class says how noisy the small picture is."""
    (x, ctx), rng = inputs(model), torch.Generator().manual_seed(5)
    small, x = x[:, :3], x[:, 3:]
    level = torch.tensor([3, 7])
    small = scheduler.add_noise(small, torch.randn(small.shape, generator=rng, dtype=x.dtype), level)
    scheduler.set_timesteps(4)
    for t in scheduler.timesteps:
        out = model(torch.cat([x, small], dim=1), t, ctx, class_labels=level).sample
        x = scheduler.step(out, t, x).prev_sample
    return x


def test_a_loop_by_hand() -> None:
    ours, theirs = make_pair(UPSCALER)
    theirs.spec = ours.spec  # what ``inputs`` reads
    fields = {"beta_end": 0.02, "beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    expected = upscale(theirs, diffusers.DDIMScheduler(**fields))
    assert relative_error(upscale(ours, DDIMScheduler(**fields)), expected) <= BOUND
    minidiff.fast.optimize(ours)
    assert relative_error(upscale(ours, DDIMScheduler(**fields)), expected) <= BOUND


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    ours, _ = make_pair(tiny(**KINDS[kind]))
    x, ctx = inputs(ours)
    told = {"class_labels": torch.tensor([3, 700])} if kind == "timestep" else labels(ours)
    exact = ours(x, 20, ctx, **told).sample
    out = ours.to(dtype)(x.to(dtype), 20, ctx.to(dtype), **told).sample  # labels of any dtype are taken
    assert out.dtype == dtype
    assert relative_error(out, exact) <= {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]  # measured: 1.4e-3, 1.1e-2


@torch.no_grad()
def test_what_embeds_a_class_may_be_watched() -> None:
    """Optimized networks keep embedded times from step to step, and not what nobody knows to be unchanged."""
    ours, _ = make_pair(tiny(num_class_embeds=9))
    (x, ctx), called = inputs(ours), []
    minidiff.fast.optimize(ours)
    ours.class_embed.register_forward_hook(lambda *_: called.append(1))
    run, told = a_run(x[:1], torch.tensor(400), passes=2), labels(ours)
    with computing(run):
        for _ in range(2):
            ours(x, run.plan.timesteps[0], ctx, **told)
    assert len(called) == 2


def test_a_pipeline_says_what_is_missing(tmp_path: Path) -> None:
    for pipe in load_both("StableDiffusionPipeline", save_tiny(tmp_path, unet={"num_class_embeds": 9})):
        with pytest.raises(ValueError, match="class_labels should be provided when num_class_embeds > 0"):
            pipe("red heart", num_inference_steps=1, height=16, width=16)


@pytest.mark.parametrize("kind", ["table", "timestep", "projection"])
def test_original_names_are_those_that_the_reference_reads(kind: str, tmp_path: Path) -> None:
    """In a file that it writes; ``simple_projection`` it does not read."""
    ours, theirs = make_pair(UPSCALER | {"num_class_embeds": None} | KINDS[kind])
    ours.save_config(tmp_path / "unet")
    convert(save_unet(ours, tmp_path), tmp_path / "one.safetensors")
    names = {name for name in load_file(tmp_path / "one.safetensors") if "label_emb" in name}
    assert names == (
        {"model.diffusion_model.label_emb.weight"}
        if kind == "table"
        else {f"model.diffusion_model.label_emb.0.{n}.{part}" for n in (0, 2) for part in ("weight", "bias")}
    )
    where = {"config": str(tmp_path / "unet"), "torch_dtype": torch.float64}
    loaded = diffusers.UNet2DConditionModel.from_single_file(str(tmp_path / "one.safetensors"), **where)
    again = UNet2DConditionModel.from_single_file(tmp_path / "one.safetensors", torch_dtype=torch.float64)
    expected = theirs.state_dict()
    for state in (loaded.state_dict(), again.state_dict()):
        assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in expected)


def save_unet(model: UNet2DConditionModel, folder: Path) -> Path:
    model.save_pretrained(folder / "hub")
    return folder / "hub"


def test_a_file_without_its_classes(tmp_path: Path) -> None:
    ours, _ = make_pair(tiny())
    convert(save_unet(ours, tmp_path), tmp_path / "one.safetensors")
    UNet2DConditionModel(**UPSCALER).save_config(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"missing:\n  model\.diffusion_model\.label_emb\.weight"):
        UNet2DConditionModel.from_single_file(tmp_path / "one.safetensors", config=tmp_path / "other")


def test_compiled_as_one_graph() -> None:
    """The labels are not looked at then."""
    model = UNet2DConditionModel(**tiny(num_class_embeds=9))
    x, ctx, told = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 6), {"class_labels": torch.tensor([1, 8])}
    compiled, t = torch.compile(model, backend="eager", fullgraph=True), torch.tensor(3)
    with torch.no_grad():
        assert torch.equal(compiled(x, t, ctx, **told).sample, model(x, t, ctx, **told).sample)
