"""The switches of a pipeline that save memory. docs/memory.md measures what each of them saves.

Checked against the methods of the same names of ``diffusers.DiffusionPipeline``.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from minidiff.networks.slicing import SlicedAttention
from minidiff.pipelines.offload import (
    METHODS,
    OnloadPlace,
    destination,
    end_offload,
    execution_device,
    free,
    offload_layers,
    offload_of,
    offload_whole,
)

logger = logging.getLogger("minidiff")


class MemorySavers:
    """What every pipeline can do about its memory."""

    components: dict[str, Any]
    _networks: Callable[[], list[nn.Module]]

    # --- attention ---------------------------------------------------------------------------------------------------

    def enable_attention_slicing(self, slice_size: str | int | None = "auto") -> None:
        """Compute the UNet's attention for some heads at a time; see ``UNet2DConditionModel.set_attention_slice``.

        It saves memory only where torch has no fused attention, and costs time everywhere. Pictures stay the same.
        """
        for network in self._networks():
            if isinstance(network, SlicedAttention):
                network.set_attention_slice(slice_size)

    def disable_attention_slicing(self) -> None:
        """Compute the attention of all heads at once."""
        self.enable_attention_slicing(None)

    def enable_xformers_memory_efficient_attention(self, attention_op: None = None) -> None:
        """Do nothing, and say so: attention is always computed by torch's fused kernels, without xformers."""
        for network in self._networks():
            if isinstance(network, SlicedAttention):
                network.enable_xformers_memory_efficient_attention(attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Do nothing: torch's fused attention stays in use."""

    # --- autoencoder -------------------------------------------------------------------------------------------------

    def enable_vae_slicing(self) -> None:
        """Encode and decode the pictures of a batch one after the other; see ``AutoencoderKL.enable_slicing``."""
        self._vae().enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Encode and decode a batch at once."""
        self._vae().disable_slicing()

    def enable_vae_tiling(self) -> None:
        """Encode and decode large pictures in overlapping tiles; see ``AutoencoderKL.enable_tiling``."""
        self._vae().enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Encode and decode pictures of any size at once."""
        self._vae().disable_tiling()

    def _vae(self) -> Any:
        vae = self.components.get("vae")
        if vae is None:
            raise ValueError(f"this {type(self).__name__} has no vae whose memory could be saved")
        return vae

    # --- offloading --------------------------------------------------------------------------------------------------

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: torch.device | str | None = None) -> None:
        """Keep the networks in main memory; each is on the device from its first call until another one computes.

        Pipelines that share a network take turns on one place. Pictures stay the same.

        Args:
            gpu_id: number of the accelerator, 0 by default.
            device: what to compute on, by default the accelerator that torch finds.

        Raises:
            ValueError: if ``gpu_id`` and an index in ``device`` are both given.
            RuntimeError: if there is no such device, or a network is computing in another thread.
        """
        device = execution_device(METHODS["model"], gpu_id, device)
        whole = [one for one in map(offload_of, self._networks()) if one is not None and one.kind == "model"]
        place = next((one.places[0] for one in whole if one.device == device), None) or OnloadPlace(device, stay=True)
        for network in self._networks():
            offload_whole(network, place)
        _empty_cache(device)

    def enable_sequential_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """Keep the networks in main memory; each layer is on the device while it computes. Least memory, and slow.

        Pictures stay the same. Arguments and errors are those of ``enable_model_cpu_offload``.
        """
        device = execution_device(METHODS["sequential"], gpu_id, device)
        for network in self._networks():
            offload_layers(network, device)
        _empty_cache(device)

    def remove_all_hooks(self) -> None:
        """End offloading of either kind; the networks stay in main memory until ``to`` moves them."""
        for network in self._networks():
            end_offload(network)

    def maybe_free_model_hooks(self) -> None:
        """Drop from the device what is offloaded and not computing. Every call of a pipeline ends with it."""
        for network in self._networks():
            free(network)

    def _destinations(self, device: torch.device | str | int | None) -> list[torch.device | str | int | None]:
        """Return where ``to(device)`` is to move each network: None for those that are offloaded.

        Raises: as ``minidiff.pipelines.offload.destination``.
        """
        places = [destination(network, device) for network in self._networks()]
        if device is not None and torch.device(device).type != "cpu" and None in places:
            logger.warning(
                "to(%r) does not move what is offloaded: %s was called, and networks go to %s by themselves",
                str(device),
                METHODS["model"],
                self.device,
            )
        return places

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks; if they differ, of the first by name."""
        return next((network.dtype for network in self._networks()), torch.float32)

    def to(
        self,
        *args: torch.device | str | int | torch.dtype | None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        torch_device: torch.device | str | int | None = None,
        torch_dtype: torch.dtype | None = None,
        silence_dtype_warnings: bool = False,
    ) -> "MemorySavers":
        """Move all networks to a device, a dtype or both, and return the pipeline itself.

        Call it as ``to(device)``, ``to(dtype)``, ``to(device, dtype)`` or with keywords. ``silence_dtype_warnings`` is
        part of the reference's signature; there are no such warnings here. Offloaded networks take a dtype only: they
        go to their device by themselves. ``torch_device`` and ``torch_dtype`` are other names of the two.
        """
        device, dtype = (torch_device if device is None else device), (torch_dtype if dtype is None else dtype)
        if len(args) > 2:
            raise ValueError(f"to() takes a device and a dtype, found {len(args)} arguments")
        if len(args) == 2 and isinstance(args[0], torch.dtype):
            raise ValueError(f"to({args[0]}, {args[1]}): the device comes first, then the dtype")
        for arg, role in zip(args, ("device", "dtype"), strict=False):
            role = "dtype" if isinstance(arg, torch.dtype) else role
            if arg is not None and (dtype if role == "dtype" else device) is not None:
                raise ValueError(f"to() got {role} both as a positional and as a keyword argument")
            if role == "dtype":
                dtype = arg if arg is not None else dtype
            else:
                device = arg if arg is not None else device
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"to() needs a torch.dtype, found {dtype!r}")
        for network, place in zip(self._networks(), self._destinations(device), strict=True):
            network.to(device=place, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """The device that the networks compute on; the accelerator if some are on the CPU and some are not."""
        offloaded = [offload.device for offload in map(offload_of, self._networks()) if offload is not None]
        devices = offloaded or [network.device for network in self._networks()]
        return next((d for d in devices if d.type != "cpu"), devices[0] if devices else torch.device("cpu"))


def _empty_cache(device: torch.device) -> None:
    """Give back what torch keeps of the memory that the networks took on the device before."""
    if device.type not in ("cpu", "meta"):
        getattr(torch, device.type).empty_cache()
