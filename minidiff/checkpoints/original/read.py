"""What a single file in the original CompVis / Stability spelling holds, and which of it belongs to which network.

Files differ in what stands before the names of a network (``prefixes``), in the spelling behind it, and in what they
hold besides weights (``dropped``).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from minidiff.checkpoints.gguf import is_gguf, read_gguf
from minidiff.checkpoints.hub import PICKLES, WHY_NO_PICKLES
from minidiff.checkpoints.load import SafetensorsFile, StoredTensor, expected_shapes, match, read_header
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.names import canonical_tiny_vae_name, canonical_vae_name, unwrapped
from minidiff.checkpoints.original.dropped import why_dropped
from minidiff.checkpoints.original.prefixes import (
    EMA,
    NETWORKS,
    PREFIXES,
    TRANSFORMERS,
    UNET,
    ema_name,
    rows_in_file,
    usual_prefixes,
)
from minidiff.checkpoints.remap import CONV1X1, SAME, Row, Spelling
from minidiff.errors import CheckpointError, CheckpointNotFoundError

_BEGINNINGS = {  # component -> how its names begin behind the prefix: originally, on the Hub
    "unet": (
        r"(input_blocks|middle_block|output_blocks|time_embed)\.",
        r"(down_blocks|mid_block|up_blocks|time_embedding)\.",
    ),
    "vae": (
        r"(en|de)coder\.(mid|down|up)\.|(taesd_)?(en|de)coder\.\d+\.(conv|weight)",
        r"(en|de)coder\.(mid_block\.|down_blocks\.|up_blocks\.|layers\.\d+\.(conv|weight))",
    ),
}
_HALF_OF_TINY = re.compile(r"\d+\.(conv\.\d+\.)?(weight|bias)")
_REFINER = PREFIXES["XL refiner"]["text_encoder_2"]
_NO_TEXT_MODEL = re.compile(r"(embeddings|encoder|final_layer_norm)\.")  # some tools leave out "text_model."


@dataclass(frozen=True)
class StoredNetwork:
    """One network of a checkpoint: on the meta device, with its rows and the stored tensors by name in ``spelling``."""

    name: str  # of the component in its pipeline, "" for a network on its own
    model: Model
    rows: list[Row]
    spelling: Spelling
    found: dict[str, StoredTensor]

    def stored(self, row: Row) -> list[StoredTensor]:
        """Return the stored tensors of a row."""
        return [self.found[name] for name in row.names(self.spelling)]


class Matched(NamedTuple):
    """The tensors of a file paired with those of networks, what is wrong with them, and what is left out and why."""

    parts: list[StoredNetwork]
    wrong: dict[str, list[str]]
    dropped: list[tuple[StoredTensor, str]]


@dataclass(frozen=True)
class SingleFile:
    """The header of a single file: its tensors in order, and its metadata.

    A network is in the original spelling or in the Hub's, whatever stands before its names. ``rows`` gives its table
    in the spelling of the file, in the column ``ldm``.
    """

    path: Path
    stored: list[StoredTensor]
    metadata: Mapping[str, str]

    @classmethod
    def of(cls, path: Path) -> "SingleFile":
        """Read the header of a safetensors or GGUF file. Raises ``CheckpointError`` for a pickle or a damaged file."""
        if path.suffix in PICKLES:
            raise CheckpointError(f"{path} is a pickle: {WHY_NO_PICKLES}")
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; from_single_file needs one file, from_pretrained a folder")
        if not path.is_file():
            raise CheckpointNotFoundError(f"there is no file {str(path)!r} (looked from {Path.cwd()})")
        if is_gguf(path):
            return cls(path, *read_gguf(path))
        source = SafetensorsFile(path)
        stored = _with_other_half(path, read_header(source))
        return cls(path, stored, source.mapped.metadata() or {})

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all tensors, by name without wrappers."""
        return {unwrapped(tensor.name): tensor.shape for tensor in self.stored}

    @cached_property
    def prefixes(self) -> dict[str, str]:
        """What stands before the names of each network that is in the file."""
        names = [name for name in self.shapes if why_dropped(name) is None]
        found = {}
        for component in NETWORKS:
            begins = "|".join(_BEGINNINGS.get(component, ("",)))
            for prefix in usual_prefixes(component):
                if any(re.match(f"{re.escape(prefix)}({begins})", name) for name in names):
                    found.setdefault(component, prefix)
        if self.has_ema:
            found.setdefault("unet", UNET)
        if found.get("text_encoder_2") == _REFINER and "unet" in found and not self._has_sizes:
            found["text_encoder"] = found.pop("text_encoder_2")  # the spelling of SD-Turbo: an SD 2.x like XL's refiner
        return found

    @property
    def _has_sizes(self) -> bool:
        """Tell whether the UNet is told sizes beside the text, as in XL."""
        return any("label_emb" in name or "add_embedding" in name for name in self.shapes)

    @cached_property
    def has_ema(self) -> bool:
        """Tell whether the file holds a moving average of the UNet's weights."""
        return any(name.startswith(f"{EMA}diffusion_model") for name in self.shapes)

    @cached_property
    def only_ema(self) -> bool:
        """Tell whether a moving average is all that there is of the UNet."""
        return self.has_ema and not any(self.owner(name) == "unet" for name in self.shapes)

    def rows(self, component: str, model: Model) -> list[Row]:
        """Return the name table of a network as this file spells it."""
        prefix, (_, hub) = self.prefixes[component], _BEGINNINGS.get(component, ("", None))
        like_hub = hub is not None and any(re.match(re.escape(prefix) + hub, name) for name in self.shapes)
        rows = rows_in_file(model.rows(), prefix, like_hub)
        as_layer = f"{prefix}text_projection.weight"  # a parameter is transposed, a layer's weight is not
        if rows[-1].ldm == (f"{prefix}text_projection",) and as_layer in self.shapes:
            rows[-1] = rows[-1]._replace(ldm=(as_layer,), ldm_op=SAME)
        return rows

    def modern(self, name: str) -> str:
        """Return the table's spelling of a tensor's name, which may be an old one or a tool's."""
        owner = self.owner(name)
        prefix = self.prefixes.get(str(owner), "")
        rest = name[len(prefix) :]
        if owner == "vae":
            return prefix + canonical_tiny_vae_name(canonical_vae_name(rest))
        if prefix.endswith(TRANSFORMERS) and _NO_TEXT_MODEL.match(rest):
            return f"{prefix}text_model.{rest}"
        return name

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
        unet = self.prefixes.get("unet", "")
        averages = {ema_name(name[len(unet) :]): name for name in shapes.get("unet", ())} if use_ema else {}
        reasons: dict[str, str] = {}

        def canonical(name: str) -> str | None:
            if name in averages:
                return averages[name]
            owner, table = self.owner(name), self.modern(name)
            why = why_dropped(name) or why_dropped(table, expected)
            if why is None and use_ema and owner == "unet":
                why = "the UNet's weights, instead of which their moving average is taken"
            if why is not None:
                reasons[name] = why
            return None if why is not None or (owner not in networks and ignore(owner)) else table

        in_gguf = any(tensor.source.mapped is None for tensor in self.stored)  # which may lack or have axes of length 1
        flat = set(expected if in_gguf else _flat_names(rows.values()))
        found, wrong = match(expected, self.stored, canonical, flat)
        if in_gguf and not wrong:
            found = {name: tensor._replace(shape=expected[name]) for name, tensor in found.items()}
        mine = {component: {n: found[n] for n in shapes[component] if n in found} for component in networks}
        parts = [StoredNetwork(name, model, rows[name], "ldm", mine[name]) for name, model in networks.items()]
        dropped = [(one, reasons[name]) for one in self.stored if (name := unwrapped(one.name)) in reasons]
        return Matched(parts, wrong, dropped)


def _with_other_half(path: Path, stored: list[StoredTensor]) -> list[StoredTensor]:
    """Return the tensors of a file; of a half of a tiny autoencoder, named by numbers alone, those of both halves.

    Raises:
        CheckpointNotFoundError: if the other half is not beside it, under the same name with the other word.
    """
    if not stored or not all(_HALF_OF_TINY.fullmatch(tensor.name) for tensor in stored):
        return stored
    mine, other = ("encoder", "decoder") if any(one.name == "0.weight" for one in stored) else ("decoder", "encoder")
    beside = path.with_name(path.name.replace(mine, other))
    if beside == path or not beside.is_file():
        raise CheckpointNotFoundError(
            f"{path} is the {mine} of a tiny autoencoder; expected the {other} beside it, in a file of the "
            f"same name with {other!r} for {mine!r}"
        )
    halves = {f"taesd_{mine}.": stored, f"taesd_{other}.": read_header(SafetensorsFile(beside))}
    return [one._replace(name=half + one.name, added=half) for half, tensors in halves.items() for one in tensors]


def _flat_names(tables: Iterable[list[Row]]) -> Iterator[str]:
    """Yield the names of linear layers that original files store as 1x1 convolutions, and some tools as matrices."""
    for rows in tables:
        for row in rows:
            if row.ldm_op is CONV1X1:
                yield from row.ldm
