"""Adapters on a network itself (``unet.load_lora_adapter`` and the like), and one in another's place, in float64."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.errors import CheckpointError
from tests.loras import Pipes, Tensors, assert_same, attention, cleaned, draw, every, load_both, outputs, peft
from tests.pictures import seeded
from tests.theirs import diffusers, relative_error
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Pipes:
    folder = save_tiny(tmp_path_factory.mktemp("sd"))
    pair = [library.StableDiffusionPipeline.from_pretrained(folder) for library in (minidiff, diffusers)]
    for pipe in pair:
        pipe.to(torch.float64)
    return tuple(pair)


@pytest.fixture
def sd(loaded: Pipes) -> Iterator[Pipes]:
    yield from cleaned(loaded)


@torch.no_grad()
def unet_output(pipe: Any) -> Tensor:
    g = seeded(0)
    x, ctx = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((2, 4, 8, 8), (2, 5, 24)))
    return pipe.unet(x, torch.tensor([3, 800]), ctx).sample


def assert_same_unets(pipes: Pipes) -> Tensor:
    ours, theirs = map(unet_output, pipes)
    assert relative_error(ours, theirs) < 1e-10  # measured: at most 1.2e-15
    return ours


def of_unet(pipe: Any, seed: int = 1, n: int = 3) -> Tensors:
    """Draw a LoRA of the UNet; theirs cannot weigh the blocks of one that adapts the embeddings."""
    lora = draw(pipe, seed=seed, only=lambda layer: every(n)(layer) and "_embedding" not in layer[1])
    return peft({"unet": lora["unet"]})


def test_signatures() -> None:
    for name in ("load_lora_adapter", "save_lora_adapter", "set_adapters", "set_adapter", "add_adapter", "fuse_lora"):
        ours, theirs = (getattr(library.UNet2DConditionModel, name) for library in (minidiff, diffusers))
        found = [
            [(p.name, p.default) for p in inspect.signature(one).parameters.values() if p.kind is not p.VAR_KEYWORD]
            for one in (ours, theirs)
        ]
        assert found[0][: len(found[1])] == found[1], name


def test_a_unet_loads_weighs_switches_and_deletes(sd: Pipes) -> None:
    plain = assert_same_unets(sd)
    seen = [plain]
    files = [of_unet(sd[1], seed) for seed in (1, 2)]
    for k, (tensors, prefix) in enumerate(zip(files, ("unet", None), strict=True)):
        tensors = tensors if prefix else {key.removeprefix("unet."): value for key, value in tensors.items()}
        for pipe in sd:
            pipe.unet.load_lora_adapter(dict(tensors), prefix=prefix, adapter_name=f"a{k}")
        seen.append(assert_same_unets(sd))
    assert sd[0].get_list_adapters() == {"unet": ["a0", "a1"]} and sd[0].unet.active_adapters() == ["a1"]
    for names, weights in (
        (["a0", "a1"], [0.5, -0.25]),
        ("a0", 0.3),
        (["a0"], [{"down": 0.5, "mid": 0.2}]),
        (["a0", "a1"], None),
    ):
        for pipe in sd:
            pipe.unet.set_adapters(names, weights)
        seen.append(assert_same_unets(sd))
    for pipe in sd:
        pipe.unet.set_adapter("a0")
    assert_same_unets(sd)
    for name in ("disable_lora", "enable_lora", "disable_adapters", "enable_adapters"):
        for pipe in sd:
            getattr(pipe.unet, name)()
        assert torch.equal(assert_same_unets(sd), plain) == name.startswith("disable")
    for pipe in sd:
        pipe.unet.fuse_lora(lora_scale=0.7, safe_fusing=True)
    seen.append(assert_same_unets(sd))
    for pipe in sd:
        pipe.unet.unfuse_lora()
    for pipe in sd:
        pipe.unet.delete_adapters("a0")
        pipe.unet.set_adapters("a1")
    assert_same_unets(sd)
    assert all(relative_error(a, b) > 1e-3 for k, a in enumerate(seen) for b in seen[:k])
    for pipe in sd:
        assert list(pipe.unet.peft_config) == ["a1"] and pipe.unet.peft_config["a1"].r == 2
        pipe.unet.unload_lora()
        assert not hasattr(pipe.unet, "peft_config")
    assert torch.equal(unet_output(sd[0]), plain) and sd[0].get_list_adapters() == {}


def test_saved_adapters_load_in_both(sd: Pipes, tmp_path: Path) -> None:
    """Ranks and alphas that differ come back from the header, whoever wrote it."""
    lora = {"unet": draw(sd[1], rank=lambda k: 2 + 2 * (k % 2), only=attention)["unet"]}
    fields = {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1}}
    fields["unet.rank_pattern"] = {name: len(A) for name, (A, _) in lora["unet"].items()}
    fields["unet.target_modules"] = list(lora["unet"])
    save_file(peft(lora), tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(fields)})
    for pipe in sd:
        pipe.unet.load_lora_adapter(tmp_path, weight_name="x.safetensors", prefix="unet", adapter_name="a")
    expected = assert_same_unets(sd)
    for k, pipe in enumerate(sd):
        pipe.unet.save_lora_adapter(tmp_path / str(k), adapter_name="a")
        pipe.unload_lora_weights()
    name = "pytorch_lora_weights.safetensors"
    ours, theirs = (load_file(tmp_path / str(k) / name) for k in (0, 1))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    for k in (0, 1):
        for pipe in sd:
            pipe.unet.load_lora_adapter(str(tmp_path / str(k)), prefix=None, adapter_name="a", weight_name=name)
        assert relative_error(assert_same_unets(sd), expected) < 1e-10
        for pipe in sd:
            pipe.unload_lora_weights()


def test_text_encoders_switch_theirs(sd: Pipes) -> None:
    files = {name: peft(draw(sd[1], seed, only=every(seed + 2))) for seed, name in ((1, "one"), (2, "two"))}
    for name, tensors in files.items():
        load_both(sd, tensors, adapter_name=name)
    seen = []
    for method, *arguments in (
        ("set_adapter", "one"),
        ("set_adapter", ["one", "two"]),
        ("disable_adapters",),
        ("enable_adapters",),
    ):
        for pipe in sd:
            getattr(pipe.text_encoder, method)(*arguments)
        assert_same(*map(outputs, sd))
        seen.append(outputs(sd[0])[1])
    assert sorted(sd[0].text_encoder.active_adapters()) == ["one", "two"]
    assert torch.equal(seen[1], seen[3]) and all(relative_error(seen[1], seen[k]) > 1e-3 for k in (0, 2))
    sd[0].text_encoder.delete_adapter("two")
    assert sd[0].get_list_adapters()["text_encoder"] == ["one"]


def test_one_adapter_in_the_place_of_another(sd: Pipes) -> None:
    """Whether active or not, at the weight 1; layers that the new one lacks are left alone."""
    files = {seed: of_unet(sd[1], seed) for seed in (1, 2, 4)}
    new = {key: value for k, (key, value) in enumerate(of_unet(sd[1], 3).items()) if k % 4 < 2}  # half of the layers
    for seed in (1, 2):
        load_both(sd, files[seed], adapter_name=f"a{seed}")
    for pipe in sd:
        pipe.set_adapters(["a1", "a2"], [0.5, 0.25])
    before = assert_same_unets(sd)
    load_both(sd, new, adapter_name="a1", hotswap=True)
    assert relative_error(assert_same_unets(sd), before) > 1e-3
    assert sd[0].get_active_adapters() == ["a1", "a2"] and sd[0].get_list_adapters() == {"unet": ["a1", "a2"]}
    for pipe in sd:
        pipe.set_adapters("a2")
    inactive = assert_same_unets(sd)
    sd[0].load_lora_weights(files[4], adapter_name="a1", hotswap=True)
    assert torch.equal(unet_output(sd[0]), inactive)
    sd[0].enable_lora_hotswap(target_rank=8)  # nothing to prepare


def test_an_optimized_network_sees_the_new_one(sd: Pipes, tmp_path: Path) -> None:
    sd[0].save_pretrained(tmp_path)
    pipes = [minidiff.StableDiffusionPipeline.from_pretrained(tmp_path) for _ in range(2)]
    pipes[1].optimize()
    x, ctx = torch.ones(2, 4, 8, 8), torch.ones(2, 5, 24)
    for seed, hotswap in ((1, False), (2, True), (3, True)):
        found = []
        for pipe in pipes:
            pipe.load_lora_weights({k: v.float() for k, v in of_unet(sd[1], seed).items()}, "a", hotswap)
            with torch.no_grad():
                found.append(pipe.unet(x, 7, ctx).sample)
        assert relative_error(*found) < 1e-5  # measured: 1.6e-6, in float32


def test_what_a_network_refuses(sd: Pipes) -> None:
    unet, tensors = sd[0].unet, of_unet(sd[1])
    for name in ("enable_adapters", "disable_adapters", "active_adapters"):
        with pytest.raises(ValueError, match="UNet2DConditionModel has no adapter"):
            getattr(unet, name)()
    with pytest.raises(CheckpointError, match="no tensor of the given state dict begins with 'transformer.'.*prefix="):
        unet.load_lora_adapter(tensors)
    with pytest.raises(CheckpointError, match="for a layer 'unet.down_blocks"):
        unet.load_lora_adapter(tensors, prefix=None)
    with pytest.raises(NotImplementedError, match="add_adapter.*adapted_layers|add_adapter.*training"):
        unet.add_adapter(object())
    with pytest.raises(TypeError, match="unknown arguments speed"):
        unet.load_lora_adapter(tensors, prefix="unet", speed=1)
    unet.load_lora_adapter(tensors, prefix="unet", adapter_name="a")
    with pytest.raises(ValueError, match=r"adapters \['a'\]; found \['b'\]"):
        unet.save_lora_adapter("nowhere", adapter_name="b")
    with pytest.raises(CheckpointError, match="safe_serialization=False"):
        unet.save_lora_adapter("nowhere", adapter_name="a", safe_serialization=False)
    assert not Path("nowhere").exists()
