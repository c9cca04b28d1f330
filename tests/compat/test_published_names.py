"""The published names inside networks: what programs find, hook, call, exchange and save by them is the reference's."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from minidiff.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import minidiff
from minidiff.fast import optimize
from tests.theirs import carry_over, diffusers, randomize, relative_error, transformers
from tests.tiny import TEXT, UNET, VAE

BOUND = 1e-12  # measured: at most 2e-15 over all cases of this file
PIXELS = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
LINEAR = {"use_linear_projection": True, "attention_head_dim": [2, 4], "layers_per_block": 2, "upcast_attention": True}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
NETWORKS = {
    "unet": ("UNet2DConditionModel", UNET),
    "unet of SD 2": ("UNet2DConditionModel", {**UNET, **LINEAR}),
    "unconditional": ("UNet2DModel", PIXELS),
    "no norm in the middle": ("UNet2DModel", {**PIXELS, "resnet_time_scale_shift": "scale_shift"}),
    "vae": ("AutoencoderKL", VAE),
    "clip": ("CLIPTextModel", {**TEXT, "vocab_size": 50}),
    "clip with projection": ("CLIPTextModelWithProjection", {**TEXT, "vocab_size": 50, "projection_dim": 12}),
    "clip vision": ("CLIPVisionModel", VISION),
    "clip vision with projection": ("CLIPVisionModelWithProjection", {**VISION, "projection_dim": 12}),
}


def make(name: str) -> tuple[Any, Any]:
    """Build ours and theirs with the same weights, in float64."""
    kind, fields = NETWORKS[name]
    if kind.startswith("CLIP"):
        config = f"CLIP{'Vision' if 'Vision' in kind else 'Text'}Config"
        theirs = getattr(transformers, kind)(getattr(transformers, config)(**fields))
        ours = getattr(minidiff, kind)(getattr(minidiff, config)(**fields))
    else:
        theirs, ours = getattr(diffusers, kind)(**fields), getattr(minidiff, kind)(**fields)
    return carry_over(randomize(theirs.double()), ours.double()), theirs


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return make(request.param)


def run(network: Any) -> Tensor:
    """Ask a network of theirs or ours."""
    g = torch.Generator().manual_seed(0)
    kind = type(network).__name__
    with torch.no_grad():
        if kind.startswith("CLIPVision"):
            return network(torch.randn(2, 3, 8, 8, generator=g, dtype=torch.float64)).last_hidden_state
        if kind.startswith("CLIP"):
            return network(torch.randint(4, 50, (2, 9), generator=g)).last_hidden_state
        if kind == "AutoencoderKL":
            return network(torch.randn(1, 3, 16, 16, generator=g, dtype=torch.float64)).sample
        x = torch.randn(2, network.config["in_channels"], 8, 8, generator=g, dtype=torch.float64)
        if kind == "UNet2DModel":
            return network(x, 7).sample
        return network(x, 7, torch.randn(2, 5, 24, generator=g, dtype=torch.float64)).sample


def hub(network: Any, name: str) -> str:
    """Return a name of theirs as the Hub spells it: transformers 5 writes no ``text_model.``."""
    return network.canonical_hub_name(f"{name}.weight").removesuffix(".weight") if name else ""


def test_names_and_shapes_are_those_of_the_hub(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    expected = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    state = ours.state_dict()
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in expected.items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    order = [ours.canonical_hub_name(name) for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == list(state)
    assert list(state) == order or any("k_proj" in name for name in order)  # CLIP lists q before k
    assert len(list(ours.parameters())) == len(set(ours.parameters())) == len(state)
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for m in ours.modules() for p in m.parameters()}


def test_modules_have_the_published_names(pair: tuple[Any, Any]) -> None:
    ours, theirs = pair
    listed = dict(ours.named_modules())
    for name, module in theirs.named_modules():
        if any(True for _ in module.parameters()) and name != "":
            mine = ours.get_submodule(hub(ours, name))
            assert listed[hub(ours, name)] is mine
            assert [n for n, _ in mine.named_parameters()] == [n for n, _ in listed[hub(ours, name)].named_parameters()]
            assert {n for n, _ in mine.named_parameters()} == {n for n, _ in module.named_parameters()}
            if isinstance(module, nn.ModuleList):
                assert len(mine) == len(module) and list(mine)[-1] is mine[-1] and len(mine[:1]) == 1
            if isinstance(module, nn.Linear | nn.GroupNorm | nn.LayerNorm | nn.Embedding):
                assert type(mine) is type(module)


@pytest.mark.parametrize("spelling", ["ours", "hub", "ldm"])
def test_weights_are_taken_in_every_spelling(pair: tuple[Any, Any], spelling: str) -> None:
    ours, _ = pair
    new = copy.deepcopy(ours)
    for parameter in new.parameters():
        parameter.data.zero_()
    state = {}
    for row in ours.rows():
        tensors = tuple(nn.Module.state_dict(ours)[name] for name in row.ours)
        state.update(zip(row.names(spelling), row.op(spelling).from_ours(tensors), strict=True))
    prefixes = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.model.")
    for prefix in ("", *(prefixes if spelling != "ours" else ())):  # as a single file spells it, too
        named = {prefix + name: tensor for name, tensor in state.items()}
        assert str(new.load_state_dict(named)) == "<All keys matched successfully>"
    assert torch.equal(run(new), run(ours))
    wrapper = nn.ModuleDict({"ema": new})  # as DDP, torch.compile or a LightningModule would hold it
    assert list(wrapper.state_dict()) == [f"ema.{name}" for name in ours.state_dict()]
    assert str(wrapper.load_state_dict({f"ema.{n}": t for n, t in state.items()})) == "<All keys matched successfully>"


def test_wrong_weights_are_named_as_published() -> None:
    ours, _ = make("unet")
    state = ours.state_dict()
    weight = state.pop("mid_block.resnets.0.conv1.weight")
    with pytest.raises(RuntimeError, match=r'Missing key.*"mid_block\.resnets\.0\.conv1\.weight"'):
        ours.load_state_dict(state)
    assert ours.load_state_dict(state, strict=False).missing_keys == ["mid_block.resnets.0.conv1.weight"]
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"down_blocks\.7\.x"'):
        ours.load_state_dict({**state, "mid_block.resnets.0.conv1.weight": weight, "down_blocks.7.x": weight})
    with pytest.raises(RuntimeError, match=r"size mismatch for mid_block\.resnets\.0\.conv1\.weight"):
        ours.load_state_dict({**state, "mid_block.resnets.0.conv1.weight": weight[:1]})


def flat(key: str, value: Any) -> Tensor:
    value = value[0] if isinstance(value, tuple | dict) else getattr(value, "sample", value)
    if value.ndim == 4:  # a 1x1 convolution of theirs is linear here
        return value.flatten(2).mT
    return value.mT if key.endswith("group_norm") else value


def test_hooks_hear_the_same_at_every_name(pair: tuple[Any, Any]) -> None:
    """Each module of theirs that ours call too: outputs are equal. What is no module here refuses the hook."""
    ours, theirs = pair
    heard: dict[str, Tensor] = {}
    deaf = []
    for name, module in theirs.named_modules():
        if any(True for _ in module.parameters()) and not isinstance(module, nn.ModuleList) and name:
            key = hub(ours, name)
            try:
                ours.get_submodule(key).register_forward_hook(lambda _, x, out, key=key: heard.update({key: out}))
            except TypeError as error:
                assert "hook the parts in it" in str(error)
                deaf.append(key)
                continue
            module.register_forward_hook(lambda _, x, out, key=key: expected.update({key: out}))
    expected: dict[str, Tensor] = {}
    run(ours), run(theirs)
    assert heard.keys() == expected.keys()
    worst = {key: relative_error(flat(key, heard[key]), flat(key, expected[key])) for key in heard}
    assert max(worst.values()) < BOUND, worst
    endings = ("_block", "_blocks.0", "_blocks.1", "_blocks.2", "net.0", "embeddings", "encoder", ".mlp", "text_model")
    assert all(key.endswith(endings) for key in deaf), deaf


class Store:
    """A processor as published programs write them: it keeps the scores, and changes those of the text."""

    def __init__(self) -> None:
        self.scores: dict[str, Tensor] = {}
        self.name = ""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        if len(shape) == 4:
            hidden_states = hidden_states.view(*shape[:2], -1).transpose(1, 2)
        B, L, _ = hidden_states.shape if encoder_hidden_states is None else encoder_hidden_states.shape
        attention_mask = attn.prepare_attention_mask(attention_mask, L, B)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(hidden_states)
        cross = encoder_hidden_states is not None
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        elif attn.norm_cross:
            encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
        key, value = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        query, key, value = (attn.head_to_batch_dim(s) for s in (query, key, value))
        scores = attn.get_attention_scores(query, key, attention_mask)
        self.scores[self.name] = scores
        if cross:
            scores = scores.roll(1, dims=-1)
        hidden_states = attn.batch_to_head_dim(torch.bmm(scores, value))
        hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
        if len(shape) == 4:
            hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            hidden_states = hidden_states + residual
        return hidden_states / attn.rescale_output_factor


@pytest.mark.parametrize("name", ["unet", "unet of SD 2", "unconditional", "no norm in the middle", "vae"])
@pytest.mark.parametrize("fast", [False, True], ids=["plain", "optimized"])
def test_processors(name: str, fast: bool) -> None:
    ours, theirs = make(name)
    before = run(ours)
    attentions = {f"{n}.processor": m for n, m in theirs.named_modules() if type(m).__name__ == "Attention"}
    assert ours.attn_processors.keys() == attentions.keys()
    stores: list[dict[str, Store]] = [{key: Store() for key in attentions} for _ in range(2)]
    for key, attn in attentions.items():
        stores[0][key].name = stores[1][key].name = key
        attn.set_processor(stores[1][key])
    ours.set_attn_processor(dict(stores[0]))
    assert ours.attn_processors == stores[0]
    if fast:
        optimize(ours)
    mine, reference = run(ours), run(theirs)
    assert relative_error(mine, reference) < BOUND
    assert name in ("unconditional", "no norm in the middle", "vae") or relative_error(mine, before) > 1e-3
    for key in stores[0]:
        assert relative_error(stores[0][key].scores[key], stores[1][key].scores[key]) < BOUND
    ours.set_attn_processor(AttnProcessor())
    upcast = name not in ("unet",)  # the scores to float32, as the reference does: measured 6e-8
    assert relative_error(run(ours), before) < (1e-6 if upcast else BOUND)
    ours.set_default_attn_processor()
    assert relative_error(run(ours), before) < (1e-5 if fast else BOUND)
    assert {type(p) for p in ours.attn_processors.values()} == {AttnProcessor2_0}
    with pytest.raises(ValueError, match="number of processors, 0, "):
        ours.set_attn_processor({})
    with pytest.raises(TypeError, match="a processor is called"):
        ours.set_attn_processor("xformers")


def test_processors_are_called_with_the_arguments_that_they_name() -> None:
    class Counting(AttnProcessor2_0):
        def __call__(self, attn: Any, hidden_states: Tensor, number: int = 0, **kwargs: Any) -> Tensor:
            heard.append((number, "other" in kwargs))
            return super().__call__(attn, hidden_states, **kwargs)

    ours, _ = make("unet")
    x, ctx, heard = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 5, 24).double(), []
    with pytest.raises(ValueError, match="cross_attention_kwargs"):
        ours(x, 7, ctx, cross_attention_kwargs={"number": 3})
    ours.set_attn_processor(Counting())
    ours(x, 7, ctx, cross_attention_kwargs={"number": 3, "other": 4})
    ours(x, 7, ctx)
    assert heard == [(3, False)] * 8 + [(0, False)] * 8


def test_attention_answers_what_programs_read() -> None:
    for name in ("unet", "unet of SD 2", "unconditional", "no norm in the middle", "vae"):
        ours, theirs = make(name)
        found = {n: m for n, m in ours.named_modules() if isinstance(m, Attention)}
        expected = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Attention"}
        assert found.keys() == expected.keys()
        fields = (
            "heads scale cross_attention_dim residual_connection rescale_output_factor norm_q norm_k norm_cross "
            "upcast_attention upcast_softmax spatial_norm only_cross_attention"
        ).split()
        for key, attn in found.items():
            for field in fields:
                assert getattr(attn, field) == getattr(expected[key], field), (key, field)
            assert (attn.group_norm is None) == (expected[key].group_norm is None)
        mask = torch.randn(2, 1, 5, dtype=torch.float64)
        for out_dim in (3, 4):
            x = torch.randn(2, 5, attn.to_q.out_features)
            assert torch.equal(attn.head_to_batch_dim(x, out_dim), expected[key].head_to_batch_dim(x, out_dim))
            for length in (5, 3):  # one that is not as long is padded, there too
                both = (a.prepare_attention_mask(mask, length, 2, out_dim) for a in (attn, expected[key]))
                assert torch.equal(*both)


def test_a_layer_is_exchanged_by_its_published_name() -> None:
    class Louder(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * super().forward(x)

    ours, theirs = make("unet")
    for network in (ours, theirs):
        attn = network.down_blocks[0].attentions[0].transformer_blocks[0].attn2
        attn.to_q = randomize(Louder(16, 16, bias=False).double())
        network.mid_block.attentions[0].transformer_blocks[0].ff.net[2] = randomize(Louder(128, 32).double(), 1)
        network.up_blocks[1].resnets[0].conv_shortcut.weight.data.mul_(2)
        network.conv_in.requires_grad_(False)
    assert attn.to_q is not ours.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_q
    assert relative_error(run(ours), run(theirs)) < BOUND
    frozen = [name for name, p in ours.named_parameters() if not p.requires_grad]
    assert frozen == ["conv_in.weight", "conv_in.bias"]
    with pytest.raises(TypeError, match="mid_block cannot be exchanged as a whole"):
        ours.mid_block = nn.Identity()


def test_what_is_added_is_trained_and_saved_by_name(tmp_path: Path) -> None:
    """As peft does: a layer gives way to one that holds it; and a processor that has weights."""

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.lora_A = layer, nn.Linear(layer.in_features, layer.out_features, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.lora_A(x)

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(()))

        def forward(self, attn: Any, hidden_states: Tensor, **kwargs: Any) -> Tensor:
            return self.gain * AttnProcessor2_0()(attn, hidden_states, **kwargs)

    ours, _ = make("unet")
    for name in [name for name, _ in ours.named_modules() if name.endswith("attn2.to_k")]:
        parent, _, last = name.rpartition(".")
        setattr(ours.get_submodule(parent), last, Adapted(ours.get_submodule(name)))
    ours.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Trained())
    ours.extra = nn.Linear(1, 1)
    names = [name for name, _ in ours.named_parameters()]
    assert names == list(ours.state_dict())
    block = "mid_block.attentions.0.transformer_blocks.0"
    for name in (f"{block}.attn2.to_k.lora_A.weight", f"{block}.attn2.to_k.base_layer.weight", "extra.weight"):
        assert name in names
    assert f"{block}.attn1.processor.gain" in names and len(names) == len(list(ours.parameters()))
    before, state = run(ours), copy.deepcopy(ours.state_dict())
    for parameter in ours.parameters():
        parameter.data.zero_()
    ours.load_state_dict(state)
    assert torch.equal(run(ours), before)
    with pytest.raises(minidiff.errors.CheckpointError, match="weights are not those of its configuration"):
        ours.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_forward_is_exchanged_as_prompt_to_prompt_does() -> None:
    def controlled(attn: Any) -> Any:
        def forward(hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **others: Any) -> Tensor:
            calls.append(attn)
            ctx = hidden_states if encoder_hidden_states is None else encoder_hidden_states
            q, k, v = attn.to_q(hidden_states), attn.to_k(ctx), attn.to_v(ctx)
            q, k, v = (attn.head_to_batch_dim(s) for s in (q, k, v))
            return attn.to_out[0](attn.batch_to_head_dim(torch.bmm((q @ k.mT * attn.scale).softmax(-1).roll(1, -1), v)))

        return forward

    def register(module: nn.Module) -> int:
        if type(module).__name__ == "Attention":
            module.forward = controlled(module)
            return 1
        return sum(map(register, module.children()))

    results = []
    for network in make("unet"):
        calls: list[Any] = []
        count = sum(register(child) for name, child in network.named_children() if "mid" in name or "up" in name)
        results.append(run(network))
        assert count == len(calls) == 6
    assert relative_error(*results) < BOUND


def test_parts_are_called_as_the_reference_calls_them() -> None:
    g = torch.Generator().manual_seed(1)
    x, temb, ctx = (torch.randn(s, generator=g).double() for s in ((2, 16, 4, 4), (2, 64), (2, 5, 24)))
    mask = torch.randn(2, 1, 5, generator=g).double()
    (ours, theirs), (vae, their_vae), (clip, their_clip) = make("unet"), make("vae"), make("clip")
    with torch.no_grad():
        for call in (
            lambda net: net.down_blocks[0].resnets[0](x, temb),
            lambda net: net.down_blocks[0].attentions[0](x, encoder_hidden_states=ctx).sample,
            lambda net: net.down_blocks[0].attentions[0](x, ctx, return_dict=False)[0],
            lambda net: (
                net.down_blocks[0]
                .attentions[0]
                .transformer_blocks[0](x.flatten(2).mT, attention_mask=None, encoder_hidden_states=ctx)
            ),
            lambda net: net.down_blocks[0].attentions[0].transformer_blocks[0].attn1(x.flatten(2).mT),
            lambda net: net.down_blocks[0].attentions[0].transformer_blocks[0].attn2(x.flatten(2).mT, ctx),
            lambda net: net.down_blocks[0].attentions[0].transformer_blocks[0].attn2(x.flatten(2).mT, ctx, mask),
            lambda net: net.down_blocks[0].attentions[0].transformer_blocks[0].ff(x.flatten(2).mT),
            lambda net: net.down_blocks[0].downsamplers[0](x),
            lambda net: net.time_embedding(torch.ones(2, 16).double()),
        ):
            assert relative_error(call(ours), call(theirs)) < BOUND
        picture = torch.randn(1, 3, 16, 16, generator=g).double()
        for call in (
            lambda net: net.encoder(picture),
            lambda net: net.decoder(torch.ones(1, 4, 4, 4).double()),
            lambda net: net.encoder.mid_block.attentions[0](torch.ones(1, 16, 4, 4).double()),
            lambda net: net.encoder.mid_block(torch.ones(1, 16, 4, 4).double()),
        ):
            assert relative_error(call(vae), call(their_vae)) < BOUND
        assert (
            relative_error(clip.text_model(torch.ones(1, 9).long())[0], their_clip(torch.ones(1, 9).long())[0]) < BOUND
        )
    with pytest.raises(TypeError, match="cannot be called"):
        ours.mid_block(x)
    assert theirs.down_blocks[1].downsamplers is ours.down_blocks[1].downsamplers is None
    assert not hasattr(ours.down_blocks[1], "attentions")
    with pytest.raises(AttributeError, match="mid_block has no 'nothing'; it has attentions, resnets"):
        ours.mid_block.nothing  # noqa: B018


def test_copies_and_pickles_have_names_of_their_own() -> None:
    ours, _ = make("vae")
    ours.set_attn_processor(store := Store())
    before = run(ours)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert twin.decoder.up_blocks[0].resnets[0].conv1 is not ours.decoder.up_blocks[0].resnets[0].conv1
        twin.decoder.mid_block.attentions[0].to_q.weight.data.zero_()
        assert relative_error(run(ours), before) == 0 and relative_error(run(twin), before) > 1e-6
        (processor,) = {id(p) for p in twin.attn_processors.values()}
        assert processor != id(store)


def test_mode_and_attributes_reach_the_module() -> None:
    ours, _ = make("unet")
    ours.eval()
    ours.mid_block.train()
    assert ours.mid.res[0].training and ours.mid_block.training and not ours.training
    assert not ours.down_blocks[0].resnets[0].training
    ours.mid_block.resnets[0].marked = 5
    assert ours.mid.res[0].marked == ours.mid_block.resnets[0].marked == 5
    ours.down[0].res[0].conv1 = nn.Conv2d(16, 16, 1)  # by our name: the published one follows
    assert ours.down_blocks[0].resnets[0].conv1.kernel_size == (1, 1)
    with pytest.warns(FutureWarning, match=r"config\.sample_size"):
        assert ours.sample_size == 8
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        ours.nothing  # noqa: B018


def test_compiled_parts_keep_their_names(tmp_path: Any) -> None:
    ours, _ = make("vae")
    names = list(ours.state_dict())
    ours.decoder = torch.compile(ours.decoder, backend="eager")
    assert list(ours.state_dict()) == [name for name, _ in ours.named_parameters()] == names
    ours.load_state_dict({name: tensor + 1 for name, tensor in ours.state_dict().items()})
    ours.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save, push_to_hub=False)
    again = minidiff.AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert torch.equal(run(again), run(ours)) and again.name_or_path == str(tmp_path)


def test_masks_reach_a_processor_that_keeps_its_scores() -> None:
    ours, theirs = make("unet")
    theirs.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    for _, attn in ours.named_modules():
        if isinstance(attn, Attention):
            attn.processor = plain = AttnProcessor()
            assert attn.get_processor() is plain
    x, ctx = torch.ones(2, 4, 8, 8).double(), torch.linspace(-1, 1, 240).double().reshape(2, 5, 24)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        results = [net(x, 7, ctx, encoder_attention_mask=mask).sample for net in (ours, theirs)]
        assert relative_error(ours(x, 7, ctx).sample, results[1]) > 1e-6
    assert relative_error(*results) < BOUND


def test_a_transformer_is_exchanged_by_its_forward_and_a_norm_of_the_vae_by_name() -> None:
    def passed_by(
        x: Tensor, encoder_hidden_states: Tensor, *, return_dict: bool = True, **others: Any
    ) -> tuple[Tensor]:
        return (x + encoder_hidden_states.mean(),)

    plain, results = run(make("unet")[0]), []
    for network in (networks := make("unet")):
        network.mid_block.attentions[0].forward = passed_by
        results.append(run(network))
    assert relative_error(*results) < BOUND < 1e-6 < relative_error(results[0], plain)
    del networks[0].mid_block.attentions[0].forward
    assert torch.equal(run(networks[0]), plain)
    both = make("vae")
    before = run(both[0])
    for network in both:
        network.decoder.conv_norm_out = randomize(nn.GroupNorm(2, network.decoder.conv_norm_out.num_channels).double())
    assert relative_error(*map(run, both)) < BOUND < 1e-6 < relative_error(run(both[0]), before)


def test_a_network_without_a_middle_says_none() -> None:
    fields = {**PIXELS, "mid_block_type": None}
    ours, theirs = minidiff.UNet2DModel(**fields), diffusers.UNet2DModel(**fields)
    assert ours.mid_block is theirs.mid_block is None and ours.class_embedding is theirs.class_embedding is None
    assert not hasattr(minidiff.AutoencoderKL(**VAE), "mid_block")


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("name", ["unet", "vae", "clip", "unconditional"])
def test_rebuilding_a_network_from_its_listing_is_refused(name: str, asked_before: bool) -> None:
    """accelerate copies a module without its children, and adds what ``named_children`` gave, compiled."""
    from accelerate.utils import compile_regions

    ours, _ = make(name)
    before, listed = run(ours), asked_before and list(ours.named_modules())
    with pytest.raises(RuntimeError, match=r"lacks .*; copy it with copy\.deepcopy, .*compile_repeated_blocks"):
        compile_regions(ours, backend="eager")
    assert torch.equal(run(ours), before) and (not listed or list(ours.named_modules()) == listed)


def test_a_copied_part_is_not_its_module() -> None:
    ours, _ = make("unet")
    part = ours.mid_block.resnets[0]
    copied = type(part).__new__(type(part))
    vars(copied).update(vars(part))
    with pytest.raises(RuntimeError, match="lacks its network"):
        copied._modules = {}
    assert ours.mid.res[0]._modules and part._modules


def test_freeu() -> None:
    values = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
    fields = {
        **UNET,
        "block_out_channels": [16, 16, 32],
        "down_block_types": ["CrossAttnDownBlock2D"] * 2 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 2,
    }
    theirs = randomize(diffusers.UNet2DConditionModel(**fields).double())
    ours = carry_over(theirs, minidiff.UNet2DConditionModel(**fields))
    before = run(ours)
    for network in (ours, theirs):
        network.enable_freeu(**values)
    assert relative_error(run(ours), run(theirs)) < BOUND
    assert relative_error(run(ours), before) > 1e-2
    ours.disable_freeu()
    assert torch.equal(run(ours), before)
    with pytest.raises(ValueError, match="other than 0"):
        ours.enable_freeu(0, 0.2, 1.5, 1.6)


@pytest.mark.parametrize("arguments", [(60,), (60, None, False), (40,), (None, 16), (51, 8), (50,)])
def test_the_vocabulary_is_resized_as_in_the_reference(arguments: tuple[Any, ...]) -> None:
    ours, theirs = make("clip")
    ours, theirs = ours.float(), theirs.float()
    tables = []
    for network in (ours, theirs):
        torch.manual_seed(3)
        tables.append(network.resize_token_embeddings(*arguments))
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert ours.get_input_embeddings() is tables[0] and ours.config.vocab_size == theirs.config.vocab_size
    assert len(tables[0].weight) == tables[0].num_embeddings == ours.config.vocab_size
    ours.set_input_embeddings(nn.Embedding(70, 24))
    assert ours.text_model.embeddings.token_embedding.num_embeddings == 70
    with pytest.raises(ValueError, match="width 24"):
        ours.set_input_embeddings(nn.Embedding(70, 3))


def test_native_attention_is_the_only_one() -> None:
    ours, _ = make("unet")
    ours.set_attention_backend("native")
    ours.reset_attention_backend()
    ours.fuse_qkv_projections(), ours.unfuse_qkv_projections()
    with pytest.raises(ValueError, match="'native'"):
        ours.set_attention_backend("flash")
