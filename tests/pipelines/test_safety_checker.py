"""The safety checker: scores and flags as the reference's, whole pictures with one flagged, files, and bad input."""

import json
import logging
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.checkpoints.load import OnMeta
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from minidiff.fast.unchanged import Fast
from minidiff.networks.safety_checker import StableDiffusionSafetyChecker
from tests.pictures import assert_same, load, load_both, quiet, seeded
from tests.theirs import carry_over, diffusers, randomize, relative_error, transformers
from tests.tiny import save_tiny

CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}
FIELDS = {"vision_config": VISION, "projection_dim": 8}
CALL = {"prompt": "a cat", "num_inference_steps": 3, "num_images_per_prompt": 2, "output_type": "np"}
PICTURE = torch.rand(1, 3, 32, 32, generator=seeded(6), dtype=torch.float64)
MASK = torch.ones(1, 1, 32, 32)
MASK[..., :16] = 0
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("StableDiffusionPipeline", {}),
    "image": ("StableDiffusionImg2ImgPipeline", {"image": PICTURE, "strength": 0.9}),
    "mask": ("StableDiffusionInpaintPipeline", {"image": PICTURE, "mask_image": MASK}),
    "edit": ("StableDiffusionInstructPix2PixPipeline", {"image": PICTURE}),
}


def their_class() -> Any:
    return diffusers.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker


def make_pair() -> tuple[StableDiffusionSafetyChecker, Any]:
    """Build ours and theirs with the same random float64 weights; no picture is flagged."""
    theirs = randomize(their_class()(transformers.CLIPConfig(**FIELDS)).double())
    theirs.concept_embeds_weights.fill_(2.0)
    theirs.special_care_embeds_weights.fill_(2.0)
    with torch.device("meta"):
        ours = StableDiffusionSafetyChecker(FIELDS)
    return carry_over(theirs, ours), theirs


def looks(B: int = 8) -> Tensor:
    return torch.randn(B, 3, 12, 12, generator=seeded(3), dtype=torch.float64)


# --- One look ----------------------------------------------------------------------------------------------------


def test_cosines() -> None:
    ours, theirs = make_pair()
    distance = diffusers.pipelines.stable_diffusion.safety_checker.cosine_distance
    with torch.no_grad():
        embeds = theirs.visual_projection(theirs.vision_model(looks())[1])
    expected = distance(embeds, theirs.special_care_embeds), distance(embeds, theirs.concept_embeds)
    for one, other in zip(ours.cosines(looks()), expected, strict=True):
        assert one.dtype == torch.float64 and relative_error(one, other) < 1e-10  # measured: 1.6e-16


@pytest.mark.parametrize("margin", [0.0, 4e-4, 6e-4, -0.0094, -0.0096, -0.0104, -0.0106])
@pytest.mark.parametrize("care", [-2.0, 4e-4, 6e-4], ids=str)
def test_flags_at_the_edge(care: float, margin: float) -> None:
    """Scores that just fail or pass: each is rounded to 3 digits, and special care lowers the threshold by 0.01."""
    ours, theirs = make_pair()
    cares, concepts = ours.cosines(looks())
    for checker in (ours, theirs):
        checker.concept_embeds_weights[5] = concepts[3, 5] - margin
        checker.special_care_embeds_weights[1] = cares[3, 1] - care
    images = torch.ones(8, 3, 2, 2)
    a, flags = ours(looks(), images.clone())
    b, expected = theirs(looks(), images.clone())
    assert flags == expected and torch.equal(a, b)
    assert (a == 0).flatten(1).all(dim=1).tolist() == flags
    assert flags[3] == (margin > 5e-4 or (care > 5e-4 and margin > -0.0095))


KINDS = {
    "tensor": lambda: torch.ones(8, 3, 2, 2),
    "list of tensors": lambda: list(torch.ones(8, 3, 2, 2)),
    "array": lambda: np.ones((8, 2, 2, 3)),
    "list of arrays": lambda: list(np.ones((8, 2, 2, 3))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_pictures(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    ours, theirs = make_pair()
    for checker in (ours, theirs):
        checker.concept_embeds_weights[2] = ours.cosines(looks())[1][:, 2].median()
    given = KINDS[kind]()
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        a, flags = ours(clip_input=looks(), images=given)
    b, expected = theirs(clip_input=looks(), images=KINDS[kind]())
    assert a is given and flags == expected and 0 < sum(flags) < 8
    assert all(np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(a, b, strict=True))
    assert f"flagged {sum(flags)} of 8 pictures" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    ours, theirs = make_pair()
    for checker in (ours, theirs):
        checker.concept_embeds_weights[2] = ours.cosines(looks())[1][:, 2].median()
        checker.to(dtype)
    assert ours(looks(), looks())[1] == theirs(looks(), looks())[1]


# --- Whole pictures ----------------------------------------------------------------------------------------------


def add_checker(folder: Path, name: str, arguments: dict[str, Any]) -> Path:
    """Give a checkpoint a checker of the reference's class that flags the first of the two pictures of ``CALL``."""
    _, checker = make_pair()
    extractor = transformers.CLIPImageProcessorPil(size=12, crop_size=12)
    kind = getattr(diffusers, name)
    pipe = load(kind, folder, requires_safety_checker=False)
    pipe = quiet(kind(**{**pipe.components, "safety_checker": checker, "feature_extractor": extractor}))
    scores: list[Tensor] = []
    checker.visual_projection.register_forward_hook(lambda _, x, out: scores.append(out))
    pipe(**CALL, **arguments, generator=seeded())
    cosines = torch.nn.functional.normalize(scores[0]) @ torch.nn.functional.normalize(checker.concept_embeds).T
    apart = cosines[0] - cosines[1]
    assert apart.max() > 0.02
    checker.concept_embeds_weights[apart.argmax()] = cosines[:, apart.argmax()].mean()
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint with a safety checker for each task."""
    made = {}
    for task, (name, arguments) in TASKS.items():
        unet = {"in_channels": 8} if task == "edit" else None
        made[task] = add_checker(save_tiny(tmp_path_factory.mktemp(task), unet=unet), name, arguments)
    return made


@pytest.fixture
def checked(folders: dict[str, Path]) -> Path:
    return folders["text"]


@pytest.mark.parametrize("task", TASKS)
def test_one_of_two_pictures_is_black(folders: dict[str, Path], task: str) -> None:
    name, arguments = TASKS[task]
    pipes = load_both(name, folders[task])
    outs = [pipe(**CALL, **arguments, generator=seeded()) for pipe in pipes]
    assert [out.nsfw_content_detected for out in outs] == [[True, False]] * 2
    assert_same(outs[0].images, outs[1].images)
    assert not outs[0].images[0].any() and outs[0].images[1].any()
    unchecked = load(getattr(minidiff, name), folders[task], safety_checker=None)
    out = unchecked(**CALL, **arguments, generator=seeded())
    assert out.nsfw_content_detected is None and out.images[0].any()
    assert_same(out.images[1], outs[1].images[1])


@pytest.mark.parametrize("output_type", ["pil", "pt", "latent"])
def test_kinds_of_results(checked: Path, output_type: str) -> None:
    pipes = load_both("StableDiffusionPipeline", checked)
    (images, flags), (theirs, expected) = (
        pipe(**{**CALL, "output_type": output_type}, generator=seeded(), return_dict=False) for pipe in pipes
    )
    assert flags == expected == (None if output_type == "latent" else [True, False])
    for one, other in zip(images, theirs, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, float), np.asarray(other, float), atol=1 if output_type == "pil" else 1e-6
        )


def test_optimized_and_shared(checked: Path) -> None:
    pipe = quiet(minidiff.StableDiffusionPipeline.from_pretrained(checked))
    before = pipe(**CALL, generator=seeded())
    after = pipe.optimize()(**CALL, generator=seeded())
    assert after.nsfw_content_detected == before.nsfw_content_detected and any(after.nsfw_content_detected)
    np.testing.assert_allclose(after.images, before.images, atol=1e-4)
    inside = [value for module in pipe.safety_checker.modules() for value in vars(module).values()]
    assert not any(isinstance(value, Fast) for value in inside)  # it is asked once
    other = minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.safety_checker is pipe.safety_checker is pipe.components["safety_checker"]
    assert other.to(torch.float16).safety_checker.concept_embeds.dtype == torch.float16
    assert minidiff.StableDiffusionImg2ImgPipeline.from_pipe(pipe, safety_checker=None).safety_checker is None


def test_a_program_may_switch_it_off_by_hand(checked: Path) -> None:
    pipe = quiet(minidiff.StableDiffusionPipeline.from_pretrained(checked))
    pipe.safety_checker.forward = lambda clip_input, images: (images, [False] * len(images))
    assert pipe(**CALL, generator=seeded()).nsfw_content_detected == [False, False]
    pipe.safety_checker = None
    assert pipe(**CALL, generator=seeded()).nsfw_content_detected is None


def test_without_one_a_warning_says_what_it_means(checked: Path, caplog: pytest.LogCaptureFixture) -> None:
    load_it = minidiff.StableDiffusionPipeline.from_pretrained
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        load_it(checked)
        load_it(checked, safety_checker=None, requires_safety_checker=False)
        assert caplog.messages == []
        assert load_it(checked, safety_checker=None).config.requires_safety_checker
    assert "StableDiffusionPipeline has no safety checker" in caplog.text


# --- Files -------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied(checked: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the checkpoint, to change."""
    shutil.copytree(checked, tmp_path / "copied")
    yield tmp_path / "copied"


def index_of(folder: Path, **changes: Any) -> dict[str, Any]:
    path = folder / "model_index.json"
    index = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(index))
    return index


def test_it_is_saved_as_the_reference_saves_it(checked: Path, tmp_path: Path) -> None:
    pipe = minidiff.DiffusionPipeline.from_pretrained(checked)
    pipe.save_pretrained(tmp_path, variant="fp16")
    theirs = index_of(checked) | {"feature_extractor": ["transformers", "CLIPImageProcessor"]}  # there ...Pil
    assert index_of(tmp_path) == theirs
    assert index_of(tmp_path)["safety_checker"] == ["stable_diffusion", "StableDiffusionSafetyChecker"]
    theirs = load(diffusers.StableDiffusionPipeline, tmp_path, variant="fp16")
    ours = load(minidiff.StableDiffusionPipeline, tmp_path, variant="fp16")
    images = [pipe(**CALL, generator=seeded()).images for pipe in (ours, theirs)]
    assert_same(*images)
    assert not images[0][0].any()


SPELLINGS = {
    "transformers 4, as published": lambda name: name,
    "transformers 5": lambda name: name.replace("vision_model.vision_model.", "vision_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_its_files(copied: Path, spelling: str) -> None:
    before = StableDiffusionSafetyChecker.from_pretrained(copied / "safety_checker")
    before.save_pretrained(copied / "safety_checker")
    path = copied / "safety_checker" / "model.safetensors"
    tensors = {SPELLINGS[spelling](name): tensor for name, tensor in load_file(path).items()}
    prefix = "vision_model." * (1 + (spelling != "transformers 5"))
    assert f"{prefix}embeddings.class_embedding" in tensors
    save_file(tensors | {f"{prefix}embeddings.position_ids": torch.arange(10)[None]}, path)
    index_of(copied, feature_extractor=["transformers", "CLIPFeatureExtractor"])
    pipe = minidiff.DiffusionPipeline.from_pretrained(copied)
    assert all(torch.equal(a, b) for a, b in zip(pipe.safety_checker.parameters(), before.parameters(), strict=True))
    assert type(pipe.feature_extractor) is minidiff.CLIPImageProcessor


@pytest.mark.parametrize("name", ["CompVis--stable-diffusion-v1-4", "runwayml--stable-diffusion-inpainting"])
def test_names_and_shapes_at_full_size(name: str) -> None:
    fields = json.loads((CONFIGS / name / "safety_checker" / "config.json").read_text())
    with torch.device("meta"):
        theirs = their_class()(transformers.CLIPConfig(**json.loads(json.dumps(fields))))
    with OnMeta():
        ours = StableDiffusionSafetyChecker.from_config(fields)
    expected = {
        name.replace("vision_model.", "vision_model.vision_model."): tensor.shape
        for name, tensor in theirs.state_dict().items()
    }
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == expected
    assert ours.concept_embeds.shape == (17, 768) and ours.visual_projection.in_features == 1024


@pytest.mark.parametrize("missing", ["folder", "safetensors", "variant", "config"])
def test_a_checker_that_is_not_there_is_named_with_what_to_do(copied: Path, missing: str) -> None:
    checker = copied / "safety_checker"
    if missing == "folder":
        shutil.rmtree(checker)
    elif missing == "safetensors":
        (checker / "model.safetensors").rename(checker / "pytorch_model.bin")
    elif missing == "config":
        (checker / "config.json").unlink()
    variant = "fp16" if missing == "variant" else None
    if variant:
        pipe = minidiff.StableDiffusionPipeline.from_pretrained(copied)
        for name in ("unet", "vae", "text_encoder"):
            getattr(pipe, name).save_pretrained(copied / name, variant=variant)
    with pytest.raises(CheckpointNotFoundError, match="safety_checker.*pass safety_checker=None"):
        minidiff.StableDiffusionPipeline.from_pretrained(copied, variant=variant)
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(copied, variant=variant, safety_checker=None)
    assert pipe.safety_checker is None
    checkpoint = open_checkpoint(copied, variant=variant).check()  # these tools can do without it
    assert "safety_checker: its weights are not there" in report(checkpoint)


def test_single_files_have_none(checked: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(checked)
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        pipe.save_single_file(tmp_path / "a.safetensors")
    assert "safety checker is left out" in caplog.text
    kind, file = minidiff.StableDiffusionPipeline, tmp_path / "a.safetensors"
    assert open_checkpoint(file).index["safety_checker"] == [None, None]
    alone = kind.from_single_file(file)
    described = kind.from_single_file(file, config=checked)
    assert alone.safety_checker is described.safety_checker is None
    assert alone.feature_extractor.size == described.feature_extractor.size == {"shortest_edge": 12}
    checker = StableDiffusionSafetyChecker.from_pretrained(checked, subfolder="safety_checker", dtype="float64")
    whole = quiet(kind.from_single_file(file, safety_checker=checker, dtype="float64"))
    assert whole(**CALL, generator=seeded()).nsfw_content_detected == [True, False]


def test_inspect_and_convert(checked: Path, tmp_path: Path) -> None:
    assert "safety_checker  StableDiffusionSafetyChecker" in report(open_checkpoint(checked))
    convert(checked, tmp_path / "half", dtype=torch.float16)
    pipe = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "half")
    assert pipe.safety_checker.concept_embeds.shape == (17, 8) and pipe.feature_extractor.size["shortest_edge"] == 12
    stored = load_file(tmp_path / "half" / "safety_checker" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    convert(checked, tmp_path / "one.safetensors")
    assert open_checkpoint(tmp_path / "one.safetensors").index["safety_checker"] == [None, None]
    convert(tmp_path / "one.safetensors", tmp_path / "back")
    index = index_of(tmp_path / "back")
    assert index["safety_checker"] == [None, None] and index["feature_extractor"][1].startswith("CLIPImageProcessor")
    assert minidiff.StableDiffusionPipeline.from_pretrained(tmp_path / "back").feature_extractor is not None


def test_a_checker_of_ones_own_that_reads_the_scores(checked: Path) -> None:
    """As programs with a threshold of their own are written: by the names of the reference's module."""
    found = []
    for library in (minidiff, diffusers):
        module = import_module(f"{library.__name__}.pipelines.stable_diffusion.safety_checker")

        class Tunable(module.StableDiffusionSafetyChecker):
            cosine = staticmethod(module.cosine_distance)

            def forward(self, clip_input: Tensor, images: Any) -> Any:
                embeds = self.visual_projection(self.vision_model(clip_input)[1])
                self.scores = self.cosine(embeds, self.concept_embeds) - self.concept_embeds_weights
                return images, (self.scores > -1.9).any(dim=1).tolist()

        pipe = load(library.StableDiffusionPipeline, checked)
        pipe.safety_checker = Tunable.from_pretrained(checked, subfolder="safety_checker", torch_dtype=torch.float64)
        out = pipe(**CALL, generator=seeded(1))
        found.append((pipe.safety_checker.scores, out.nsfw_content_detected))
    assert relative_error(found[0][0], found[1][0]) < 1e-10
    assert found[0][1] == found[1][1]


# --- Bad input ---------------------------------------------------------------------------------------------------


def test_bad_input(checked: Path) -> None:
    parts = minidiff.StableDiffusionPipeline.from_pretrained(checked).components
    with pytest.raises(ConfigError, match="a safety_checker needs a feature_extractor"):
        minidiff.StableDiffusionPipeline(**{**parts, "feature_extractor": None})
    pipe = quiet(minidiff.StableDiffusionPipeline(**parts))
    pipe.feature_extractor = None
    with pytest.raises(ValueError, match=r"pixel_values should be \(B, 3, 12, 12\), found None"):
        pipe(**CALL)
    for fields, message in (
        ({"projection_dim": 0}, "projection_dim should be a positive integer"),
        ({"vision_config": {"hidden_act": "relu"}}, "hidden_act"),
        ({"vision_config": None}, "vision_config should have the fields of a vision encoder, found None"),
        ({"concepts": 18}, r"concepts = 18 \(unknown field\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            StableDiffusionSafetyChecker({**FIELDS, **fields})


def test_a_tensor_that_does_not_fit_is_named(copied: Path) -> None:
    path = copied / "safety_checker" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"concept_embeds": torch.ones(18, 8)}, path)
    with pytest.raises(CheckpointError, match=r"concept_embeds is \(18, 8\) in model.safetensors, expected \(17, 8\)"):
        minidiff.StableDiffusionPipeline.from_pretrained(copied)
