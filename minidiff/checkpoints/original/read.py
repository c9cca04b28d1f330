"""What a single file in the original CompVis / Stability spelling holds, and which of it belongs to which network.

The name table (``names.py``) knows each tensor by one name. Files differ from it in what stands before the names (a
bare autoencoder has no ``first_stage_model.``), and in what they hold besides weights; both are settled here.
"""

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open

from minidiff.checkpoints.hub import PICKLES, WHY_NO_PICKLES
from minidiff.checkpoints.load import Stored, expected_shapes, match, read_header
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import (
    CLIP_PREFIX,
    EMA_PREFIX,
    LDM_DROPPED,
    OPENCLIP_PREFIX,
    REFINER_OPENCLIP_PREFIX,
    SDXL_CLIP_PREFIX,
    SDXL_OPENCLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    canonical_original_vae_name,
    canonical_vae_name,
    clip_rows,
    ema_name,
    unwrapped,
)
from minidiff.checkpoints.remap import CONV1X1, SAME, Row, Spelling
from minidiff.errors import CheckpointError, CheckpointNotFoundError

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the components that a single file may hold

# component -> what may stand before its names, the usual first, and how its names then begin: originally, on the Hub
_PREFIXES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "unet": (
        (UNET_PREFIX, "diffusion_model.", ""),
        r"(input_blocks|middle_block|output_blocks|time_embed)\.",
        r"(down_blocks|mid_block|up_blocks|time_embedding)\.",
    ),
    "vae": (
        (VAE_PREFIX, "vae.", ""),
        r"(en|de)coder\.(mid|down|up)\.",
        r"(en|de)coder\.(mid_block|down_blocks|up_blocks)\.",
    ),
    "text_encoder": ((SDXL_CLIP_PREFIX, CLIP_PREFIX, OPENCLIP_PREFIX), "", ""),
    "text_encoder_2": ((SDXL_OPENCLIP_PREFIX, "conditioner.embedders.1.transformer.", REFINER_OPENCLIP_PREFIX), "", ""),
}
_TABLE = {"unet": UNET_PREFIX, "vae": VAE_PREFIX}  # what stands before their names in the table
_OPENCLIP = ".model."  # the end of a text encoder's prefix behind which OpenCLIP's names stand, not transformers'
_NO_TEXT_MODEL = re.compile(r"(embeddings|encoder|final_layer_norm)\.")  # some tools leave out "text_model."
_DROPPED = [(re.compile(pattern), reason) for pattern, reason in LDM_DROPPED.items()]
_BEHIND = re.compile(r"(.*\.model\.)(?:transformer\.resblocks\.(\d+)\..*|text_projection(?:\.weight)?)")


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


class Matched(NamedTuple):
    """The tensors of a file paired with those of networks, what is wrong with them, and what is left out and why."""

    parts: list[Part]
    wrong: dict[str, list[str]]
    dropped: list[tuple[Stored, str]]


@dataclass(frozen=True)
class Contents:
    """The header of a single file: its tensors in order, and its metadata.

    A network is in the original spelling or in the Hub's, whatever stands before its names. ``rows`` gives its table
    in the spelling of the file, in the column ``ldm``.
    """

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
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by name without wrappers."""
        return {unwrapped(tensor.name): tensor.shape for tensor in self.stored}

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """What stands before the names of each network that is in the file."""
        names = [name for name in self.shapes if why_dropped(name) is None]
        found = {}
        for component, (prefixes, original, hub) in _PREFIXES.items():
            for prefix in prefixes:
                pattern = re.compile(f"{re.escape(prefix)}({original}|{hub})")
                if any(pattern.match(name) for name in names):
                    found[component] = prefix
                    break
        if self.has_ema:
            found.setdefault("unet", UNET_PREFIX)
        if found.get("text_encoder_2") == REFINER_OPENCLIP_PREFIX and "unet" in found and not self._has_sizes:
            found["text_encoder"] = found.pop("text_encoder_2")  # the spelling of SD-Turbo: an SD 2.x like XL's refiner
        return found

    @property
    def _has_sizes(self) -> bool:
        """Tell whether the UNet is told sizes beside the text, as in XL."""
        return any("label_emb" in name or "add_embedding" in name for name in self.shapes)

    @cached_property
    def has_ema(self) -> bool:
        """Tell whether the file holds a moving average of the UNet's weights."""
        return any(name.startswith(f"{EMA_PREFIX}diffusion_model") for name in self.shapes)

    @cached_property
    def only_ema(self) -> bool:
        """Tell whether a moving average is all that there is of the UNet."""
        return self.has_ema and not any(self.owner(name) == "unet" for name in self.shapes)

    def _like_hub(self, component: str) -> bool:
        prefix, (_, _, hub) = self.prefixes[component], _PREFIXES[component]
        return any(re.match(re.escape(prefix) + hub, name) for name in self.shapes)

    def rows(self, component: str, model: Model) -> list[Row]:
        """Return the name table of a network as this file spells it."""
        prefix = self.prefixes[component]
        if component in _TABLE:
            rows = model.rows()
            if self._like_hub(component):
                before = _TABLE[component]
                rows = [row._replace(ldm=tuple(before + n for n in row.hub), ldm_op=row.hub_op) for row in rows]
            return rows
        projection = any("text_projection.weight" in row.hub for row in model.rows())
        rows = clip_rows(model.spec, openclip=prefix.endswith(_OPENCLIP), prefix=prefix, projection=projection)
        as_layer = f"{prefix}text_projection.weight"  # a parameter is transposed, a layer's weight is not
        if projection and as_layer in self.shapes:
            rows[-1] = rows[-1]._replace(ldm=(as_layer,), ldm_op=SAME)
        return rows

    def name_in_table(self, name: str) -> str:
        """Return the table's spelling of a tensor's name."""
        owner = self.owner(name)
        if owner is None:
            return name
        prefix = self.prefixes[owner]
        rest = name[len(prefix) :]
        if owner == "vae":
            rest = canonical_original_vae_name(canonical_vae_name(rest))
        elif owner not in _TABLE and not prefix.endswith(_OPENCLIP) and _NO_TEXT_MODEL.match(rest):
            rest = f"text_model.{rest}"
        return _TABLE.get(owner, prefix) + rest

    def owner(self, name: str) -> str | None:
        """Return the network that a tensor belongs to by what stands before its name."""
        fits = [component for component, prefix in self.prefixes.items() if name.startswith(prefix)]
        return max(fits, key=lambda component: len(self.prefixes[component]), default=None)

    def match(
        self,
        networks: Mapping[str, Model],
        *,
        use_ema: bool = False,
        ignore: Callable[[str | None], bool] = lambda component: False,
    ) -> Matched:
        """Pair the tensors of the file with those of ``networks``, which are on the meta device.

        Args:
            networks: by component; each must be in ``prefixes``.
            use_ema: whether to take the moving average of the UNet's weights; where there is nothing else, it is taken.
            ignore: tells of which components (None: of no known one) tensors that nobody wants are no problem.
        """
        use_ema = use_ema or self.only_ema
        rows = {component: self.rows(component, model) for component, model in networks.items()}
        shapes = {component: expected_shapes(networks[component], rows[component], "ldm") for component in networks}
        expected = {name: shape for part in shapes.values() for name, shape in part.items()}
        averages = {ema_name(name): name for name in shapes.get("unet", ())} if use_ema else {}
        reasons: dict[str, str] = {}

        def canonical(name: str) -> str | None:
            if name in averages:
                return averages[name]
            owner, table = self.owner(name), self.name_in_table(name)
            why = why_dropped(name) or why_dropped(table, expected)
            if why is None and use_ema and owner == "unet":
                why = "the UNet's weights, instead of which their moving average is taken"
            if why is not None:
                reasons[name] = why
            return None if why is not None or (owner not in networks and ignore(owner)) else table

        found, wrong = match(expected, self.stored, canonical, set(_flat_names(rows.values())))
        parts = [
            Part(component, model, rows[component], "ldm", {n: found[n] for n in shapes[component] if n in found})
            for component, model in networks.items()
        ]
        dropped = [(one, reasons[name]) for one in self.stored if (name := unwrapped(one.name)) in reasons]
        return Matched(parts, wrong, dropped)


def why_dropped(name: str, expected: Container[str] = ()) -> str | None:
    """Return why a tensor of an original single file is left out on purpose; None if it is not.

    OpenCLIP's text encoders have a layer behind the state that SD 2.x conditions on, and a projection. They are told by
    the names that are ``expected``: one layer less, and no projection.
    """
    if (match := _BEHIND.fullmatch(name)) and name not in expected:
        prefix, n = match[1], match[2]
        before = f"{prefix}transformer.resblocks.{int(n or 1) - 1}.ln_1.weight"
        projects = any(f"{prefix}text_projection{end}" in expected for end in ("", ".weight"))
        if before in expected and not projects and f"{prefix}transformer.resblocks.{n}.ln_1.weight" not in expected:
            return "stands behind the state of OpenCLIP that SD 2.x conditions on"
    return next((reason for pattern, reason in _DROPPED if pattern.fullmatch(name)), None)


def _flat_names(tables: Iterable[list[Row]]) -> Iterator[str]:
    """Yield the names of linear layers that original files store as 1x1 convolutions, and some tools as matrices."""
    for rows in tables:
        for row in rows:
            if row.ldm_op is CONV1X1:
                yield from row.ldm
