"""Load networks from single files in the original CompVis / Stability spelling; see ``families`` and ``read``.

Checked against ``diffusers.loaders.single_file``. What differs on purpose: no network for a local file; missing,
unknown and misshapen tensors are an error that names them all; what a file cannot tell is asked for.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NoReturn

import torch

from minidiff.checkpoints.arguments import refuse_unless_harmless, take_gguf
from minidiff.checkpoints.hub import PICKLES, WHY_NO_PICKLES, Repo
from minidiff.checkpoints.load import OnMeta, as_dtype, fill, listed, paused_collector
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.configs import Configs, FolderConfigs
from minidiff.checkpoints.original.edm import with_own_numbers
from minidiff.checkpoints.original.families import (
    AUTOENCODER,
    Family,
    checked_prediction,
    choose_prediction,
    config_of,
    recognise,
    stranger,
    told_prediction,
)
from minidiff.checkpoints.original.header import HeaderConfigs
from minidiff.checkpoints.original.read import SingleFile, StoredNetwork
from minidiff.errors import CheckpointError, CheckpointNotFoundError
from minidiff.registry import public

logger = logging.getLogger("minidiff")

SITES = ("https://huggingface.co/", "https://hf.co/", "huggingface.co/", "hf.co/")


def find(source: str | Path, where: Mapping[str, Any]) -> Path:
    """Return the path of a single file, downloading it if need be.

    Args:
        source: a path; or an address such as ``https://huggingface.co/OWNER/NAME/blob/main/FILE``, or
            ``OWNER/NAME/FILE``, if there is no such path.
        where: ``revision``, ``cache_dir``, ``local_files_only``, ``token`` and ``force_download``, as in ``Repo``.

    Raises:
        CheckpointNotFoundError: if there is no such file.
        CheckpointError: if it is a pickle or a folder.
    """
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"from_single_file takes a path or an address, found {type(source).__name__}")
    path, text = Path(source), str(source).split("?")[0]
    if PurePosixPath(text).suffix in PICKLES:
        raise CheckpointError(f"{source} is a pickle: {WHY_NO_PICKLES}")
    site = next((site for site in SITES if text.startswith(site)), "")
    if "://" in text and not site:
        raise CheckpointNotFoundError(f"{source} is not on the Hugging Face Hub; download it and pass its path")
    parts = text.removeprefix(site).split("/")
    means_a_path = isinstance(source, Path) or text.startswith((".", "/", "~")) or "\\" in text or len(parts) < 3
    if not site and (path.exists() or means_a_path):
        return path  # SingleFile.of says what is wrong with it
    if len(parts) < 3:
        raise CheckpointNotFoundError(f"{source} names no file; expected {SITES[0]}OWNER/NAME/blob/main/FILE")
    repo, rest, revision = "/".join(parts[:2]), parts[2:], where.get("revision")
    if len(rest) > 2 and rest[0] in ("blob", "resolve"):
        if revision not in (None, rest[1]):
            raise ValueError(f"{source} names the revision {rest[1]!r}, and revision={revision!r}; give one of them")
        revision, rest = rest[1], rest[2:]
    return Repo(repo, **{**where, "revision": revision}).file("/".join(rest))


def describe(
    contents: SingleFile, config: str | Path | None, asked: str | None, where: Mapping[str, Any], *, ask: bool = True
) -> tuple[Family | None, Configs, str | None]:
    """Return the family of a file, what configures it, and what its UNet predicts.

    With ``config``, or if the file says its configuration, the family is None. ``ask`` is whether a prediction that
    nobody says is an error; otherwise, and where the configuration says it, it is None.
    """
    if what := stranger(contents.shapes):
        raise CheckpointError(f"{contents.path} is {what}")
    told = told_prediction(contents.shapes, contents.metadata)
    given = None if config is None else FolderConfigs(Repo(config, **where))
    configs = given or HeaderConfigs.of(contents.path, contents.metadata)
    if configs is not None:
        return None, configs, checked_prediction(asked) or told
    family = recognise(contents.shapes, contents.prefixes.get("unet"), str(contents.path))
    if family is AUTOENCODER and "vae" not in contents.prefixes:
        some = ", ".join(sorted(contents.shapes)[:3])
        raise CheckpointError(
            f"{contents.path} holds no network in the original spelling: {len(contents.shapes)} tensors such as {some}"
        )
    prediction = choose_prediction(family, asked, told, str(contents.path), ask)
    return family, with_own_numbers(config_of(family, prediction), contents), prediction


def raise_if_wrong(contents: SingleFile, wrong: Mapping[str, list[str]], described_by: object) -> None:
    """Raise one ``CheckpointError`` with everything that ``SingleFile.match`` found wrong."""
    if wrong:
        raise CheckpointError(
            f"{contents.path} does not fit {described_by}; `minidiff inspect` shows what it holds, and config= may "
            "name another configuration\n" + "\n".join(listed(wrong))
        )


def absent(contents: SingleFile, component: str, kind: type) -> NoReturn:
    """Raise ``CheckpointError`` for a network that the file does not hold."""
    has = ", ".join(contents.prefixes) or "no network that minidiff knows"
    raise CheckpointError(
        f"{contents.path} holds no weights of {component} (it has {has}): load it from elsewhere and pass "
        f"{component}={kind.__name__}.from_pretrained(...)"
    )


def say_ema(contents: SingleFile, use_ema: bool) -> None:
    """Raise if a moving average is asked for and absent; say which weights are taken if the file has both."""
    if use_ema and not contents.has_ema:
        raise CheckpointError(f"use_ema=True: {contents.path} holds no moving average (model_ema.*); leave it out")
    if contents.only_ema and not use_ema:
        logger.warning("%s holds only the moving average of the UNet's weights: it is loaded", contents.path.name)
    elif contents.has_ema and not use_ema:
        logger.warning(
            "%s holds the UNet's weights and their moving average: the weights are loaded, use_ema=True takes the "
            "average",
            contents.path.name,
        )


class SingleFileModel:
    """Mixin of the networks that can be loaded from an original single file, whole or bare."""

    single_file_parts: ClassVar[tuple[str, ...]]

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: str | Path,
        *,
        config: str | Path | None = None,
        subfolder: str | None = None,
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
    ) -> "SingleFileModel":
        """Load this network from a single file in the original spelling: a whole checkpoint, or the network alone.

        The network is on the CPU and in evaluation mode. No network connection is used for a local file.

        Args:
            pretrained_model_link_or_path_or_dict: a path, an address on the Hub, or ``"OWNER/NAME/FILE"``.
            config: a folder or Hub id with a ``config.json`` that describes it, instead of the packaged configuration
                of the family that the file is recognised as. ``subfolder`` is where in it.
            torch_dtype: dtype of the weights, float32 by default whatever is stored; ``dtype`` is another name of it.
            use_ema: whether to load the moving average of a UNet's weights, for files that hold both.
            prediction_type: "v_prediction" or "epsilon", for a UNet of Stable Diffusion 2.x whose file does not say.
            revision: branch, tag or commit on the Hub; likewise the next four, as in ``from_pretrained``.
            overrides: configuration fields, such as ``scaling_factor=0.13025`` for a bare autoencoder of SDXL.

        Raises:
            CheckpointNotFoundError: if there is no such file.
            CheckpointError: if it is a pickle, or of no known family, or its tensors do not fit (all are named).
            ValueError: if ``prediction_type`` is needed.
            TypeError: naming an argument of the reference that is not implemented.
        """
        use_ema = bool(overrides.pop("extract_ema", False)) or use_ema  # the reference's name of it
        wanted = as_dtype(torch_dtype, dtype)
        is_gguf = str(pretrained_model_link_or_path_or_dict).endswith(".gguf")
        overrides = refuse_unless_harmless(take_gguf(overrides, wanted, is_gguf))
        where = {"cache_dir": cache_dir, "local_files_only": bool(local_files_only), "token": token}
        path = find(
            pretrained_model_link_or_path_or_dict, {**where, "revision": revision, "force_download": force_download}
        )
        contents, (part,) = SingleFile.of(path), cls.single_file_parts
        family, configs, _ = describe(contents, config, prediction_type, where, ask=part == "unet")
        if part not in contents.prefixes:
            absent(contents, part, cls)
        if part == "unet":
            say_ema(contents, use_ema)
        if family is AUTOENCODER and "scaling_factor" not in overrides:
            logger.warning(
                "%s is a bare autoencoder, and those of Stable Diffusion 1.x, 2.x and XL look alike: taken for 1.x, "
                "scaling_factor 0.18215, as diffusers does; for XL pass scaling_factor=0.13025, or config=",
                path.name,
            )
        folder = subfolder if config is not None else part
        fields = configs.read(str(PurePosixPath(folder or "", "config.json")))
        described = public(fields.get("_class_name"))
        if described is not None and not issubclass(cls, described):
            raise CheckpointError(f"{path} holds a {described.__name__}, not a {cls.__name__}: load it with that class")
        with paused_collector():
            with OnMeta():
                model = cls.from_config(fields, **overrides)
            parts, wrong, _ = contents.match({part: model}, use_ema=use_ema, ignore=lambda owner: True)
            raise_if_wrong(contents, wrong, f"{cls.__name__} as {configs} describes it")
            return load_part(parts[0], wanted)


def load_part(part: StoredNetwork, dtype: torch.dtype) -> Model:
    """Fill the network of a part with its tensors and return it in evaluation mode."""
    fill(part.model, part.rows, part.found, dtype, part.spelling)
    return part.model.eval()
