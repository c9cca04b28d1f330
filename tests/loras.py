"""LoRA for tests: matrices drawn for the reference's layers, their names in files, and what two pipelines compute."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tests.pictures import seeded
from tests.theirs import relative_error

Tensors = dict[str, Tensor]
Matrices = dict[str, dict[str, tuple[Tensor, Tensor]]]  # component -> layer of theirs -> A, B
Pipes = tuple[Any, Any]
Rank = Callable[[int], int]
Only = Callable[[tuple[int, str]], bool]
BOUND = 1e-10  # measured: at most 1.8e-15 everywhere


def cleaned(pipes: Pipes) -> Iterator[Pipes]:
    yield pipes
    for pipe in pipes:
        pipe.unload_lora_weights()
    pipes[1]._lora_scale = 1.0  # theirs keeps the scale of its last call for what it loads next


@torch.no_grad()
def outputs(pipe: Any) -> list[Tensor]:
    """Return what the UNet and the text encoders compute for fixed inputs."""
    g, options = seeded(0), {}
    x, t = torch.randn(2, 4, 8, 8, generator=g, dtype=torch.float64), torch.tensor([3, 800])
    ctx = torch.randn(2, 5, pipe.unet.config.cross_attention_dim, generator=g, dtype=torch.float64)
    ids = torch.randint(0, 500, (2, 7), generator=g)
    found = []
    if hasattr(pipe, "text_encoder_2"):
        pooled, sizes = torch.randn(2, 20, generator=g, dtype=torch.float64), torch.rand(2, 6, generator=g)
        options["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
        out = pipe.text_encoder_2(ids)
        found += [out.text_embeds, out.last_hidden_state]
    return [pipe.unet(x, t, ctx, **options).sample, pipe.text_encoder(ids).last_hidden_state, *found]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert relative_error(a, b) < BOUND


def layers(pipe: Any) -> dict[str, dict[str, nn.Module]]:
    """Return all layers of the reference's networks that LoRA can adapt."""
    return {
        component: {
            name: module
            for name, module in getattr(pipe, component).named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d))
        }
        for component in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipe, component)
    }


def draw(pipe: Any, seed: int = 1, rank: Rank = lambda k: 2, only: Only = lambda layer: True) -> Matrices:
    """Draw matrices for those layers of theirs whose number and name ``only`` accepts."""
    g, found, k = seeded(seed), {}, 0
    for component, modules in layers(pipe).items():
        found[component] = {}
        for name, module in modules.items():
            k += 1
            if only((k, name)):
                (rows, columns, *kernel), r = module.weight.shape, rank(k)
                A = torch.randn(r, columns, *kernel, generator=g, dtype=torch.float64) / 4
                B = torch.randn(rows, r, *(1 for _ in kernel), generator=g, dtype=torch.float64) / 4
                found[component][name] = A, B
    return found


def every(n: int) -> Only:
    return lambda layer: layer[0] % n == 0


def attention(layer: tuple[int, str]) -> bool:
    return "attn" in layer[1]


def hub(name: str) -> str:
    """Return a name as it is on the Hub: transformers 5 has dropped "text_model." from one of its two encoders."""
    return f"text_model.{name}" if name.startswith(("encoder.", "final_layer_norm")) else name


def spell(lora: Matrices, name: Callable[[str, str], str], down: str, up: str) -> Tensors:
    found = {}
    for component, matrices in lora.items():
        for layer, (A, B) in matrices.items():
            full = name(component, layer)
            found |= {full + down: A, full + up: B}
    return found


def peft(lora: Matrices) -> Tensors:
    return spell(lora, lambda component, name: f"{component}.{hub(name)}", ".lora_A.weight", ".lora_B.weight")


def load_both(pipes: Pipes, tensors: Any, **options: Any) -> None:
    for pipe in pipes:
        pipe.load_lora_weights(dict(tensors) if isinstance(tensors, dict) else tensors, **options)
