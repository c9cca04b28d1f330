"""Tiling and slicing of ``AutoencoderKL`` against the reference's: sizes that do not divide, overlaps, convolutions."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff import AutoencoderKL
from minidiff.networks.tiles import Tiles
from tests.theirs import carry_over, diffusers, randomize

BOUND = 1e-10  # measured: 0 over all cases of this file; the weights of the blend are rounded as the reference's are
FIELDS = {  # tiles of 16 pixels and 8 latents, of which the next tile shares 4 and 2
    "sample_size": 16,
    "block_out_channels": [4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
}


def make_pair(dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[AutoencoderKL, nn.Module]:
    """Build ours and theirs with the same random weights and tiling on."""
    theirs = randomize(diffusers.AutoencoderKL.from_config({**FIELDS, **fields})).to(dtype)
    with torch.device("meta"):
        ours = AutoencoderKL.from_config({**FIELDS, **fields})
    for model in (carry_over(theirs, ours), theirs):
        model.enable_tiling()
    return ours, theirs


@pytest.fixture(scope="module")
def pair() -> tuple[AutoencoderKL, nn.Module]:
    return make_pair()


def draw(B: int, C: int, H: int, W: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def encode(model: nn.Module, x: Tensor) -> Tensor:
    return model.encode(x).latent_dist.parameters


def decode(model: nn.Module, z: Tensor) -> Tensor:
    return model.decode(z).sample


@torch.no_grad()
def assert_same(ours: AutoencoderKL, theirs: nn.Module, H: int, W: int, B: int = 1, bound: float = BOUND) -> None:
    """Compare moments of a picture of H x W latents, and the picture decoded from as many, with the reference's."""
    dtype = ours.dtype
    f = 2 ** (len(ours.config.block_out_channels) - 1)
    for run, x in ((encode, draw(B, 3, f * H, f * W, dtype)), (decode, draw(B, 4, H, W, dtype))):
        a, b = run(ours, x), run(theirs, x)
        assert a.shape == b.shape
        assert (a.double() - b.double()).abs().max() <= bound


SIZES = [
    (8, 8),
    (9, 8),
    (8, 9),
    (12, 14),
    (14, 12),
    (20, 7),
    (13, 27),
    (7, 40),
]  # in latents; tiles begin at 0, 6, 12...


@pytest.mark.parametrize(("H", "W"), SIZES)
def test_size(H: int, W: int, pair: tuple[AutoencoderKL, nn.Module]) -> None:
    assert_same(*pair, H, W)


@pytest.mark.parametrize("overlap", [0, 0.125, 0.25, 0.5, 0.75])
def test_overlap(overlap: float) -> None:
    ours, theirs = make_pair()
    ours.tile_overlap_factor = theirs.tile_overlap_factor = overlap
    assert_same(ours, theirs, 11, 9)


@pytest.mark.parametrize("quant_conv", [False, True])
@pytest.mark.parametrize("post_quant_conv", [False, True])
def test_convolutions_around_the_latents(quant_conv: bool, post_quant_conv: bool) -> None:
    pair = make_pair(use_quant_conv=quant_conv, use_post_quant_conv=post_quant_conv)
    assert_same(*pair, 10, 15)


def test_published_depth() -> None:
    """Four levels: 8 pixels per latent, as in every published autoencoder."""
    levels = {"block_out_channels": [4] * 4, "sample_size": 32}
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    assert_same(*make_pair(**levels, **kinds), 5, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_blend_rounds_as_the_reference_does(dtype: torch.dtype) -> None:
    """Over 3 latents and 6 pixels, since thirds are rounded. The networks agree to the bit, and so must the blend."""
    ours, theirs = make_pair(dtype, sample_size=24)
    assert_same(ours, theirs, 13, 14, bound=0)


def test_smaller_tiles(pair: tuple[AutoencoderKL, nn.Module]) -> None:
    ours, theirs = make_pair()
    for model in (ours, theirs):
        model.tile_sample_min_size, model.tile_latent_min_size = 8, 4
    assert_same(ours, theirs, 9, 10)


@pytest.mark.parametrize("tiling", [False, True])
def test_slicing(tiling: bool, pair: tuple[AutoencoderKL, nn.Module]) -> None:
    ours, theirs = make_pair()
    ours.use_tiling = theirs.use_tiling = tiling
    ours.enable_slicing()
    theirs.enable_slicing()
    assert_same(ours, theirs, 9, 9, B=3)


@torch.no_grad()
def test_switches_do_what_they_say() -> None:
    ours, _ = make_pair()
    seen: list[tuple[int, ...]] = []
    for part in (ours.encoder, ours.decoder):
        part.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    z, x = draw(2, 4, 6, 14), draw(2, 3, 12, 28)

    def shapes() -> list[tuple[int, ...]]:
        seen.clear()
        encode(ours, x), decode(ours, z)
        return list(seen)

    in_tiles = [(2, 3, 12, w) for w in (16, 16, 4)] + [(2, 4, 6, w) for w in (8, 8, 2)]
    assert shapes() == in_tiles
    ours.enable_slicing()
    assert shapes() == [(1, *shape[1:]) for half in (in_tiles[:3], in_tiles[3:]) for shape in half * 2]
    ours.disable_tiling()
    assert shapes() == [(1, 3, 12, 28)] * 2 + [(1, 4, 6, 14)] * 2
    ours.disable_slicing()
    assert shapes() == [(2, 3, 12, 28), (2, 4, 6, 14)]


@torch.no_grad()
def test_tiled_methods(pair: tuple[AutoencoderKL, nn.Module]) -> None:
    """In tiles even where one would do, as the reference: the second begins at the sixth of 8 latents."""
    ours, theirs = pair
    x, z = draw(1, 3, 16, 16), draw(1, 4, 8, 8)
    a, b = (model.tiled_encode(x).latent_dist.parameters for model in pair)
    assert (a - b).abs().max() <= BOUND and torch.equal(a, ours.tiled_encode(x, return_dict=False)[0].parameters)
    assert not torch.equal(a, encode(ours, x)) and encode(ours, x).equal(encode(theirs, x))
    a, b = (model.tiled_decode(z).sample for model in pair)
    assert (a - b).abs().max() <= BOUND and torch.equal(a, ours.tiled_decode(z, return_dict=False)[0])
    with pytest.raises(ValueError, match="pictures to encode should be"):
        ours.tiled_encode(x[:, :2])
    with pytest.raises(ValueError, match="latents should be"):
        ours.tiled_decode(z[:, :2])


@torch.no_grad()
def test_odd_pixels() -> None:
    """Where the last tile would be a single pixel the reference's encoder fails; here the tile before has it all."""
    ours, theirs = make_pair()
    with pytest.raises(RuntimeError, match="Kernel size"):
        encode(theirs, draw(1, 3, 25, 16))
    assert encode(ours, draw(1, 3, 25, 17)).shape == (1, 8, 12, 8)  # floor(25 / 2), floor(17 / 2)
    x = draw(1, 3, 27, 19)
    assert (encode(ours, x) - encode(theirs, x)).abs().max() <= BOUND


@torch.no_grad()
def test_what_does_not_fit_is_refused() -> None:
    ours, theirs = make_pair()
    z = draw(1, 4, 20, 20)
    ours.tile_overlap_factor = theirs.tile_overlap_factor = 0.3
    assert theirs.decode(z).sample.shape == (1, 3, 46, 46)  # not 40
    with pytest.raises(ValueError, match=r"tile_overlap_factor=0.3 .* 0.25"):
        ours.decode(z)
    ours.tile_overlap_factor = 1.0
    with pytest.raises(ValueError, match="at least 0 and below 1, found 1.0"):
        ours.decode(z)
    ours.tile_latent_min_size = 7
    with pytest.raises(ValueError, match="should be 2 times tile_latent_min_size.*found 16 and 7"):
        ours.encode(draw(1, 3, 40, 40))
    with pytest.raises(ValueError, match="cuts tiles of 0"):
        Tiles.of(0, 0, 0.25)


def test_a_list_of_sizes_counts_by_its_first() -> None:
    ours, _ = make_pair()
    with torch.device("meta"):
        ours = AutoencoderKL(**{**FIELDS, "sample_size": [24, 16]})
    assert (ours.tile_sample_min_size, ours.tile_latent_min_size) == (24, 12)


def test_gradients_flow_through_the_blend() -> None:
    ours, theirs = make_pair()
    z = [draw(1, 4, 12, 12).requires_grad_() for _ in range(2)]
    for model, leaf in zip((ours, theirs), z, strict=True):
        decode(model, leaf).square().mean().backward()
    assert z[0].grad.abs().min() > 0
    assert (z[0].grad - z[1].grad).abs().max() <= BOUND
