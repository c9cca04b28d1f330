"""The reference (diffusers, transformers, peft, LyCORIS) and the few tools that compare with it.

``from tests.theirs import diffusers`` imports the reference on first use: tests that do not need it do not wait for it.
"""

from collections.abc import Callable
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
    if name == "lycoris":
        import lycoris

        lycoris.logger.setLevel("ERROR")
        return lycoris
    if name == "peft":
        import peft

        return peft
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


def assert_same_start(make_ours: Callable[[], nn.Module], make_theirs: Callable[[], nn.Module]) -> None:
    """Build both under one seed: the weights are equal bit for bit, and so are the random numbers that come next."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        theirs, next_of_theirs = make_theirs(), torch.get_rng_state()
        torch.manual_seed(3)
        ours, next_of_ours = make_ours(), torch.get_rng_state()
    found = ours.state_dict()
    expected = {ours.canonical_hub_name(name): tensor for name, tensor in theirs.state_dict().items()}
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"{len(different)} of {len(expected)} differ, first {different[:3]}"
    assert torch.equal(next_of_ours, next_of_theirs)


def assert_same_order(ours: nn.Module, theirs: nn.Module) -> None:
    """The parameters come in the same order, in which optimizers and averages of weights store what belongs to them."""
    expected = [ours.canonical_hub_name(name) for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_parameters()] == expected
