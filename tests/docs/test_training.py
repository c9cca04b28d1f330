"""The training written by hand in docs/training.md: it runs, it learns, and the reference reads its checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import DDIMPipeline, DDPMScheduler
from tests.theirs import diffusers

PAGE = Path(__file__).parents[2] / "docs/training.md"
SIZES, SMALL = "STEPS, BATCH, SIDE = 600, 32, 16\n", "STEPS, BATCH, SIDE = 24, 8, 8\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the block of the page leaves behind, with fewer steps on smaller pictures."""
    (code,) = re.findall(r"```python\n# tutorial\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert code.count(SIZES) == 1
    folder, names = tmp_path_factory.mktemp("training"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # the block writes a checkpoint and a picture
        exec(compile(code.replace(SIZES, SMALL), str(PAGE), "exec"), names)
    return names | {"folder": folder}


def test_the_loss_falls(trained):
    losses = np.array(trained["losses"])
    assert len(losses) == 24
    assert losses[-6:].mean() < 0.6 * losses[:6].mean()  # measured: 0.46


def test_the_average_is_what_is_saved_and_it_has_learned(trained):
    saved = DDIMPipeline.from_pretrained(trained["folder"] / "discs").unet
    for mean, ours, last in zip(
        trained["average"].parameters(), saved.parameters(), trained["unet"].parameters(), strict=True
    ):
        assert torch.equal(mean, ours)
        assert not torch.equal(mean, last)
    scheduler, draw = trained["scheduler"], torch.Generator().manual_seed(1)
    x0, t = trained["pictures"](32, draw), torch.randint(1000, (32,), generator=draw)
    noise = torch.randn(x0.shape, generator=draw)
    with torch.no_grad():
        out = saved(scheduler.add_noise(x0, noise, t), t).sample
    loss = (out - scheduler.get_velocity(x0, noise, t)).square().mean()
    assert loss < 0.6 * trained["losses"][0]  # measured: 0.35


def test_the_checkpoint_draws_the_same_with_the_reference(trained):
    theirs = diffusers.DDIMPipeline.from_pretrained(trained["folder"] / "discs")
    theirs.set_progress_bar_config(disable=True)
    out = theirs(1, num_inference_steps=50, generator=torch.Generator().manual_seed(0), output_type="np").images[0]
    ours = np.asarray(trained["images"][0])
    assert np.abs(ours - out * 255).max() <= 1
    with Image.open(trained["folder"] / "discs.png") as sheet:
        assert sheet.size == (32, 32)


def test_the_data_are_discs_on_white(trained):
    x0 = trained["pictures"](64, torch.Generator().manual_seed(0))
    assert x0.shape == (64, 3, 8, 8) and x0.min() >= -1 and x0.max() == 1
    assert (x0[:, :, 0, 0] == 1).all() and x0.std() > 0.1


def test_an_error_of_v_means_the_errors_of_the_table(rng):
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    t = torch.tensor([3, 500, 990])
    x0, noise, d = torch.randn(3, 3, 3, 4, 4, generator=rng)
    alpha_bar = scheduler.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x, v = scheduler.add_noise(x0, noise, t), scheduler.get_velocity(x0, noise, t) + d
    torch.testing.assert_close(sigma * x + alpha * v, noise + alpha * d, atol=1e-5, rtol=0)  # measured: 2.4e-7
    torch.testing.assert_close(alpha * x - sigma * v, x0 - sigma * d, atol=1e-5, rtol=0)  # measured: 2.4e-7


def test_the_schedules_lose_the_picture_when_the_page_says():
    for betas, share in (("linear", 2 / 3), ("squaredcos_cap_v2", 0.94)):
        alpha = DDPMScheduler(beta_schedule=betas).alphas_cumprod.sqrt()
        assert abs((alpha > 0.1).sum().item() / 1000 - share) < 0.02
