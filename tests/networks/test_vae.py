"""``AutoencoderKL`` and its Gaussian against the reference's, in float64, for every branch of the configuration."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minidiff.networks.vae import AutoencoderKL, DiagonalGaussian
from tests.theirs import assert_same_order, assert_same_start, carry_over, diffusers, randomize, relative_error

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
PUBLISHED = [
    "CompVis--stable-diffusion-v1-4/vae",
    "runwayml--stable-diffusion-v1-5/vae",
    "runwayml--stable-diffusion-inpainting/vae",
    "stabilityai--stable-diffusion-2/vae",
    "stabilityai--stable-diffusion-2-1/vae",
    "stabilityai--stable-diffusion-2-1-base/vae",
    "stabilityai--stable-diffusion-2-inpainting/vae",
    "stabilityai--stable-diffusion-xl-base-1.0/vae",
    "stabilityai--sd-vae-ft-mse",
]
BOUND = 1e-10  # measured: at most 4e-15 over all cases of this file


def levels(*channels: int, **fields: Any) -> dict[str, Any]:
    """Return the fields of a small autoencoder with these channels per level, finest first."""
    return {
        "block_out_channels": list(channels),
        "down_block_types": ["DownEncoderBlock2D"] * len(channels),
        "up_block_types": ["UpDecoderBlock2D"] * len(channels),
        "norm_num_groups": 4,
        **fields,
    }


def make_pair(fields: dict[str, Any], seed: int = 0) -> tuple[AutoencoderKL, nn.Module]:
    """Build ours and theirs with the same large random float64 weights."""
    theirs = randomize(diffusers.AutoencoderKL.from_config(fields).double(), seed)
    with torch.device("meta"):
        ours = AutoencoderKL.from_config(fields)
    return carry_over(theirs, ours), theirs


def picture(B: int = 2, H: int = 16, W: int = 16, C: int = 3) -> Tensor:
    return torch.rand(B, C, H, W, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def latent(model: AutoencoderKL, B: int = 2, H: int = 4, W: int = 4) -> Tensor:
    rng = torch.Generator().manual_seed(2)
    return torch.randn(B, model.config.latent_channels, H, W, generator=rng, dtype=torch.float64)


@torch.no_grad()
def errors(ours: AutoencoderKL, theirs: nn.Module, x: Tensor, z: Tensor) -> tuple[float, float]:
    """Return the relative errors of the encoder's moments and of the decoder's pictures."""
    encoded = relative_error(ours.encode(x).latent_dist.parameters, theirs.encode(x).latent_dist.parameters)
    return encoded, relative_error(ours.decode(z).sample, theirs.decode(z).sample)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_topology_at_an_eighth_of_the_width(name: str) -> None:
    fields = json.loads((CONFIGS / name / "config.json").read_text())
    fields |= {"block_out_channels": [16, 32, 64, 64], "norm_num_groups": 8}
    ours, theirs = make_pair(fields)
    assert max(errors(ours, theirs, picture(B=1, H=24, W=16), latent(ours, B=1, H=3, W=2))) <= BOUND


BRANCHES = {
    "one level": levels(8),
    "two levels": levels(8, 16),
    "three levels": levels(8, 8, 16),
    "four levels": levels(4, 8, 8, 16),
    "widths that fall": levels(16, 8),
    "two residual blocks": levels(8, 16, layers_per_block=2),
    "three residual blocks": levels(8, 16, layers_per_block=3),
    "one group": levels(8, 16, norm_num_groups=1),
    "eight groups": levels(8, 16, norm_num_groups=8),
    "three latent channels": levels(8, 16, latent_channels=3),
    "sixteen latent channels": levels(8, 16, latent_channels=16),
    "no quant_conv": levels(8, 16, use_quant_conv=False),
    "no post_quant_conv": levels(8, 16, use_post_quant_conv=False),
    "neither": levels(8, 16, use_quant_conv=False, use_post_quant_conv=False),
    "no attention": levels(8, 16, mid_block_add_attention=False),
    "other channels in and out": levels(8, 16, in_channels=4, out_channels=5),
    "fields of the pipeline": levels(8, 16, scaling_factor=0.13025, force_upcast=False, sample_size=[24, 16]),
}


@pytest.mark.parametrize("branch", BRANCHES)
def test_branch_of_the_configuration(branch: str) -> None:
    ours, theirs = make_pair(BRANCHES[branch])
    assert max(errors(ours, theirs, picture(C=ours.config.in_channels), latent(ours))) <= BOUND


@pytest.mark.parametrize("branch", BRANCHES)
def test_new_weights(branch: str) -> None:
    """Initial weights are drawn as the reference draws them, and stand in its order."""
    fields = BRANCHES[branch]
    assert_same_start(lambda: AutoencoderKL.from_config(fields), lambda: diffusers.AutoencoderKL.from_config(fields))
    with torch.device("meta"):
        assert_same_order(AutoencoderKL.from_config(fields), diffusers.AutoencoderKL.from_config(fields))


@pytest.fixture(scope="module")
def three_levels() -> tuple[AutoencoderKL, nn.Module]:
    return make_pair(levels(8, 8, 16))


@pytest.mark.parametrize(
    ("B", "H", "W", "h", "w"), [(1, 9, 13, 3, 5), (3, 5, 7, 1, 1), (1, 4, 4, 1, 4), (2, 31, 6, 7, 2)]
)
def test_size(B: int, H: int, W: int, h: int, w: int, three_levels: tuple[AutoencoderKL, nn.Module]) -> None:
    ours, theirs = three_levels
    assert max(errors(ours, theirs, picture(B, H, W), latent(ours, B, h, w))) <= BOUND


@pytest.mark.parametrize("posterior", [False, True], ids=["mode", "sample"])
@torch.no_grad()
def test_forward(posterior: bool, three_levels: tuple[AutoencoderKL, nn.Module]) -> None:
    ours = three_levels[0]
    x = picture(H=12, W=8)
    a, b = (model(x, sample_posterior=posterior, generator=torch.Generator().manual_seed(3)) for model in three_levels)
    assert relative_error(a.sample, b.sample) <= BOUND
    (plain,) = ours(x, sample_posterior=posterior, return_dict=False, generator=torch.Generator().manual_seed(3))
    assert torch.equal(plain, a.sample)
    if posterior:
        assert relative_error(a.sample, ours(x).sample) > 0.1  # a sample is not the mode


@torch.no_grad()
def test_output_records(three_levels: tuple[AutoencoderKL, nn.Module]) -> None:
    for model in three_levels:  # the forms that code written for the reference uses
        encoded, (posterior,) = model.encode(picture()), model.encode(picture(), return_dict=False)
        assert type(encoded).__name__ == "AutoencoderKLOutput"
        assert encoded[0] is encoded.latent_dist and encoded["latent_dist"] is encoded.latent_dist
        assert torch.equal(encoded.latent_dist.mean, posterior.mean)
        decoded, (pixels,) = model.decode(posterior.mean), model.decode(posterior.mean, return_dict=False)
        assert type(decoded).__name__ == "DecoderOutput"
        assert torch.equal(decoded.sample, pixels)
        assert torch.equal(decoded[0], pixels) and torch.equal(decoded["sample"], pixels)


def gaussians(seed: int, dtype: torch.dtype = torch.float64) -> tuple[DiagonalGaussian, Any]:
    """Return our Gaussian and theirs with the same moments; some log-variances lie beyond the clamp at both ends."""
    moments = torch.randn(3, 8, 4, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    moments[:, 4:] *= 3
    moments[0, 4, 0, :2] = torch.tensor([50.0, -80.0])
    theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(moments.to(dtype))
    return DiagonalGaussian(moments.to(dtype)), theirs


def test_gaussian_moments() -> None:
    ours, theirs = gaussians(0)
    assert ours.logvar.max() == 20 and ours.logvar.min() == -30
    for name in ("parameters", "mean", "logvar", "std", "var"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.mode(), theirs.mode()) and torch.equal(ours.mode(), ours.mean)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gaussian_draws_are_bit_equal(dtype: torch.dtype) -> None:
    ours, theirs = gaussians(0, dtype)
    for make in (
        lambda: torch.Generator().manual_seed(5),
        lambda: [torch.Generator().manual_seed(k) for k in range(3)],  # one per picture
        lambda: torch.manual_seed(5) and None,  # the global generator
    ):
        draw = ours.sample(make())
        assert draw.dtype == dtype and torch.equal(draw, theirs.sample(make()))


def test_gaussian_divergence_and_likelihood() -> None:
    (ours, theirs), (our_other, their_other) = gaussians(0), gaussians(7)
    z = torch.randn(3, 4, 4, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert ours.kl().shape == (3,)
    assert relative_error(ours.kl(), theirs.kl()) <= 1e-14  # measured: 0
    assert relative_error(ours.kl(our_other), theirs.kl(their_other)) <= 1e-14  # measured: 2e-16
    assert relative_error(ours.nll(z), theirs.nll(z)) <= 1e-14  # measured: 0
    assert relative_error(ours.nll(z, dims=(1, 2)), theirs.nll(z, dims=(1, 2))) <= 1e-14  # measured: 0


SHIFTS_ALL_SCORES = ".self_attn.k.bias"  # q·(k + b) = q·k + q·b: softmax takes no notice of the same number everywhere


@torch.no_grad()
def test_no_tensor_is_ignored_or_swapped() -> None:
    """Disturb each tensor of the reference, and its counterpart here: both outputs move, and by the same amount."""
    ours, theirs = make_pair(levels(8, 16))
    ours = copy.deepcopy(ours)  # weights of its own
    x, z = picture(B=1, H=6, W=8), latent(ours, B=1, H=3, W=2)

    def both(model: nn.Module) -> Tensor:
        return torch.cat([model.encode(x).latent_dist.parameters.flatten(), model.decode(z).sample.flatten()])

    still = both(ours)
    rng = torch.Generator().manual_seed(2)
    mine, reference = torch.nn.Module.state_dict(ours), theirs.state_dict()
    for row in ours.rows():
        (our_name,), (hub_name,) = row.ours, row.hub
        delta = 0.1 * torch.randn(reference[hub_name].shape, generator=rng, dtype=torch.float64)
        (our_delta,) = row.hub_op.to_ours((delta,))
        mine[our_name] += our_delta
        reference[hub_name] += delta
        moved = both(ours)
        if our_name.endswith(SHIFTS_ALL_SCORES):
            assert relative_error(moved, still) < 1e-13, our_name
        else:
            assert relative_error(moved, still) > 1e-4, our_name  # the smallest: 1.2e-2
        assert relative_error(moved, both(theirs)) <= BOUND, (our_name, hub_name)
        mine[our_name] -= our_delta
        reference[hub_name] -= delta


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)],  # measured: 2e-3 to the reference, 2.3e-3 and 1.9e-2 to float64
    ids=str,
)
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, bound: float, three_levels: tuple[AutoencoderKL, nn.Module]) -> None:
    ours, theirs = copy.deepcopy(three_levels)
    x, z = picture(), latent(ours)
    exact = ours.encode(x).latent_dist.parameters, ours.decode(z).sample
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x, z = x.to(dtype), z.to(dtype)
    for out, other, truth in zip(
        (ours.encode(x).latent_dist.parameters, ours.decode(z).sample),
        (theirs.encode(x).latent_dist.parameters, theirs.decode(z).sample),
        exact,
        strict=True,
    ):
        assert out.dtype == dtype
        assert relative_error(out, other) <= bound
        assert relative_error(out, truth) <= bound
