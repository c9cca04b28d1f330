"""``AutoencoderTiny`` against the reference's, in float64, for every branch of the configuration."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import AutoencoderTiny
from minidiff.errors import ConfigError
from minidiff.networks.specs.vae_tiny import ACTIVATIONS, UPSAMPLING, tiny_vae_config
from tests.theirs import assert_same_order, assert_same_start, carry_over, diffusers, randomize, relative_error

BOUND = 1e-10  # measured: 0 in all cases of this file but gradients, there 4e-16

# madebyollin/taesd and madebyollin/taesdxl on the Hub. What diffusers 0.30 prints as the configuration of the first is
# stored in the config.py of a program of Ahmed et al. 2025 (SDSeg on Kvasir-SEG); the second has the same layers
# (GitHub's madebyollin/taesd, taesd.py: one class for both), its config.json itself was found nowhere.
PUBLISHED = {
    "_class_name": "AutoencoderTiny",
    "_diffusers_version": "0.30.0",
    "act_fn": "relu",
    "decoder_block_out_channels": [64, 64, 64, 64],
    "encoder_block_out_channels": [64, 64, 64, 64],
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "num_decoder_blocks": [3, 3, 3, 1],
    "num_encoder_blocks": [1, 3, 3, 3],
    "out_channels": 3,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}


def small(*, encoder: int = 8, decoder: int = 8, levels: int = 4, **fields: Any) -> dict[str, Any]:
    """Return the fields of a narrow network with one block per level."""
    return {
        "encoder_block_out_channels": [encoder] * levels,
        "decoder_block_out_channels": [decoder] * levels,
        "num_encoder_blocks": [1] * levels,
        "num_decoder_blocks": [1] * levels,
        **fields,
    }


@contextmanager
def float64_by_default() -> Iterator[None]:
    """The reference makes what it tiles into, and what it has rounded to bytes, in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def make_pair(fields: dict[str, Any], seed: int = 0) -> tuple[AutoencoderTiny, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(diffusers.AutoencoderTiny.from_config(fields).double(), seed, scale=1.4)
    with torch.device("meta"):
        ours = AutoencoderTiny.from_config(fields)
    return carry_over(theirs, ours), theirs


def picture(B: int = 2, H: int = 24, W: int = 16, C: int = 3) -> Tensor:
    return torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def latent(Z: int = 4, B: int = 2, H: int = 3, W: int = 4) -> Tensor:
    return 3 * torch.randn(B, Z, H, W, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@torch.no_grad()
def errors(ours: AutoencoderTiny, theirs: nn.Module, x: Tensor, z: Tensor) -> tuple[float, ...]:
    with float64_by_default():
        return (
            relative_error(ours.encode(x).latents, theirs.encode(x).latents),
            relative_error(ours.decode(z).sample, theirs.decode(z).sample),
            relative_error(ours(x).sample, theirs(x).sample),
        )


BRANCHES = {
    "published, narrow": {**PUBLISHED, "encoder_block_out_channels": [8] * 4, "decoder_block_out_channels": [8] * 4},
    "other widths of the halves": small(encoder=8, decoder=12),
    "one level": small(levels=1),
    "two levels": small(levels=2),
    "other numbers of blocks": small(num_encoder_blocks=[2, 0, 1, 3], num_decoder_blocks=[0, 2, 1, 2]),
    "sixteen latent channels": small(latent_channels=16),
    "channels in and out": small(levels=2, in_channels=4, out_channels=5),
    "times three": small(levels=2, upsampling_scaling_factor=3),
    "latents in another range": small(levels=2, latent_magnitude=2.5, latent_shift=0.4),
    "capitals": small(levels=2, act_fn="SiLU"),
    "another scale": small(levels=2, scaling_factor=0.13025),
    **{f"act_fn {name}": small(levels=2, act_fn=name) for name in ACTIVATIONS},
    **{f"upsample_fn {name}": small(levels=3, upsample_fn=name) for name in UPSAMPLING},
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str) -> None:
    ours, theirs = make_pair(BRANCHES[branch])
    x, z = picture(C=ours.config.in_channels), latent(ours.config.latent_channels)
    assert max(errors(ours, theirs, x, z)) <= BOUND
    assert ours.config.to_dict().items() >= {k: v for k, v in theirs.config.items() if k[0] != "_"}.items()


@pytest.mark.parametrize("branch", ["published, narrow", "other widths of the halves", "other numbers of blocks"])
def test_new_weights(branch: str) -> None:
    """Initial weights are drawn as the reference draws them, and stand in its order."""
    fields, theirs = BRANCHES[branch], diffusers.AutoencoderTiny
    assert_same_start(lambda: AutoencoderTiny.from_config(fields), lambda: theirs.from_config(fields))
    with torch.device("meta"):
        assert_same_order(AutoencoderTiny.from_config(fields), theirs.from_config(fields))


def test_published_size() -> None:
    """Every tensor of the published network, by name and shape."""
    with torch.device("meta"):
        ours, theirs = AutoencoderTiny.from_config(PUBLISHED), diffusers.AutoencoderTiny.from_config(PUBLISHED)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert ours.num_parameters() == 2_445_063
    filled, theirs = make_pair(PUBLISHED)
    assert max(errors(filled, theirs, picture(B=1, H=32, W=40), latent(B=1, H=4, W=5))) <= BOUND
    assert AutoencoderTiny(**{}).config == ours.config.__class__({k: v for k, v in ours.config.items() if k[0] != "_"})


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderTiny, nn.Module]:
    return make_pair(small(encoder=4, decoder=4))


def test_slicing_changes_nothing(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    ours, theirs = pair
    whole = ours.encode(picture(B=3)).latents, ours.decode(latent(B=3)).sample
    seen: list[int] = []
    hooks = [half.register_forward_hook(lambda m, args, out: seen.append(len(args[0]))) for half in ours.children()]
    ours.enable_slicing(), theirs.enable_slicing()
    try:
        assert max(errors(ours, theirs, picture(B=3), latent(B=3))) <= BOUND
        sliced = ours.encode(picture(B=3)).latents, ours.decode(latent(B=3)).sample
    finally:
        ours.disable_slicing(), theirs.disable_slicing()
        [hook.remove() for hook in hooks]
    assert set(seen) == {1}
    assert max(relative_error(a, b) for a, b in zip(sliced, whole, strict=True)) <= 1e-14  # measured: 2e-16


SIZES = [(64, 64), (56, 56), (57 * 8, 16), (24, 136), (200, 8), (120, 112)]


@pytest.mark.parametrize(("H", "W"), SIZES)
@pytest.mark.parametrize("overlap", [0.125, 0.25, 0.5])
def test_tiling(pair: tuple[AutoencoderTiny, nn.Module], H: int, W: int, overlap: float) -> None:
    """Tiles of 128 pixels, 16 latents; also where a single position lies in the last tile."""
    ours, theirs = pair
    before = ours.decode(latent(H=H // 8, W=W // 8)).sample
    for model in pair:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size, model.tile_overlap_factor = 128, 16, overlap
    try:
        assert max(errors(ours, theirs, picture(B=1, H=H, W=W), latent(H=H // 8, W=W // 8))) <= BOUND
        tiled = ours.decode(latent(H=H // 8, W=W // 8)).sample
    finally:
        [model.disable_tiling() for model in pair]
    assert tiled.dtype == torch.float64
    if max(H, W) > 128:
        assert relative_error(tiled, before) > 1e-3  # it did something: measured 0.02 and more


def test_tiles_by_default_are_the_reference_s() -> None:
    ours, theirs = AutoencoderTiny(**small()), diffusers.AutoencoderTiny(**small())
    for name in ("tile_sample_min_size", "tile_latent_min_size", "tile_overlap_factor", "use_tiling", "use_slicing"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_tiling_of_sizes_that_the_reference_cannot_tile(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    """A picture that f does not divide has as many latents as without tiles; a bfloat16 one has bfloat16 latents."""
    ours, _ = pair
    ours.enable_tiling()
    ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor = 128, 16, 0.25
    try:
        assert ours.encode(picture(H=205, W=33)).latents.shape[2:] == (26, 5)
        half = AutoencoderTiny(**small(encoder=4, decoder=4)).bfloat16()
        half.enable_tiling()
        assert half.decode(latent(H=70, W=9).bfloat16()).sample.dtype == torch.bfloat16
        assert ours.encode(picture(H=7, W=2)).latents.shape[2:] == (1, 1)
        ours.tile_latent_min_size = 15
        with pytest.raises(ValueError, match="should be 8 times tile_latent_min_size.*128 and 15"):
            ours.decode(latent())
        ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor = 128, 16, 0.2
        with pytest.raises(ValueError, match="tile_overlap_factor=0.2 cuts"):
            ours.decode(latent())
    finally:
        ours.disable_tiling()


@pytest.mark.parametrize("overlap", [0.0, 1 / 16])
def test_tiles_with_little_overlap(pair: tuple[AutoencoderTiny, nn.Module], overlap: float) -> None:
    """With none they stand side by side, with one latent the first one counts; the reference divides by zero there."""
    ours, _ = pair
    ours.enable_tiling()
    ours.tile_sample_min_size, ours.tile_latent_min_size, ours.tile_overlap_factor = 128, 16, overlap
    try:
        x = picture(H=256, W=16)
        tiled = ours.encode(x).latents
    finally:
        ours.disable_tiling()
    step = 128 - int(128 * overlap)
    second = ours.encode(x[:, :, step : step + 128]).latents
    assert torch.equal(tiled[:, :, :16], ours.encode(x[:, :, :128]).latents)
    assert torch.equal(tiled[:, :, 16:30], second[:, :, 16 - step // 8 : 30 - step // 8])


@torch.no_grad()
def test_halves_called_by_hand(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    """They take and return what ``encode`` and ``decode`` do, as the reference's: previewers call ``vae.decoder``."""
    ours, theirs = pair
    assert relative_error(ours.encoder(picture()), theirs.encoder(picture())) <= BOUND
    assert relative_error(ours.decoder(latent()), theirs.decoder(latent())) <= BOUND
    assert torch.equal(ours.decoder(latent()), ours.decode(latent()).sample)


def test_scaled_latents(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    ours, theirs = pair
    z = latent()
    assert torch.equal(ours.scale_latents(z), theirs.scale_latents(z))
    assert torch.equal(ours.unscale_latents(z), theirs.unscale_latents(z))


def test_gradients_with_recomputed_blocks_are_those_without(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    """The reference leaves out the change of range then, and learns something else."""
    ours, theirs = pair
    gradients = []
    for on in (False, True):
        ours.enable_gradient_checkpointing() if on else ours.disable_gradient_checkpointing()
        assert ours.is_gradient_checkpointing is on
        ours.zero_grad()
        ours.decode(ours.encode(picture()).latents).sample.square().mean().backward()
        gradients.append([parameter.grad for parameter in ours.parameters()])
    ours.disable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    theirs.decode(theirs.encode(picture()).latents).sample.square().mean().backward()
    found = dict(ours.named_parameters())
    assert max(relative_error(found[n].grad, p.grad) for n, p in theirs.named_parameters()) <= BOUND


def test_records_and_tuples(pair: tuple[AutoencoderTiny, nn.Module]) -> None:
    ours, _ = pair
    (z,) = ours.encode(picture(), return_dict=False)
    assert torch.equal(z, ours.encode(picture())[0])
    assert torch.equal(ours.decode(z, None, False)[0], ours.decode(z).sample)
    assert torch.equal(ours(picture(), return_dict=False)[0], ours(picture())["sample"])


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "force_upcast": ({"force_upcast": True}, r"force_upcast = true \(implemented: false\)"),
    "shift_factor": ({"shift_factor": 0.1}, r"shift_factor = 0.1 \(implemented: 0.0\)"),
    "unknown": ({"patch_size": 2}, r"patch_size = 2 \(unknown field\)"),
    "act_fn": ({"act_fn": "tanh"}, "act_fn should be one of relu, silu, swish, mish, gelu, found 'tanh'"),
    "upsample_fn": ({"upsample_fn": "linear"}, "upsample_fn should be one of nearest, .*, found 'linear'"),
    "widths": ({"encoder_block_out_channels": [8, 16, 16, 16]}, "encoder_block_out_channels should be one width"),
    "blocks": ({"num_decoder_blocks": [1, 1]}, "num_decoder_blocks has 2 entries"),
    "no number": ({"num_encoder_blocks": [1, 1, 1, -1]}, "num_encoder_blocks should hold integers of at least 0"),
    "copy": ({"block_out_channels": [1, 2]}, r"block_out_channels is .*\[64, 64, 64, 64\], found \[1, 2\]"),
    "one number as copy": ({"block_out_channels": 3}, "block_out_channels is .* found 3"),
    "no latents": ({"latent_channels": 0}, "latent_channels should be a positive integer or null, found 0"),
    "no pixels": ({"upsampling_scaling_factor": 0}, "upsampling_scaling_factor should be a positive integer"),
    "type": ({"latent_magnitude": "3"}, "latent_magnitude.*expected a number"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refused(case: str) -> None:
    fields, words = WRONG[case]
    with pytest.raises(ConfigError, match=words):
        tiny_vae_config(fields)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda vae: vae.encode(torch.zeros(1, 4, 8, 8)), r"pictures to encode should be \(B, 3, H, W\), found \(1, 4"),
        (lambda vae: vae.decode(torch.zeros(4, 8, 8)), r"latents should be \(B, 4, H, W\), found \(4, 8, 8\)"),
    ],
)
def test_wrong_shapes(
    pair: tuple[AutoencoderTiny, nn.Module], call: Callable[[AutoencoderTiny], None], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        call(pair[0])
