"""``LoraLoader``: what a pipeline can do with LoRA, under the reference's names.

    pipe.load_lora_weights("pixel-art.safetensors", adapter_name="pixel")
    pipe.set_adapters(["pixel", "toy"], [0.8, 0.5])
    pipe(prompt, cross_attention_kwargs={"scale": 0.7})
    pipe.fuse_lora()

The adapters belong to the networks, so pipelines that share networks share their adapters. Checked against
``diffusers.loaders.StableDiffusionLoraLoaderMixin`` and ``StableDiffusionXLLoraLoaderMixin`` with peft;
docs/adapters.md lists where it differs.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from minidiff.adapters.bundled import forget_words, owners, split_words, teach_words
from minidiff.adapters.control import AdapterControl, LoadedLora
from minidiff.adapters.lora_config import COMPONENTS
from minidiff.adapters.lora_file import FILE_NAME
from minidiff.adapters.source import options_of, read_adapter
from minidiff.checkpoints.model import Model

logger = logging.getLogger("minidiff")


class LoraLoader(AdapterControl):
    """Adds LoRA to a pipeline with ``unet``, ``text_encoder`` and ``text_encoder_2``, or some of them."""

    components: Mapping[str, Any]

    # --- loading and unloading ---------------------------------------------------------------------------------------

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        hotswap: bool = False,
        **options: Any,
    ) -> LoadedLora:
        """Load a LoRA file and make it the active adapter of the networks that it is for.

        Adapters that are fused there are taken out of the weights, as in the reference. Everything is checked before
        anything is changed. The spellings are listed in ``minidiff.adapters.lora_names``.

        Args:
            pretrained_model_name_or_path_or_dict: a safetensors file, a folder, a Hub id, or tensors by name. A folder
                of PEFT has ``adapter_config.json``, or one for each network in ``unet/`` and ``text_encoder/``.
            adapter_name: what to call it; default: default_0, default_1...
            hotswap: whether it takes the place of the adapter of this name: active or not as that one, at the weight 1.
            options: ``weight_name``, the file in the folder or repository (default: pytorch_lora_weights.safetensors,
                or the only safetensors file there); ``subfolder``, ``revision``, ``cache_dir``, ``token``,
                ``local_files_only`` and ``force_download`` as of ``from_pretrained``.

        Embeddings inside the file (``minidiff.adapters.bundled``) are learned, and forgotten when it is unloaded.

        Returns:
            which layers it adapts and which words it brings; the same is logged.

        Raises:
            CheckpointError: one error with all tensors that have no layer in this pipeline, lack their other matrix,
                have a wrong shape, or belong to a kind of adapter that is not implemented.
            CheckpointNotFoundError: if there is no such file.
            ValueError: if the name is taken, or, with ``hotswap``, if it is not, or fused; if a word of the file is
                known already, or ``hotswap`` would exchange words.
        """
        options = options_of("load_lora_weights", options)
        name = self._name_to_swap(adapter_name) if hotswap else self._new_name(adapter_name, owners(self.components))
        file = read_adapter(pretrained_model_name_or_path_or_dict, FILE_NAME, **options)
        file, words = split_words(file, self.components)
        if words and hotswap:
            raise ValueError(f"{file.label} brings words, which hotswap=True cannot exchange: delete {name!r} first")
        loaded = self._add_lora(file, name, tuple(dict.fromkeys(word.token for new in words.values() for word in new)))
        teach_words(words, self.components, name)
        return loaded

    def unload_lora_weights(self) -> None:
        """Remove all adapters and the words that came with them. The weights are bit for bit the originals; but those
        that are fused stay so, and their words."""
        gone, fused = self._names(), self.fused_loras
        self._remove_all()
        forget_words(self.components, gone, fused)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove some adapters and the words that came with them; one that is not there costs a warning. Where no
        active one is left, the oldest becomes active, as in the reference."""
        before = self._names()
        super().delete_adapters(adapter_names)
        forget_words(self.components, before - self._names(), set())

    # --- which of them count, and how much ---------------------------------------------------------------------------

    def get_active_adapters(self) -> list[str]:
        """Return the names of the active adapters."""
        return self._active()

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Return the names of all adapters of each network that has some."""
        return {component: list(adapters.names) for component, adapters in self._all_adapters().items()}

    # --- fusing ------------------------------------------------------------------------------------------------------

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Make the active adapters part of the weights: W + s B A costs nothing in a call, but cannot be scaled there.

        Args:
            components: the networks; default: all.
            lora_scale: what to multiply all adapters with.
            safe_fusing: raise, and change nothing, if a weight becomes infinite or NaN.
            adapter_names: must be the active ones, if given.

        Raises:
            ValueError: if there is nothing to fuse, or naming what is not there or is fused already.
        """
        self._fuse(self._chosen(components), lora_scale, safe_fusing, adapter_names)

    @property
    def num_fused_loras(self) -> int:
        """The number of adapters that are fused."""
        return len(self.fused_loras)

    # --- what there is -----------------------------------------------------------------------------------------------

    def _lora_networks(self) -> dict[str, Model]:
        return {name: self.components[name] for name in COMPONENTS if self.components.get(name) is not None}

    def _warn_unless_scaled(self, scale: float) -> None:
        """Warn if a call asks for another scale and there is nothing to scale, which the reference leaves unsaid."""
        adapters = self._all_adapters().values()
        if scale != 1 and all(one.fused for one in adapters):
            why = f"{', '.join(sorted(self.fused_loras))} is fused" if adapters else "no LoRA is loaded"
            logger.warning("cross_attention_kwargs={'scale': %g} has no effect: %s", scale, why)
