"""Previews of clean latents: linear colours, a tiny autoencoder, and the film strip of a run."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import minidiff
from minidiff import AutoencoderKL, AutoencoderTiny, DiffusionPipeline
from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.cli.main import main
from minidiff.embedded import GUIDANCE, embedded_checkpoint
from minidiff.images.tensors import read_metadata
from minidiff.previews import PUBLISHED, FilmStrip, LatentRGB, previewer
from tests.networks.test_vae_tiny import small
from tests.pictures import quiet, seeded
from tests.pipelines.test_memory import call, enable, make
from tests.theirs import diffusers, randomize
from tests.tiny_xl import save_base

SCHEDULERS = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
PROMPTS = ["red apple", "smiling face", "full moon", "green tree"]


@pytest.fixture(scope="module")
def embedded() -> Any:
    return quiet(DiffusionPipeline.from_pretrained(embedded_checkpoint()))


@pytest.fixture(scope="module")
def colours(embedded: Any) -> LatentRGB:
    """The fit takes as long as to decode a picture."""
    return previewer(embedded)


@pytest.fixture(scope="module")
def drawn(embedded: Any) -> torch.Tensor:
    """Latents of four different pictures."""
    options = {"num_inference_steps": 8, "guidance_scale": GUIDANCE, "seeds": [0, 1, 2, 3]}
    return embedded(PROMPTS, **options, output_type="latent").images


# --- linear colours ----------------------------------------------------------------------------------------------


def test_fit_is_least_squares() -> None:
    x, y = torch.randn(3, 5, 4, 6, generator=seeded()), torch.rand(3, 3, 32, 48, generator=seeded(1))
    found = LatentRGB.fit(x, y)
    means = y.double().numpy().reshape(3, 3, 4, 8, 6, 8).mean(axis=(3, 5))  # of 8 x 8 pixels
    rows = x.double().numpy().transpose(0, 2, 3, 1).reshape(-1, 5)
    design = np.hstack([rows, np.ones((len(rows), 1))])
    expected = np.linalg.lstsq(design, means.transpose(0, 2, 3, 1).reshape(-1, 3), rcond=None)[0]
    assert found.weight.dtype == found.bias.dtype == torch.float32
    np.testing.assert_allclose(found.weight.numpy(), expected[:-1], atol=1e-7)  # measured: 2e-8, they are float32
    np.testing.assert_allclose(found.bias.numpy(), expected[-1], atol=1e-7)
    pixels = (design @ expected).reshape(3, 4, 6, 3).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found.pixels(x.double()).numpy(), pixels, atol=1e-6)  # measured: 2e-8


def test_what_is_linear_is_found() -> None:
    true = LatentRGB(torch.randn(4, 3, generator=seeded()), torch.randn(3, generator=seeded(1)))
    x = torch.randn(2, 4, 8, 8, generator=seeded(2))
    found = LatentRGB.fit(x, F.interpolate(true.pixels(x), scale_factor=8))
    torch.testing.assert_close(found, true, atol=1e-5, rtol=0)


def test_colours_of_the_embedded_checkpoint(embedded: Any, colours: LatentRGB, drawn: torch.Tensor) -> None:
    """They were fitted to smooth noise, and are tried on pictures."""
    seen = F.adaptive_avg_pool2d(embedded._decoded(drawn).detach(), drawn.shape[2:])
    found = colours.pixels(drawn)
    pair = torch.stack([found.clamp(-1, 1).flatten(), seen.clamp(-1, 1).flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.85  # measured: 0.92; fitted to these pictures themselves, 0.94
    best = LatentRGB.fit(drawn, embedded._decoded(drawn).detach()).pixels(drawn)
    assert (best - seen).square().mean() <= (found - seen).square().mean()
    assert [picture.size for picture in colours(drawn)] == [(16, 16)] * 4
    assert torch.equal(previewer(embedded).weight, colours.weight)  # the noise is always the same


UNITS = {  # the colours of the latents (1, 0, 0, 0) to (0, 0, 0, 1), worked out from ComfyUI's numbers
    0.18215: [(172, 157, 169), (169, 191, 157), (91, 150, 162), (100, 94, 36)],
    0.13025: [(188, 179, 183), (109, 125, 141), (155, 139, 123), (101, 93, 99)],
}
CONFIGS = {0.18215: "stable-diffusion-v1-5", 0.13025: "stable-diffusion-xl-base-1.0"}


@pytest.mark.parametrize("scale", CONFIGS)
def test_published_autoencoders_have_published_colours(scale: float) -> None:
    fields = PackagedConfigs(CONFIGS[scale]).read("vae/config.json")
    with OnMeta():
        vae = AutoencoderKL.from_config(fields)
    pipe = SimpleNamespace(vae=vae, unet=SimpleNamespace(config=SimpleNamespace(out_channels=4)))
    assert previewer(pipe) is PUBLISHED[scale]
    x = torch.randn(1, 4, 2, 2, generator=seeded())
    (picture,) = previewer(pipe)(x)
    rgb = x[0, :, 1, 0] @ PUBLISHED[scale].weight + PUBLISHED[scale].bias
    units = previewer(pipe)(torch.eye(4).reshape(4, 4, 1, 1))
    assert [unit.getpixel((0, 0)) for unit in units] == UNITS[scale]
    assert picture.getpixel((0, 1)) == tuple(((rgb.clamp(-1, 1) + 1) * 127.5).round().int().tolist())


def test_half_precision_latents(drawn: torch.Tensor) -> None:
    one, two = (PUBLISHED[0.18215](x)[0] for x in (drawn, drawn.bfloat16()))
    assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 4  # measured: 1


# --- autoencoders ------------------------------------------------------------------------------------------------


def test_tiny_autoencoder_as_previewer(drawn: torch.Tensor, embedded: Any) -> None:
    theirs = randomize(diffusers.AutoencoderTiny(**small(levels=3)), scale=1.3)
    ours = AutoencoderTiny(**small(levels=3)).eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = theirs.decode(drawn).sample.detach()
    expected = diffusers.image_processor.VaeImageProcessor().postprocess(pixels)
    for one, two in zip(previewer(embedded, ours)(drawn), expected, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1  # measured: 0
    pipe = make("StableDiffusionPipeline")
    pipe.vae = ours
    assert previewer(pipe)(drawn) == previewer(embedded, ours)(drawn)  # the pipeline's own, if it is a tiny one


def test_the_pipeline_s_own_autoencoder(drawn: torch.Tensor, embedded: Any) -> None:
    assert previewer(embedded, embedded.vae)(drawn) == embedded.decode(drawn)


def test_an_offloaded_tiny_autoencoder(drawn: torch.Tensor) -> None:
    """It decodes where the pipeline computes, and not where its weights are at home."""
    pipe, seen = make("StableDiffusionPipeline"), []
    pipe.vae = AutoencoderTiny(**small(levels=3))
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].device.type))
    enable(pipe, "model", "meta")
    with pytest.raises(RuntimeError, match="meta tensor"):  # which has no pixels
        previewer(pipe)(drawn)
    assert seen == ["meta"]


def test_an_autoencoder_with_moments(drawn: torch.Tensor) -> None:
    """Of Playground's kind, and another than the pipeline has."""
    pipe = make("StableDiffusionXLPipeline")
    moments = {"latents_mean": [-1.6, 1.9, -1.4, 2.5], "latents_std": [8.5, 5.9, 6.5, 5.2]}
    vae = AutoencoderKL.from_config(pipe.vae.config, **moments)
    vae.load_state_dict(pipe.vae.state_dict())
    shown = previewer(pipe, vae)(drawn)
    pipe.vae = vae
    assert shown == pipe.decode(drawn)


def test_what_cannot_be_shown(embedded: Any, colours: LatentRGB) -> None:
    with pytest.raises(ValueError, match="latents of 4 channels as the UNet makes them, found 16"):
        previewer(embedded, AutoencoderTiny(latent_channels=16))
    with pytest.raises(ValueError, match=r"latents should be \(B, 4, h, w\), found \(1, 5, 2, 2\)"):
        colours(torch.zeros(1, 5, 2, 2))
    with pytest.raises(ValueError, match="NaN or infinity"):
        colours(torch.full((1, 4, 2, 2), torch.nan))
    pipe = make("StableDiffusionPipeline")
    pipe.vae = None
    with pytest.raises(ValueError, match="has no vae"):
        previewer(pipe)
    assert len(previewer(pipe, embedded.vae)(torch.zeros(1, 4, 2, 2))) == 1


# --- film strips -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def tiny(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A pipeline of each family, and what previews its latents."""
    pipe = make(request.param)
    return pipe, previewer(pipe)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_film_of_every_scheduler(tiny: tuple[Any, Any], scheduler: str) -> None:
    """A column for each of the steps, with what ``steps`` says of them; the picture stays the same."""
    pipe, preview = tiny
    pipe.scheduler = getattr(minidiff, scheduler).from_config(pipe.scheduler.config)
    film = FilmStrip(preview, height=24)
    asked = {"num_inference_steps": 4, "num_images_per_prompt": 2, "guidance_scale": 1.0}
    latents = call(pipe, **asked, callback_on_step_end=film, output_type="latent")
    (kept,) = film.calls
    assert len(kept) == 4 and film.image().size == (4 * 24, 2 * 24)
    steps = list(pipe.steps("a red heart", seed=7, **asked))
    known = [step.denoised for step in steps]
    assert torch.equal(latents, steps[-1].latents)
    assert all(any(torch.equal(x0, one) for one in known) for x0 in kept)
    assert torch.equal(kept[-1], known[-1])
    assert len({tuple(x0.flatten().tolist()) for x0 in kept}) == 4


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"])
def test_film_of_other_tasks(name: str) -> None:
    """Which take the last steps: three of four at a strength of 0.8."""
    pipe = make(name)
    film = FilmStrip(previewer(pipe, pipe.vae))
    call(pipe, callback_on_step_end=film, num_inference_steps=4, strength=0.8)
    assert film.image().size == (3 * 96, 96)


def test_strip_shows_the_previews_in_order(embedded: Any) -> None:
    """Rows are pictures, of one call after the other; what a shorter call lacks is white."""
    shown: list[torch.Tensor] = []

    def preview(latents: torch.Tensor) -> list[Image.Image]:
        shown.append(latents)
        return [Image.new("RGB", (4, 2), (len(shown) * 10, k, 0)) for k in range(len(latents))]

    film, options = FilmStrip(preview, height=2), {"guidance_scale": 1.0, "callback_on_step_end": film_of(lambda: film)}
    embedded(PROMPTS[:2], seeds=[1, 2], num_inference_steps=3, **options)
    embedded(PROMPTS[0], seed=3, num_inference_steps=2, **options)
    assert shown == []  # nothing is computed while pictures are made
    strip = np.asarray(film.image())
    assert strip.shape == (3 * 2, 3 * 4, 3)
    cells = strip[::2, ::4].tolist()
    assert cells == [
        [[10, 0, 0], [20, 0, 0], [30, 0, 0]],
        [[10, 1, 0], [20, 1, 0], [30, 1, 0]],
        [[40, 0, 0], [50, 0, 0], [255, 255, 255]],
    ]


def test_threads_share_a_film() -> None:
    """Whose steps come in turn: each call has a row of its own."""
    pipe, film, turn = make("StableDiffusionPipeline"), FilmStrip(PUBLISHED[0.18215]), Barrier(2)

    def keep(*arguments: Any) -> Any:
        turn.wait(timeout=30)
        return film(*arguments)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda seed: call(pipe, seed, num_inference_steps=3, callback_on_step_end=keep), (1, 2)))
    assert [len(steps) for steps in film.calls] == [3, 3]


def test_calls_of_other_sizes_are_not_stretched() -> None:
    """What is less wide stands in the middle of a white cell."""
    film = FilmStrip(lambda x: [Image.new("RGB", x.shape[:1:-1], "red")], height=4)
    film.calls = [[torch.zeros(1, 4, 4, 8)], [torch.zeros(1, 4, 4, 4)]]
    strip = np.asarray(film.image())
    red = (strip == [255, 0, 0]).all(axis=-1).astype(int).tolist()
    assert red == [[1, 1, 1, 1, 1, 1, 1, 1]] * 4 + [[0, 0, 1, 1, 1, 1, 0, 0]] * 4


def film_of(film: Any) -> Any:
    return lambda *arguments: film()(*arguments)


def test_last_column_is_the_picture(embedded: Any) -> None:
    film = FilmStrip(previewer(embedded, embedded.vae), height=64)
    options = {"num_inference_steps": 6, "guidance_scale": GUIDANCE, "seed": 3, "callback_on_step_end": film}
    (picture,) = embedded("red apple", **options).images
    last = film.image().crop((5 * 64, 0, 6 * 64, 64))
    assert np.abs(np.asarray(last, float) - np.asarray(picture, float)).mean() < 1  # measured: 0.0 of 255


def test_a_film_waits_for_no_device() -> None:
    """On the meta device nothing has a value that could be waited for."""
    film = FilmStrip(PUBLISHED[0.18215])
    call(enable(make("StableDiffusionPipeline"), "model", "meta"), output_type="latent", callback_on_step_end=film)
    assert [x0.device.type for x0 in film.calls[0]] == ["meta"] * 2


def test_a_strip_of_nothing() -> None:
    with pytest.raises(ValueError, match="needs a call: pipe"):
        FilmStrip(PUBLISHED[0.18215]).image()


# --- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["embedded", "XL"])
def test_film_on_the_command_line(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = [] if family == "embedded" else ["--model", str(save_base(tmp_path / "xl"))]
    arguments = ["generate", "red heart", "--seed", "4", "--num", "2", "--steps", "3", "--device", "cpu", *model]
    strip = tmp_path / "strip.png"
    assert main([*arguments, "-o", str(tmp_path / "a.png"), "--film", str(strip), "--scheduler", "heundiscrete"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{strip}  seed 4, 5"
    with Image.open(strip) as image:
        assert image.size == (3 * 96, 2 * 96)
    assert read_metadata(strip) == read_metadata(tmp_path / "a-0.png") | {"seed": "4, 5"}
    assert main([*arguments, "-o", str(tmp_path / "b.png"), "--scheduler", "heundiscrete"]) == 0
    for k in range(2):  # a film changes nothing
        with Image.open(tmp_path / f"a-{k}.png") as one, Image.open(tmp_path / f"b-{k}.png") as two:
            assert one == two


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["x", "--film", "strip.jpg"], "pictures are written as PNG files"),
        (["x", "--film", "nowhere/strip.png"], "the folder nowhere of the output file strip.png does not exist"),
        (
            ["--model", "emoji32-ddpm", "--film", "strip.png"],
            "draws without a prompt and in one size: leave out --film",
        ),
    ],
)
def test_wrong_films(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(["generate", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2 and words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
