"""Original single files: recognised, loaded, saved and converted, with the same weights and pictures in every layout.

Tiny twins of each layout are made by the reference. What we write as a single file must load in the reference and draw
the same picture there; what we read must draw the picture of the same weights in Hub layout. Full-size files are
headers without data (``weights/headers``): names, shapes and dtypes are real, and nothing is read but the header.
"""

import json
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import minidiff
from minidiff import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from minidiff.checkpoints import hub
from minidiff.checkpoints.original import configs as packaged_configs
from minidiff.checkpoints.original import families
from minidiff.checkpoints.original.configs import PackagedConfigs
from minidiff.checkpoints.original.dropped import why_dropped
from minidiff.checkpoints.original.families import FAMILIES, recognise
from minidiff.checkpoints.original.prefixes import EMA, UNET, ema_name
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.original.single_file import find
from minidiff.checkpoints.tools.checkpoint import open_checkpoint
from minidiff.checkpoints.tools.convert import convert
from minidiff.checkpoints.tools.inspect import report
from minidiff.cli.main import main
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from minidiff.networks.specs.clip import clip_config
from minidiff.networks.specs.unet import unet_config
from minidiff.networks.specs.vae import vae_config
from tests.hub_server import HubServer, Repository, run_with
from tests.single_files import TWINS, Twin, draw, sparse_file, states_equal
from tests.theirs import diffusers, transformers
from tests.tiny import VAE
from tests.tiny_xl import vocabulary
from tests.vocabulary import PUBLISHED as TOKENIZERS
from tests.vocabulary import load_script, write_folder

headers = load_script("headers")
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


# --- tiny twins: the three directions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def make_twin(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Twin]:
    return lru_cache(lambda kind: Twin(kind, tmp_path_factory.mktemp(kind)))


@pytest.fixture(params=TWINS)
def twin(request: pytest.FixtureRequest, make_twin: Callable[[str], Twin]) -> Twin:
    return make_twin(request.param)


@pytest.fixture
def sd1(make_twin: Callable[[str], Twin]) -> Twin:
    return make_twin("sd1")


def test_same_weights_and_pictures_in_every_layout(twin: Twin) -> None:
    ours = twin.our_class.from_single_file(twin.file, config=twin.folder)
    parts = [name for name in NETWORKS if getattr(twin.ours, name, None) is not None]
    assert len(parts) == {"sd1": 3, "sd2": 3, "xl": 4, "refiner": 3}[twin.kind]
    for name in parts:
        assert states_equal(getattr(ours, name), getattr(twin.ours, name)), name
    assert all(p.is_contiguous() for name in parts for p in getattr(ours, name).parameters())
    assert ours.config.to_dict() == twin.ours.config.to_dict()
    assert ours.scheduler.config.to_dict() == twin.ours.scheduler.config.to_dict()

    picture = draw(twin.ours, **twin.arguments)
    assert np.array_equal(draw(ours, **twin.arguments), picture)  # bit for bit
    theirs = twin.their_class.from_single_file(str(twin.file), config=str(twin.folder))
    assert np.abs(draw(theirs, **twin.arguments) - picture).max() <= 1  # measured: 0 for all four


def test_conversions_are_bit_exact_both_ways(twin: Twin, tmp_path: Path) -> None:
    convert(twin.folder, tmp_path / "single.safetensors")
    assert_same_file(tmp_path / "single.safetensors", twin.file)  # streamed from the folder = saved from memory
    convert(twin.file, tmp_path / "hub", config=twin.folder)
    for name in NETWORKS:
        if (twin.folder / name).is_dir():
            (theirs,) = (twin.folder / name).glob("*.safetensors")
            saved = load_file(tmp_path / "hub" / name / theirs.name)
            modern = {name.removeprefix("text_model."): tensor for name, tensor in saved.items()}
            assert_same_tensors(modern, {n.removeprefix("text_model."): t for n, t in load_file(theirs).items()})
    again = twin.their_class.from_pretrained(tmp_path / "hub")  # the folder is complete: the reference draws from it
    assert np.abs(draw(again, **twin.arguments) - draw(twin.ours, **twin.arguments)).max() <= 1  # measured: 0
    convert(tmp_path / "hub", tmp_path / "back.safetensors")
    assert_same_file(tmp_path / "back.safetensors", twin.file)


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name


def assert_same_file(a: Path, b: Path) -> None:
    assert SingleFile.of(a).metadata == SingleFile.of(b).metadata
    assert_same_tensors(load_file(a), load_file(b))


@pytest.mark.parametrize(
    ("class_name", "kind", "channels"),
    [
        ("StableDiffusionImg2ImgPipeline", "sd1", 4),
        ("StableDiffusionInpaintPipeline", "sd1", 9),
        ("StableDiffusionInstructPix2PixPipeline", "sd1", 8),
        ("StableDiffusionXLInpaintPipeline", "xl", 9),
        ("StableDiffusionXLInstructPix2PixPipeline", "xl", 8),
    ],
)
def test_pipelines_for_other_tasks(
    class_name: str, kind: str, channels: int, make_twin: Callable[[str], Twin], tmp_path: Path
) -> None:
    ours, theirs = getattr(minidiff, class_name), getattr(diffusers, class_name)
    parts = dict(make_twin(kind).ours.components)
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, in_channels=channels).eval()
    pipe = ours(**{name: part for name, part in parts.items() if name in ours._signature()[0]})
    pipe.save_pretrained(tmp_path / "hub")
    pipe.save_single_file(tmp_path / "single.safetensors")
    again = ours.from_single_file(tmp_path / "single.safetensors", config=tmp_path / "hub")
    assert again.unet.config.in_channels == channels
    assert all(states_equal(again.components[name], pipe.components[name]) for name in NETWORKS if name in parts)
    loaded = theirs.from_single_file(str(tmp_path / "single.safetensors"), config=str(tmp_path / "hub"))
    assert torch.equal(loaded.unet.conv_in.weight, pipe.unet.conv_in.weight)
    assert torch.equal(loaded.unet.conv_out.bias, pipe.unet.conv_out.bias)


# --- dtypes, moving averages, spellings ------------------------------------------------------------------------------


def test_stacked_tensors_of_several_dtypes_lose_nothing(make_twin: Callable[[str], Twin], tmp_path: Path) -> None:
    """q, k and v of OpenCLIP are one tensor in a single file: in the dtype that holds the values of all three."""
    copytree(make_twin("sd2").folder, tmp_path / "hub")
    path = tmp_path / "hub" / "text_encoder" / "model.safetensors"
    stored = load_file(path)
    first = next(name for name in stored if name.endswith("layers.0.self_attn.q_proj.weight"))
    kinds = {"q": torch.float16, "k": torch.bfloat16, "v": torch.float16}
    names = {part: first.replace("q_proj", f"{part}_proj") for part in kinds}
    for part, kind in kinds.items():
        stored[names[part]] = stored[names[part]].to(kind)
    stored[names["k"]][0, 0] = 1e30  # more than float16 holds
    save_file(stored, path)
    convert(tmp_path / "hub", tmp_path / "one.safetensors")
    written = load_file(tmp_path / "one.safetensors")
    (stacked,) = [written[name] for name in written if name.endswith("resblocks.0.attn.in_proj_weight")]
    expected = torch.cat([stored[names[part]].float() for part in kinds])
    assert stacked.dtype == torch.float32 and torch.equal(stacked, expected)

    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "hub")
    attention = pipe.text_encoder.get_submodule(names["q"].removesuffix(".q_proj.weight"))
    for part, kind in kinds.items():
        getattr(attention, f"{part}_proj").to(kind)
    pipe.save_single_file(tmp_path / "two.safetensors")
    (stacked,) = [
        t for name, t in load_file(tmp_path / "two.safetensors").items() if name.endswith("0.attn.in_proj_weight")
    ]
    assert torch.equal(stacked, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files(sd1: Twin, dtype: torch.dtype, tmp_path: Path) -> None:
    convert(sd1.file, tmp_path / "half.safetensors", dtype=dtype, config=sd1.folder)
    stored = load_file(tmp_path / "half.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    assert all(torch.equal(tensor.to(dtype), stored[name]) for name, tensor in load_file(sd1.file).items())
    for wanted in (None, dtype):  # float32 unless asked otherwise, as in the reference
        pipe = StableDiffusionPipeline.from_single_file(
            tmp_path / "half.safetensors", config=sd1.folder, torch_dtype=wanted
        )
        weight = pipe.unet.conv_in.weight
        assert pipe.dtype == weight.dtype == (wanted or torch.float32)
        assert torch.equal(weight, stored["model.diffusion_model.input_blocks.0.0.weight"].to(weight.dtype))


def test_moving_average_is_taken_when_asked_for(sd1: Twin, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = load_file(sd1.file)
    unet = {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}
    averages = {ema_name(name.removeprefix(UNET)): tensor + 1 for name, tensor in unet.items()}
    assert "model_ema.diffusion_modelinput_blocks00weight" in averages
    averages |= {f"{EMA}decay": torch.tensor(0.9999), f"{EMA}num_updates": torch.tensor(7)}
    save_file(tensors | averages, tmp_path / "both.safetensors")
    path = tmp_path / "both.safetensors"

    plain = StableDiffusionPipeline.from_single_file(path, config=sd1.folder)
    assert "use_ema=True" in caplog.text and states_equal(plain.unet, sd1.ours.unet)
    caplog.clear()
    for average in (
        StableDiffusionPipeline.from_single_file(path, config=sd1.folder, use_ema=True).unet,
        UNet2DConditionModel.from_single_file(path, config=sd1.folder, subfolder="unet", extract_ema=True),
    ):
        state = sd1.ours.unet.state_dict()
        assert all(torch.equal(tensor, state[name] + 1) for name, tensor in average.state_dict().items())
    assert not caplog.text
    theirs = diffusers.UNet2DConditionModel.from_single_file(
        str(path), config=str(sd1.folder), subfolder="unet", extract_ema=True
    )
    assert len(averages) > 102 and torch.equal(theirs.conv_in.weight, average.conv_in.weight)
    with pytest.raises(CheckpointError, match="use_ema=True: .*holds no moving average"):
        StableDiffusionPipeline.from_single_file(sd1.file, config=sd1.folder, use_ema=True)
    del averages[ema_name("out.2.bias")]
    save_file(tensors | averages, path)
    with pytest.raises(CheckpointError, match=r"1 missing:\n  model\.diffusion_model\.out\.2\.bias"):
        StableDiffusionPipeline.from_single_file(path, config=sd1.folder, use_ema=True)


def renamed(tensors: dict[str, torch.Tensor], old: str, new: str) -> dict[str, torch.Tensor]:
    return {new + name[len(old) :]: tensor for name, tensor in tensors.items() if name.startswith(old)}


@pytest.mark.parametrize(
    ("part", "prefix"),
    [
        ("unet", "model.diffusion_model."),
        ("unet", "diffusion_model."),
        ("unet", ""),
        ("vae", "first_stage_model."),
        ("vae", "vae."),
        ("vae", ""),
    ],
)
def test_networks_alone(sd1: Twin, part: str, prefix: str, tmp_path: Path) -> None:
    kind = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[part]
    table = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part]
    save_file(renamed(load_file(sd1.file), table, prefix), tmp_path / "bare.safetensors")
    from_bare = kind.from_single_file(tmp_path / "bare.safetensors", config=sd1.folder, subfolder=part)
    from_whole = kind.from_single_file(sd1.file, config=sd1.folder, subfolder=part)
    stored = sd1.folder / part / "diffusion_pytorch_model.safetensors"  # in the Hub's spelling
    from_hub = kind.from_single_file(stored, config=sd1.folder, subfolder=part)
    for model in (from_bare, from_whole, from_hub):
        assert states_equal(model, getattr(sd1.ours, part)) and not model.training


def test_other_spellings_of_whole_files(sd1: Twin, tmp_path: Path) -> None:
    tensors = load_file(sd1.file)
    text = "cond_stage_model.transformer."
    attention = [name for name in tensors if ".attn_1." in name and tensors[name].ndim == 4]
    assert len(attention) == 8
    other = {name.replace(f"{text}text_model.", text): tensor for name, tensor in tensors.items()}
    other |= {name: tensors[name].flatten(1).clone() for name in attention}  # linear, not 1x1 convolutions
    other |= {
        "betas": torch.ones(1000),
        "global_step": torch.tensor(875000),
        f"{text}embeddings.position_ids": torch.arange(77)[None],
        "cond_stage_model.logit_scale": torch.tensor(4.6),
    }
    save_file(other, tmp_path / "other.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / "other.safetensors", config=sd1.folder)
    assert all(states_equal(getattr(pipe, name), getattr(sd1.ours, name)) for name in NETWORKS[:3])
    reasons = {
        tensor.name: reason
        for tensor, reason in open_checkpoint(tmp_path / "other.safetensors", config=sd1.folder).dropped
    }
    assert reasons.keys() == other.keys() - {name.replace(f"{text}text_model.", text) for name in tensors}


def test_given_components_are_used_and_not_loaded(sd1: Twin, tmp_path: Path) -> None:
    no_vae = {name: tensor for name, tensor in load_file(sd1.file).items() if not name.startswith("first_stage_model.")}
    save_file(no_vae, tmp_path / "no_vae.safetensors")
    scheduler = DDIMScheduler.from_config(sd1.ours.scheduler.config)
    given = {"vae": sd1.ours.vae, "scheduler": scheduler}
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / "no_vae.safetensors", config=sd1.folder, **given)
    assert pipe.vae is sd1.ours.vae and isinstance(pipe.scheduler, DDIMScheduler)
    whole = StableDiffusionPipeline.from_single_file(sd1.file, config=sd1.folder, **given)  # its own vae is left alone
    assert whole.vae is sd1.ours.vae
    with pytest.raises(CheckpointError, match=r"holds no weights of vae .*vae=AutoencoderKL.from_pretrained"):
        StableDiffusionPipeline.from_single_file(tmp_path / "no_vae.safetensors", config=sd1.folder)


# --- families: recognised from a header, configured by the package ---------------------------------------------------

FULL = ["v1-5-pruned-emaonly", "v2-1_768-ema-pruned", "sd_xl_base_1.0", "sd_xl_refiner_1.0"]
PARAMETERS = {  # as their model cards and papers say: 860 M, 866 M, 2.6 B; 123 M, 340 M, 695 M
    "v1-5-pruned-emaonly": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "v2-1_768-ema-pruned": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sd_xl_base_1.0": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
    "sd_xl_refiner_1.0": {"unet": 2_259_526_660, "vae": 83_653_863, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("name", FULL)
def test_full_size_files_have_every_tensor_that_their_family_needs(name: str, tmp_path: Path) -> None:
    tensors = headers.read_list(headers.HERE / f"{name}.json")
    path = sparse_file(tmp_path / f"{name}.safetensors", tensors)
    assert path.stat().st_size > 4e9
    checkpoint = open_checkpoint(path, ask=False)
    assert not checkpoint.wrong and checkpoint.layout == "single-file"
    counts = {p.name: sum(torch.Size(t.shape).numel() for t in p.found.values()) for p in checkpoint.parts}
    assert counts == PARAMETERS[name]
    assert checkpoint.prediction == (None if name.startswith("v2") else "epsilon")


@pytest.mark.parametrize(
    ("name", "prediction", "pad", "scheduler"),
    [
        ("v1-5-pruned-emaonly", None, 49_407, "PNDMScheduler"),
        ("v2-1_768-ema-pruned", "v_prediction", 0, "DDIMScheduler"),
    ],
)
def test_full_size_pipelines_need_nothing_but_the_file(
    name: str, prediction: str | None, pad: int, scheduler: str, tmp_path: Path
) -> None:
    """Weights are mapped, not read, so a pipeline of two gigabytes of zeros is there at once."""
    tensors = headers.read_list(headers.HERE / f"{name}.json")
    path = sparse_file(tmp_path / "full.safetensors", {name: ["F16", shape] for name, (_, shape) in tensors.items()})
    pipe = DiffusionPipeline.from_single_file(path, torch_dtype="float16", prediction_type=prediction)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler).__name__ == scheduler
    assert pipe.tokenizer.pad_token_id == pad and pipe.dtype == torch.float16
    assert pipe.unet.num_parameters() == PARAMETERS[name]["unet"]
    assert pipe.unet.config.sample_size == (96 if prediction == "v_prediction" else 64)
    assert pipe.scheduler.config.get("prediction_type", "epsilon") == (prediction or "epsilon")
    assert pipe.vae.config.scaling_factor == 0.18215 and pipe.vae.config.force_upcast


def test_lists_of_published_files_are_what_the_table_derives() -> None:
    assert {path.stem for path in headers.HERE.glob("*.json")} == headers.PUBLISHED.keys()
    for name, published in headers.PUBLISHED.items():
        content = json.loads((headers.HERE / f"{name}.json").read_text())
        assert content["note"] == headers.NOTE
        tensors = headers.read_list(headers.HERE / f"{name}.json")
        assert not any(why_dropped(tensor) for tensor in tensors)
        if published.like:  # the same but for the input: 9 or 8 channels, or 4 as well
            assert content["tensors"].keys() <= {"model.diffusion_model.input_blocks.0.0.weight"}
    name = "v2-1_512-ema-pruned"
    assert headers.read_list(headers.HERE / f"{name}.json") == headers.derive(headers.PUBLISHED[name])


def test_lists_are_compared_with_files(sd1: Twin, tmp_path: Path) -> None:
    listed = headers.read_list(headers.HERE / "v1-5-pruned-emaonly.json")
    gone, other, *_ = listed
    found = {name: entry for name, entry in listed.items() if name != gone}
    found |= {other: ["F16", [1280]], "betas": ["F32", [1000]], "x": ["F32", [1]]}
    path = str(sparse_file(tmp_path / "file.safetensors", found))
    lines = headers.differences(listed, headers.tensors_of(path))
    assert [line.split()[:2] for line in lines] == [["missing", gone], ["different", other], ["unexpected", "x"]]
    headers.write_list(tmp_path / "made.json", {"source": path}, headers.tensors_of(path))
    assert headers.differences(headers.read_list(tmp_path / "made.json"), headers.tensors_of(path)) == []
    assert {"unet/conv_in.weight", "vae/quant_conv.bias"} <= headers.tensors_of(str(sd1.folder)).keys()


def their_choice(shapes: dict[str, tuple[int, ...]]) -> str:
    """Return the repository that the reference configures such a file from."""
    utils = diffusers.loaders.single_file_utils
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return utils.fetch_diffusers_config(meta)["pretrained_model_name_or_path"].split("/")[1]


def test_families_are_recognised_as_the_reference_does() -> None:
    lists = {name: headers.read_list(headers.HERE / f"{name}.json") for name in headers.PUBLISHED}
    first = "model.diffusion_model.input_blocks.0.0.weight"
    lists["x4"] = headers.derive(headers.Published("", "stable-diffusion-x4-upscaler", "F32"))
    lists["xl inpainting"] = lists["sd_xl_base_1.0"] | {first: ["F16", [320, 9, 3, 3]]}
    seen = set()
    for tensors in lists.values():
        shapes = {name: tuple(shape) for name, (_, shape) in tensors.items()}
        family = recognise(shapes, "model.diffusion_model.", "file")
        theirs = their_choice(shapes)
        assert theirs in family.configs.values(), family.title
        assert PackagedConfigs(theirs).read("model_index.json")["_class_name"]
        seen.add(family.title)
    xl_instruct = {f.title for f in FAMILIES if f.title.startswith("Stable Diffusion XL InstructPix2Pix")}
    pruned = {f.title for f in FAMILIES if f.left is not None}  # see ``test_single_file_pruned``
    # The reference takes XL's instruct files for XL base, and pruned ones for what they were pruned from.
    assert seen | xl_instruct | pruned == {f.title for f in FAMILIES}
    assert all((packaged_configs.PUBLISHED / f"{name}.json").is_file() for f in FAMILIES for name in f.configs.values())


HUB_CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"


@pytest.mark.parametrize("name", sorted({name for f in FAMILIES for name in f.configs.values()}))
def test_packaged_configurations_are_the_published_ones(name: str) -> None:
    configs = PackagedConfigs(name)
    repo = next(HUB_CONFIGS.glob(f"*--{name}"), None)  # None: derived from another, as the file says
    index = configs.read("model_index.json")
    if (kind := getattr(minidiff, index["_class_name"], None)) is not None:  # there is none for upscaling
        parts = kind._from_index(index, configs, {})  # the pipeline takes them all
        has = {part for part in NETWORKS if index.get(part, [None])[0]}
        assert {part for part in NETWORKS if parts.get(part)} == has
    for part in NETWORKS:
        path = repo / part / "config.json" if repo else Path()
        if path.is_file():
            complete = {"unet": unet_config, "vae": vae_config}.get(part, clip_config)
            packaged, published = complete(configs.read(f"{part}/config.json")), complete(json.loads(path.read_text()))
            assert described(packaged) == described(published), part
    scheduler = getattr(minidiff, index["scheduler"][1]).from_config(configs.read("scheduler/scheduler_config.json"))
    assert scheduler.config.beta_end == (0.02 if "x4" in name else 0.012)
    assert scheduler.config.beta_schedule == "scaled_linear"
    said = "v_prediction" if name in ("stable-diffusion-2-1", "stable-diffusion-x4-upscaler") else "epsilon"
    assert scheduler.config.get("prediction_type", "epsilon") == said


def described(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that describe the network."""
    return {
        k: v
        for k, v in dict(config).items()
        if not k.startswith("_") and k not in ("torch_dtype", "transformers_version")
    }


@pytest.mark.parametrize(
    ("model", "component", "published"),
    [
        ("stable-diffusion-v1-5", "tokenizer", "sd15"),
        ("stable-diffusion-2-1", "tokenizer", "sd21"),
    ],
)
def test_packaged_tokenizers(model: str, component: str, published: str, tmp_path: Path) -> None:
    ours = PackagedConfigs(model).tokenizer(component)
    theirs = transformers.CLIPTokenizer.from_pretrained(write_folder(tmp_path, TOKENIZERS[published]))
    assert len(ours) == len(theirs) == 49_408 and ours.pad_token_id == theirs.pad_token_id
    texts = ["a photo of an astronaut riding a horse on mars!", "Ça va? 1234", "", "<|EndOfText|> !"]
    options = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert ours(texts, **options).input_ids == theirs(texts, **options).input_ids


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sd1: Twin) -> Iterator[Path]:
    """Make the package believe that the tiny twin was published, as 'tiny-eps' and 'tiny-v', a family like SD 2.x."""
    sections = {}
    for path in sd1.folder.rglob("*.json"):
        if path.name != "tokenizer.json":
            sections[path.relative_to(sd1.folder).as_posix()] = json.loads(path.read_text())
    sections["tokenizer/special_tokens_map.json"] = {}
    scheduler = sections["scheduler/scheduler_config.json"]
    (tmp_path / "tiny-eps.json").write_text(json.dumps(sections))
    v = {"scheduler/scheduler_config.json": scheduler | {"prediction_type": "v_prediction"}}
    (tmp_path / "tiny-v.json").write_text(json.dumps({"extends": "tiny-eps", **v}))
    family = families.Family("Tiny 2.x", 24, 4, {"epsilon": "tiny-eps", "v_prediction": "tiny-v"})
    monkeypatch.setattr(families, "FAMILIES", (family,))
    monkeypatch.setattr(families, "AUTOENCODER", family)
    monkeypatch.setattr(packaged_configs, "PUBLISHED", tmp_path)
    monkeypatch.setattr(packaged_configs, "clip_vocabulary", vocabulary)
    yield sd1.file


def with_metadata(path: Path, target: Path, metadata: dict[str, str], **more: torch.Tensor) -> Path:
    save_file(load_file(path) | more, target, metadata=metadata)
    return target


def test_what_the_file_cannot_tell_is_asked_for(packaged: Path, tmp_path: Path) -> None:
    def load(path: Path, **options: Any) -> Any:
        return StableDiffusionPipeline.from_single_file(path, **options)

    silent = with_metadata(packaged, tmp_path / "silent.safetensors", {"format": "pt"})
    for call in (load, UNet2DConditionModel.from_single_file):
        with pytest.raises(ValueError, match=r"silent\.safetensors is Tiny 2\.x.*prediction_type='v_prediction'"):
            call(silent)
    assert load(silent, prediction_type="epsilon").scheduler.config.get("prediction_type", "epsilon") == "epsilon"
    assert load(silent, prediction_type="v_prediction").scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="PNDMScheduler does not implement prediction_type='sample'"):
        load(silent, prediction_type="sample")
    assert load(silent, scheduler=DDIMScheduler(prediction_type="v_prediction")).unet is not None
    with pytest.raises(ValueError, match="prediction_type should be one of .* found 'v'"):
        load(silent, prediction_type="v")
    assert load(packaged).scheduler.config.get("prediction_type", "epsilon") == "epsilon"  # ours say what they are
    said = {"modelspec.prediction_type": "v"}
    told = with_metadata(packaged, tmp_path / "told.safetensors", said)
    assert load(told).scheduler.config.prediction_type == "v_prediction"
    marked = with_metadata(packaged, tmp_path / "mark.safetensors", {}, v_pred=torch.ones(0), ztsnr=torch.ones(0))
    with pytest.raises(ConfigError, match="rescale_betas_zero_snr"):  # PNDM has no such option
        load(marked)
    path = packaged_configs.PUBLISHED / "tiny-v.json"
    path.write_text(path.read_text().replace("PNDMScheduler", "DDIMScheduler"))
    sections = json.loads((packaged_configs.PUBLISHED / "tiny-eps.json").read_text())
    sections["model_index.json"]["scheduler"] = ["diffusers", "DDIMScheduler"]
    (packaged_configs.PUBLISHED / "tiny-eps.json").write_text(json.dumps(sections))
    scheduler = load(marked).scheduler
    assert scheduler.config.prediction_type == "v_prediction" and scheduler.config.rescale_betas_zero_snr
    loaded = DiffusionPipeline.from_single_file(told)  # the base class makes what the family is for
    assert type(loaded) is StableDiffusionPipeline
    assert AutoencoderKL.from_single_file(silent).config.block_out_channels == VAE["block_out_channels"]


def test_the_command_line_draws_from_a_file(packaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--model", str(packaged), "--steps", "1", "--device", "cpu", "-o", str(tmp_path / "x.png")]
    assert main(["generate", "red heart", *arguments]) == 0
    assert (tmp_path / "x.png").is_file()
    with pytest.raises(CheckpointError, match="from_single_file reads checkpoints in one file"):
        StableDiffusionPipeline.from_pretrained(packaged)


def test_no_network_for_a_local_file(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*args: Any, **options: Any) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(hub.Repo, "_download", reached)
    pipe = StableDiffusionPipeline.from_single_file(str(packaged))
    assert np.isfinite(draw(pipe)).all()
    with pytest.raises(CheckpointNotFoundError, match="there is no file 'nothing.safetensors'"):
        StableDiffusionPipeline.from_single_file("nothing.safetensors")


def test_a_bare_autoencoder_says_which_scaling_it_was_given(
    sd1: Twin, packaged: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from minidiff.checkpoints.original import single_file

    monkeypatch.setattr(single_file, "AUTOENCODER", families.AUTOENCODER)
    save_file(renamed(load_file(packaged), "first_stage_model.", ""), tmp_path / "vae.safetensors")
    assert AutoencoderKL.from_single_file(tmp_path / "vae.safetensors").config.scaling_factor == 0.18215
    assert "scaling_factor=0.13025" in caplog.text
    caplog.clear()
    vae = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors", scaling_factor=0.13025)
    assert vae.config.scaling_factor == 0.13025 and not caplog.text


# --- what a file says of itself: what its UNet predicts, and its configuration ---------------------------------------


def as_v(twin: Twin, folder: Path, scheduler: Any) -> Path:
    """Save the twin with another scheduler, in Hub layout and as one file."""
    pipe = twin.our_class(**{**twin.ours.components, "scheduler": scheduler})
    pipe.save_pretrained(folder)
    pipe.save_single_file(folder / "x.safetensors")
    return folder


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def test_marks_of_v_prediction_and_zero_snr_travel(sd1: Twin, tmp_path: Path) -> None:
    """Other programs look for empty tensors of these names."""
    folder = as_v(sd1, tmp_path / "v", DDIMScheduler.from_config(sd1.ours.scheduler.config, **ZERO_SNR))
    convert(folder, tmp_path / "a.safetensors")
    assert_same_file(tmp_path / "a.safetensors", folder / "x.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors["v_pred"].shape == tensors["ztsnr"].shape == (0,)
    assert not {"v_pred", "ztsnr"} & load_file(sd1.file).keys()
    save_file(tensors, tmp_path / "marks.safetensors")  # the configuration lacks them
    plain = as_v(sd1, tmp_path / "plain", DDIMScheduler.from_config(sd1.ours.scheduler.config))
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / "marks.safetensors", config=plain)
    assert ZERO_SNR.items() <= dict(pipe.scheduler.config).items()
    checkpoint = convert(tmp_path / "marks.safetensors", tmp_path / "hub", config=plain)
    assert (checkpoint.prediction, checkpoint.zero_snr) == ("v_prediction", True)
    assert "prediction  v_prediction, trained with zero terminal SNR\n" in report(checkpoint)
    fields = json.loads((tmp_path / "hub/scheduler/scheduler_config.json").read_text())
    assert ZERO_SNR.items() <= fields.items()
    convert(tmp_path / "marks.safetensors", tmp_path / "again.safetensors", config=plain)
    assert {"v_pred", "ztsnr"} < load_file(tmp_path / "again.safetensors").keys()
    save_file(load_file(sd1.file), tmp_path / "said.safetensors", {"modelspec.prediction_type": "v"})
    pipe = StableDiffusionPipeline.from_single_file(tmp_path / "said.safetensors", config=plain)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    with pytest.raises(ConfigError, match="PNDMScheduler has no option 'rescale_betas_zero_snr'"):
        convert(tmp_path / "marks.safetensors", tmp_path / "pndm", config=sd1.folder)
    assert not (tmp_path / "pndm").exists()
    convert(tmp_path / "marks.safetensors", tmp_path / "pndm.safetensors", config=sd1.folder)  # a file need not
    assert {"v_pred", "ztsnr"} < load_file(tmp_path / "pndm.safetensors").keys()
    again = StableDiffusionPipeline.from_single_file(tmp_path / "pndm.safetensors", scheduler=DDIMScheduler(**ZERO_SNR))
    assert states_equal(again.unet, sd1.ours.unet)


def test_a_scheduler_that_contradicts_the_file_is_said(sd1: Twin, tmp_path: Path, caplog: Any) -> None:
    save_file(load_file(sd1.file) | {"v_pred": torch.ones(0)}, tmp_path / "v.safetensors")
    for prediction, said in (("v_prediction", False), ("epsilon", True)):
        scheduler = DDIMScheduler(prediction_type=prediction)
        options = {"config": sd1.folder, "scheduler": scheduler}
        pipe = StableDiffusionPipeline.from_single_file(tmp_path / "v.safetensors", **options)
        assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.prediction_type == prediction
        assert (
            "says that its UNet predicts v_prediction, and the given scheduler or prediction_type epsilon"
            in caplog.text
        ) == said


def test_a_saved_file_needs_nothing_beside_it(twin: Twin, tmp_path: Path) -> None:
    """Its header says its configuration, down to a vocabulary that is not CLIP's."""
    for kind in (DiffusionPipeline, twin.our_class):
        pipe = kind.from_single_file(twin.file)
        assert type(pipe) is twin.our_class and pipe.config.to_dict() == twin.ours.config.to_dict()
        assert pipe.scheduler.config.to_dict() == twin.ours.scheduler.config.to_dict()
        assert np.array_equal(draw(pipe, **twin.arguments), draw(twin.ours, **twin.arguments))
    assert states_equal(UNet2DConditionModel.from_single_file(twin.file), twin.ours.unet)
    convert(twin.file, tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "back.safetensors")
    assert_same_file(tmp_path / "back.safetensors", twin.file)
    convert(tmp_path / "hub/vae", tmp_path / "vae.safetensors")  # a network alone says its own
    vae = AutoencoderKL.from_single_file(tmp_path / "vae.safetensors")
    assert states_equal(vae, twin.ours.vae) and vae.config.scaling_factor == twin.ours.vae.config.scaling_factor
    with pytest.raises(CheckpointNotFoundError, match="in the header of .*vae.safetensors has no model_index.json"):
        DiffusionPipeline.from_single_file(tmp_path / "vae.safetensors")


def test_new_words_travel_in_a_file(sd1: Twin, tmp_path: Path) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd1.folder)
    pipe.load_textual_inversion({"<cat>": torch.ones(2, 24)})
    pipe.save_single_file(tmp_path / "x.safetensors")
    again = StableDiffusionPipeline.from_single_file(tmp_path / "x.safetensors")
    assert again.tokenizer("a <cat>").input_ids == pipe.tokenizer("a <cat>").input_ids
    assert states_equal(again.text_encoder, pipe.text_encoder)


SAID: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is not JSON"),
    "not an object": ("[1]", "should be an object of objects"),
    "no objects": ({"model_index.json": 1}, "should be an object of objects"),
    "merges": ({"tokenizer/merges.txt": 1}, "should be an object of objects"),
    "nothing": ({}, "has no model_index.json"),
    "another class": (
        {"model_index.json": {"_class_name": "os.system"}},
        "asks for os.system, which",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_header_is_believed_only_so_far(name: str, sd1: Twin, tmp_path: Path) -> None:
    said, message = SAID[name]
    text = said if isinstance(said, str) else json.dumps(said)
    save_file(load_file(sd1.file), tmp_path / "x.safetensors", {"minidiff.config": text})
    with pytest.raises((CheckpointError, ConfigError), match=message) as error:
        DiffusionPipeline.from_single_file(tmp_path / "x.safetensors")
    assert "x.safetensors" in str(error.value)
    StableDiffusionPipeline.from_single_file(tmp_path / "x.safetensors", config=sd1.folder)  # what the caller says wins


def test_a_header_that_describes_another_model_is_an_error(sd1: Twin, tmp_path: Path) -> None:
    metadata = dict(SingleFile.of(sd1.file).metadata)
    tensors = load_file(sd1.file)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.ones(16, 9, 3, 3)
    save_file(tensors, tmp_path / "x.safetensors", metadata)
    with pytest.raises(CheckpointError, match="x.safetensors does not fit the configuration in the header of"):
        DiffusionPipeline.from_single_file(tmp_path / "x.safetensors")


# --- where files come from, and what is refused ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("https://huggingface.co/a/b/blob/main/x.safetensors", {}, ("a/b", "main", "x.safetensors")),
        ("https://hf.co/a/b/resolve/fp16/c/x.safetensors?download=true", {}, ("a/b", "fp16", "c/x.safetensors")),
        ("huggingface.co/a/b/x.safetensors", {"revision": "v2"}, ("a/b", "v2", "x.safetensors")),
        ("a/b/x.safetensors", {}, ("a/b", None, "x.safetensors")),
        ("a/b/c/x.safetensors", {}, ("a/b", None, "c/x.safetensors")),
    ],
)
def test_addresses_on_the_hub(
    source: str, options: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(hub.Repo, "_download", lambda repo, name: asked.append((repo.source, repo.revision, name)))
    find(source, options)
    assert asked == [expected]


def test_file_and_configuration_from_the_hub(sd1: Twin, tmp_path: Path) -> None:
    """The file is downloaded, of the repository that describes it only the configuration; a list needs the header."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "sd1.safetensors").symlink_to(sd1.file)
    code = f"""
import sys; sys.path.insert(0, {str(headers.HERE.parent)!r})
import headers, minidiff
minidiff.StableDiffusionPipeline.from_single_file("a/files/sd1.safetensors", config="a/hub")
print(len(headers.tensors_of("a/files/sd1.safetensors")))
"""
    with HubServer({"a/files": Repository({"main": files}), "a/hub": Repository({"main": sd1.folder})}) as server:
        assert run_with(server, tmp_path / "cache", code) == str(len(load_file(sd1.file)))
        downloaded = [path for path in server.downloaded() if path.endswith(".safetensors")]
    assert [path.split("/")[:2] for path in downloaded] == [["a", "files"]] * 2  # the file, and its header


REFUSED = [
    ("model.ckpt", {}, CheckpointError, r"model\.ckpt is a pickle: minidiff reads only safetensors.*convert"),
    ("https://huggingface.co/a/b/blob/main/x.ckpt", {}, CheckpointError, r"x\.ckpt is a pickle"),
    ("https://example.com/x.safetensors", {}, CheckpointNotFoundError, "not on the Hugging Face Hub; download it"),
    ("https://huggingface.co/a", {}, CheckpointNotFoundError, "names no file; expected https"),
    ("./x.safetensors", {}, CheckpointNotFoundError, r"there is no file 'x\.safetensors' \(looked from"),
    (".", {}, CheckpointError, r"\. is a folder; from_single_file needs one file, from_pretrained a folder"),
    ({"a": 1}, {}, TypeError, "takes a path or an address, found dict"),
    (
        "x.safetensors",
        {"original_config": "v1.yaml"},
        TypeError,
        "original_config='v1.yaml' is not implemented; give config=",
    ),
    (
        "x.safetensors",
        {"scheduler_type": "pndm"},
        TypeError,
        "scheduler_type='pndm' is not implemented; give scheduler=",
    ),
    (
        "x.safetensors",
        {"load_safety_checker": True},
        TypeError,
        "load_safety_checker=True is not implemented; pass safety_checker=StableDiffusionSafetyChecker",
    ),
    ("x.safetensors", {"disable_mmap": True}, TypeError, "disable_mmap=True is not implemented"),
    ("x.safetensors", {"device_map": "auto"}, TypeError, "device_map='auto' is not implemented"),
    (
        "https://huggingface.co/a/b/blob/main/x.safetensors",
        {"revision": "v2"},
        ValueError,
        "names the revision 'main', and revision='v2'",
    ),
]


@pytest.mark.parametrize("kind", [StableDiffusionPipeline, AutoencoderKL])
@pytest.mark.parametrize(("source", "options", "error", "message"), REFUSED)
def test_refused(kind: Any, source: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind.from_single_file(source, **options)


def test_arguments_that_ask_for_nothing_are_accepted(sd1: Twin) -> None:
    harmless = {"original_config": None, "disable_mmap": False, "low_cpu_mem_usage": True, "local_files_only": True}
    assert StableDiffusionPipeline.from_single_file(sd1.file, config=str(sd1.folder), **harmless).unet is not None


def test_wrong_pipeline_for_the_file_is_named(sd1: Twin, tmp_path: Path) -> None:
    tensors = headers.read_list(headers.HERE / "sd_xl_base_1.0.json")
    path = sparse_file(tmp_path / "xl.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"is for StableDiffusionXLPipeline: StableDiffusionPipeline has no place"):
        StableDiffusionPipeline.from_single_file(path)
    tensors = headers.read_list(headers.HERE / "v1-5-pruned-emaonly.json")
    path = sparse_file(tmp_path / "sd1.safetensors", tensors)
    with pytest.raises(ConfigError, match=r"names no text_encoder_2, which StableDiffusionXLPipeline needs"):
        StableDiffusionXLPipeline.from_single_file(path)
    with pytest.raises(TypeError, match="unknown arguments safety"):
        StableDiffusionPipeline.from_single_file(path, safety=1)


def test_every_pipeline_has_it(sd1: Twin, tmp_path: Path) -> None:
    kinds = [getattr(minidiff, name) for name in minidiff.__all__ if name.endswith("Pipeline")]
    assert {"from_single_file", "save_single_file"} <= set.intersection(*(set(dir(kind)) for kind in kinds))
    assert StableDiffusionXLImg2ImgPipeline in kinds
    ddpm = minidiff.DDPMPipeline(
        minidiff.UNet2DModel(
            sample_size=8,
            block_out_channels=(8, 8),
            norm_num_groups=4,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
        ),
        minidiff.DDPMScheduler(),
    )
    with pytest.raises(CheckpointError, match=r"no names for unet \(UNet2DModel\)"):
        ddpm.save_single_file(tmp_path / "ddpm.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_function_among_the_components_is_left_out(sd1: Twin, tmp_path: Path) -> None:
    """As ``save_pretrained`` leaves it out: a program may have set a safety checker of its own."""
    pipe = type(sd1.ours)(**sd1.ours.components)
    pipe.safety_checker = lambda images, clip_input: (images, None)
    pipe.save_single_file(tmp_path / "a.safetensors")
    assert type(pipe).from_single_file(tmp_path / "a.safetensors").safety_checker is None
