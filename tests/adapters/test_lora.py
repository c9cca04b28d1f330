"""LoRA against diffusers with peft, in float64: each spelling, each way to weigh, switch and fuse adapters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.loras import (
    BOUND,
    Matrices,
    Pipes,
    Tensors,
    assert_same,
    attention,
    draw,
    every,
    hub,
    layers,
    load_both,
    outputs,
    peft,
    spell,
)
from tests.pictures import seeded
from tests.theirs import relative_error


def assert_differ(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) > 1e-3


# --- LoRA files ------------------------------------------------------------------------------------------------------


def kohya_name(component: str, name: str) -> str:
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[component]
    return prefix + hub(name).replace(".", "_")


def kohya(lora: Matrices, alpha: float, name: Callable[[str, str], str] = kohya_name) -> Tensors:
    tensors = spell(lora, name, ".lora_down.weight", ".lora_up.weight")
    alphas = {key.split(".")[0] + ".alpha": torch.tensor(alpha) for key in tensors}
    return tensors | alphas


def compare_file(pipes: Pipes, tensors: Any) -> None:
    """Load a file into both; all networks must change, and equally; unloaded, they are what they were."""
    before = outputs(pipes[0])
    load_both(pipes, tensors)
    assert_same(*map(outputs, pipes))
    assert_differ(outputs(pipes[0]), before)
    pipes[0].unload_lora_weights()
    assert all(map(torch.equal, outputs(pipes[0]), before))


# --- spellings -------------------------------------------------------------------------------------------------------


def test_peft_every_layer(pipes: Pipes) -> None:
    """Linear layers, convolutions, their 1x1 and strided kinds, of ranks that differ."""
    lora = draw(pipes[1], rank=lambda k: 1 + k % 4)
    compare_file(pipes, peft(lora))
    loaded = pipes[0].load_lora_weights(peft(lora))
    assert {part: len(ranks) for part, ranks in loaded.layers.items()} == {k: len(v) for k, v in lora.items()}


def test_peft_without_the_prefix_that_transformers_dropped(sd: Pipes) -> None:
    lora = draw(sd[1], only=every(3))
    compare_file(sd, spell(lora, lambda part, name: f"{part}.{name}", ".lora_A.weight", ".lora_B.weight"))


def test_diffusers(sd: Pipes) -> None:
    def part(component: str) -> str:
        return ".lora" if component == "unet" else ".lora_linear_layer"

    lora = draw(sd[1], only=lambda layer: layer[0] % 2 == 0 and "conv" not in layer[1])
    tensors = spell(lora, lambda c, name: f"{c}.{hub(name)}{part(c)}", ".down.weight", ".up.weight")
    compare_file(sd, tensors)


def old_name(component: str, name: str) -> str:
    """Return the name of an attention layer in the first diffusers with LoRA."""
    name = hub(name).replace("to_out.0", "to_out")
    for s in "12":
        name = name.replace(f"attn{s}.", f"attn{s}.processor.")
    for s in "qkv":
        name = name.replace(f"{s}_proj", f"to_{s}")
    return f"{component}.{name.replace('out_proj', 'to_out')}_lora"


def test_old_diffusers(sd: Pipes) -> None:
    compare_file(sd, spell(draw(sd[1], only=attention), old_name, ".down.weight", ".up.weight"))


def test_a_file_of_the_unet_alone(sd: Pipes) -> None:
    """Its names have no component; the reference's pipelines pass them over without an effect, its UNet loads them."""
    lora = {"unet": draw(sd[1], only=attention)["unet"]}
    tensors = spell(lora, lambda c, name: old_name("", name)[1:], ".down.weight", ".up.weight")
    sd[0].load_lora_weights(tensors)
    sd[1].unet.load_lora_adapter(dict(tensors), prefix=None)
    assert_same(*map(outputs, sd))


def test_kohya(pipes: Pipes) -> None:
    """Linear layers and convolutions under the names of diffusers, with an alpha."""
    lora = draw(pipes[1], rank=lambda k: 4, only=lambda layer: "add_embedding" not in layer[1])  # theirs loses these
    tensors = kohya(lora, alpha=2.0)
    if "text_encoder_2" not in lora:  # of one text encoder
        tensors = {key.replace("lora_te1_", "lora_te_"): tensor for key, tensor in tensors.items()}
    compare_file(pipes, tensors)


def original_names(pipe: Any) -> dict[str, str]:
    """Return the names of the UNet's layers in an original single file, which kohya uses for SDXL."""
    found = {}
    for row in pipe.unet.rows():
        for hub_name, original in zip(row.hub, row.ldm, strict=True):
            found[hub_name.rpartition(".")[0]] = original.rpartition(".")[0]
    return found


def test_kohya_with_original_names(xl: Pipes) -> None:
    """The reference finds the layers by arithmetic with the numbers in the names, ours by the name table.

    Its arithmetic expects attention in every block with an upsampler, which the real SDXL has and this one has not.
    """
    original = original_names(xl[0])

    def name(component: str, layer: str) -> str:
        return kohya_name(component, original[layer] if component == "unet" else layer)

    lora = draw(xl[1], rank=lambda k: 3, only=lambda layer: "upsamplers" not in layer[1])
    tensors = kohya(lora, 1.5, name)
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q.alpha" in tensors
    compare_file(xl, tensors)


def test_alphas_that_differ(sd: Pipes) -> None:
    """The reference's converter mixes such alphas up, so it gets matrices that are multiplied already."""
    lora, tensors = draw(sd[1], rank=lambda k: 1 + k % 3, only=every(2)), {}
    for k, (component, matrices) in enumerate(lora.items()):
        for j, (name, (A, B)) in enumerate(matrices.items()):
            alpha = 0.5 + (7 * j + k) % 5
            tensors |= kohya({component: {name: (A, B)}}, alpha)
            matrices[name] = A, B * (alpha / len(A))
    sd[0].load_lora_weights(tensors)
    sd[1].load_lora_weights(peft(lora))
    assert_same(*map(outputs, sd))


@pytest.mark.parametrize("stabilised", [False, True])
def test_alphas_in_the_header(sd: Pipes, tmp_path: Path, stabilised: bool) -> None:
    lora = draw(sd[1], rank=lambda k: 4 if k % 2 else 2, only=attention)
    metadata = {"text_encoder.r": 4, "text_encoder.lora_alpha": 3}
    metadata |= {"unet.r": 4, "unet.lora_alpha": 6, "unet.alpha_pattern": {"attn1.to_q": 1, r"up_blocks.*to_v": 5}}
    for part, matrices in lora.items():
        metadata[f"{part}.target_modules"] = list(matrices)
        metadata[f"{part}.rank_pattern"] = {name: len(A) for name, (A, _) in matrices.items()}
        metadata[f"{part}.use_rslora"], metadata[f"{part}.init_lora_weights"] = stabilised, "gaussian"
    save_file(peft(lora), tmp_path / "adapter.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
    for pipe in sd:
        pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert_same(*map(outputs, sd))
    scales = {patch.forms["default_0"].scale for patch in sd[0].unet._lora.layers.values()}
    assert len(scales) > 4  # both matter: the layer's rank, and the alpha of its pattern


# --- weighing, switching, fusing -------------------------------------------------------------------------------------


def load_two(pipes: Pipes) -> None:
    """Load two adapters that share some layers; the second leaves the (last) text encoder alone."""
    first, second = draw(pipes[1], seed=1, only=every(4)), draw(pipes[1], seed=2, only=every(6))
    load_both(pipes, peft(first), adapter_name="one")
    del second["text_encoder_2" if "text_encoder_2" in second else "text_encoder"]
    load_both(pipes, peft(second), adapter_name="two")


def test_two_adapters(xl: Pipes) -> None:
    """The last that was loaded is active where it has layers; weights; one, both, in another order; one deleted."""
    ours, theirs = pipes = xl
    load_two(pipes)
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert_same(*map(outputs, pipes))
    seen = [outputs(ours)[0]]
    for arguments in (
        (["one", "two"], [0.5, -1.25]),
        ("one", 0.3),
        (["two", "one"], None),
        ("two", [2]),
        (["one", "two"], [{"unet": 0.2, "text_encoder": 0.7}, 0.9]),
    ):
        for pipe in pipes:
            pipe.set_adapters(*arguments)
        assert_same(*map(outputs, pipes))
        assert sorted(ours.get_active_adapters()) == sorted(theirs.get_active_adapters())
        seen.append(outputs(ours)[0])
    assert all(relative_error(a, b) > 1e-3 for k, a in enumerate(seen) for b in seen[:k])
    for pipe in pipes:
        pipe.delete_adapters("two")
    assert ours.get_list_adapters() == theirs.get_list_adapters()
    assert_same(*map(outputs, pipes))


def test_weights_of_blocks(sd: Pipes) -> None:
    lora = draw(sd[1], only=lambda layer: every(3)(layer) and "_embedding" not in layer[1])  # theirs fails on those
    load_both(sd, peft(lora))
    before = outputs(sd[0])[0]
    for weights in (
        {"unet": {"down": 0.5, "mid": 0.25, "up": {"block_1": [0.75, 0.1]}}},
        {"unet": {"up": 0.3}, "text_encoder": 0.6},
    ):
        for pipe in sd:
            pipe.set_adapters("default_0", weights)
        assert_same(*map(outputs, sd))
        assert relative_error(outputs(sd[0])[0], before) > 1e-3


def test_disable_and_enable(sd: Pipes) -> None:
    ours, _ = sd
    plain = outputs(ours)
    load_two(sd)
    active = outputs(ours)
    for pipe in sd:
        pipe.disable_lora()
    assert all(map(torch.equal, outputs(ours), plain))
    assert_same(*map(outputs, sd))
    for pipe in sd:
        pipe.enable_lora()
    assert all(map(torch.equal, outputs(ours), active))
    assert_same(*map(outputs, sd))


def test_fuse(xl: Pipes) -> None:
    ours, theirs = pipes = xl
    networks = [getattr(ours, name) for name in layers(theirs)]
    originals = [dict(network.named_parameters()) for network in networks]
    plain = outputs(ours)
    load_two(pipes)
    for pipe in pipes:
        pipe.set_adapters(["one", "two"], [0.5, 0.75])
    active = outputs(ours)
    for pipe in pipes:
        pipe.fuse_lora(components=list(layers(theirs)), lora_scale=0.4)
    assert_same(*map(outputs, pipes))
    assert relative_error(outputs(ours)[0], active[0]) > 1e-3
    assert ours.fused_loras == {"one", "two"} and ours.num_fused_loras == 2
    for pipe in pipes:
        pipe.unfuse_lora(components=list(layers(theirs)))  # theirs comes back but for rounding, and keeps the 0.4
    for network, before in zip(networks, originals, strict=True):
        for name, parameter in network.named_parameters():
            assert parameter is before[name]  # not its bits: the very tensor, as it was mapped from its file
    assert all(map(torch.equal, outputs(ours), active))
    ours.unload_lora_weights()
    assert all(map(torch.equal, outputs(ours), plain))
    assert not any(module._forward_hooks or "lora" in str(module._buffers) for n in networks for module in n.modules())


def test_another_adapter_takes_the_place_of_a_fused_one(sd: Pipes) -> None:
    first, second = (peft(draw(sd[1], seed=seed, only=attention)) for seed in (1, 2))
    load_both(sd, first, adapter_name="one")
    for pipe in sd:
        pipe.fuse_lora()
    load_both(sd, second, adapter_name="two")
    assert_same(*map(outputs, sd))
    alone = outputs(sd[0])
    sd[0].delete_adapters("one")
    assert all(map(torch.equal, outputs(sd[0]), alone))


def test_fuse_and_unload_keeps_the_fused_weights(sd: Pipes, tmp_path: Path) -> None:
    """The reference's way to merge adapters for good; the saved pipeline has them too, and takes others."""
    ours, theirs = (copy_of(pipe, tmp_path / str(k)) for k, pipe in enumerate(sd))
    third = peft(draw(theirs, seed=3, only=attention))
    load_two((ours, theirs))
    for pipe in (ours, theirs):
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    assert_same(outputs(ours), outputs(theirs))
    load_both((ours, theirs), third)
    assert_same(outputs(ours), outputs(theirs))
    ours.unload_lora_weights()
    again = copy_of(ours, tmp_path / "fused")
    assert all(map(torch.equal, outputs(again), outputs(ours)))


def copy_of(pipe: Any, folder: Path) -> Any:
    pipe.save_pretrained(folder)
    copy = type(pipe).from_pretrained(folder, torch_dtype=torch.float64).to(torch.float64)
    copy.set_progress_bar_config(disable=True)
    return copy


# --- whole calls -----------------------------------------------------------------------------------------------------


def picture(pipe: Any, **arguments: Any) -> Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent", "generator": seeded(3)}
    return pipe("a red heart", **options, **arguments).images


def test_a_scale_per_call(pipes: Pipes) -> None:
    """It counts for the UNet and for text encoders, and in no other call."""
    load_two(pipes)
    bound = 1e-7  # measured: 3e-8 with the Euler scheduler of SDXL, which computes in float32, and 2e-15 without
    full = picture(pipes[0])
    assert relative_error(full, picture(pipes[1])) < bound
    ours, theirs = (picture(pipe, cross_attention_kwargs={"scale": 0.35}) for pipe in pipes)
    assert relative_error(ours, theirs) < bound
    assert relative_error(ours, full) > 1e-3
    assert torch.equal(picture(pipes[0]), full)
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = [pipe.encode_prompt("a red heart", **arguments, lora_scale=0.35)[0] for pipe in pipes]
    assert relative_error(*found) < BOUND
    assert relative_error(found[0], pipes[0].encode_prompt("a red heart", **arguments)[0]) > 1e-3
