"""The reference (diffusers, transformers) and the few tools that compare with it.

``from theirs import diffusers`` imports the reference on first use, so tests that do not need it do not wait for it.
"""

from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor, nn

from minidiff.checkpoints.remap import translate

Module = TypeVar("Module", bound=nn.Module)


def __getattr__(name: str) -> ModuleType:
    if name == "diffusers":
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        return diffusers
    if name == "transformers":
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        return transformers
    raise AttributeError(name)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Return ‖ours - theirs‖₂ / ‖theirs‖₂, in float64. Shapes must be equal and every value finite."""
    assert ours.shape == theirs.shape, f"ours {tuple(ours.shape)}, theirs {tuple(theirs.shape)}"
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.isfinite().all() and theirs.isfinite().all(), "not finite"
    return (torch.linalg.vector_norm(ours - theirs) / torch.linalg.vector_norm(theirs)).item()


@torch.no_grad()
def randomize(module: Module, seed: int = 0, scale: float = 1.0) -> Module:
    """Redraw every parameter of ``module`` in place, large enough that each one shows in the output; return it in eval.

    Weight matrices and kernels are N(0, scale² / fan_in), so activations keep their size through any depth; gains of
    norms are N(1, 0.2²) and biases N(0, 0.2²), so that a gain or a bias that is ignored or swapped cannot hide.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1:
            value = draw * scale / parameter[0].numel() ** 0.5
        else:
            value = 0.2 * draw + (1.0 if name.endswith("weight") else 0.0)
        parameter.copy_(value)
    return module.eval()


@torch.no_grad()
def carry_over(theirs: nn.Module, ours: Module) -> Module:
    """Give ``ours`` the weights and dtype of ``theirs``, by the Hub column of the name table; return it in eval."""
    tensors = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(translate(tensors, ours.rows(), "hub", "ours"), strict=True, assign=True)
    return ours.eval()
