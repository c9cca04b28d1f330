"""Products and convolutions whose weights are laid out once, in the blocks that the CPU's kernels multiply.

    y = x W^T + b,  with W cut into blocks beforehand

oneDNN, the library behind torch's fast CPU kernels, cuts W into blocks that fit the processor's registers. Called in
the usual way it does so at every call, which for the coarse levels of a UNet takes longer than the product; and torch
hands float32 linear layers to another library altogether. ``torch.compile`` packs the weights of a frozen graph once;
the same operators are used here without a compiler.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)  # those that oneDNN multiplies on any processor


def can_pack(x: Tensor) -> bool:
    """Return whether a product with ``x`` can use a packed weight: on the CPU, in inference, where torch has oneDNN."""
    return x.device.type == "cpu" and x.dtype in _DTYPES and not torch.is_grad_enabled() and _available()


def hooked(module: nn.Module) -> bool:
    """Return whether calling a part of ``module`` does more than its forward, as adapters and observers want."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


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
    """A value made of tensors and kept until one of them changes.

    Args:
        keep: whether to keep it at all. A UNet uses its weights in dozens of steps, an autoencoder once for a picture.
    """

    def __init__(self, keep: bool) -> None:
        self.keep = keep
        # One object, so that threads see old or new and never half. The sources are in it because their addresses,
        # which are part of the key, could be those of other tensors once they are gone.
        self._entry: tuple[Any, Any, Any] = (None, None, ())

    def get(self, make: Callable[[], Any], *sources: Tensor, shape: torch.Size | None = None) -> Any:
        """Return the value, made anew if a source is another tensor or was written to, or for another ``shape``."""
        if not self.keep:
            return make()
        key = [shape, *((s.data_ptr(), s.dtype, s.device, None if s.is_inference() else s._version) for s in sources)]
        kept, value, _ = self._entry
        if kept != key:
            value = make()
            self._entry = (key, value, sources)
        return value

    def __getstate__(self) -> dict[str, Any]:
        return {"keep": self.keep, "_entry": (None, None, ())}  # packed weights cannot be pickled, and need not be


class FastLinear:
    """The forward of an ``nn.Linear`` with a packed weight."""

    def __init__(self, module: nn.Linear, keep: bool) -> None:
        self.module, self._packed = module, Kept(keep)

    def __call__(self, x: Tensor) -> Tensor:
        """Compute x W^T + b for x (..., D_in)."""
        W = self.module.weight
        if not can_pack(x) or W.dtype != x.dtype:
            return nn.Linear.forward(self.module, x)
        rows = x.numel() // x.shape[-1]
        return product(x, self._packed.get(lambda: pack_matrix(W, rows), W), self.module.bias)


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
