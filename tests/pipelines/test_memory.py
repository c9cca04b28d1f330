"""Offloading and the other memory switches: the picture stays the same, and each thing is on the device when it says.

There is no second device here that computes. Two stand-ins are as strict: weights that are NaN unless onloaded to
the device, for what is where when and for pictures; and torch's meta device, which refuses to meet the CPU in one
operation, for where latents, texts and times are made.
"""

import copy
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import minidiff
from minidiff.embedded import embedded_checkpoint
from minidiff.pipelines import offload
from minidiff.pipelines.base import DiffusionPipeline
from tests.theirs import randomize

KINDS = ["model", "sequential"]
LEVELS = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
UNET = LEVELS | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "attention_head_dim": 4,
}
VAE = LEVELS | {
    "sample_size": 16,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
DDPM = LEVELS | {
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
TEXT = {
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 49408,
    "projection_dim": 4,
}
PIPELINES = [name for name in minidiff.__all__ if name.endswith("Pipeline") and name != "DiffusionPipeline"]
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
MASK = Image.fromarray(np.kron(np.eye(2, dtype=np.uint8) * 255, np.ones((8, 8), dtype=np.uint8)))


def make(name: str, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Build a tiny pipeline of the class with random weights."""
    cls = getattr(minidiff, name)
    if name.startswith("DD"):
        parts = {"unet": minidiff.UNet2DModel(**DDPM), "scheduler": minidiff.DDPMScheduler()}
    else:
        Z = 2 if "Pix2Pix" in name else 1
        xl = "XL" in name
        added = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": TEXT["projection_dim"] + 6 * 4,
            "use_linear_projection": True,
        }
        width = TEXT["hidden_size"] * (2 if xl else 1)
        fields = UNET | {"in_channels": 4 * Z, "cross_attention_dim": width} | (added if xl else {})
        lcm = name.startswith("LatentConsistency")
        fields |= {"time_cond_proj_dim": 8} if lcm else {}
        tokenizer = minidiff.CLIPTokenizer.from_pretrained(embedded_checkpoint(), subfolder="tokenizer")
        parts = {
            "vae": minidiff.AutoencoderKL(**VAE),
            "text_encoder": minidiff.CLIPTextModel(TEXT),
            "tokenizer": tokenizer,
            "unet": minidiff.UNet2DConditionModel(**fields),
            "scheduler": minidiff.LCMScheduler()
            if lcm
            else minidiff.EulerDiscreteScheduler(beta_schedule="scaled_linear"),
        }
        if xl:
            parts |= {"text_encoder_2": minidiff.CLIPTextModelWithProjection(TEXT), "tokenizer_2": tokenizer}
    for k, part in enumerate(parts.values()):
        if isinstance(part, nn.Module):
            randomize(part, seed=k).to(dtype)
    pipe = cls(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: DiffusionPipeline, seed: int = 7, **arguments: Any) -> np.ndarray:
    """Make a picture in two steps; image and mask go to the pipelines that take them."""
    name = type(pipe).__name__
    asked: dict[str, Any] = {"num_inference_steps": 2, "seed": seed, "output_type": "np"}
    if not name.startswith("DD"):
        asked["prompt"] = "a red heart"
    if any(task in name for task in ("Img2Img", "Inpaint", "Pix2Pix")):
        asked["image"] = PICTURE
    if "Img2Img" in name:
        asked["strength"] = 1.0
    if "Inpaint" in name:
        asked["mask_image"] = MASK
    return pipe(**asked | arguments).images


class FakeDevice:
    """Records what is onloaded; a weight that is not is NaN, so that a picture made with it is refused."""

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.names: dict[int, str] = {}
        self.real: dict[int, Tensor] = {}
        self.here: list[str] = []  # the networks of the weights that are on the device
        self.fetched: list[str] = []  # networks in the order in which they came, without repetition
        self.bytes = self.peak = 0
        self.to_device = offload.to_device
        for name, network in pipe.components.items():
            if isinstance(network, nn.Module):
                for tensor in [*network.parameters(), *network.buffers()]:
                    self.names[id(tensor)], self.real[id(tensor)] = name, tensor.detach().clone()
                    tensor.data.fill_(torch.nan)

    def lend(self, tensor: Tensor, device: torch.device) -> Tensor:
        name = self.names.get(id(tensor), "a copy")
        if self.fetched[-1:] != [name]:
            self.fetched.append(name)
        self.bytes += tensor.nbytes
        self.peak = max(self.peak, self.bytes)
        copied = self.to_device(tensor, device)
        copied.data = self.real.get(id(tensor), tensor.detach()).clone()
        return copied

    def dropped(self, group: offload.ModuleGroup) -> None:
        self.bytes -= sum(one.weight.nbytes for one in group.swapped)


@contextmanager
def fake_device(pipe: DiffusionPipeline) -> Iterator[FakeDevice]:
    """Make the weights of an offloaded pipeline NaN at home, and give the true ones to the device."""
    fake = FakeDevice(pipe)
    drop = offload.ModuleGroup.offload

    def recorded(group: offload.ModuleGroup) -> None:
        fake.dropped(group)
        drop(group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offload, "to_device", fake.lend)
        patch.setattr(offload.ModuleGroup, "offload", recorded)
        yield fake


def enable(pipe: DiffusionPipeline, kind: str, device: str = "cpu") -> DiffusionPipeline:
    getattr(pipe, offload.METHODS[kind])(device=device)
    return pipe


def size(module: nn.Module, own: bool = False) -> int:
    return sum(tensor.nbytes for tensor in module.parameters(recurse=not own))


def networks(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PIPELINES)
def test_picture_and_peak(name: str, kind: str) -> None:
    pipe = make(name)
    before = call(pipe)
    with fake_device(enable(pipe, kind)) as device:
        after = call(pipe)
    assert before.std() > 0.05
    assert np.array_equal(after, before)
    assert device.bytes == 0  # nothing is left on the device
    parts = networks(pipe)
    if kind == "sequential":
        assert device.peak == max(size(module, own=True) for part in parts.values() for module in part.modules())
        return
    assert device.peak == max(map(size, parts.values()))
    texts = [part for part in ("text_encoder", "text_encoder_2") if part in parts]
    ways_in = ["vae"] if "Img2Img" in name or "Inpaint" in name or "Pix2Pix" in name else []
    assert [part for part in device.fetched if part in ("unet", "vae")] in (
        [[*ways_in, "unet", "vae"]] if "vae" in parts else [["unet"]]
    )
    assert device.fetched[: len(texts)] == texts


@pytest.mark.parametrize("kind", KINDS)
def test_a_safety_checker_comes_last(kind: str) -> None:
    vision = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    checker = randomize(minidiff.StableDiffusionSafetyChecker({"vision_config": vision, "projection_dim": 4}))
    parts = {"safety_checker": checker, "feature_extractor": minidiff.CLIPImageProcessor(size=16, crop_size=16)}
    pipe = minidiff.StableDiffusionPipeline(**{**make("StableDiffusionPipeline").components, **parts})
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(2.0)
    before = call(pipe)
    assert before.std() > 0.05
    with fake_device(enable(pipe, kind)) as device:
        after = pipe("a red heart", num_inference_steps=2, seed=7, output_type="np")
        assert device.fetched[-1] == "safety_checker" and device.bytes == 0
    assert np.array_equal(after.images, before) and after.nsfw_content_detected == [False]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("StableDiffusionPipeline", "model"),
        ("StableDiffusionPipeline", "sequential"),
        ("StableDiffusionXLPipeline", "model"),
        ("StableDiffusionInstructPix2PixPipeline", "sequential"),  # encodes a picture too
    ],
)
def test_everything_is_made_on_the_device(name: str, kind: str) -> None:
    pipe = enable(make(name), kind, "meta")
    assert pipe.device.type == "meta"
    assert {network.device.type for network in networks(pipe).values()} == {"cpu"}
    x = call(pipe, output_type="latent")
    assert x.device.type == "meta" and x.shape == (1, 4, 8, 8)
    assert pipe.vae.decode(x).sample.device.type == "meta"
    assert pipe.vae.encode(torch.zeros(1, 3, 16, 16, device="meta")).latent_dist.mean.device.type == "meta"
    pipe.remove_all_hooks()
    assert pipe.device.type == "cpu" and pipe.vae.decode(torch.zeros(1, 4, 2, 2)).sample.device.type == "cpu"


@pytest.fixture(scope="module")
def shared() -> DiffusionPipeline:
    """A pipeline for tests that put it back as it was."""
    return make("StableDiffusionPipeline")


@pytest.fixture
def pipe(shared: DiffusionPipeline) -> Iterator[DiffusionPipeline]:
    yield shared
    shared.remove_all_hooks()
    shared.disable_attention_slicing()


@pytest.mark.parametrize("kind", KINDS)
def test_methods_bring_their_network(kind: str) -> None:
    pipe = make("StableDiffusionPipeline")
    z, x = torch.randn(1, 4, 4, 4), torch.rand(1, 3, 8, 8)
    calls: list[Callable[[], Tensor]] = [
        lambda: pipe.vae.decode(z).sample,
        lambda: pipe.vae.encode(x).latent_dist.mean,
        lambda: pipe.vae(x).sample,
        lambda: pipe.text_encoder.norm_out(torch.ones(1, 2, 8)),
        lambda: pipe.text_encoder(torch.ones(1, 3, dtype=torch.long)).pooler_output,
        lambda: pipe.unet(z, 3, torch.ones(1, 2, 8)).sample,
    ]
    with torch.no_grad():
        before = [one() for one in calls]
        with fake_device(enable(pipe, kind)) as device:
            after = [one() for one in calls]
            assert not pipe("a red heart", num_inference_steps=1, clip_skip=1, output_type="pt").images.isnan().any()
            calls[-1]()
            assert (device.bytes > 0) == (kind == "model")  # the last one stays until another is called...
            pipe.maybe_free_model_hooks()
            assert device.bytes == 0  # ... or it is freed
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(b, a)


@pytest.mark.parametrize("kind", KINDS)
def test_threads(kind: str) -> None:
    pipe = make("StableDiffusionPipeline")
    alone = [call(pipe, seed) for seed in range(4)]
    with fake_device(enable(pipe, kind)) as device, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: call(pipe, seed), range(4)))
        if kind == "model":
            assert device.peak == max(map(size, networks(pipe).values()))  # one network at a time, whoever calls it
        assert device.bytes == 0
    for a, b in zip(alone, together, strict=True):
        assert np.array_equal(b, a)


def test_pipelines_that_share_networks_take_turns() -> None:
    base = make("StableDiffusionXLPipeline")
    other = minidiff.StableDiffusionXLImg2ImgPipeline(
        **base.components | {"unet": copy.deepcopy(base.unet)}, force_zeros_for_empty_prompt=True
    )
    for one in (base, other):
        one.set_progress_bar_config(disable=True)
        one.enable_model_cpu_offload(device="cpu")
    places = {id(network._offload.places[0]) for one in (base, other) for network in networks(one).values()}
    assert len(places) == 1
    with fake_device(base) as device:
        latents = call(base, output_type="latent")
        call(other, image=latents)
    assert device.peak == max(size(network) for network in networks(base).values())


@pytest.mark.parametrize("kind", KINDS)
def test_a_float32_copy_of_the_autoencoder_takes_turns_too(kind: str) -> None:
    """SDXL decodes with a copy where float16 would overflow; it is brought and dropped like the original."""
    pipe = make("StableDiffusionXLPipeline", torch.float16)
    assert pipe.vae.config.force_upcast
    before = call(pipe, output_type="pt")
    with fake_device(enable(pipe, kind)) as device, pytest.MonkeyPatch.context() as patch:
        upcast = copy.deepcopy(pipe.vae).float()
        for tensor, original in zip(upcast.parameters(), pipe.vae.parameters(), strict=True):
            tensor.data = device.real[id(original)].float()
        patch.setattr(pipe, "_decoder", lambda: upcast)
        after = call(pipe, output_type="pt")
        assert device.fetched[-1] == "a copy" and device.bytes == 0
    assert torch.equal(after, before)


def test_hooks_see_the_weights_of_their_layer() -> None:
    """Adapters read weights and buffers in forward hooks, when the layer's forward is over."""
    pipe = enable(make("StableDiffusionPipeline"), "sequential")
    seen = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, out: seen.append(module.weight.isnan().any().item()))
    with fake_device(pipe):
        call(pipe)
    assert seen == [False] * 2


# --- one switch after another ----------------------------------------------------------------------------------------


def test_to_after_offloading(pipe: DiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    enable(pipe, "model", "meta")
    assert pipe.to("cpu") is pipe and pipe.device.type == "meta"  # they are there already
    with caplog.at_level(logging.WARNING):
        pipe.to("meta")
    assert "enable_model_cpu_offload was called, and networks go to meta by themselves" in caplog.text
    assert len(caplog.records) == 1 and pipe.unet.device.type == "cpu"
    with pytest.raises(ValueError, match=r"to\('cuda'\): enable_model_cpu_offload was called.*remove_all_hooks"):
        pipe.to("cuda")
    enable(pipe, "sequential", "meta")
    for place in ("meta", "cuda"):
        with pytest.raises(ValueError, match="enable_sequential_cpu_offload was called"):
            pipe.to(place)
    pipe.to(torch.float64)
    assert pipe.unet.dtype == torch.float64 and call(pipe, output_type="latent").dtype == torch.float64
    pipe.to(dtype=torch.float32)
    pipe.remove_all_hooks()
    assert pipe.device.type == "cpu"


def test_offloading_again_replaces_what_was(pipe: DiffusionPipeline) -> None:
    before = call(pipe)
    for kind in [*KINDS, *KINDS[::-1]]:
        enable(pipe, kind)
        assert {network._offload.kind for network in networks(pipe).values()} == {kind}
        assert np.array_equal(call(pipe), before)
    pipe.remove_all_hooks()
    pipe.remove_all_hooks()
    for network in networks(pipe).values():
        assert not hasattr(network, "_offload")
        assert not any("_call_impl" in vars(module) for module in network.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_saving_what_is_offloaded(kind: str, pipe: DiffusionPipeline, tmp_path: Path) -> None:
    enable(pipe, kind)
    call(pipe, output_type="latent")
    pipe.unet.save_pretrained(tmp_path)
    loaded = minidiff.UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == pipe.unet.state_dict().keys()
    for name, tensor in pipe.unet.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert list(pipe.unet.state_dict()) == [name for name, _ in pipe.unet.named_parameters()]


def test_weights_are_never_replaced(pipe: DiffusionPipeline) -> None:
    before = [(tensor, tensor.data_ptr()) for tensor in pipe.unet.parameters()]
    for kind in KINDS:
        with fake_device(make("StableDiffusionPipeline")):
            call(enable(pipe, kind))
    assert all(a is b and a.data_ptr() == at for a, (b, at) in zip(pipe.unet.parameters(), before, strict=True))


def test_what_is_put_in_place_of_an_onloaded_weight_stays(pipe: DiffusionPipeline) -> None:
    enable(pipe, "model")
    with torch.no_grad():
        pipe.vae.decode(torch.zeros(1, 4, 2, 2))
        old, new = pipe.vae.post_quant_conv.bias, nn.Parameter(torch.zeros(4))
        pipe.vae.post_quant_conv.bias = new
        pipe.maybe_free_model_hooks()
    assert pipe.vae.post_quant_conv.bias is new
    pipe.vae.post_quant_conv.bias = old


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_call_leaves_nothing_behind(kind: str, error: type[BaseException]) -> None:
    pipe = make("StableDiffusionPipeline")
    before = call(pipe)

    def interrupt(module: nn.Module, args: Any) -> None:
        raise error

    with fake_device(enable(pipe, kind)) as device:
        handle = pipe.unet.up[0].res[0].conv1.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            call(pipe)
        handle.remove()
        assert np.array_equal(call(pipe), before)
        assert device.bytes == 0


def test_a_device_that_is_full(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    before = call(pipe)
    enable(pipe, "model")
    weights = [tensor for network in networks(pipe).values() for tensor in network.parameters()]
    left = [30]

    def lend(tensor: Tensor, device: torch.device) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return nn.Parameter(tensor.detach().clone())

    monkeypatch.setattr(offload, "to_device", lend)
    with pytest.raises(torch.OutOfMemoryError):
        call(pipe)
    at_home = [tensor for network in networks(pipe).values() for tensor in network.parameters()]
    assert all(a is b for a, b in zip(at_home, weights, strict=True))
    left[0] = 10**6
    assert not any(network._offload.places[0].group for network in networks(pipe).values())
    assert np.array_equal(call(pipe), before)


def test_a_network_in_use_is_not_taken_away(pipe: DiffusionPipeline) -> None:
    enable(pipe, "model")
    inside, go_on = threading.Event(), threading.Event()

    def wait(module: nn.Module, args: Any) -> None:
        inside.set()
        assert go_on.wait(60)

    handle = pipe.unet.conv_out.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, pipe, num_inference_steps=1)
        assert inside.wait(60)
        try:
            pipe.maybe_free_model_hooks()
            assert pipe.unet._offload.places[0].group is not None
            for change in (pipe.remove_all_hooks, lambda: pipe.to(torch.float64), lambda: enable(pipe, "sequential")):
                with pytest.raises(RuntimeError, match="is computing in another thread"):
                    change()
        finally:
            go_on.set()
        assert running.result() is not None
    handle.remove()


def test_a_network_inside_another_is_refused(pipe: DiffusionPipeline) -> None:
    """It would wait for itself otherwise."""
    enable(pipe, "model")
    handle = pipe.unet.conv_in.register_forward_hook(lambda *_: pipe.vae.decode(torch.zeros(1, 4, 2, 2)) and None)
    with pytest.raises(RuntimeError, match="inside a call of another one"):
        call(pipe)
    enable(pipe, "sequential")
    assert call(pipe) is not None
    handle.remove()


def test_optimized_networks_can_be_offloaded() -> None:
    pipe = make("StableDiffusionPipeline").optimize()
    before = call(pipe)
    with fake_device(enable(pipe, "model")) as device:
        assert np.array_equal(call(pipe), before)
        assert device.bytes == 0


def test_wrong_devices(pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "accelerator", lambda: None)
    for kind in KINDS:
        method = getattr(pipe, offload.METHODS[kind])
        with pytest.raises(RuntimeError, match=f"{offload.METHODS[kind]} needs an accelerator"):
            method()
        with pytest.raises(ValueError, match="give gpu_id=1 or the index in device='cuda:0', not both"):
            method(gpu_id=1, device="cuda:0")
        if not torch.cuda.is_available():
            with pytest.raises(RuntimeError, match="cuda:1 cannot be used here"):
                method(gpu_id=1, device="cuda")
    monkeypatch.setattr(offload, "accelerator", lambda: "meta")
    pipe.enable_model_cpu_offload()
    assert pipe.device.type == "meta"


# --- attention and autoencoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slices", "calls"), [(None, 1), ("auto", 4), ("max", 8), (1, 8), (3, 4), (4, 2)])
def test_attention_slicing(slices: Any, calls: int, pipe: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample and so many of its 4 heads at a time; two samples, of the prompt and of the empty one."""
    before = call(pipe)
    counted = []
    fused = F.scaled_dot_product_attention

    def counting(q: Tensor, *args: Any, **options: Any) -> Tensor:
        counted.append(q.shape[-2:])
        return fused(q, *args, **options)

    pipe.enable_attention_slicing(slices)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    assert np.array_equal(call(pipe), before)
    assert counted.count((64, 2)) == 2 * 3 * 2 * calls  # steps x transformers at this level x attentions in each
    pipe.disable_attention_slicing()
    assert {module.slice_size for module in pipe.unet.modules() if hasattr(module, "slice_size")} == {None}


@pytest.mark.parametrize("slices", [0, -1, True, 1.5, "half", [1, 2]])
def test_wrong_slices(slices: Any, pipe: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match='slice_size should be "auto", "max", a positive integer or None, found'):
        pipe.enable_attention_slicing(slices)


def test_more_heads_than_there_are(pipe: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="slice_size=5: this UNet has attention of 4 heads"):
        pipe.unet.set_attention_slice(5)
    assert pipe.unet.down[0].attn[0].blocks[0].self_attn.slice_size is None


def test_unconditional_attention_is_sliced_too() -> None:
    pipe = make("DDPMPipeline")
    before = call(pipe)
    pipe.enable_attention_slicing("max")
    assert np.array_equal(call(pipe), before)


def test_xformers_is_answered(pipe: DiffusionPipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipe.enable_xformers_memory_efficient_attention()
    assert "torch's fused attention" in caplog.text and len(caplog.records) == 1
    pipe.disable_xformers_memory_efficient_attention()
    pipe.unet.disable_xformers_memory_efficient_attention()
    with pytest.raises(ValueError, match="attention_op is not implemented"):
        pipe.enable_xformers_memory_efficient_attention(attention_op=print)


def test_switches_of_the_autoencoder(pipe: DiffusionPipeline) -> None:
    before = call(pipe, num_images_per_prompt=2)
    pipe.enable_vae_slicing()
    pipe.enable_vae_tiling()
    assert pipe.vae.use_slicing and pipe.vae.use_tiling
    # a picture of one tile stays the same; so does each of a batch, but for the kernels' choice of blocks
    np.testing.assert_allclose(call(pipe, num_images_per_prompt=2), before, atol=1e-6, rtol=0)
    pipe.disable_vae_slicing()
    pipe.disable_vae_tiling()
    assert not pipe.vae.use_slicing and not pipe.vae.use_tiling
    for switch in ("enable_vae_slicing", "disable_vae_slicing", "enable_vae_tiling", "disable_vae_tiling"):
        with pytest.raises(ValueError, match="this DDPMPipeline has no vae"):
            getattr(make("DDPMPipeline"), switch)()
