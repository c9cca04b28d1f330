"""The training code of the embedded checkpoints: what must hold of its parts, without training anything."""

import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minidiff import AutoencoderKL, DDPMPipeline

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


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


def test_spread_timesteps_are_one_from_each_part_and_denser_late(training):
    spread, rng = training("train_emoji32").spread_timesteps, torch.Generator().manual_seed(0)
    draws = torch.stack([spread(8, 1000, rng) for _ in range(4000)])
    ends = 1000 * (torch.arange(9) / 8).sqrt()
    assert (draws >= ends[:8].floor()).all() and (draws < ends[1:].ceil()).all()
    assert abs(draws.float().mean() / 1000 - 2 / 3) < 0.002  # the mean of the density 2 t on [0, 1]
    for part, low, high in zip(draws.T, ends, ends[1:], strict=False):  # the same within each part
        u = (part.square() - low**2) / (high**2 - low**2)
        assert abs(u.mean() - 0.5) < 0.03  # 6 standard deviations


def test_shrink_averages_squares_of_four_pixels(training):
    pictures = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pictures[:, :, 2, 4:6] = 255
    x = training("train_emoji32").shrink(pictures)
    assert x.shape == (1, 3, 32, 32)
    assert (x[:, :, 1, 2] == 0).all() and (x == -1).sum() == 3 * (32 * 32 - 1)


def test_the_loss_is_the_squared_error_of_v(training, rng):
    code = training("train_emoji32")
    scheduler = code.DDPMScheduler(**code.SCHEDULE)
    x0, noise = torch.randn(2, 4, 3, 8, 8, generator=rng)
    t, shown = torch.tensor([0, 400, 700, 999]), {}

    def unet(x: torch.Tensor, t: torch.Tensor):
        shown.update(x=x, t=t)
        return SimpleNamespace(sample=torch.full_like(x, 0.5))

    losses = code.prediction_loss(unet, scheduler, x0, noise, t)
    alpha_bar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    torch.testing.assert_close(shown["x"], alpha * x0 + sigma * noise)
    torch.testing.assert_close(losses, (0.5 - (alpha * noise - sigma * x0)).square().mean(dim=(1, 2, 3)))
    assert shown["t"] is t and losses.shape == (4,)


def test_export_writes_the_average_and_a_card_of_what_was_done(training, tmp_path, monkeypatch):
    code, state = training("train_emoji32"), training("run_state")
    small = {"block_out_channels": [8, 8, 8, 8], "norm_num_groups": 4, "attention_head_dim": 4}
    monkeypatch.setattr(code, "UNET", code.UNET | small)
    live, average = code.UNet2DModel(**code.UNET), code.UNet2DModel(**code.UNET)
    state.Run(tmp_path / "run", {"live": live, "average": average}, {}).save(2650)
    log = state.Log(tmp_path / "run", every=1)
    settings = {"seed": 0, "steps": 2650, "batch": 50, "lr": 1.0, "muon_lr": 2.0, "workers": 3}
    log.write({"settings": settings, "pictures": 2000})
    log.add(0, loss=[0.25, 0.75])

    code.export(SimpleNamespace(run=tmp_path / "run", to=tmp_path / "to"))
    ours = DDPMPipeline.from_pretrained(tmp_path / "to")
    assert ours.scheduler.config.prediction_type == "v_prediction"
    for a, b in zip(ours.unet.parameters(), average.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    card = (tmp_path / "to" / "README.md").read_text(encoding="utf-8")
    assert "2,650 steps of 50 pictures. Settings: seed 0, steps 2650, batch 50" in card
    assert "the rest (5 epochs)" in card  # 200 steps after the earlier ones
    assert "| 1 | 0.5000 |" in card and "not measured yet" in card


def test_the_quality_in_the_card_is_a_table(training, tmp_path):
    file = tmp_path / "quality.json"
    runs = [{"pipeline": "DDIMPipeline", "steps": 50, "copies": 0.25, "distance": 0.1234, "met": 7}]
    file.write_text(json.dumps({"pictures": 8, "distance_in_data": 0.2, "runs": runs}))
    assert training("train_emoji32")._quality(file).splitlines() == [
        "| sampler | copies | median distance | pictures of the data met by 8 |",
        "| --- | ---: | ---: | ---: |",
        "| DDIMPipeline, 50 steps | 25.0% | 0.123 | 7 |",
        "| among the data, all kinds |  | 0.200 |  |",
    ]


def test_the_average_follows_the_weights(training):
    """mean <- d mean + (1 - d) weight, with d = min(decay, (step + 1) / (step + 10))."""
    average, network = nn.Linear(3, 2), nn.Linear(3, 2)
    for step, decay, d in ((0, 0.99, 0.1), (89, 0.99, 90 / 99), (10_000, 0.99, 0.99)):
        before = [p.detach().clone() for p in average.parameters()]
        training("run_state").update_average(average, network, step, decay)
        for mean, old, weight in zip(average.parameters(), before, network.parameters(), strict=True):
            torch.testing.assert_close(mean, d * old + (1 - d) * weight)
            assert not torch.equal(mean, old)
