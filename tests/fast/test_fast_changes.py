"""What people change on a network, before and after ``optimize``: it computes what the plain network computes.

Every change below is made to each inner layer of every kind of module that has a fast forward, in both orders, the
second after the weights were packed. That it changes the plain module too shows that the test could fail.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

import minidiff
from minidiff.fast import optimize, restore
from minidiff.networks.layers import Attention, FeedForward, TransformerBlock, Upsample
from minidiff.networks.vae import Level
from tests.fast_ways import UNET, error, random

LAYERS = {
    "linear": lambda: nn.Linear(24, 24),
    "convolution": lambda: nn.Conv2d(24, 24, 3, padding=1),
    "1x1": lambda: nn.Conv2d(24, 24, 1),
    "strided": lambda: nn.Conv2d(24, 24, 3, stride=2, padding=1),
    "attention": lambda: Attention(24, 24, heads=3),
    "feed forward": lambda: FeedForward(24),
    "upsampling": lambda: Upsample(24),
    "level": lambda: Level([24, 24, 24], 4, Upsample),
}
CONVOLUTIONS = ("convolution", "upsampling", "level")
ORDERS = ("before", "after")


# Changes that are not made to one network.
FOR_ALL = {
    "_conv_forward of the class",
    "forward of the class",
    "forward of the class of layers",
    "call of all modules",
    "hook on all modules",
    "pre-hook on all modules",
}


def leaves(layer):
    return [m for m in layer.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.GroupNorm)]


def convolutions(layer):
    return [m for m in layer.modules() if isinstance(m, nn.Conv2d)]


def inputs(layer):
    x = torch.randn(2, 30, 24) if isinstance(layer, nn.Linear | Attention | FeedForward) else torch.randn(2, 24, 6, 6)
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def values(**attributes):
    def change(layer, monkeypatch):
        for convolution in convolutions(layer):
            vars(convolution).update(attributes)

    return change


def in_groups(layer, monkeypatch):
    for conv in convolutions(layer):
        conv.groups, conv.weight = 2, nn.Parameter(conv.weight.detach()[:, ::2].clone())


def each_leaf(change):
    return lambda layer, monkeypatch: [change(leaf) for leaf in leaves(layer)]


def each_weight(change):
    return lambda layer, monkeypatch: [change(leaf) for leaf in leaves(layer) if leaf.weight.ndim > 1]


def patched(name):
    def change(leaf):
        plain = getattr(leaf, name)
        setattr(leaf, name, lambda *args, **kwargs: 1.5 * plain(*args, **kwargs))

    return each_leaf(change)


def patched_class(*kinds, name="forward"):
    def change(layer, monkeypatch):
        for kind in kinds or (type(layer),):
            plain = getattr(kind, name)
            monkeypatch.setattr(kind, name, lambda self, *args, _plain=plain: 1.5 * _plain(self, *args))

    return change


class Wrapped(nn.Module):
    """What adapters of other libraries put in the place of a layer; it has a weight too."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.weight, self.bias = layer, layer.weight, layer.bias

    def forward(self, x):
        return 1.5 * self.layer(x)


def exchanged(make):
    def change(layer, monkeypatch):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if child in leaves(layer):
                    setattr(parent, name, make(child))

    return change


def subclassed(leaf):
    class Subclass(type(leaf)):
        def forward(self, x):
            return 1.5 * super().forward(x)

    leaf.__class__ = Subclass


class Double(nn.Module):
    def forward(self, weight):
        return 2 * weight


def hook(leaf):
    leaf.register_forward_hook(lambda _, args, out: 1.5 * out - out.mean(dim=1, keepdim=True))


def pre_hook(leaf):
    leaf.register_forward_pre_hook(lambda _, args: (1.5 * args[0],))


def on_all_modules(register, result):
    def change(layer, monkeypatch):
        handle = register(result)
        monkeypatch.setattr(layer, "handle", handle, raising=False)  # for the fixture below

    return change


def transpose(leaf):
    """The same memory, read in another order."""
    leaf.weight.data = leaf.weight.data.transpose(0, 1)


def set_data(leaf):
    leaf.weight.data = leaf.weight.data.flip(0)


def blocks(**attributes):
    def change(layer, monkeypatch):
        for block in layer.res:
            vars(block).update(attributes)

    return change


def norms(**attributes):
    def change(layer, monkeypatch):
        for norm in [m for m in layer.modules() if isinstance(m, nn.GroupNorm)]:
            vars(norm).update(attributes)

    return change


def without_affine(layer, monkeypatch):
    for norm in [m for m in layer.modules() if isinstance(m, nn.GroupNorm)]:
        norm.affine, norm.weight, norm.bias = False, None, None


def larger_kernel(layer, monkeypatch):
    """Wider than what the fast ways were made for, by the weight alone."""
    for conv in convolutions(layer):
        conv.weight, conv.padding = nn.Parameter(F.pad(conv.weight.detach(), (1, 1, 1, 1), value=0.1)), (2, 2)


def own_convolution(layer, monkeypatch):
    for conv in convolutions(layer):
        conv._conv_forward = lambda x, W, bias: 1.5 * F.conv2d(x, W, bias, padding=1)


def compiled_call(leaf):
    leaf._compiled_call_impl = lambda x: 1.5 * type(leaf).forward(leaf, x)


def without_bias(leaf):
    leaf.register_parameter("bias", None)


def weight_norm(leaf):
    parametrizations.weight_norm(leaf).parametrizations.weight.original0.mul_(1.5)


def spectral_norm(leaf):
    torch.manual_seed(1)  # it draws
    parametrizations.spectral_norm(leaf).eval()


def larger_input(_, args):
    return 1.5 * args[0], *args[1:]


INNER = ("attention", "feed forward", "upsampling", "level")
CHANGES = {
    "padding mode": (values(padding_mode="circular"), (*CONVOLUTIONS, "strided")),
    "dilation": (values(dilation=(2, 2), padding=(2, 2)), CONVOLUTIONS),
    "padding a number": (values(dilation=2, padding=2), ("convolution", "strided")),
    "padding a word": (values(padding="valid"), ("convolution",)),
    "uneven stride": (values(stride=(2, 1)), ("convolution", "1x1", "strided")),
    "larger kernel": (larger_kernel, CONVOLUTIONS),
    "groups": (in_groups, (*CONVOLUTIONS, "1x1", "strided")),
    "_conv_forward": (own_convolution, CONVOLUTIONS),
    "_conv_forward of the class": (patched_class(nn.Conv2d, name="_conv_forward"), (*CONVOLUTIONS, "1x1", "strided")),
    "forward": (patched("forward"), LAYERS),
    "forward of the class": (patched_class(), LAYERS),
    "forward of the class of layers": (patched_class(nn.Linear, nn.Conv2d, nn.GroupNorm), LAYERS),
    "_call_impl": (patched("_call_impl"), LAYERS),
    "call of all modules": (patched_class(nn.Module, name="__call__"), LAYERS),
    "compiled": (each_leaf(compiled_call), LAYERS),
    "exchanged": (exchanged(Wrapped), INNER),
    "left out": (exchanged(lambda leaf: nn.Identity()), ("level", "upsampling", "attention")),
    "subclass": (each_leaf(subclassed), LAYERS),
    "no bias": (each_leaf(without_bias), [name for name in LAYERS if name != "level"]),
    "new bias": (each_leaf(lambda leaf: setattr(leaf, "bias", nn.Parameter(torch.ones(len(leaf.weight))))), LAYERS),
    "new weight": (each_leaf(lambda leaf: setattr(leaf, "weight", nn.Parameter(leaf.weight * 1.5))), LAYERS),
    "weight in place": (each_leaf(lambda leaf: leaf.weight.mul_(1.5)), LAYERS),
    "data": (each_leaf(set_data), LAYERS),
    "data in place": (each_leaf(lambda leaf: leaf.weight.data.mul_(1.5)), LAYERS),
    "data copied": (each_leaf(lambda leaf: leaf.weight.data.copy_(leaf.weight.flip(0))), LAYERS),
    "data of some rows": (each_leaf(lambda leaf: leaf.weight.data[: len(leaf.weight) // 4].zero_()), LAYERS),
    "data of some columns": (each_weight(lambda leaf: leaf.weight.data[:, :4].zero_()), LAYERS),
    "transposed": (each_weight(transpose), ("linear", "convolution", "1x1", "attention", "upsampling", "level")),
    "rounded": (lambda layer, _: layer.to(torch.bfloat16).to(torch.float32), LAYERS),
    "parametrization": (each_leaf(lambda leaf: parametrize.register_parametrization(leaf, "weight", Double())), LAYERS),
    "weight norm": (each_weight(weight_norm), LAYERS),
    "old weight norm": (each_weight(lambda leaf: nn.utils.weight_norm(leaf).weight_g.mul_(1.5)), LAYERS),
    "spectral norm": (each_weight(spectral_norm), LAYERS),
    "hook": (each_leaf(hook), LAYERS),
    "pre-hook": (each_leaf(pre_hook), LAYERS),
    "hook on all modules": (on_all_modules(register_module_forward_hook, lambda m, args, out: 1.5 * out), LAYERS),
    "pre-hook on all modules": (on_all_modules(register_module_forward_pre_hook, larger_input), LAYERS),
    "heads": (lambda layer, _: setattr(layer, "heads", 2), ("attention",)),
    "scale of the block": (blocks(scale=2.0), ("level",)),
    "dropout": (lambda layer, _: [setattr(block.train(), "dropout", 1.0) for block in layer.res], ("level",)),
    "groups of the norm": (norms(num_groups=2), ("level",)),
    "eps of the norm": (norms(eps=1.0), ("level",)),
    "norm without weights": (without_affine, ("level",)),
}  # fmt: skip


CASES = [(name, layer) for name, (_, layers) in CHANGES.items() for layer in layers]


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_changes_are_seen(name, layer, order, small_blocks, monkeypatch):
    change, make, handles = CHANGES[name][0], LAYERS[layer], []
    plain, fast = (nn.ModuleList([random(make()), nn.Linear(1, 1)]) for _ in range(2))
    x = inputs(plain[0])
    before = plain[0](x)
    try:
        if order == "before":
            change(fast[0], monkeypatch)
        optimize(fast)
        fast[0](x.clone())  # packs
        if order == "after":
            change(fast[0], monkeypatch)
        if name not in FOR_ALL:
            change(plain[0], monkeypatch)
        found, expected = fast[0](x.clone()), plain[0](x.clone())
    finally:
        handles = [vars(network[0]).get("handle") for network in (plain, fast)]
        [handle.remove() for handle in handles if handle is not None]
    assert found.shape == expected.shape
    assert error(found, expected) <= 1e-5
    assert before.shape != expected.shape or error(before, expected) > 1e-3


# --- how it is called ------------------------------------------------------------------------------------------------


def in_autocast(network, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return network(x)


def in_vmap(network, x):
    return torch.vmap(network, randomness="error")(x[:, None])


def with_a_tangent(network, x):
    with forward_ad.dual_level():
        found = network(forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.cat(forward_ad.unpack_dual(found)[:2])


def with_gradients(network, x):
    with torch.enable_grad():
        x = x.clone().requires_grad_()
        return torch.autograd.grad(network(x).square().sum(), x)[0]


def with_other_weights(network, x):
    return torch.func.functional_call(network, {name: 1.5 * p for name, p in network.named_parameters()}, (x,))


def twice_as_large(network, x):
    return network(x if x.ndim == 3 else x.repeat(1, 1, 2, 2))


def counted(network, x):
    with FlopCounterMode(display=False) as counter:
        network(x)
    return torch.tensor(float(counter.get_total_flops()))


def traced(network, x):
    return torch.jit.trace(network, (x,), check_trace=False)(2 * x)


def compiled(network, x):
    torch.compiler.reset()
    return torch.compile(network, backend="eager", fullgraph=True)(x)


class Marked(torch.Tensor):
    pass


WAYS = {
    "autocast": in_autocast,
    "vmap": in_vmap,
    "forward AD": with_a_tangent,
    "gradients": with_gradients,
    "functional_call": with_other_weights,
    "inference_mode": torch.inference_mode()(lambda network, x: network(x)),
    "another size": twice_as_large,
    "one sample without a batch": lambda network, x: network(x[0]),
    "no samples": lambda network, x: network(x[:0]),
    "float64": lambda network, x: network.double()(x.double()),
    "bfloat16": lambda network, x: network.bfloat16()(x.bfloat16()),
    "a keyword": lambda network, x: network(**{"input" if isinstance(network, nn.Linear | nn.Conv2d) else "x": x}),
    "a subclass of Tensor": lambda network, x: network(x.as_subclass(Marked)),
    "counted": counted,
    "traced": traced,
    "compiled": compiled,
    "a deep copy": lambda network, x: copy.deepcopy(network)(x),
    "pickled": lambda network, x: pickle.loads(pickle.dumps(network))(x),
}


@torch.no_grad()
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore:.*vmap:UserWarning"
)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("small_blocks", ["few products"], indirect=True)
def test_ways_to_call_it(layer, way, small_blocks):
    """What comes out is of the same type and dtype, or the same error."""
    plain, fast = (nn.ModuleList([random(LAYERS[layer]()), nn.Linear(1, 1)]) for _ in range(2))
    x = inputs(plain[0])
    optimize(fast)
    fast[0](x.clone())
    try:
        expected = WAYS[way](plain[0], x.clone())
    except Exception as wrong:
        with pytest.raises(type(wrong)):
            WAYS[way](fast[0], x.clone())
        return
    found = WAYS[way](fast[0], x.clone())
    assert (found.shape, found.dtype, type(found)) == (expected.shape, expected.dtype, type(expected))
    bound = 0.04 if expected.dtype == torch.bfloat16 else 1e-5
    assert expected.numel() == 0 or error(found, expected) <= bound  # measured: float32 2e-6, bfloat16 0.013


def test_a_batch_of_texts_that_does_not_fit(small_blocks):
    """Once, keys of four texts were taken for longer keys of two."""
    plain, fast = (nn.ModuleList([random(Attention(24, 24, heads=3))]) for _ in range(2))
    optimize(fast)
    for N, texts in ((3, 4), (5, 2)):  # heads that do not divide the width
        for network in (plain, fast):
            network[0].heads = N
            with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
                network[0](torch.randn(2, 30, 24), torch.randn(texts, 5, 24))


# --- copies ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_is_on_its_own(copied, small_blocks):
    """Changes of the one are not those of the other: of weights, of attributes, and when the other is restored."""
    unet = random(minidiff.UNet2DConditionModel(**UNET))
    optimize(unet)
    x, ctx = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    before = unet(x, 3, ctx).sample
    other = copied(unet)
    assert torch.equal(other(x, 3, ctx).sample, before)
    random(other, seed=1)
    assert torch.equal(unet(x, 3, ctx).sample, before)
    other.conv_in.padding_mode = "circular"
    plain = random(minidiff.UNet2DConditionModel(**UNET), seed=1)
    plain.conv_in.padding_mode = "circular"
    assert error(other(x, 3, ctx).sample, plain(x, 3, ctx).sample) <= 1e-5  # measured 6e-7
    restore(other)
    assert torch.equal(other(x, 3, ctx).sample, plain(x, 3, ctx).sample)
    assert torch.equal(unet(x, 3, ctx).sample, before)


@torch.no_grad()
def test_what_was_there_before_stays(small_blocks):
    """``optimize`` and ``restore`` take away nothing that is not theirs."""
    conv = nn.Conv2d(4, 4, 3, padding=1)
    network, mine = nn.ModuleList([conv]), lambda x: 2 * x
    conv.forward, x = mine, torch.randn(1, 4, 6, 6)
    for change in (optimize, optimize, restore):
        change(network)
        assert conv.forward is mine and torch.equal(conv(x), 2 * x)
    del conv.forward
    optimize(network)
    fast = conv.forward
    conv.forward = lambda x: 2 * fast(x)
    restore(network)
    assert error(conv(x), 2 * nn.Conv2d.forward(conv, x)) <= 1e-6  # measured 2e-7


# --- what watches a whole network ------------------------------------------------------------------------------------


def seen(network, ask):
    """Call a network with a hook on each module: return their numbers, shapes of the inputs, and outputs."""
    calls = []

    def note(number):
        return lambda _, args, out: calls.append((number, [a.shape for a in args if isinstance(a, torch.Tensor)], out))

    handles = [m.register_forward_hook(note(number)) for number, m in enumerate(network.modules())]
    ask()
    [handle.remove() for handle in handles]
    return calls


CALL = {"num_inference_steps": 3, "output_type": "pt", "guidance_scale": 5.0, "seed": 1}


@pytest.mark.parametrize("small_blocks", ["few products"], indirect=True)
def test_hooks_see_what_they_saw(folder, small_blocks):
    """The same calls in the same order with the same shapes in every step of a run, nothing shared or left out."""
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for network in (pipe.unet, pipe.vae.decoder):
        plain = seen(network, lambda: pipe("red heart", **CALL))
        fast = seen(network, lambda: pipe.optimize()("red heart", **CALL))
        pipe.unoptimize()
        assert [call[:2] for call in fast] == [call[:2] for call in plain]
        for (*_, ours), (*_, theirs) in zip(fast, plain, strict=True):
            if isinstance(ours, torch.Tensor):
                assert error(ours, theirs) <= 1e-4  # measured: at most 5.3e-6


# --- in the middle of a run ------------------------------------------------------------------------------------------


def half_of_the_batch(place):
    """Make a difference between the two halves of the batch before the text is looked at."""

    def other_half(_, args):
        return torch.cat([args[0][:1], 1.5 * args[0][1:]]), *args[1:]

    return lambda unet: place(unet).register_forward_pre_hook(other_half)


def another_embedding(unet):
    """Put a function in the place of the one that tells equal copies from others, and difference into the copies."""
    plain = type(unet)._embed_time
    unet._embed_time = lambda sample, *rest: plain(unet, sample, *rest)
    half_of_the_batch(lambda unet: unet.conv_in)(unet)


def another_time(unet):
    plain = unet.forward
    unet.forward = lambda x, t, *args, **kwargs: plain(x, t + 100, *args, **kwargs)


def exchange_time(unet):
    unet.time_embed.fc2 = Wrapped(unet.time_embed.fc2)


def each_reader(change):
    """Change what reads the text."""
    return lambda unet: [change(m.cross_attn) for m in unet.modules() if isinstance(m, TransformerBlock)]


def first(unet):
    return unet.down[0].res[0]


def reader(unet):
    return unet.down[0].attn[0]


IN_A_RUN = {
    "keys": each_reader(lambda attention: attention.k.weight.mul_(1.5)),
    "new keys": each_reader(lambda attention: setattr(attention.k, "weight", nn.Parameter(1.5 * attention.k.weight))),
    "values of other type": each_reader(lambda attention: setattr(attention, "v", Wrapped(attention.v))),
    "hook on the keys": each_reader(lambda attention: hook(attention.k)),
    "time of a block": lambda unet: first(unet).time.weight.mul_(1.5),
    "hook on the time of a block": lambda unet: hook(first(unet).time),
    "what a block is told": lambda unet: first(unet).register_forward_pre_hook(lambda _, args: (args[0], -args[1])),
    "time": lambda unet: unet.time_embed.fc1.weight.mul_(1.5),
    "exchanged time": exchange_time,
    "another time": another_time,
    "half of the batch": half_of_the_batch(lambda unet: unet.conv_in),
    "half of the residual block's": half_of_the_batch(first),
    "half of its convolution's": half_of_the_batch(lambda unet: first(unet).conv2),
    "half of the transformer's": half_of_the_batch(reader),
    "half of its projection's": half_of_the_batch(lambda unet: reader(unet).proj_in),
    "half of its block's": half_of_the_batch(lambda unet: reader(unet).blocks[0]),
    "half of the self-attention's": half_of_the_batch(lambda unet: reader(unet).blocks[0].self_attn),
    "half of its queries'": half_of_the_batch(lambda unet: reader(unet).blocks[0].self_attn.q),
    "another embedding": another_embedding,
    "padding": lambda unet: [setattr(m, "padding_mode", "circular") for m in convolutions(unet)],
    "_condition_on_time of a block": lambda unet: setattr(first(unet), "_condition_on_time", lambda h, temb: 0.5 * h),
}


@pytest.fixture(scope="module")
def unchanged(folder):
    """The images of a run without changes."""
    return run(folder, optimized=False)


def run(folder, optimized, change=None, step=None):
    """Return the images; the change is made before the run or by the callback of a step."""
    pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.optimize() if optimized else pipe
    if change is not None and step is None:
        change(pipe.unet)

    def callback(pipe, i, t, tensors):
        if i == step:
            change(pipe.unet)
        return {}

    return pipe("red heart", callback_on_step_end=callback, **CALL).images


@torch.no_grad()
@pytest.mark.parametrize("name", IN_A_RUN)
@pytest.mark.parametrize("step", [None, 0])
@pytest.mark.parametrize("small_blocks", ["few products"], indirect=True)
def test_changes_in_a_run(name, step, folder, unchanged, small_blocks):
    """Made before a run, or by the callback of its first step, when keys and times are already kept."""
    expected = run(folder, False, IN_A_RUN[name], step)
    assert (run(folder, True, IN_A_RUN[name], step) - expected).abs().max() <= 1e-5  # measured: at most 3e-6
    assert (expected - unchanged).abs().max() > 1e-3


@pytest.mark.parametrize("small_blocks", ["few products"], indirect=True)
def test_an_adapter_in_a_run(folder, small_blocks):
    """A LoRA of the keys has another weight from the second step on."""
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    matrices = {f"{layer}.lora_A.weight": torch.randn(2, 24), f"{layer}.lora_B.weight": torch.randn(16, 2)}

    def images(optimized, weight):
        pipe = minidiff.DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(matrices, adapter_name="keys")
        pipe = pipe.optimize() if optimized else pipe
        change = lambda pipe, i, t, tensors: pipe.set_adapters("keys", weight) or {}  # noqa: E731
        return pipe("red heart", callback_on_step_end=change, **CALL).images

    expected = images(False, 3.0)
    assert (images(True, 3.0) - expected).abs().max() <= 1e-5  # measured: 1.8e-6
    assert (expected - images(False, 1.0)).abs().max() > 1e-3
