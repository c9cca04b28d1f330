"""Products and convolutions whose weights are laid out once, in the blocks that the CPU's kernels multiply.

    y = x W^T + b,  with W cut into blocks beforehand

oneDNN, the library behind torch's fast CPU kernels, cuts W into blocks that fit the processor's registers. Called in
the usual way it does so at every call, which for the coarse levels of a UNet takes longer than the product; and torch
hands float32 linear layers to another library altogether. ``torch.compile`` packs the weights of a frozen graph once;
the same operators are used here without a compiler.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from minidiff.fast.unchanged import Fast

# What is used of torch that is private: another version may not have it.
OPERATORS = "_linear_pointwise _reorder_linear_weight _convolution_pointwise _reorder_convolution_weight".split()
OPERATORS += ["_is_mkldnn_bf16_supported"]
SAMPLE = 64  # values of a weight that are looked at to see whether it was written to
_PLAIN = (Tensor, nn.Parameter)


def can_pack(x: Tensor, *weights: Tensor | None) -> bool:
    """Return whether a product of ``x`` with these weights can use packed ones.

    On the CPU, in inference, where torch has oneDNN; and where nothing but the numbers is wanted: no autocast, tracing
    or transform, and no tensors that are more than tensors, such as quantized weights.
    """
    if torch.is_grad_enabled() or x.dtype not in _dtypes() or x.numel() == 0:
        return False
    for tensor in (x, *weights):  # a loop, for speed
        if tensor is not None and not (type(tensor) in _PLAIN and tensor.is_cpu and tensor.dtype == x.dtype):
            return False
    transformed = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    recorded = torch.jit.is_tracing() or forward_ad._current_level >= 0
    return not (transformed or recorded or torch.is_autocast_enabled("cpu"))


def pack_matrix(W: Tensor, rows: int) -> Tensor:
    """Pack a matrix (D_out, D_in) for products with ``rows`` rows; other numbers of rows work too."""
    return torch.ops.mkldnn._reorder_linear_weight(W.contiguous(), rows)


def product(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x W^T + b for x (..., D_in): (..., D_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def gelu_product(x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """Return gelu(x W^T + b), rounded once."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "gelu", [], "none")


def product_times(x: Tensor, packed: Tensor, bias: Tensor, factor: Tensor) -> Tensor:
    """Return (x W^T + b) * factor, rounded once."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, factor, packed, bias, "mul")


def pack_kernel(W: Tensor, stride: int, padding: tuple[int, int], like: Tensor) -> Tensor:
    """Pack a convolution kernel (C_out, C_in, h, w) for feature maps of the shape of ``like``.

    Others work too, but the blocks may be the wrong ones for them, and then they are laid out anew at every call.
    """
    shape = list(like.shape)
    return torch.ops.mkldnn._reorder_convolution_weight(W, list(padding), [stride] * 2, [1, 1], 1, shape)


def convolve(x: Tensor, packed: Tensor, bias: Tensor | None, stride: int, padding: tuple[int, int]) -> Tensor:
    """Convolve x (B, C_in, H, W); the result lies in memory with the channels last, whatever x does."""
    sizes = list(padding), [stride] * 2, [1, 1]
    return torch.ops.mkldnn._convolution_pointwise(x, packed, bias, *sizes, 1, "none", [], "")


class Kept:
    """A value made of weights and kept until one of them changes.

    Args:
        keep: whether to keep it at all. A UNet uses its weights in dozens of steps, an autoencoder once for a picture.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        # One object, so that threads see old or new and never half. The sources are in it because their addresses,
        # which are part of the key, could be those of other tensors once they are gone.
        self._entry: tuple[Any, Any, Any, Any] = (None, None, (), ())

    def get(self, make: Callable[[], Any], *sources: Tensor, shape: torch.Size | None = None) -> Any:
        """Return the value, made anew if a source is another tensor or was written to, or for another ``shape``.

        What is written through ``.data``, as averages of weights often are, or put there by ``.to`` leaves no trace but
        the values: a sample of them, looked at where the packed ones were, is compared.
        """
        if not self.keep:
            return make()
        key = shape, *((version(s), s.shape, s.stride(), s.dtype) for s in sources)
        kept, value, _, samples = self._entry
        if kept != key or not all(torch.equal(now, seen) for now, seen in samples):
            value = make()
            self._entry = (key, value, sources, [(sample(s), sample(s).clone()) for s in sources])
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"keep": self.keep, "_entry": (None, None, (), ())}  # packed weights cannot be pickled, and need not be


def version(tensor: Tensor) -> tuple[int, int | None]:
    """Return what changes when something is written to a tensor, or another memory takes the place of its own."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def sample(W: Tensor) -> Tensor:
    """Look at about ``SAMPLE`` values that lie evenly in the memory of W, and in all rows and columns in turn."""
    count = min(W.numel(), W.untyped_storage().nbytes() // W.element_size() - W.storage_offset())
    step = max(count // SAMPLE, 1) | 1  # odd: the rows of a weight are mostly of even length
    return W.as_strided(((count + step - 1) // step,), (step,))


class Packing(Fast):
    """A faster way with packed weights, or with the matrices of fewer products."""

    def __init__(self, module: nn.Module, keep: bool = True) -> None:
        super().__init__(module)
        self._packed, self._matrices = Kept(keep), Kept(keep)


class FastLinear(Packing):
    """The forward of an ``nn.Linear`` with a packed weight."""

    kind = nn.Linear

    def fast(self, input: Tensor) -> Tensor:
        """Compute x W^T + b for x (..., D_in)."""
        x, W, bias = input, self.module.weight, self.module.bias
        if not can_pack(x, W, bias) or x.shape[-1] != W.shape[1]:
            return NotImplemented
        rows = x.numel() // x.shape[-1]
        return product(x, self._packed.get(lambda: pack_matrix(W, rows), W), bias)


@functools.cache
def _dtypes() -> tuple[torch.dtype, ...]:
    """Return what oneDNN multiplies on this processor: bfloat16 needs AVX-512 or newer."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
