"""``pipe.optimize()`` against the same networks as they are, and against the reference.

The packed products exist in float32 and bfloat16 only. Where a formula is at stake they are replaced by torch's own in
float64, so that a wrong index cannot hide in rounding.
"""

import copy
import pickle
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import minidiff
from minidiff.fast import attention, convolutions, feed_forward, memo, optimize, packed, restore, strips, winograd
from minidiff.fast.convolutions import FastConv, FastUpsample, four_kernels
from minidiff.fast.memo import repeated
from minidiff.networks.layers import Attention, FeedForward, ResBlock, TransformerBlock, Upsample
from minidiff.networks.vae import Level
from minidiff.threads import computing
from tests.fast_ways import UNET, VAE, a_run, error, random
from tests.theirs import diffusers
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

TOPOLOGIES = {
    "SD 1": UNET,
    "SD 2": UNET | {"use_linear_projection": True, "attention_head_dim": [2, 4]},
    "pruned": UNET
    | {"layers_per_block": 2, "mid_block_type": None, "transformer_layers_per_block": [[2, 1], 1]}
    | {"reverse_transformer_layers_per_block": [1, [1, 2, 1]]},
    "text alone": UNET | {"only_cross_attention": True},
    "text late": UNET | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]},
}


@pytest.fixture(scope="module")
def folder_xl(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("tiny_xl"))


@pytest.fixture
def in_float64(monkeypatch, small_blocks):
    """Let torch's plain operators stand in for the packed ones, in any dtype."""

    def convolve(x, W, bias, stride, padding):
        return F.conv2d(x, W, bias, stride, padding).contiguous(memory_format=torch.channels_last)

    for module in (packed, convolutions, winograd, feed_forward, strips, attention):
        for name, stand_in in {
            "can_pack": lambda x, *weights: not torch.is_grad_enabled(),
            "pack_matrix": lambda W, rows: W.clone(),
            "product": lambda x, W, bias=None: F.linear(x, W, bias),
            "pack_kernel": lambda W, stride, padding, like: W.clone(),
            "convolve": convolve,
            "gelu_product": lambda x, W, bias: F.gelu(F.linear(x, W, bias)),
            "product_times": lambda x, W, bias, factor: F.linear(x, W, bias) * factor,
        }.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, stand_in)


def record(monkeypatch, place, name):
    """Return a list to which a function adds the number of rows of its first argument."""
    function, rows = getattr(place, name), []
    monkeypatch.setattr(place, name, lambda x, *args, **kwargs: rows.append(len(x)) or function(x, *args, **kwargs))
    return rows


@torch.no_grad()
@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
def test_unet_in_float64(name, size, in_float64, monkeypatch):
    unet = random(minidiff.UNet2DConditionModel(**TOPOLOGIES[name]).double())
    latents, ctx, t = torch.randn(2, 4, *size).double(), torch.randn(4, 5, 24).double(), torch.tensor(400)
    run, x = a_run(latents, t, passes=2), torch.cat([latents, latents])
    expected = unet(x, t, ctx).sample
    optimize(unet)
    assert error(unet(x, t, ctx).sample, expected) <= 1e-12  # measured 1e-15
    rows = record(monkeypatch, F, "group_norm")
    for _ in range(2):
        with computing(run):
            assert error(unet(x, run.plan.timesteps[0], ctx).sample, expected) <= 1e-12  # 1e-15: one sample, two texts
    assert rows[:3] == ([4, 4, 4] if name == "text late" else [2, 2, 4])  # the first residual block


@torch.no_grad()
def test_times_of_several_steps_in_one_batch(in_float64):
    """A slice of the run's timesteps lies where its first entry does, and is not that one time for all."""
    unet = random(minidiff.UNet2DConditionModel(**UNET).double())
    x, ctx, t = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 24).double(), torch.tensor([900, 100])
    expected = unet(x, t, ctx).sample
    optimize(unet)
    run = SimpleNamespace(plan=SimpleNamespace(timesteps=t), step=0, passes=2, latents=x[:1])
    with computing(run):
        assert error(unet(x, run.plan.timesteps[:2], ctx).sample, expected) <= 1e-12  # measured 1e-15


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (20, 12)])
@pytest.mark.parametrize("batch", [1, 2])
def test_vae_in_float64(size, batch, in_float64):
    vae = random(minidiff.AutoencoderKL(**VAE).double())
    x, z = torch.randn(batch, 3, *size).double(), torch.randn(batch, 4, *size).double()
    moments, pixels = vae.encode(x).latent_dist.parameters, vae.decode(z).sample
    optimize(vae)
    kept = x.clone(), z.clone()
    assert error(vae.encode(x).latent_dist.parameters, moments) <= 1e-12  # measured 2e-15
    assert error(vae.decode(z).sample, pixels) <= 1e-12  # 2e-15
    assert torch.equal(x, kept[0]) and torch.equal(z, kept[1])  # only what was made on the way is written over


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (9, 5)])
def test_unconditional_unet_in_float64(size, in_float64):
    unet = minidiff.UNet2DModel(
        block_out_channels=[8, 16],
        layers_per_block=1,
        down_block_types=["DownBlock2D", "AttnDownBlock2D"],
        up_block_types=["AttnUpBlock2D", "UpBlock2D"],
        norm_num_groups=4,
        attention_head_dim=4,
    )
    unet = random(unet.double())
    x, t = torch.randn(2, 3, *size).double(), torch.tensor([3, 700])
    expected = unet(x, t).sample
    optimize(unet)
    assert error(unet(x, t).sample, expected) <= 1e-12  # measured 1e-15


@torch.no_grad()
def test_the_four_kernels_see_what_the_one_saw():
    W, x = torch.randn(3, 2, 3, 3).double(), torch.randn(1, 2, 5, 4).double()
    expected = F.conv2d(F.interpolate(x, scale_factor=2), W, padding=1)
    for phase, kernel in enumerate(four_kernels(W)):
        i, j = divmod(phase, 2)
        found = F.conv2d(F.pad(x, (1, 1, 1, 1)), kernel)[:, :, i : i + 5, j : j + 4]
        assert error(found, expected[:, :, i::2, j::2]) <= 1e-13  # measured 3e-16


@torch.no_grad()
@pytest.mark.parametrize("L_ctx", [5, 40, 65])
def test_attention_in_blocks(L_ctx, in_float64):
    q, k, v = (torch.randn(2, L, 3, 8).double().transpose(1, 2) for L in (40, L_ctx, L_ctx))
    expected = F.scaled_dot_product_attention(q, k, v)
    for way in (attention.head_by_head, attention.all_heads):
        assert error(way(q, k, v), expected) <= 1e-13  # measured 6e-16


@torch.no_grad()
def test_which_attention_is_taken(monkeypatch):
    taken = []
    for name in ("head_by_head", "all_heads"):
        way = getattr(attention, name)
        monkeypatch.setattr(attention, name, lambda *qkv, name=name, way=way: taken.append(name) or way(*qkv))
    for dtype in (torch.float32, torch.bfloat16):
        network = torch.nn.ModuleList([Attention(8, 8, heads=1)]).to(dtype)
        optimize(network)
        for L, L_ctx in ((1030, 77), (1030, 1030), (77, 77)):
            network[0](torch.randn(1, L, 8, dtype=dtype), torch.randn(1, L_ctx, 8, dtype=dtype))
            taken.append(None)
    in_bfloat16 = ["all_heads", None, "head_by_head", None, "all_heads", None]
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # by processors older than AVX-512
        in_bfloat16 = [None] * 3
    assert taken == [None, "head_by_head", None, None, *in_bfloat16]
    taken.clear()
    network[0](torch.randn(1, 1030, 8, dtype=dtype), causal=True)
    assert not taken


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "convolution", "feed forward", "upsampling"])
def test_mixed_dtypes_are_refused_as_before(kind):
    make, shape = {
        "linear": (lambda: torch.nn.Linear(64, 64), (1, 9, 64)),
        "convolution": (lambda: torch.nn.Conv2d(64, 64, 3, padding=1), (1, 64, 32, 32)),
        "feed forward": (lambda: FeedForward(64), (1, 9, 64)),
        "upsampling": (lambda: Upsample(64), (1, 64, 32, 32)),
    }[kind]
    network = torch.nn.ModuleList([make()]).bfloat16()
    with pytest.raises(RuntimeError) as before:
        network[0](torch.randn(shape))
    optimize(network)
    with pytest.raises(RuntimeError) as after:
        network[0](torch.randn(shape))
    assert str(after.value) == str(before.value)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[8], [4, 4], [2, 2, 2, 2], [6, 2]])
def test_winograd(rows, in_float64):
    """A map in strips of any even number of rows, and one whose pixels are doubled in strips of any number."""
    W, bias, x = torch.randn(5, 3, 3, 3).double(), torch.randn(5).double(), torch.randn(2, 3, 8, 6).double()
    bordered = F.pad(x, (1, 1, 1, 1)).contiguous(memory_format=torch.channels_last)
    found, doubled = convolutions.empty((2, 5, 8, 6), x.dtype), convolutions.empty((2, 5, 16, 12), x.dtype)
    first = 0
    for count in rows:
        strip = bordered[:, :, first : first + count + 2]
        winograd.conv3x3(strip, winograd.pack(W, 9), bias, found[:, :, first : first + count])
        large = doubled[:, :, 2 * first : 2 * (first + count)]
        winograd.conv3x3_doubled(strip, winograd.pack(W, 9, winograd.G_DOUBLED), bias, large)
        first += count
    assert error(found, F.conv2d(x, W, bias, padding=1)) <= 1e-13  # measured 6e-16
    assert error(doubled, F.conv2d(F.interpolate(x, scale_factor=2), W, bias, padding=1)) <= 1e-13  # 6e-16


def test_when_winograd_is_taken():
    W, x = torch.empty(64, 64, 3, 3), torch.empty(1, 64, 32, 32)
    assert winograd.pays(W, x) and winograd.pays_doubled(W, x)
    for wrong in (x[:, :, :31], x[:, :, :, :31], x.bfloat16(), x[:, :, :16]):  # odd, imprecise, small
        assert not winograd.pays(W, wrong)
    assert not winograd.pays(W[:, :32], x[:, :32]) and not winograd.pays(W[:32], x)
    assert not winograd.pays(W[:, :, :1, :1], x)
    assert not winograd.pays_doubled(W, x.bfloat16()) and not winograd.pays_doubled(W, x[:, :, :4])


@torch.no_grad()
@pytest.mark.parametrize("name", packed.OPERATORS)
def test_a_torch_without_the_operators(name, monkeypatch):
    """They are private, and another version of torch may not have them: everything is computed as before."""
    there = SimpleNamespace(**{other: getattr(torch.ops.mkldnn, other) for other in packed.OPERATORS if other != name})
    monkeypatch.setattr(torch.ops, "mkldnn", there)
    monkeypatch.setattr(packed, "_dtypes", packed._dtypes.__wrapped__)
    network, x = torch.nn.ModuleList([torch.nn.Linear(8, 8), torch.nn.Conv2d(8, 8, 3)]), torch.randn(1, 8, 8, 8)
    optimize(network)
    for layer in network:
        assert torch.equal(layer(x), type(layer).forward(layer, x))


@torch.no_grad()
def test_what_winograd_costs_in_precision():
    """At the sizes of a real autoencoder: 512 channels, where 4,608 products are added up."""
    g = torch.Generator().manual_seed(0)
    conv, upsample = torch.nn.Conv2d(512, 64, 3, padding=1), Upsample(512)
    x = torch.randn(1, 512, 32, 32, generator=g)
    for module, fast in ((conv, FastConv(conv, False)), (upsample, FastUpsample(upsample, False))):
        x = x[:, :, : 32 if module is conv else 16]
        precise = copy.deepcopy(module).double()(x.double())
        # Measured over 20 seeds, the usual way in brackets: 1.4e-6 (3.8e-7) with kernels for AVX-512, 1.4e-6 (4.6e-6)
        # with those for AVX2 and 8e-7 (4.6e-6) with those for SSE 4.1.
        usual, found = error(module(x).double(), precise), error(fast(x).double(), precise)
        assert found <= 3e-6
        assert usual <= 5e-7 or not torch.ops.mkldnn._is_mkldnn_bf16_supported()  # the kernels are not for AVX-512


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 0.04)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: Attention(24, 24, heads=3),
        lambda: FeedForward(24),
        lambda: Upsample(24),
        lambda: torch.nn.Conv2d(24, 16, 3, padding=1),
    ],
)
def test_packed_layers(make, dtype, bound, small_blocks):
    """measured: float32 at most 6e-7; bfloat16 0.016, the layers as they are 0.012."""
    network = torch.nn.ModuleList([random(make())])
    shape = (2, 30, 24) if isinstance(network[0], Attention | FeedForward) else (2, 24, 6, 6)
    x = torch.randn(shape)
    precise = copy.deepcopy(network).double()[0](x.to(dtype).double())
    network = network.to(dtype)
    optimize(network)
    assert any("forward" in vars(module) for module in network.modules())
    assert error(network[0](x.to(dtype)).double(), precise) <= bound


@torch.no_grad()
def test_another_size_is_packed_for(monkeypatch):
    """A kernel packed for one size of map can be slow for another: 1x1 as a product, all others packed anew."""
    shapes = []
    pack = convolutions.pack_kernel
    monkeypatch.setattr(
        convolutions,
        "pack_kernel",
        lambda W, stride, padding, like: shapes.append(like.shape) or pack(W, stride, padding, like),
    )
    network = torch.nn.ModuleList([torch.nn.Conv2d(8, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 1), Upsample(8)])
    optimize(network)
    small, large = torch.randn(1, 8, 4, 4), torch.randn(1, 8, 6, 6)
    for x in (small, small, large):
        for layer in network:
            layer(x)
    assert shapes == [small.shape] * 5 + [large.shape] * 5  # the upsampling has four kernels
    x = large.contiguous(memory_format=torch.channels_last)
    assert error(network[1](x), F.conv2d(x, network[1].weight, network[1].bias)) <= 1e-6  # measured 2e-7
    assert network[1](x).is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def test_repeating_keeps_the_memory_format():
    x = torch.randn(1, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    assert repeated(x, 2).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(repeated(x, 2), torch.cat([x, x]))


# --- pipelines -------------------------------------------------------------------------------------------------------

CALL = {"num_inference_steps": 3, "output_type": "np", "guidance_scale": 5.0}


def pipeline(folder, **options):
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("xl", [False, True])
def test_pictures_are_the_reference_s(xl, folder, folder_xl, small_blocks):
    place = folder_xl if xl else folder
    theirs = diffusers.DiffusionPipeline.from_pretrained(place)
    theirs.set_progress_bar_config(disable=True)
    ours = pipeline(place).optimize()
    prompts = ["a smiling face", "two cats"]
    expected = theirs(prompts, generator=torch.manual_seed(3), **CALL).images
    found = ours(prompts, generator=torch.manual_seed(3), **CALL).images
    assert np.abs(found - expected).max() * 255 <= 0.05  # measured 0.004 levels
    without = {**CALL, "guidance_scale": 1.0}
    expected = theirs(prompts, generator=torch.manual_seed(3), **without).images
    found = ours(prompts, generator=torch.manual_seed(3), **without).images
    assert np.abs(found - expected).max() * 255 <= 0.05  # 0.004


@pytest.mark.parametrize("xl", [False, True])
def test_what_is_remembered_is_right_in_float64(xl, folder, folder_xl):
    place = folder_xl if xl else folder
    pipe = pipeline(place, torch_dtype=torch.float64)

    def change(pipe, i, t, tensors):  # another text from the second step on; none at all in the third
        if i == 0:
            changed = {name: tensor * 1.5 for name, tensor in tensors.items()}
        if i == 1:
            pipe._guidance_scale = 0.0
            changed = {name: tensor.chunk(2)[-1] for name, tensor in tensors.items()}
        return changed if i in (0, 1) else {}

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"] if xl else ["prompt_embeds"]
    call = {**CALL, "callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    expected = pipe("red heart", seed=1, **call).images
    found = pipe.optimize()("red heart", seed=1, **call).images
    assert np.abs(found - expected).max() <= 1e-10  # measured 1e-15
    assert not np.array_equal(found, pipe("red heart", seed=1, **CALL).images)  # the callback made a difference


def test_editing_shows_each_copy_another_image(tmp_path):
    """The copies of the latents are alike, and what the UNet sees is not: the last pass has no image."""
    pipe = minidiff.StableDiffusionInstructPix2PixPipeline.from_pretrained(
        save_tiny(tmp_path, unet={"in_channels": 8}), torch_dtype=torch.float64
    )
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "image": torch.rand(1, 3, 32, 32, dtype=torch.float64), "seed": 1}
    expected = pipe("red heart", **call).images
    assert np.abs(pipe.optimize()("red heart", **call).images - expected).max() <= 1e-10  # measured 1e-15


def test_steps_and_threads(folder, small_blocks):
    pipe = pipeline(folder).optimize()
    prompts = ["a smiling face", "red heart"]
    alone = [pipe(prompt, seed=5, **CALL).images for prompt in prompts]
    together = [None] * 2

    def draw(k):
        together[k] = pipe(prompts[k], seed=5, **CALL).images

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    runs = [pipe.steps(prompt, num_inference_steps=3, guidance_scale=5.0, seed=5) for prompt in prompts]
    last = list(zip(*runs, strict=True))[-1]  # two runs, step by step in turn
    for step, image in zip(last, alone, strict=True):
        assert np.array_equal(pipe.decode(step.latents, "np"), image)


# --- what must not change --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_new_weights_are_seen(small_blocks):
    unet = random(minidiff.UNet2DConditionModel(**UNET))
    optimize(unet)
    x, ctx, t = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.tensor(9)

    def check():
        plain = copy.deepcopy(unet)
        restore(plain)
        assert error(unet(x, t, ctx).sample, plain(x, t, ctx).sample) <= 1e-5  # measured 8e-7

    check()
    before = unet(x, t, ctx).sample
    random(unet, seed=1)  # in place
    check()
    unet.load_state_dict({name: tensor + 0.01 for name, tensor in unet.state_dict().items()}, assign=True)
    check()
    assert error(unet(x, t, ctx).sample, before) > 0.01
    unet.to(torch.bfloat16)
    assert unet(x.bfloat16(), t, ctx.bfloat16()).sample.dtype == torch.bfloat16
    unet.to(torch.float32)
    check()


def test_training_goes_on(small_blocks):
    vae = random(minidiff.AutoencoderKL(**VAE))
    x = torch.randn(1, 3, 16, 16)
    vae(x).sample.square().mean().backward()
    expected = [p.grad.clone() for p in vae.parameters()]
    vae.zero_grad()
    optimize(vae)
    vae(x).sample.square().mean().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(vae.parameters(), expected, strict=True))


@torch.no_grad()
def test_saving_copying_and_undoing(folder, tmp_path, small_blocks):
    pipe = pipeline(folder)
    names = list(pipe.unet.state_dict())
    expected = pipe("red heart", seed=1, **CALL).images
    fast = pipe.optimize()("red heart", seed=1, **CALL).images
    assert not np.array_equal(fast, expected)  # other rounding: the fast way was taken
    assert list(pipe.unet.state_dict()) == names
    pipe.save_pretrained(tmp_path / "saved")
    assert np.array_equal(pipeline(tmp_path / "saved")("red heart", seed=1, **CALL).images, expected)
    for copied in (copy.deepcopy(pipe.unet), pickle.loads(pickle.dumps(pipe.unet))):
        ours = minidiff.StableDiffusionPipeline(**{**pipe.components, "unet": copied})
        ours.set_progress_bar_config(disable=True)
        assert np.array_equal(ours("red heart", seed=1, **CALL).images, fast)
    restored = pipeline(folder).optimize().unoptimize()
    assert np.array_equal(restored("red heart", seed=1, **CALL).images, expected)


def test_what_is_saved(folder, small_blocks, monkeypatch):
    """Five steps under guidance: the text is read once, the first layers see one half, the fast forwards are there."""
    pipe = pipeline(folder).optimize()
    widths, product = [], packed.product
    monkeypatch.setattr(packed, "product", lambda x, *rest: widths.append(x.shape[-1]) or product(x, *rest))
    rows = record(monkeypatch, F, "group_norm")
    pipe(["red heart", "two cats"], seed=1, **{**CALL, "num_inference_steps": 5})
    readers = [m for m in pipe.unet.modules() if isinstance(m, TransformerBlock)]
    assert widths.count(24) == 2 * len(readers)  # keys and values; no other layer has this width
    norms = sum(isinstance(m, torch.nn.GroupNorm) for m in pipe.unet.modules())
    assert rows[: 6 * norms : norms] == [2] * 6 and max(rows) == 4  # PNDM takes one step twice
    kinds = {type(m) for network in (pipe.unet, pipe.vae) for m in network.modules() if "forward" in vars(m)}
    assert kinds == {torch.nn.Linear, torch.nn.Conv2d, Attention, FeedForward, ResBlock, Upsample, Level}


def test_a_run_lets_go_of_what_it_remembered(folder):
    """A pipeline keeps its last run, whose numbers a program may ask for; the keys of its texts would be megabytes."""
    pipe, memos = pipeline(folder).optimize(), []
    pipe.unet.conv_out.register_forward_hook(lambda *_: memos.append(weakref.ref(memo.current())))
    pipe("red heart", **CALL)
    assert memos[0] is memos[-1] and memos[0]() is None


def test_what_is_installed_beside_the_cpu():
    """On any other device only what helps there; optimized again on the CPU, everything."""
    for network, there in (
        (minidiff.UNet2DConditionModel(**UNET), {Attention, ResBlock}),
        (minidiff.AutoencoderKL(**VAE), {Attention}),
    ):
        optimize(network)
        here = {type(m) for m in network.modules() if "forward" in vars(m)}
        assert here > there
        optimize(network.to("meta"))
        assert {type(m) for m in network.modules() if "forward" in vars(m)} == there
        convolution = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
        assert convolution.weight.is_contiguous(memory_format=torch.channels_last)
        optimize(network.to_empty(device="cpu"))
        assert {type(m) for m in network.modules() if "forward" in vars(m)} == here


@torch.no_grad()
def test_hooks_are_called(small_blocks):
    """Adapters are hooks on single layers; the ways that do not call the layers must give way to them."""
    unet, vae = random(minidiff.UNet2DConditionModel(**UNET)), random(minidiff.AutoencoderKL(**VAE))
    x, ctx, z = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 24), torch.randn(1, 4, 8, 8)
    found = [*unet.named_modules(), *vae.decoder.named_modules()]
    hooked = {name: m for name, m in found if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    called = set()
    for name, layer in hooked.items():
        layer.register_forward_hook(lambda _, args, out, name=name: called.add(name) or out * 1.1)
    expected = unet(x, 3, ctx).sample, vae.decode(z).sample
    called.clear()
    optimize(unet), optimize(vae)
    assert error(unet(x, 3, ctx).sample, expected[0]) <= 1e-5  # measured 7e-7
    assert error(vae.decode(z).sample, expected[1]) <= 1e-5  # 8e-7
    assert called == set(hooked)
