"""A new task and a new condition, each a part of its own: no family, no other task and no pipeline knows of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minidiff import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from minidiff.pipelines.request import Request
from minidiff.pipelines.run import LatentGeneration, TextToImage
from minidiff.pipelines.stable_diffusion import StableDiffusion
from minidiff.pipelines.state import Run
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

CALL = {"num_inference_steps": 3, "seed": 1, "output_type": "np", "height": 16, "width": 16}


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("xl"))


def load(cls: type, folder: Path) -> Any:
    pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


# --- a condition: the UNet sees the first words of a prompt alone ----------------------------------------------------


class FirstTokens(LatentGeneration):
    """Show the UNet as many tokens of the text as ``tokens`` says."""

    tokens = 1

    def _conditions(self, request: Any, run: Run) -> list[Any]:
        return [*super()._conditions(request, run), self.first_tokens]

    def first_tokens(self, x: Tensor, t: Tensor, run: Run) -> dict[str, Tensor]:
        B, L, _ = run.tensors["prompt_embeds"].shape
        return {"encoder_attention_mask": (torch.arange(L) < self.tokens).expand(B, L)}


class SDFirstTokens(FirstTokens, StableDiffusionPipeline):
    pass


class SDRedrawnByFirstTokens(FirstTokens, StableDiffusionImg2ImgPipeline):
    pass


class XLFirstTokens(FirstTokens, StableDiffusionXLPipeline):
    pass


def test_a_condition_of_any_family_and_task(sd: Path, xl: Path) -> None:
    """The first token is the start of every text: with it alone, all prompts give one picture."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    redraw = {**CALL, "image": image, "num_inference_steps": 6}
    del redraw["height"], redraw["width"]
    for plain, toy, folder, call in (
        (StableDiffusionPipeline, SDFirstTokens, sd, CALL),
        (StableDiffusionImg2ImgPipeline, SDRedrawnByFirstTokens, sd, redraw),
    ):
        one, other = (load(toy, folder)(prompt, **call).images for prompt in ("red heart", "two cats and 3 dogs"))
        assert (one == other).all()
        assert (one != load(plain, folder)("red heart", **call).images).any()
    pipe = load(XLFirstTokens, xl)
    blind = pipe("red heart", **CALL).images
    pipe.tokens = 77
    assert (pipe("red heart", **CALL).images == load(StableDiffusionXLPipeline, xl)("red heart", **CALL).images).all()
    assert (blind != pipe("red heart", **CALL).images).any()


class NoSizes(LatentGeneration):
    """Tell XL's UNet that every size is 0: what a condition says in a dict replaces that part of it alone."""

    def _conditions(self, request: Any, run: Run) -> list[Any]:
        def none(x: Tensor, t: Tensor, run: Run) -> dict[str, Any]:
            return {"added_cond_kwargs": {"time_ids": torch.zeros_like(run.tensors["add_time_ids"])}}

        return [*super()._conditions(request, run), none]


class XLNoSizes(NoSizes, StableDiffusionXLPipeline):
    pass


def test_conditions_add_up(xl: Path) -> None:
    ours = load(XLNoSizes, xl)("red heart", **CALL).images
    plain = load(StableDiffusionXLPipeline, xl)
    sizes = {"original_size": (0, 0), "target_size": (0, 0)}
    assert (ours == plain("red heart", **CALL, **sizes).images).all()
    assert (ours != plain("red heart", **CALL).images).any()


# --- a task: begin with noise that is its own mirror image -----------------------------------------------------------


class Mirrored(TextToImage):
    """Text to image from noise whose right half is the left one, seen in a mirror."""

    def _first_latents(self, request: Any, run: Run, size: tuple[int, int]) -> Tensor:
        left = super()._first_latents(request, run, size).chunk(2, dim=-1)[0]
        return torch.cat([left, left.flip(-1)], dim=-1)


class SDMirrored(Mirrored, StableDiffusionPipeline):
    pass


class XLMirrored(Mirrored, StableDiffusionXLPipeline):
    pass


@pytest.mark.parametrize(
    ("plain", "toy"), [(StableDiffusionPipeline, SDMirrored), (StableDiffusionXLPipeline, XLMirrored)]
)
def test_a_task_of_any_family(plain: type, toy: type, sd: Path, xl: Path) -> None:
    pipe, other = (load(cls, xl if "XL" in plain.__name__ else sd) for cls in (toy, plain))
    x = []

    def look(pipe: Any, i: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return x.append(tensors["latents"]) or {}

    pipe("red heart", **CALL, callback_on_step_end=look)
    given = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    left = given[..., :2]
    expected = other("red heart", **{**CALL, "seed": None}, latents=torch.cat([left, left.flip(-1)], dim=-1)).images
    assert (pipe("red heart", **CALL).images == expected).all()
    assert len(list(pipe.steps("red heart", num_inference_steps=3, seed=1))) == len(x)


class OwnMirrored(Mirrored, StableDiffusion):
    """A family and a task, without a published pipeline, and a call of its own."""

    request = Request

    def __call__(self, prompt: str, steps: int) -> Any:
        return list(self.steps(prompt, num_inference_steps=steps, seed=1, height=16, width=16))[-1]


def test_a_program_makes_a_pipeline_of_parts(sd: Path) -> None:
    last = OwnMirrored(**load(SDMirrored, sd).components)("red heart", 3)
    pipe = load(SDMirrored, sd)
    assert torch.equal(last.latents, pipe("red heart", **{**CALL, "output_type": "latent"}).images)
    assert torch.equal(last.latents, list(pipe.steps("red heart", 16, 16, 3, seed=1))[-1].latents)
    with pytest.raises(TypeError, match="too many positional arguments"):
        pipe.steps(*["red heart"] * 40)
