"""A checkpoint of either layout as the sum of its networks, from headers and configurations: no weight is read."""

from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minidiff.checkpoints.hub import MissingFileError, Repo, variant_of
from minidiff.checkpoints.load import (
    OnMeta,
    StoredTensor,
    expected_shapes,
    listed,
    match,
    paused_collector,
    read_headers,
)
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.configs import Configs, FolderConfigs
from minidiff.checkpoints.original.edm import marks_of
from minidiff.checkpoints.original.families import AUTOENCODER, TINY_AUTOENCODER, ZERO_SNR_MARK, family_of
from minidiff.checkpoints.original.prefixes import NETWORKS
from minidiff.checkpoints.original.read import SingleFile, StoredNetwork
from minidiff.checkpoints.original.single_file import describe, say_ema
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from minidiff.registry import public

STEMS = ("diffusion_pytorch_model", "model")  # of the weight files in Hub layout
DISPENSABLE = ("safety_checker",)  # components whose files are often not downloaded


@dataclass(frozen=True)
class Checkpoint:
    """What a file or folder holds.

    ``index`` is the content of ``model_index.json``, empty for a network on its own. ``prediction`` is what the UNet
    predicts, None if there is no UNet or nobody says; ``zero_snr`` whether it was trained with zero terminal SNR.
    ``wrong`` has lines of text by what is wrong with the tensors that they name, ``dropped`` the tensors that are left
    out on purpose, each with the reason, ``absent`` the components that the index names and one can do without, if
    their files are not there.
    """

    path: Path
    layout: str  # "single-file" or "hub"
    title: str
    prediction: str | None
    parts: list[StoredNetwork]
    configs: Configs
    index: Mapping[str, Any] = field(default_factory=dict)
    wrong: Mapping[str, list[str]] = field(default_factory=dict)
    dropped: list[tuple[StoredTensor, str]] = field(default_factory=list)
    zero_snr: bool = False
    absent: list[str] = field(default_factory=list)

    def check(self) -> "Checkpoint":
        """Return the checkpoint itself. Raises ``CheckpointError`` with everything that is wrong."""
        if self.wrong:
            raise CheckpointError(f"{self.path} does not fit {self.configs}\n" + "\n".join(listed(self.wrong)))
        return self


def open_checkpoint(
    path: Path,
    *,
    config: str | Path | None = None,
    prediction_type: str | None = None,
    variant: str | None = None,
    use_ema: bool = False,
    ask: bool = True,
) -> Checkpoint:
    """Read the headers of a single file in the original spelling, or of a folder in Hub layout.

    Args:
        path: the file, or the folder of a pipeline or of one network.
        config: for a file, a folder or Hub id that describes it, instead of its family's configuration.
        prediction_type: for a file, what its UNet predicts, where neither it nor its family says so.
        variant: for a folder, which weights, such as ``"fp16"``.
        use_ema: for a file, whether to take the moving average of the UNet's weights.
        ask: whether an unknown prediction is an error; otherwise it stays None.

    Raises:
        CheckpointError: if it is of no kind that minidiff knows. Tensors that do not fit are reported in ``wrong``.
    """
    if path.is_dir():
        return _open_folder(path, variant)
    of_folder = next((v for stem in STEMS if (v := variant_of(path.name, stem)) is not None), None)
    if of_folder is not None and config is None and path.with_name("config.json").is_file():
        return _open_folder(path.parent, of_folder or None)
    contents = SingleFile.of(path)
    if use_ema:
        say_ema(contents, use_ema)
    has_unet = "unet" in contents.prefixes
    family, configs, prediction = describe(contents, config, prediction_type, {}, ask=ask and has_unet)
    with paused_collector(), OnMeta():
        networks = dict(_networks_of_file(contents, configs))
    parts, wrong, dropped = contents.match(networks, use_ema=use_ema)
    index = _index(configs)
    if family is None and prediction is None and has_unet and index:
        prediction = _scheduler_prediction(configs)
    if len(parts) == 1:  # one network is written without the rest of a pipeline
        (only,) = parts
        parts, index = [StoredNetwork("", only.model, only.rows, only.spelling, only.found)], {}
    return Checkpoint(
        path=path,
        layout="single-file",
        title=family.title if family else _title(networks.values(), contents.shapes),
        prediction=prediction if has_unet else None,
        parts=parts,
        configs=configs,
        index=index,
        wrong=wrong,
        dropped=dropped,
        zero_snr=ZERO_SNR_MARK in contents.shapes or (has_unet and bool(index) and _zero_snr(configs)),
    )


def _networks_of_file(contents: SingleFile, configs: Configs) -> Iterator[tuple[str, Model]]:
    """Build the networks that a file has tensors of and its configuration describes."""
    index = _index(configs)
    for name in NETWORKS:
        if name not in contents.prefixes:
            continue
        if index and index.get(name) in (None, [None, None]):
            raise ConfigError(f"{contents.path} holds a {name}, which {configs} does not describe")
        fields = configs.read(f"{name}/config.json") if index else configs.read("config.json")
        yield name, model_class(index[name][1] if index else fields.get("_class_name"), configs).from_config(fields)


def _open_folder(path: Path, variant: str | None) -> Checkpoint:
    """Read the headers and configurations of a folder in Hub layout."""
    configs = FolderConfigs(Repo(path))
    index = _index(configs)
    if index and public(index.get("_class_name")) is None and not _is_ours((index.get("unet") or [None] * 2)[1]):
        raise ConfigError(f"{path} is for {index.get('_class_name')}, a pipeline that minidiff does not implement")
    if index:
        kinds = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and _is_ours(entry[1])}
        where = {name: configs.repo.at(name) if (path / name).is_dir() else configs.repo for name in kinds}
    elif (path / "config.json").is_file():
        fields = configs.read("config.json")
        kinds, where = {"": fields.get("_class_name") or (fields.get("architectures") or [None])[0]}, {"": configs.repo}
    else:
        raise CheckpointNotFoundError(
            f"{path} has neither model_index.json (a pipeline) nor config.json (a network); it holds "
            f"{', '.join(configs.repo.names()) or 'nothing'}"
        )
    parts: list[StoredNetwork] = []
    wrong: dict[str, list[str]] = {}
    dropped: list[tuple[StoredTensor, str]] = []
    absent: list[str] = []
    for name, kind in kinds.items():
        try:
            part, problems, left_out = _read_part(name, kind, where[name], variant)
        except CheckpointNotFoundError:
            if name not in DISPENSABLE:
                raise
            absent.append(name)
            continue
        parts.append(part)
        dropped += [(tensor, "not a weight of this network") for tensor in left_out]
        for problem, lines in problems.items():
            wrong.setdefault(problem, []).extend(f"{name}: {line}" if name else line for line in lines)
    scheduled = "unet" in kinds and "scheduler" in index
    prediction = _scheduler_prediction(configs) if scheduled else None
    title = _title([part.model for part in parts], marks_of(*edm_fields(parts, index, configs)))
    zero_snr = scheduled and _zero_snr(configs)
    return Checkpoint(path, "hub", title, prediction, parts, configs, index, wrong, dropped, zero_snr, absent)


def _read_part(
    name: str, kind: object, repo: Repo, variant: str | None
) -> tuple[StoredNetwork, dict[str, list[str]], list[StoredTensor]]:
    """Return a network of a folder, what is wrong with its tensors, and those that are left out on purpose."""
    with paused_collector(), OnMeta():
        model = model_class(kind, repo).from_config(FolderConfigs(repo).read("config.json"))
    weights = repo.weights(model.weights_stem, variant)
    stored = read_headers(weights)
    rows = model.rows()
    found, wrong = match(expected_shapes(model, rows), stored, model.canonical_hub_name)
    left_out = [tensor for tensor in stored if model.canonical_hub_name(tensor.name) is None]
    return StoredNetwork(name, model, rows, "hub", found), wrong, left_out


def _index(configs: Configs) -> dict[str, Any]:
    try:
        return configs.read("model_index.json")
    except MissingFileError:
        return {}


def scheduler_fields(configs: Configs, name: str = "scheduler") -> dict[str, Any]:
    """Return the configuration of the scheduler; in the oldest repositories it lies beside the index."""
    try:
        return configs.read(f"{name}/scheduler_config.json")
    except MissingFileError:
        return configs.read("scheduler_config.json")


def edm_fields(
    parts: Iterable[StoredNetwork], index: Mapping[str, Any], configs: Configs
) -> tuple[str, Mapping[str, Any], Mapping[str, Any]]:
    """Return the class and the configuration of a checkpoint's scheduler, and the configuration of its autoencoder."""
    kind = str((index.get("scheduler") or [None, None])[1])
    vae = next((part.model.config for part in parts if part.name == "vae"), {})
    return kind, scheduler_fields(configs) if kind.startswith("EDM") else {}, vae


def _scheduler_prediction(configs: Configs) -> str:
    return scheduler_fields(configs).get("prediction_type", "epsilon")


def _zero_snr(configs: Configs) -> bool:
    return bool(scheduler_fields(configs).get("rescale_betas_zero_snr"))


def _is_ours(name: object) -> bool:
    kind = public(name)
    return isinstance(kind, type) and issubclass(kind, Model)


def model_class(name: object, where: object) -> type[Model]:
    """Return the class of networks of this name. Raises ``ConfigError``, naming ``where``, if there is none."""
    if not _is_ours(name):
        raise ConfigError(f"{where} describes a {name}, which is no network that minidiff implements")
    return public(name)


def _title(models: Collection[Model], marks: Container[str]) -> str:
    """Name the family of a checkpoint that is described by configurations, by its UNet and by marks (``MARKED``)."""
    for model in models:
        D, C = model.config.get("cross_attention_dim"), model.config.get("in_channels")
        is_unet = type(model).__name__ == "UNet2DConditionModel"
        shapes = expected_shapes(model, model.rows()) if is_unet else {}
        if is_unet and (family := family_of(D, C, shapes | dict.fromkeys(marks, ()))):
            told = model.config.time_cond_proj_dim is not None
            return family.title + ", told the guidance scale (LCM)" * told
    kinds = {type(model).__name__ for model in models}
    for kind, title in (("AutoencoderKL", AUTOENCODER.title), ("AutoencoderTiny", TINY_AUTOENCODER.title)):
        if kinds == {kind}:
            return title
    return "of its own configuration" if kinds else "no network"
