"""Layerwise casting: weights in float8, computed in another dtype, as the reference's hooks do it."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from minidiff.hooks import apply_layerwise_casting
from torch import Tensor, nn

import minidiff
from tests.networks.test_vae_tiny import small
from tests.pictures import quiet, seeded
from tests.single_files import draw, states_equal
from tests.theirs import carry_over, diffusers, randomize, relative_error
from tests.tiny import UNET, VAE
from tests.tiny_xl import COARSE_UNET

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DDPM = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.x": ("UNet2DConditionModel", UNET),
    "SD 2.x": ("UNet2DConditionModel", UNET | {"use_linear_projection": True}),
    "SDXL": ("UNet2DConditionModel", COARSE_UNET),
    "DDPM": ("UNet2DModel", DDPM),
    "VAE": ("AutoencoderKL", VAE),
    "tiny VAE": ("AutoencoderTiny", small(levels=2)),
}


def pair(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Return our network and the reference's, with the same weights."""
    name, config = NETWORKS[kind]
    theirs = randomize(getattr(diffusers, name)(**config)).to(dtype)
    return carry_over(theirs, getattr(minidiff, name)(**config)), theirs


def run(network: nn.Module, kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """Call a network of either library."""
    x = torch.randn(2, 4 if kind.startswith("SD") else 3, 8, 8, generator=seeded(), dtype=torch.float64).to(dtype)
    with torch.no_grad():
        if kind == "VAE":
            return network(x).sample
        if kind == "tiny VAE":
            return network.decode(network.encode(x).latents).sample
        if kind == "DDPM":
            return network(x, 7).sample
        options = {"encoder_hidden_states": torch.randn(2, 5, 24, generator=seeded(1), dtype=torch.float64).to(dtype)}
        if kind == "SDXL":
            added = {"text_embeds": torch.ones(2, 12, dtype=dtype), "time_ids": torch.ones(2, 6, dtype=dtype)}
            options["added_cond_kwargs"] = added
        return network(x, 7, **options).sample


def dtypes(network: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in network.state_dict().items()}


@pytest.mark.parametrize(
    ("kind", "storage"), [*((kind, E4M3) for kind in NETWORKS), ("SD 1.x", E5M2), ("SD 2.x", torch.bfloat16)], ids=str
)
def test_stored_and_computed_as_in_the_reference(kind: str, storage: torch.dtype) -> None:
    """Measured: 1.7e-15 at most; what is stored is equal bit for bit."""
    ours, theirs = pair(kind)
    before = run(ours, kind)
    for network in (ours, theirs):
        network.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float64)
        assert network.dtype == torch.float64
    assert dtypes(ours) == dtypes(theirs) and storage in dtypes(ours).values()
    stored = theirs.state_dict()
    assert all(torch.equal(t.double(), stored[name].double()) for name, t in ours.state_dict().items())
    found, expected = run(ours, kind), run(theirs, kind)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(found, before) > 1e-4  # the rounding shows
    assert torch.equal(found, run(ours, kind))  # and nothing is lost by computing
    assert ours.get_memory_footprint() == theirs.get_memory_footprint()


@pytest.mark.parametrize(
    ("kind", "compute"), [("SD 1.x", torch.bfloat16), ("SDXL", torch.float32), ("VAE", torch.bfloat16)], ids=str
)
def test_computed_as_with_rounded_weights(kind: str, compute: torch.dtype) -> None:
    """Bit for bit."""
    ours, _ = pair(kind, compute)
    rounded = copy.deepcopy(ours)
    ours.enable_layerwise_casting()  # in its own dtype
    with torch.no_grad():
        for name, weight in rounded.named_parameters():
            if dtypes(ours)[name] == E4M3:
                weight.copy_(weight.to(E4M3))
    assert ours.dtype == compute
    assert torch.equal(run(ours, kind, compute), run(rounded, kind, compute))


CHOICES: list[dict[str, Any]] = [
    {},
    {"skip_modules_pattern": ()},
    {"skip_modules_pattern": ("down_blocks",)},
    {"skip_modules_pattern": ["^mid_block$", r"attn2\.to_k", "time"]},
    {"skip_modules_pattern": (r"attentions\.0$", r"^up_blocks\.\d+\.resnets\.0\.conv1$")},
    {"skip_modules_pattern": ("proj_in$",)},
    {"skip_modules_classes": (nn.Conv2d,)},
    {"skip_modules_classes": (nn.Linear,)},
    {"skip_modules_classes": (nn.Linear,), "skip_modules_pattern": ("conv_in",)},
    {"skip_modules_pattern": ("",)},  # everything
    {"skip_modules_pattern": ("encoder",)},
    {"skip_modules_pattern": (r"layers\.0$",)},
]


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_same_layers_are_left_as_they_are(kind: str) -> None:
    """SD 1.x has 1x1 convolutions around its transformers, which are linear here."""
    seen = []
    for choice in CHOICES:
        ours, theirs = pair(kind, torch.float32)
        ours.enable_layerwise_casting(**choice)
        theirs.enable_layerwise_casting(**choice)
        assert dtypes(ours) == dtypes(theirs), choice
        seen.append(tuple(dtypes(ours).values()))
    assert len(set(seen)) >= 4


def test_the_function_casts_any_module() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 1), nn.Embedding(5, 3))
    expected = {name: p.to(E4M3 if name[0] in "03" else torch.float32) for name, p in layers.named_parameters()}
    x = torch.randn(2, 3)
    apply_layerwise_casting(layers, E4M3, torch.float32, skip_modules_pattern=("2",))
    assert {name: p.dtype for name, p in layers.named_parameters()} == {n: p.dtype for n, p in expected.items()}
    y = layers[0](x)
    assert torch.equal(y, nn.functional.linear(x, expected["0.weight"].float(), expected["0.bias"].float()))
    assert torch.equal(layers[3](torch.tensor([2])), expected["3.weight"].float()[[2]])


def test_the_function_casts_a_network_and_its_parts() -> None:
    whole, by_parts = pair("SD 1.x", torch.float32)[0], pair("SD 1.x", torch.float32)[0]
    apply_layerwise_casting(whole, E4M3, torch.float32)
    for name in ("conv_in", "time_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"):
        apply_layerwise_casting(getattr(by_parts, name), E4M3, torch.float32, skip_modules_pattern=["norm"])
    assert dtypes(whole) == dtypes(by_parts) and whole.dtype == by_parts.dtype == torch.float32
    assert torch.equal(run(whole, "SD 1.x", torch.float32), run(by_parts, "SD 1.x", torch.float32))


class Own(minidiff.ModelMixin, minidiff.ConfigMixin):
    @minidiff.configuration_utils.register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer, self.out_norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_norm(self.layer(x))


def test_a_network_of_ones_own() -> None:
    network = Own()
    network.enable_layerwise_casting()
    assert network.layer.weight.dtype == E4M3 and network.out_norm.weight.dtype == network.dtype == torch.float32
    assert network(torch.ones(1, 4)).dtype == torch.float32


def test_saved_and_loaded(tmp_path: Path) -> None:
    ours, theirs = pair("SD 1.x", torch.float32)
    for network in (ours, theirs):
        network.enable_layerwise_casting()
        network.save_pretrained(tmp_path / type(network).__module__)
    again = minidiff.UNet2DConditionModel.from_pretrained(tmp_path / type(ours).__module__)
    assert again.dtype == torch.float32
    assert states_equal(again, minidiff.UNet2DConditionModel.from_pretrained(tmp_path / type(theirs).__module__))
    again.enable_layerwise_casting()
    assert torch.equal(run(again, "SD 1.x", torch.float32), run(ours, "SD 1.x", torch.float32))


def test_conversions_leave_what_is_cast(pipe: minidiff.StableDiffusionPipeline) -> None:
    """The reference's weights come back to float8 in the next call; here they never leave it."""
    before = dtypes(cast(pipe).unet)
    expected = draw(pipe)
    pipe.to("cpu", torch.float32)
    assert dtypes(pipe.unet.float()) == before and np.array_equal(draw(pipe), expected)
    pipe.unet.to(torch.float64)
    assert {kind for name, kind in dtypes(pipe.unet).items() if before[name] != E4M3} == {torch.float64}
    assert pipe.unet.conv_in.weight.dtype == E4M3


@pytest.fixture
def pipe(folder: Path) -> minidiff.StableDiffusionPipeline:
    return quiet(minidiff.StableDiffusionPipeline.from_pretrained(folder))


def lora(scale: float = 0.3) -> dict[str, Tensor]:
    start = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {"lora_A": torch.randn(2, 32, generator=seeded(3)), "lora_B": torch.randn(32, 2, generator=seeded(4))}
    return {f"{start}.{name}.weight": tensor * scale for name, tensor in tensors.items()}


def cast(pipe: Any, **options: Any) -> Any:
    pipe.unet.enable_layerwise_casting(**options)
    pipe.vae.enable_layerwise_casting(**options)
    return pipe


def test_pictures_with_lora_before_and_after(pipe: minidiff.StableDiffusionPipeline) -> None:
    """The matrices of an adapter are not rounded, whenever it is loaded."""
    after = copy.deepcopy(pipe)
    pipe.load_lora_weights(lora())
    cast(pipe)
    plain = draw(cast(after))
    after.load_lora_weights(lora())
    layer = after.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert {t.dtype for t in layer._buffers.values()} == {torch.float32} and layer.weight.dtype == E4M3
    assert np.array_equal(draw(pipe), draw(after)) and not np.array_equal(draw(pipe), plain)
    with pytest.raises(ValueError, match=r"attn1\.to_q is stored in .*float8_e4m3fn: fuse before enable_layerwise_c"):
        after.fuse_lora()
    assert np.array_equal(draw(pipe), draw(after))
    after.unload_lora_weights()
    assert np.array_equal(draw(after), plain)


def test_fused_before(pipe: minidiff.StableDiffusionPipeline) -> None:
    weight = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.detach().clone()
    update = list(lora().values())
    pipe.load_lora_weights(lora())
    pipe.fuse_lora()
    cast(pipe)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
    assert torch.equal(layer.weight.float(), (weight + update[1] @ update[0]).to(E4M3).float())
    pipe.unfuse_lora()
    assert torch.equal(layer.weight.float(), weight.to(E4M3).float())


def test_optimized_is_the_same(pipe: minidiff.StableDiffusionPipeline) -> None:
    expected = draw(cast(pipe))
    pipe.optimize()
    assert np.abs(draw(pipe) - expected).max() <= 1  # measured: 0
    assert pipe.unet.conv_in.weight.dtype == E4M3
    other = copy.deepcopy(pipe).unoptimize()
    assert np.array_equal(draw(other), expected)


def test_optimized_before_is_refused(pipe: minidiff.StableDiffusionPipeline) -> None:
    pipe.optimize()
    expected = dtypes(pipe.unet)
    with pytest.raises(ValueError, match=r"call unoptimize\(\) before enable_layerwise_casting\(\)"):
        pipe.unet.enable_layerwise_casting()
    assert dtypes(pipe.unet) == expected
    cast(pipe.unoptimize()).optimize()


@pytest.mark.parametrize("method", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
@pytest.mark.parametrize("first", [True, False])
def test_offloaded(pipe: minidiff.StableDiffusionPipeline, method: str, first: bool) -> None:
    """The device gets the small weights."""
    expected = draw(cast(copy.deepcopy(pipe)))
    if first:
        cast(pipe)
    getattr(pipe, method)(device="cpu")
    if not first:
        cast(pipe)
    assert np.array_equal(draw(pipe), expected)
    assert pipe.unet.conv_in.weight.dtype == E4M3


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "storage": ({"storage_dtype": torch.int8}, TypeError, "storage_dtype should be a floating torch.dtype.*int8"),
    "no sign": (
        {"storage_dtype": torch.float8_e8m0fnu},
        TypeError,
        "storage_dtype should be .*found torch.float8_e8m0",
    ),
    "compute": ({"compute_dtype": E4M3}, TypeError, "compute_dtype=torch.float8_e4m3fn is not one of torch.float64"),
    "one pattern": ({"skip_modules_pattern": "norm"}, TypeError, "should be a sequence of patterns, found the string"),
    "too large": (
        {"storage_dtype": E4M3},
        ValueError,
        r"conv_in has values up to 500 and torch.float8_e4m3fn ends at 448",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    options, error, message = WRONG[name]
    unet, _ = pair("SD 1.x", torch.float32)
    unet.conv_in.weight.data[0, 0, 0, 0] = 500
    with pytest.raises(error, match=message):
        unet.enable_layerwise_casting(**options)
    assert set(dtypes(unet).values()) == {torch.float32} and "forward" not in vars(unet.conv_out)
    unet.enable_layerwise_casting(storage_dtype=E5M2)
    with pytest.raises(ValueError, match="conv_in is cast already: load the network again"):
        unet.enable_layerwise_casting(storage_dtype=E5M2)


def test_layers_that_compute_otherwise_are_refused() -> None:
    unet, _ = pair("SD 1.x", torch.float32)
    unet.conv_out.forward = lambda x: x
    with pytest.raises(ValueError, match=r"conv_out has another forward \(function\): take it out"):
        unet.enable_layerwise_casting()
    with pytest.raises(ValueError, match="0 is a NonDynamicallyQuantizableLinear: name it in skip_modules_pattern"):
        apply_layerwise_casting(
            nn.Sequential(nn.modules.linear.NonDynamicallyQuantizableLinear(2, 2)), E4M3, torch.float32
        )
