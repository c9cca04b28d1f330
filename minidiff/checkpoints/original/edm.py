"""Single files of models that were trained as EDM has it: their marks among the weights, and the numbers in these.

    edm_mean, edm_std                         (1, Z, 1, 1)  of the latents: Playground v2.5, epsilon, sigma_data 0.5
    edm_vpred.sigma_max, edm_vpred.sigma_min  ()            of the noise: CosXL, v_prediction, sigma_data 1

ComfyUI reads both pairs (comfy/supported_models.py, ``SDXL.model_type``) and writes the second
(comfy_extras/nodes_model_merging.py); the reference knows a file of Playground by ``edm_mean``.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from minidiff.checkpoints.load import STORED_DTYPES, read_tensor
from minidiff.checkpoints.names import unwrapped
from minidiff.checkpoints.original.configs import Sections
from minidiff.checkpoints.original.read import SingleFile
from minidiff.checkpoints.stream import Group

MEAN, STD, SIGMA_MAX, SIGMA_MIN = "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min"
_FIELDS = {  # mark -> the file of the configuration, and the field, that it is about
    MEAN: ("vae/config.json", "latents_mean"),
    STD: ("vae/config.json", "latents_std"),
    SIGMA_MAX: ("scheduler/scheduler_config.json", "sigma_max"),
    SIGMA_MIN: ("scheduler/scheduler_config.json", "sigma_min"),
}


def with_own_numbers(configs: Sections, contents: SingleFile) -> Sections:
    """Return the configuration of a family with the numbers that a file of it holds."""
    sections = {name: dict(configs.sections[name]) for name, _ in _FIELDS.values() if name in configs.sections}
    for stored in contents.stored:
        if (name := unwrapped(stored.name)) in _FIELDS:
            file, field = _FIELDS[name]
            found = read_tensor(stored, STORED_DTYPES[stored.dtype])
            sections[file][field] = _told(found, sections[file][field])
    return Sections(configs.title, {**configs.sections, **sections})


def _told(found: Tensor, known: Any) -> Any:
    """Return the number or list that a tensor holds, as the published one if that is what was rounded to be stored."""
    if torch.equal(torch.tensor(known).to(found.dtype).flatten(), found.flatten()):
        return known
    return found.flatten().tolist() if isinstance(known, list) else found.item()


def marks_of(kind: str, scheduler: Mapping[str, Any], vae: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the marks, by name, of a file with a scheduler of class ``kind`` and these configurations.

    There are none if they would tell other programs something else than the configurations say.
    """
    predicts, data = scheduler.get("prediction_type", "epsilon"), scheduler.get("sigma_data", 0.5)
    moments = vae.get("latents_mean"), vae.get("latents_std")
    if not kind.startswith("EDM"):
        return {}
    if (predicts, data) == ("v_prediction", 1.0):
        levels = scheduler.get("sigma_max", 80.0), scheduler.get("sigma_min", 0.002)
        return {name: torch.tensor(float(value)) for name, value in zip((SIGMA_MAX, SIGMA_MIN), levels, strict=True)}
    if (predicts, data) == ("epsilon", 0.5) and None not in moments:
        return {n: torch.tensor(value).reshape(1, -1, 1, 1) for n, value in zip((MEAN, STD), moments, strict=True)}
    return {}


def edm_marks(kind: str, scheduler: Mapping[str, Any], vae: Mapping[str, Any]) -> Iterator[Group]:
    """Yield what ``marks_of`` returns as it is written."""
    for name, tensor in marks_of(kind, scheduler, vae).items():
        yield Group([(name, tensor.dtype, tuple(tensor.shape))], lambda tensor=tensor: (tensor,))
