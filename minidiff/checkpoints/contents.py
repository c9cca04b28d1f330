"""What a single file in the original CompVis / Stability spelling holds, and which of it belongs to which network.

The name table (``names.py``) knows each tensor by one name. Files differ from it in what stands before the names (a
bare autoencoder has no ``first_stage_model.``), and in what they hold besides weights; both are settled here.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import safe_open

from minidiff.checkpoints.hub import PICKLES, WHY_NO_PICKLES
from minidiff.checkpoints.load import Stored, expected_shapes, match, read_header
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import (
    CLIP_PREFIX,
    LDM_DROPPED,
    OPENCLIP_PREFIX,
    REFINER_OPENCLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPENCLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
)
from minidiff.checkpoints.remap import CONV1X1, Row, Spelling
from minidiff.errors import CheckpointError, CheckpointNotFoundError

EMA_PREFIX = "model_ema."
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the components that a single file may hold

# component -> what may stand before its names, the usual first, and how its names then begin
_PREFIXES: dict[str, tuple[tuple[str, ...], str]] = {
    "unet": ((UNET_PREFIX, "diffusion_model.", ""), r"(input_blocks|middle_block|output_blocks|time_embed)\."),
    "vae": ((VAE_PREFIX, "vae.", ""), r"(en|de)coder\.(mid|down|up)\."),
    "text_encoder": ((SDXL_CLIP_PREFIX, CLIP_PREFIX, OPENCLIP_PREFIX), ""),
    "text_encoder_2": ((SDXL_OPENCLIP_PREFIX, REFINER_OPENCLIP_PREFIX), ""),
}
_TABLE = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}  # what stands before their names in the table
_NO_TEXT_MODEL = re.compile(r"(embeddings|encoder|final_layer_norm)\.")  # some tools leave out "text_model."
_DROPPED = [(re.compile(pattern), reason) for pattern, reason in LDM_DROPPED.items()]


@dataclass(frozen=True)
class Part:
    """One network of a checkpoint: on the meta device, with its rows and the stored tensors by name in ``spelling``."""

    name: str  # of the component in its pipeline, "" for a network on its own
    model: Model
    rows: list[Row]
    spelling: Spelling
    found: dict[str, Stored]

    def stored(self, row: Row) -> list[Stored]:
        """Return the stored tensors of a row."""
        return [self.found[name] for name in row.names(self.spelling)]


@dataclass(frozen=True)
class Contents:
    """The header of a single file: its tensors in order, and its metadata."""

    path: Path
    stored: list[Stored]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> "Contents":
        """Read the header of a file. Raises ``CheckpointError`` for a pickle or a damaged file."""
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle: {WHY_NO_PICKLES}")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; from_single_file needs one file, from_pretrained a folder")
        if not path.is_file():
            raise CheckpointNotFoundError(f"there is no file {str(path)!r} (looked from {Path.cwd()})")
        stored = read_header(path.name, path)
        with safe_open(path, framework="pt") as file:
            return cls(path, stored, file.metadata() or {})

    @cached_property
    def names(self) -> frozenset[str]:
        """The names of all tensors."""
        return frozenset(tensor.name for tensor in self.stored)

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """What stands before the names of each network that is in the file."""
        found = {}
        for component, (prefixes, start) in _PREFIXES.items():
            for prefix in prefixes:
                pattern = re.compile(re.escape(prefix) + start)
                if any(pattern.match(name) for name in self.names):
                    found[component] = prefix
                    break
        return found

    @property
    def has_ema(self) -> bool:
        """Tell whether the file holds a moving average of the UNet's weights besides the weights."""
        return any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in self.names)

    def rows(self, component: str, model: Model) -> list[Row]:
        """Return the name table of a network as this file spells it: text encoders have a prefix for each family."""
        if component in _TABLE:
            return model.rows()
        return model.rows(self.prefixes[component])

    def name_in_table(self, name: str) -> str | None:
        """Return the table's spelling of a tensor's name; None if it is left out on purpose."""
        if why_dropped(name):
            return None
        for component, prefix in sorted(self.prefixes.items(), key=lambda item: -len(item[1])):
            if name.startswith(prefix):
                rest = name[len(prefix) :]
                if prefix in (CLIP_PREFIX, SDXL_CLIP_PREFIX) and _NO_TEXT_MODEL.match(rest):
                    rest = f"text_model.{rest}"
                name = _TABLE.get(component, prefix) + rest
                break
        return None if why_dropped(name) else name

    def owner(self, name: str) -> str | None:
        """Return the network that a tensor belongs to by what stands before its name."""
        fits = [component for component, prefix in self.prefixes.items() if name.startswith(prefix)]
        return max(fits, key=lambda component: len(self.prefixes[component]), default=None)

    def dropped(self) -> Iterator[tuple[Stored, str]]:
        """Yield the tensors that are left out on purpose, each with the reason."""
        for tensor in self.stored:
            if self.name_in_table(tensor.name) is None:
                yield tensor, why_dropped(tensor.name) or "not a weight of a network that minidiff builds"

    def match(
        self,
        networks: Mapping[str, Model],
        *,
        use_ema: bool = False,
        ignore: Callable[[str | None], bool] = lambda component: False,
    ) -> tuple[list[Part], dict[str, list[str]]]:
        """Pair the tensors of the file with those of ``networks``, which are on the meta device.

        Args:
            networks: by component; each must be in ``prefixes``.
            use_ema: whether to take the moving average of the UNet's weights.
            ignore: tells of which components (None: of no known one) tensors that nobody wants are no problem.

        Returns:
            one part for each network, and lines of text by what is wrong with the tensors that they name.
        """
        rows = {component: self.rows(component, model) for component, model in networks.items()}
        shapes = {component: expected_shapes(networks[component], rows[component], "ldm") for component in networks}
        expected = {name: shape for part in shapes.values() for name, shape in part.items()}
        averages = {ema_name(name): name for name in shapes["unet"]} if use_ema else {}

        def canonical(name: str) -> str | None:
            if name in averages:
                return averages[name]
            owner = self.owner(name)
            if (owner not in networks and ignore(owner)) or (use_ema and owner == "unet"):
                return None
            return self.name_in_table(name)

        found, wrong = match(expected, self.stored, canonical, set(_flat_names(rows.values())))
        parts = [
            Part(component, model, rows[component], "ldm", {n: found[n] for n in shapes[component] if n in found})
            for component, model in networks.items()
        ]
        return parts, wrong


def ema_name(name: str) -> str:
    """Return the name of the moving average of a UNet's tensor: all its dots but the first are gone."""
    return EMA_PREFIX + name.removeprefix("model.").replace(".", "")


def why_dropped(name: str) -> str | None:
    """Return why a tensor of an original single file is left out on purpose; None if it is not."""
    return next((reason for pattern, reason in _DROPPED if pattern.fullmatch(name)), None)


def _flat_names(tables: Iterable[list[Row]]) -> Iterator[str]:
    """Yield the names of linear layers that original files store as 1x1 convolutions, and some tools as matrices."""
    for rows in tables:
        for row in rows:
            if row.ldm_op is CONV1X1:
                yield from row.ldm
