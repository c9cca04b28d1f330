"""The training code of the embedded checkpoint: what must hold of its parts, without training anything."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff import AutoencoderKL

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch):
    """Import a module of the training code, which lies beside the checkpoints and not in the package."""
    monkeypatch.syspath_prepend(str(WEIGHTS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if (WEIGHTS / f"{name}.py").exists():
            del sys.modules[name]


def test_orthogonalise_sets_the_singular_values_to_about_1(training):
    matrix = torch.randn(12, 30, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    for x, exact in ((matrix, u @ v), (matrix.T, (u @ v).T)):
        found = training("muon").orthogonalise(x)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.6 and values.max() < 1.3  # measured: 0.68 to 1.20
        cosine = (found * exact).sum() / found.norm() / exact.norm()
        assert cosine > 0.97  # measured: 0.984


def test_muon_trains_inner_matrices_and_adamw_the_rest(training):
    network = nn.ModuleDict(
        {"conv_in": nn.Conv2d(3, 4, 3), "block": nn.Conv2d(4, 4, 3), "token_embed": nn.Embedding(5, 4)}
    )
    optimisers = training("muon").optimisers_for(network, lr=1e-3, muon_lr=1e-2)
    (inner,) = optimisers["muon"].param_groups[0]["params"]
    assert inner is network["block"].weight
    assert len(optimisers["adamw"].param_groups[0]["params"]) == 4


def test_learning_rate_rises_and_falls_to_zero(training):
    rates = [training("run_state").learning_rate(2.0, step, 100, warmup=10) for step in range(101)]
    assert rates[0] == 0.2 and max(rates) == rates[9] == rates[10] == 2.0 and abs(rates[100]) < 1e-12
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_resumed_run_equals_an_uninterrupted_one(training, tmp_path):
    state, muon = training("run_state"), training("muon")

    def start(folder: Path):
        torch.manual_seed(0)
        network = nn.ModuleDict({"first": nn.Linear(6, 8), "second": nn.Linear(8, 2)})
        optimisers = muon.optimisers_for(network, lr=1e-2, muon_lr=1e-2)
        return network, optimisers, state.Run(folder, {"network": network}, optimisers)

    def train(network, optimisers, first: int, last: int):
        for step in range(first, last):
            x = torch.randn(4, 6, generator=state.step_generator(0, step))
            network.zero_grad()
            network["second"](network["first"](x).tanh()).square().mean().backward()
            for optimiser in optimisers.values():
                optimiser.step()

    whole, optimisers, run = start(tmp_path / "whole")
    assert run.resume() == 0
    train(whole, optimisers, 0, 6)
    halves, optimisers, run = start(tmp_path / "halves")
    train(halves, optimisers, 0, 3)
    run.save(3)
    halves, optimisers, run = start(tmp_path / "halves")
    assert run.resume() == 3
    train(halves, optimisers, 3, 6)
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        assert torch.equal(a, b)


def test_whitening_changes_the_latents_and_not_the_pictures(training):
    vae_code = training("emoji_vae")
    torch.manual_seed(0)
    fields = {**vae_code.CONFIG, "block_out_channels": [8, 8, 8], "norm_num_groups": 4}
    vae = AutoencoderKL(**fields).double()
    pictures = torch.randint(256, (6, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    vae_code.to_float = lambda x: x.double() / 127.5 - 1
    before, spread = vae_code.reconstruct(vae, pictures), vae.encode(vae_code.to_float(pictures)).latent_dist.std
    scale = vae_code.encode(vae, pictures).std(dim=(0, 2, 3), keepdim=True)
    vae_code.whiten(vae, pictures)
    latents = vae_code.encode(vae, pictures)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(vae_code.reconstruct(vae, pictures), before, atol=1e-9, rtol=0)
    after = vae.encode(vae_code.to_float(pictures)).latent_dist.std
    torch.testing.assert_close(after, spread / scale, atol=1e-9, rtol=1e-9)


def test_every_epoch_shows_every_picture_once(training):
    batch_of = training("run_state").batch_of
    shown = [i for step in range(10) for i in batch_of(step, 7, count=35, seed=0)]
    assert sorted(shown[:35]) == sorted(shown[35:]) == list(range(35))
    assert shown[:35] != shown[35:]
    assert batch_of(3, 7, 35, seed=0) == shown[21:28]


def test_late_timesteps_come_more_often(training):
    draw = training("emoji_denoiser").draw_timesteps
    for late, mean in ((False, 1 / 2), (True, 2 / 3)):
        t = draw(100_000, 1000, late, torch.Generator().manual_seed(0))
        assert t.min() >= 0 and t.max() == 999
        assert abs(t.float().mean() / 1000 - mean) < 0.005  # 5 standard deviations


def test_captions_are_drawn_in_the_stated_shares(training):
    import random

    code, data = training("emoji_denoiser"), training("emoji_data")
    emoji = [data.Emoji("a.png", "red apple", ("apple", "red apple, fruit"))]
    tokenizer = code.CLIPTokenizer(*training("bpe").train_clip_bpe(["red apple"], 518), model_max_length=code.LENGTH)
    captions = code.Captions(emoji, tokenizer)
    drawn = captions.draw([0] * 4000, random.Random(0))
    assert drawn.shape == (4000, code.LENGTH)
    empty = (drawn == captions.empty).all(dim=1).float().mean().item()
    name = (drawn == captions.ids[0][0]).all(dim=1).float().mean().item()
    assert abs(empty - code.EMPTY_TEXT) < 0.02 and abs(name - code.NAME) < 0.02  # 4 standard deviations: 0.02, 0.03


def test_missing_data_says_where_to_get_it(training, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm pack emoji-datasource-google@16\.0\.0"):
        training("emoji_data").read_emoji(tmp_path)


def test_pictures_are_put_on_white(training, tmp_path):
    from PIL import Image

    data = training("emoji_data")
    folder = tmp_path / "img" / "google" / "64"
    folder.mkdir(parents=True)
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    picture.putpixel((3, 5), (10, 20, 30, 255))
    picture.save(folder / "x.png")
    (pixels,) = data.read_pictures(tmp_path, [data.Emoji("x.png", "x", ())])
    assert pixels[:, 5, 3].tolist() == [10, 20, 30]
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
