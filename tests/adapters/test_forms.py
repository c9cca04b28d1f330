"""Each form of an adapter against peft or LyCORIS, in float64: single layers, whole networks, whole pictures."""

import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import minidiff
from minidiff.adapters.forms import Update, read_update
from minidiff.adapters.lora import Adapters, lora_scaled
from minidiff.adapters.lora_names import _ENDINGS, LoraNames
from minidiff.checkpoints.load import OnMeta
from minidiff.cli.main import main
from minidiff.config import read_json
from tests.loras import Pipes, Tensors, assert_same, attention, cleaned, draw, every, hub, layers, outputs, peft
from tests.pictures import load_both, quiet, seeded
from tests.theirs import diffusers, lycoris, relative_error, transformers
from tests.theirs import peft as peft_library
from tests.tiny import save_tiny
from tests.tiny_xl import save_base

Changed = tuple[Pipes, Tensors]  # ours and theirs, which LyCORIS changes, and the file that does the same
CONFIGS = Path(__file__).parents[1] / "data" / "hub_configs"  # SOURCE.md there says where they are from
BOUND = 1e-10  # measured: at most 7.1e-16 for single layers, 2e-15 for networks
KINDS = {  # of LyCORIS's modules: class, arguments, rank
    "LoRA": ("LoConModule", {}, 3),
    "LoRA (Tucker)": ("LoConModule", {"use_tucker": True}, 3),
    "DoRA": ("LoConModule", {"weight_decompose": True}, 3),
    "DoRA of columns": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, 3),
    "LoHa": ("LohaModule", {}, 3),
    "LoHa (Tucker)": ("LohaModule", {"use_tucker": True}, 2),
    "LoHa with DoRA": ("LohaModule", {"weight_decompose": True}, 2),
    "LoKr": ("LokrModule", {"factor": 2}, 1),
    "LoKr of four": ("LokrModule", {"decompose_both": True}, 1),
    "LoKr without a rank": ("LokrModule", {"full_matrix": True}, 4),
    "LoKr (Tucker)": ("LokrModule", {"use_tucker": True, "factor": 2}, 1),
    "LoKr with DoRA": ("LokrModule", {"weight_decompose": True, "wd_on_out": False, "factor": 4}, 1),
    "difference": ("FullModule", {}, 1),
}
LAYERS = {"linear": ((2, 5, 12), 12), "conv 3x3": ((2, 12, 6, 6), 3), "conv 1x1": ((2, 12, 6, 6), 1)}


def make_layer(name: str) -> tuple[nn.Module, Tensor]:
    """Return a layer of 12 inputs and 16 outputs in float64, and an input."""
    torch.manual_seed(0)
    shape, k = LAYERS[name]
    layer = nn.Linear(12, 16) if name == "linear" else nn.Conv2d(12, 16, k, padding=k // 2, stride=2)
    return layer.double(), torch.randn(shape, dtype=torch.float64)


def change(layer: nn.Module, kind: str, seed: int = 0) -> tuple[Any, Tensors]:
    """Return a module of LyCORIS that changes a layer, and its tensors by the end of their names in a file."""
    cls, arguments, rank = ("NormModule", {}, 1) if "Norm" in type(layer).__name__ else KINDS[kind]
    module = getattr(lycoris, cls)("x", layer, 1.0, rank, 2.0, **arguments).double().eval()
    g = seeded(seed)
    for name, parameter in module.named_parameters():
        value = torch.randn(parameter.shape, generator=g, dtype=torch.float64) / 3
        parameter.data = value.abs() + 0.5 if name == "dora_scale" else value
    if cls == "FullModule":
        found = {"diff": module.weight, "diff_b": module.bias}
    else:
        found = module.state_dict() if cls == "NormModule" else module.custom_state_dict()
    return module, {key: value.detach().clone() for key, value in found.items() if value is not None}


def adapted(layer: nn.Module, *files: Tensors) -> Adapters:
    """Put changes on a layer, each as an adapter of its own; all are active."""
    network = nn.ModuleDict({"layer": layer})
    adapters = Adapters(network)
    for k, tensors in enumerate(files):
        adapters.add(f"a{k}", {"layer": ("layer", update_of(layer, tensors))})
    adapters.activate({f"a{k}": 1.0 for k in range(len(files))})
    return adapters


def update_of(layer: nn.Module, tensors: Tensors) -> Update:
    given = {_ENDINGS[f".{key}"]: (key, value) for key, value in tensors.items()}
    update, problems = read_update(given, layer.weight, layer.bias)
    assert not problems
    return update._replace(scale=tensors["alpha"].item() / update.rank if "alpha" in tensors and update.rank else 1.0)


# --- one layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_against_lycoris(name: str, kind: str) -> None:
    """As it computes, at the weight 1; fused and out again bit for bit; deleted, nothing is left."""
    layer, x = make_layer(name)
    before, weight, plain = dict(layer.named_parameters()), layer.weight.clone(), layer(x)
    module, tensors = change(layer, kind)
    module.apply_to()
    expected = layer(x)
    module.restore()
    layer.weight, layer.bias = before["weight"], before["bias"]  # LyCORIS puts copies there
    adapters = adapted(layer, tensors)
    found = layer(x)
    assert relative_error(found, expected) < BOUND
    assert relative_error(found, plain) > 1e-2
    adapters.fuse(1.0, safe=True)
    assert relative_error(layer(x), expected) < BOUND
    adapters.unfuse()
    assert dict(layer.named_parameters()) == before and torch.equal(layer.weight, weight)
    assert torch.equal(layer(x), found)
    adapters.delete("a0")
    assert torch.equal(layer(x), plain) and not layer._buffers and not layer._forward_hooks


@pytest.mark.parametrize("kind", ["LoHa", "LoHa (Tucker)", "LoKr", "LoKr of four", "LoKr (Tucker)"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_a_layer_against_peft(name: str, kind: str) -> None:
    layer, x = make_layer(name)
    tucker = {"use_effective_conv2d": kind.endswith("(Tucker)")}
    options = {"target_modules": ["layer"], "alpha": 6, "init_weights": False, **tucker}
    if kind.startswith("LoHa"):
        config = peft_library.LoHaConfig(r=4, **options)
    else:
        config = peft_library.LoKrConfig(r=1, decompose_both=kind.endswith("four"), decompose_factor=4, **options)
    theirs = peft_library.get_peft_model(nn.ModuleDict({"layer": nn.Sequential(layer)[0]}), config)
    tensors = {
        key.removeprefix("base_model.model.layer."): value.clone()
        for key, value in peft_library.get_peft_model_state_dict(theirs).items()
    }
    assert any("_t" in key for key in tensors) == (kind.endswith("(Tucker)") and name == "conv 3x3")
    expected = theirs.base_model.model["layer"](x)
    adapted(layer, tensors | {"alpha": torch.tensor(6.0)})
    assert relative_error(layer(x), expected) < BOUND


@torch.no_grad()
def test_a_row_of_zeros_has_no_direction() -> None:
    """peft divides by its norm, LyCORIS by eps more than that: it stays zero."""
    for kind in ("DoRA", "LoKr with DoRA"):
        layer, x = make_layer("linear")
        layer.weight.zero_(), layer.bias.zero_()
        tensors = change(layer, kind)[1]
        tensors = {key: value if key in ("dora_scale", "alpha") else 0 * value for key, value in tensors.items()}
        adapted(layer, tensors)
        assert torch.equal(layer(x), torch.zeros_like(layer(x)))


# --- several adapters ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_weights_by_hand() -> None:
    """A LoHa, a difference, and DoRA in LyCORIS's spelling, which the weight interpolates and no order changes."""
    layer, x = make_layer("conv 3x3")
    W, b = layer.weight.clone(), layer.bias.clone()
    files = [
        change(layer, kind, seed)[1] for seed, kind in enumerate(["LoHa", "difference", "DoRA", "DoRA of columns"])
    ]
    for weights in ((0.5, 2.0, -0.75, 0.25), (1.0, 0.0, 1.0, 1.0)):
        V = [
            W + 2 / 3 * (f["lora_up.weight"].flatten(1) @ f["lora_down.weight"].flatten(1)).view_as(W)
            for f in files[2:]
        ]
        doras = [V[0] * files[2]["dora_scale"] / torch.linalg.vector_norm(V[0], dim=(1, 2, 3), keepdim=True)]
        doras += [V[1] * files[3]["dora_scale"] / torch.linalg.vector_norm(V[1], dim=(0, 2, 3), keepdim=True)]
        f = files[0]
        loha = 2 / 3 * ((f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])).view_as(W)
        changes = [loha, files[1]["diff"], doras[0] - W, doras[1] - W]
        new = W + sum(0.6 * w * change for w, change in zip(weights, changes, strict=True))
        expected = nn.functional.conv2d(x, new, b + 0.6 * weights[1] * files[1]["diff_b"], stride=2, padding=1)
        adapters = adapted(layer, *files)
        for order in (1, -1):
            adapters.activate(dict([(f"a{k}", w) for k, w in enumerate(weights)][::order]))
            with lora_scaled(0.6):
                assert relative_error(layer(x), expected) < BOUND
        for k in range(4):
            adapters.delete(f"a{k}")
    assert torch.equal(layer.weight, W)


# --- DoRA of peft, in whole networks ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipes]:
    folders = {"sd": save_tiny(tmp_path_factory.mktemp("sd")), "xl": save_base(tmp_path_factory.mktemp("xl"))}
    names = {"sd": "StableDiffusionPipeline", "xl": "StableDiffusionXLPipeline"}
    return {kind: load_both(names[kind], folder) for kind, folder in folders.items()}


@pytest.fixture(params=["sd", "xl"])
def pipes(request: pytest.FixtureRequest, loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    yield from cleaned(loaded[request.param])


@pytest.fixture
def sd(loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    yield from cleaned(loaded["sd"])


def dora(pipe: Any, seed: int, n: int) -> Tensors:
    """Draw a DoRA in PEFT's spelling; a magnitude of a convolution is (1, O, 1, 1) there."""
    lora, g = draw(pipe, seed, only=lambda layer: every(n)(layer) and "_embedding" not in layer[1]), seeded(seed)
    tensors = peft(lora)
    for component, matrices in lora.items():
        for name, (_, B) in matrices.items():
            m = torch.rand(len(B), generator=g, dtype=torch.float64) + 0.5
            tensors[f"{component}.{hub(name)}.lora_magnitude_vector"] = m if B.ndim == 2 else m[None, :, None, None]
    return tensors


def add_dora(pipes: Pipes, tensors: Tensors, **options: Any) -> None:
    """Load it into both; transformers 5 loses the magnitudes of text encoders unless their names end in ".weight"."""
    pipes[0].load_lora_weights(tensors, **options)
    ends = {key: ".weight" * key.startswith("text") * key.endswith("magnitude_vector") for key in tensors}
    pipes[1].load_lora_weights({key + ends[key]: value.clone() for key, value in tensors.items()}, **options)


def test_dora(pipes: Pipes) -> None:
    before = outputs(pipes[0])
    add_dora(pipes, dora(pipes[1], 1, 2))
    assert_same(*map(outputs, pipes))
    assert all(relative_error(a, b) > 1e-3 for a, b in zip(outputs(pipes[0]), before, strict=True))
    pipes[0].unload_lora_weights()
    assert all(map(torch.equal, outputs(pipes[0]), before))


def test_two_doras_and_a_lora(pipes: Pipes) -> None:
    """The order counts; at the weight 0 a layer is no longer what it was; weights of blocks; fused, and out again."""
    ours, theirs = pipes
    parts = list(layers(theirs))
    lora = peft(draw(theirs, 3, only=attention))
    for name, tensors in {"one": dora(theirs, 1, 2), "two": dora(theirs, 2, 3), "lora": lora}.items():
        add_dora(pipes, tensors, adapter_name=name)
    seen = []
    for names, weights in (
        (["one", "two", "lora"], [1.0, 1.0, 1.0]),
        (["lora", "two", "one"], [1.0, 1.0, 1.0]),
        (["two", "one"], [0.5, -1.25]),
        ("one", 0.0),
        (["one", "two"], [{"unet": {"down": 0.5, "mid": 0.25}, "text_encoder": 0.2}, 0.7]),
    ):
        for pipe in pipes:
            pipe.set_adapters(names, weights)
        assert_same(*map(outputs, pipes))
        seen.append(outputs(ours)[0])
    for pipe in pipes:
        pipe.disable_lora()
    assert_same(*map(outputs, pipes))
    seen.append(plain := outputs(ours)[0])
    for pipe in pipes:
        pipe.enable_lora()
    originals = {name: dict(getattr(ours, name).named_parameters()) for name in parts}
    for pipe in pipes:
        pipe.set_adapters(["one", "two", "lora"], [0.5, 0.75, 2.0])
    active = outputs(ours)
    for pipe in pipes:
        pipe.fuse_lora(components=parts, lora_scale=0.4)
    assert_same(*map(outputs, pipes))
    seen.append(outputs(ours)[0])
    assert all(relative_error(a, b) > 1e-3 for k, a in enumerate(seen) for b in seen[:k])
    for pipe in pipes:
        pipe.unfuse_lora(components=parts)  # theirs comes back but for rounding
    for name, parameters in originals.items():
        assert all(now is parameters[key] for key, now in getattr(ours, name).named_parameters())
    assert all(map(torch.equal, outputs(ours), active))
    ours.delete_adapters(["one", "two", "lora"])
    assert torch.equal(outputs(ours)[0], plain)


def test_a_dora_scaled_per_call(pipes: Pipes) -> None:
    add_dora(pipes, dora(pipes[1], 1, 2))
    pictures = []
    for options in ({}, {"cross_attention_kwargs": {"scale": 0.35}}):
        options |= {"num_inference_steps": 2, "output_type": "np"}
        pictures.append([pipe("a red heart", generator=seeded(3), **options).images for pipe in pipes])
        np.testing.assert_allclose(*pictures[-1], atol=2e-7)  # measured: 6e-8, in float32; one level is 4e-3
    assert np.abs(pictures[0][0] - pictures[1][0]).max() > 0.01


# --- all forms in one file, in whole pictures ------------------------------------------------------------------------


def kohya_file(pipe: Any, n: int = 2) -> tuple[list[Any], Tensors]:
    """Change every n-th layer of the reference with LyCORIS, each in another form; also return the file of this."""
    modules, tensors, k = [], {}, 0
    te = "lora_te1_" if hasattr(pipe, "text_encoder_2") else "lora_te_"
    prefixes = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}
    for component in layers(pipe):
        for name, layer in list(getattr(pipe, component).named_modules()):
            k += isinstance(layer, KNOWN)
            if isinstance(layer, KNOWN) and k % n == 0 and min(layer.weight.shape[:2]) > 7:
                module, parts = change(layer, list(KINDS)[k // n % len(KINDS)], k)
                module.apply_to()
                modules.append(module)
                stem = prefixes[component] + hub(name).replace(".", "_")
                tensors |= {f"{stem}.{part}": value for part, value in parts.items()}
    return modules, tensors


KNOWN = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


@pytest.fixture
def changed(pipes: Pipes) -> Iterator[Changed]:
    modules, tensors = kohya_file(pipes[1])
    yield pipes, tensors
    for module in modules:
        module.restore()


def test_all_forms_in_one_file(changed: Changed) -> None:
    (ours, theirs), tensors = changed
    plain = outputs(ours)
    ours.load_lora_weights(tensors)
    assert_same(outputs(ours), outputs(theirs))
    assert all(relative_error(a, b) > 1e-2 for a, b in zip(outputs(ours), plain, strict=True))
    options = {"num_inference_steps": 3, "output_type": "np"}
    pictures = [pipe("a red heart", generator=seeded(3), **options).images for pipe in (ours, theirs)]
    np.testing.assert_allclose(*pictures, atol=2e-7)  # measured: 6e-8, in float32; one level is 4e-3
    ours.fuse_lora()
    assert_same(outputs(ours), outputs(theirs))
    ours.unfuse_lora()
    ours.unload_lora_weights()
    assert all(map(torch.equal, outputs(ours), plain))


def test_what_is_said_of_a_file(changed: Changed, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When it is loaded, and by ``minidiff inspect``: every form, with its rank."""
    (ours, _), tensors = changed
    loaded = ours.load_lora_weights(tensors)
    save_file(tensors | {"lora_unet_x.hada_w1_a": torch.ones(2), "y": torch.ones(1)}, tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    page = capsys.readouterr().out
    for component, forms in loaded.forms.items():
        kinds = re.search(rf"layers of {component} \((.*?)\)(?:,|$)", str(loaded)).group(1)
        assert re.search(rf"  {component} +{len(forms)} layers: {re.escape(kinds)}\n", page)
    assert len(set(loaded.forms["unet"].values())) == 9
    assert re.search(r"\d LoHa of rank [23-]+, .*\d LoKr of rank 1, \d", str(loaded))
    assert re.search(r"  unexpected +2\n    lora_unet_x.hada_w1_a: its layer lacks .*\n    y: no part of an", page)


def test_saved_and_loaded(changed: Changed, tmp_path: Path) -> None:
    """All parts under their names, with alphas in the header; of a LoKr without a rank too, which PEFT scales."""
    (ours, _), tensors = changed
    ours.load_lora_weights(tensors, adapter_name="all")
    lokr = next(layer for layer in ours.unet._lora.layers.values() if layer.forms["all"][:2] == ("LoKr", 0))
    lokr.forms["all"] = lokr.forms["all"]._replace(scale=1.5)
    expected = outputs(ours)[0]
    ours.unet.save_lora_adapter(tmp_path, adapter_name="all")
    ours.unload_lora_weights()
    ours.unet.load_lora_adapter(tmp_path, prefix=None)
    assert relative_error(outputs(ours)[0], expected) < BOUND


def test_a_dora_saved_and_loaded_by_both(sd: Pipes, tmp_path: Path) -> None:
    """In PEFT's shapes, whatever those of its magnitudes were."""
    tensors = {key: one.flatten() if key.endswith("vector") else one for key, one in dora(sd[1], 1, 3).items()}
    sd[0].load_lora_weights(tensors, adapter_name="one")
    expected = outputs(sd[0])[0]
    sd[0].unet.save_lora_adapter(tmp_path, adapter_name="one")
    assert sd[0].unet.peft_config["one"].use_dora
    sd[0].unload_lora_weights()
    for pipe in sd:
        pipe.unet.load_lora_adapter(str(tmp_path), prefix=None, weight_name="pytorch_lora_weights.safetensors")
        assert relative_error(outputs(pipe)[0], expected) < BOUND


def test_an_optimized_pipeline_sees_all_forms(changed: Changed, tmp_path: Path) -> None:
    (ours, _), tensors = changed
    ours.save_pretrained(tmp_path)
    pictures = []
    for fast in (False, True):
        pipe = quiet(type(ours).from_pretrained(tmp_path, torch_dtype=torch.float32))
        if fast:
            pipe.optimize()
        found = [pipe("a red heart", num_inference_steps=2, output_type="np", seed=0).images]
        pipe.load_lora_weights(tensors)
        found.append(pipe("a red heart", num_inference_steps=2, output_type="np", seed=0).images)
        pictures.append(found)
    np.testing.assert_allclose(pictures[0], pictures[1], atol=1e-4)  # measured: 4e-6, in float32
    assert np.abs(pictures[0][0] - pictures[0][1]).max() > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """What is stored in half is computed in float32: without a weight below, the only rounding is the last one."""
    layer, x = make_layer("conv 3x3")
    tensors = {key: value.to(dtype) for key, value in change(layer, kind)[1].items()}
    adapters = adapted(half := copy.deepcopy(make_layer("conv 3x3")[0]).to(dtype), tensors)
    adapted(layer, tensors)
    expected, bound = layer(x), 2 * torch.finfo(dtype).eps  # measured: at most 0.8 eps
    assert relative_error(half(x.to(dtype)), expected) < bound
    adapters.fuse(1.0, safe=True)
    assert half.weight.dtype == dtype and relative_error(half(x.to(dtype)), expected) < bound
    weights = []
    for one in (dtype, torch.float32):
        layer = make_layer("conv 3x3")[0].to(one)
        layer.weight.zero_()
        adapted(layer, tensors).fuse(1.0, safe=True)
        weights.append(layer.weight.to(dtype))
    assert torch.equal(*weights) and weights[0].any()


# --- biases ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_bias_of_lora_against_peft() -> None:
    layer, x = make_layer("linear")
    options = {"target_modules": ["layer"], "init_lora_weights": False}
    config = peft_library.LoraConfig(r=2, lora_alpha=6, lora_bias=True, **options)
    theirs = peft_library.get_peft_model(nn.ModuleDict({"layer": layer}), config)
    tensors = {
        key.removeprefix("base_model.model.layer."): value.clone()
        for key, value in peft_library.get_peft_model_state_dict(theirs).items()
    }
    assert "lora_B.bias" in tensors and tensors["lora_B.bias"].abs().min() > 0
    expected = theirs.base_model.model["layer"](x)
    adapters = adapted(layer, tensors | {"alpha": torch.tensor(6.0)})
    assert relative_error(layer(x), expected) < BOUND
    adapters.fuse(1.0, safe=True)
    assert relative_error(layer(x), expected) < BOUND
    adapters.unfuse()


@torch.no_grad()
def test_a_bias_beside_a_lora() -> None:
    """``diff_b`` is not scaled with alpha, and may be there alone."""
    layer, x = make_layer("conv 3x3")
    _, tensors = change(layer, "LoRA")
    D = (tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)).view_as(layer.weight)
    diff_b = torch.randn(16, dtype=torch.float64)
    b = layer.bias + 0.5 * diff_b
    for given, weight in ((tensors, layer.weight + 0.5 * 2 / 3 * D), ({}, layer.weight)):
        expected = nn.functional.conv2d(x, weight, b, stride=2, padding=1)
        adapters = adapted(layer, given | {"diff_b": diff_b})
        adapters.activate({"a0": 0.5})
        assert relative_error(layer(x), expected) < BOUND
        adapters.delete("a0")


# --- the published networks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["runwayml--stable-diffusion-v1-5", "stabilityai--stable-diffusion-xl-base-1.0"])
def test_names_and_shapes_at_full_size(folder: str) -> None:
    """Each layer of the reference that LyCORIS can change is found under its name and has its shape."""
    ours, theirs = {}, {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if (path := CONFIGS / folder / part / "config.json").exists():
            fields = read_json(path)
            text = "CLIPTextModelWithProjection" if part.endswith("2") else "CLIPTextModel"
            with OnMeta():
                cls = minidiff.UNet2DConditionModel if part == "unet" else getattr(minidiff, text)
                ours[part] = cls.from_config(fields)
            with torch.device("meta"):
                if part == "unet":
                    theirs[part] = diffusers.UNet2DConditionModel.from_config(fields)
                else:
                    theirs[part] = getattr(transformers, text)(transformers.CLIPTextConfig(**fields))
    names = LoraNames(ours)
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    for part, network in theirs.items():
        count = 0
        for name, module in network.named_modules():
            if isinstance(module, KNOWN):
                layer, role = names.find(f"{prefixes[part]}{hub(name).replace('.', '_')}.diff")
                weight = ours[part].get_submodule(layer.ours).weight
                given = {role: (name, torch.empty(module.weight.shape, device="meta"))}
                assert read_update(given, weight, None)[1] == [] and layer.component == part
                count += 1
        assert count == len(set(names.dotted[part].values()))
