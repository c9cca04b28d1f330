"""``SingleFilePipeline``: load a whole pipeline from one file in the original spelling, and write it as one.

The configuration and the tokenizers come with the package, or from ``config=``; see
``minidiff.checkpoints.original.configs``. Checked against ``diffusers.loaders.FromSingleFileMixin``.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from minidiff.checkpoints.arguments import refuse_unless_harmless
from minidiff.checkpoints.load import OnMeta, as_dtype, paused_collector
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.configs import Configs
from minidiff.checkpoints.original.families import ZERO_SNR_MARK, scheduler_changes, told_prediction
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.original.single_file import absent, describe, find, load_part, raise_if_wrong, say_ema
from minidiff.checkpoints.save import save_json
from minidiff.errors import CheckpointError, ConfigError
from minidiff.schedulers.mixin import SchedulerMixin

logger = logging.getLogger("minidiff")


class SingleFilePipeline:
    """Mixin of the pipelines."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | Path,
        *,
        config: str | Path | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_ema: bool = False,
        prediction_type: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        **overrides: Any,
    ) -> "SingleFilePipeline":
        """Load a pipeline from a single file in the original CompVis / Stability spelling.

        No network connection is used for a local file. ``DiffusionPipeline.from_single_file`` makes the pipeline that
        the family of the file is for, a subclass makes itself.

        Args:
            pretrained_model_link_or_path: a path, an address on the Hub, or ``"OWNER/NAME/FILE"``.
            config: a folder or Hub id in diffusers layout that describes the file, instead of the packaged
                configuration of the family that it is recognised as. Its weights are not read.
            torch_dtype: dtype of all networks, float32 by default; ``dtype`` is another name of it.
            use_ema: whether to load the moving average of the UNet's weights, for files that hold both.
            prediction_type: what the UNet predicts: "epsilon", "v_prediction" or "sample". By default what the file
                says, else what its family does; Stable Diffusion 2.x has both, and needs it.
            revision: branch, tag or commit on the Hub; likewise the next four, as in ``from_pretrained``.
            overrides: components to use instead of the file's (``scheduler=...``, ``vae=...``), and settings of the
                pipeline's constructor.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointError: if it is a pickle, or of no known family, or its tensors do not fit (all are named), or a
                network is not in it.
            ConfigError: if the family of the file is for another pipeline.
            ValueError: if ``prediction_type`` is needed.
            TypeError: naming an argument that is unknown or, of the reference's, not implemented.
        """
        use_ema = bool(overrides.pop("extract_ema", False)) or use_ema  # the reference's name of it
        overrides = refuse_unless_harmless(overrides)
        wanted = as_dtype(torch_dtype, dtype)
        where = {"cache_dir": cache_dir, "local_files_only": bool(local_files_only), "token": token}
        path = find(pretrained_model_link_or_path, {**where, "revision": revision, "force_download": force_download})
        contents = SingleFile.of(path)
        asked = prediction_type
        if asked is None and overrides.get("scheduler") is not None:
            asked = overrides["scheduler"].config.get("prediction_type")
        _, configs, prediction = describe(contents, config, asked, where)
        _say_contradiction(contents, asked)
        say_ema(contents, use_ema)

        index = configs.read("model_index.json")
        pipeline_class = cls._class_for(index, configs)
        given = pipeline_class._check_overrides(overrides)
        parts = pipeline_class._from_index(index, configs, given)
        kinds = {name: kind for name, kind in parts.items() if name not in given and isinstance(kind, type)}
        for name in [name for name in kinds if name in pipeline_class._optional_components]:
            if issubclass(kinds[name], Model) and name not in contents.prefixes:  # such as a safety checker
                parts[name] = None
                del kinds[name]
        for name, kind in kinds.items():
            if not issubclass(kind, Model):
                parts[name] = _small_component(kind, name, configs, contents, prediction)
        networks = {name: kind for name, kind in kinds.items() if issubclass(kind, Model)}
        with paused_collector():
            parts |= _networks(contents, configs, networks, wanted, use_ema)
        return pipeline_class(**parts)

    def save_single_file(self, path: str | Path) -> None:
        """Write all networks to one safetensors file in the original CompVis / Stability spelling.

        The dtypes stay. What the UNet predicts goes into the metadata and, for other programs, into empty tensors
        ``v_pred`` and ``ztsnr``; configuration, tokenizers and scheduler go into the metadata too, so that
        ``from_single_file`` needs nothing else. The file appears when it is complete.

        Raises:
            CheckpointError: if the pipeline has a network that the original spelling has no names for.
        """
        from minidiff.checkpoints.original.edm import edm_marks
        from minidiff.checkpoints.original.write import groups_of_model, marks, original_metadata, original_tables
        from minidiff.checkpoints.stream import write_stream

        networks = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        if networks.pop("safety_checker", None) is not None:
            logger.warning("the safety checker is left out: %s is a single file, and none has one", path)
        tables = original_tables(networks)
        if "unet" not in tables:
            raise CheckpointError(f"{type(self).__name__} has no unet, so there is no single file of it")
        groups = [group for name, rows in tables.items() for group in groups_of_model(networks[name], rows)]
        said = self.scheduler.config
        prediction = said.get("prediction_type", "epsilon")
        groups += marks(prediction, bool(said.get("rescale_betas_zero_snr")))
        groups += edm_marks(type(self.scheduler).__name__, said, getattr(networks.get("vae"), "config", {}))
        write_stream(Path(path), groups, original_metadata(prediction, self._configuration()))

    def _configuration(self) -> str:
        """Return what the header of a single file says: all that ``save_pretrained`` writes besides weights."""
        from minidiff.checkpoints.original.header import said_by

        with TemporaryDirectory() as name:
            folder, index = Path(name), self._index()
            index |= {"safety_checker": (None, None)} if "safety_checker" in index else {}
            save_json(index, folder / "model_index.json")
            for name, part in self.components.items():
                if index[name] != (None, None):
                    (part.save_config if isinstance(part, Model) else part.save_pretrained)(folder / name)
            return said_by(folder)


def _say_contradiction(contents: SingleFile, asked: str | None) -> None:
    """Warn if the file says that its UNet predicts something else than the caller, or the given scheduler, does."""
    told = told_prediction(contents.shapes, contents.metadata)
    if None not in (told, asked) and told != asked:
        logger.warning(
            "%s says that its UNet predicts %s, and the given scheduler or prediction_type %s, which is believed",
            contents.path.name,
            told,
            asked,
        )


def _small_component(kind: type, name: str, configs: Configs, contents: SingleFile, prediction: str | None) -> Any:
    """Make a tokenizer, an image processor, or a scheduler that is told what the UNet predicts."""
    from minidiff.images.clip_processor import CLIPImageProcessor  # brings PIL
    from minidiff.text.tokenizer import CLIPTokenizer  # a pipeline without text does not need its library

    if issubclass(kind, CLIPTokenizer):
        return configs.tokenizer(name)
    if issubclass(kind, CLIPImageProcessor):
        return kind.from_dict(configs.read(f"{name}/preprocessor_config.json"))
    if not issubclass(kind, SchedulerMixin):
        raise ConfigError(f"{name} ({kind.__name__}) has no place in a single file; pass {name}=...")
    fields = configs.read(f"{name}/scheduler_config.json")
    return kind.from_config(fields, **scheduler_changes(fields, prediction, ZERO_SNR_MARK in contents.shapes))


def _networks(
    contents: SingleFile, configs: Configs, kinds: Mapping[str, type[Model]], dtype: torch.dtype, use_ema: bool
) -> dict[str, Model]:
    """Build the networks and fill them from the file. Tensors of networks that are not wanted are left alone."""
    for name, kind in kinds.items():
        if name not in contents.prefixes:
            absent(contents, name, kind)
    with OnMeta():
        networks = {name: kind.from_config(configs.read(f"{name}/config.json")) for name, kind in kinds.items()}
    parts, wrong, _ = contents.match(networks, use_ema=use_ema, ignore=lambda owner: owner is not None)
    raise_if_wrong(contents, wrong, configs)
    return {part.name: load_part(part, dtype) for part in parts}
