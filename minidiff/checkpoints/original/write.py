"""Lay networks out as an original single file: which name table each has there, and what is written beside it."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial, reduce

import torch
from torch import Tensor, nn

from minidiff.checkpoints.load import FLOAT8, STORED_DTYPES, StoredTensor, expected_shapes, read_pieces, read_tensor
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.families import V_MARK, ZERO_SNR_MARK
from minidiff.checkpoints.original.header import KEY
from minidiff.checkpoints.original.prefixes import PREFIXES, UNET, rows_in_file
from minidiff.checkpoints.original.read import StoredNetwork
from minidiff.checkpoints.remap import Op, Row, Spelling
from minidiff.checkpoints.stream import Group
from minidiff.errors import CheckpointError


def original_tables(networks: Mapping[str, Model]) -> dict[str, list[Row]]:
    """Return the name table of each network of a pipeline as a single file of its family spells it.

    Args:
        networks: by component. One on its own has the name "": its names get no prefix if it is an autoencoder, as in
            the published files of autoencoders; a UNet keeps it.

    Raises:
        CheckpointError: if the original spelling has no names for one.
    """
    prefixes, tables = _prefixes(networks), {}
    for name, model in networks.items():
        part = name or next(iter(model.single_file_parts), "")
        if part not in model.single_file_parts or part not in prefixes:
            raise CheckpointError(
                f"the original spelling has no names for {name or 'a bare network'} ({type(model).__name__}); save the "
                "checkpoint in Hub layout"
            )
        tables[name] = rows_in_file(model.rows(), prefixes[part])
    return tables


def _prefixes(networks: Mapping[str, Model]) -> dict[str, str]:
    """Return what stands before the names of each component in a file that holds these networks."""
    if "" in networks:
        return {"unet": UNET, "vae": ""}
    first, second = networks.get("text_encoder"), networks.get("text_encoder_2")
    if second is not None:
        return PREFIXES["XL" if first is not None else "XL refiner"]
    return PREFIXES["2.x" if first is not None and first.config.get("hidden_act") == "gelu" else "1.x"]


def original_metadata(prediction: str | None, configuration: str) -> dict[str, str]:
    """Return the metadata of a single file: by the ModelSpec convention what the UNet predicts, and what configures it.

    ``configuration`` is that of ``header.said_by``.
    """
    said = {"modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction)} if prediction else {}
    return {"format": "pt", KEY: configuration, **said}


def marks(prediction: str | None, zero_snr: bool) -> Iterator[Group]:
    """Yield the empty tensors by which other programs tell what the UNet predicts and how it was trained."""
    for name, there in ((V_MARK, prediction == "v_prediction"), (ZERO_SNR_MARK, zero_snr)):
        if there:
            yield Group([(name, torch.float32, (0,))], lambda: ())


def groups_of_model(model: Model, rows: list[Row]) -> Iterator[Group]:
    """Yield the tensors of a network in memory, row by row, under their names in an original single file."""
    state = nn.Module.state_dict(model)
    shapes = expected_shapes(model, rows, "ldm")
    for row in rows:
        ours = tuple(state[name] for name in row.ours)
        kind = _common_dtype(tensor.dtype for tensor in ours)
        specs = [(name, kind, shapes[name]) for name in row.ldm]
        yield Group(specs, partial(row.ldm_op.from_ours, ours))


def groups_of_part(
    part: StoredNetwork, rows: list[Row], target: Spelling, dtype: torch.dtype | None
) -> Iterator[Group]:
    """Yield the tensors of a stored network, row by row, to be read when they are written.

    Args:
        part: the network, on the meta device, and its stored tensors.
        rows: its table, whose names in ``target`` are written (its own may have another prefix).
        target: the spelling to write.
        dtype: what to convert to, None for what is stored. Gains and biases are not converted to float8: they take
            hardly any room and matter more.
    """
    shapes = expected_shapes(part.model, rows, target)
    for source, row in zip(part.rows, rows, strict=True):
        stored = part.stored(source)
        small = dtype in FLOAT8.values() and all(len(tensor.shape) < 2 for tensor in stored)
        wanted = None if small else dtype
        wanted = wanted or _common_dtype(STORED_DTYPES[tensor.dtype] for tensor in stored)
        change = source.op(part.spelling), row.op(target)
        make = _in_pieces if all(op.in_order for op in change) else partial(_whole, *change)
        specs = [(name, wanted, shapes[name]) for name in row.names(target)]
        yield Group(specs, partial(make, stored=stored, dtype=wanted))


def _common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the smallest dtype that holds the values of all. torch does not say it of float8: float16 holds both."""
    kinds = set(dtypes)
    if len(kinds) > 1:
        kinds = {torch.float16 if kind in FLOAT8.values() else kind for kind in kinds}
    return reduce(torch.promote_types, kinds)


def _narrowed(values: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert values. Raises ``CheckpointError`` for those that are beyond the largest of ``dtype``."""
    limit = torch.finfo(dtype).max
    if limit < torch.finfo(values.dtype).max and (largest := values.float().abs().max()) > limit:
        raise CheckpointError(f"{name} has values up to {largest:g}; {dtype} ends at {limit:g}: choose a wider dtype")
    return values.to(dtype)


def _in_pieces(stored: list[StoredTensor], dtype: torch.dtype) -> Iterator[Tensor]:
    """Read tensors whose values stay in order, even where three are stacked to one or one is cut in three."""
    for tensor in stored:
        for piece in read_pieces(tensor):
            yield _narrowed(piece, dtype, tensor.name)


def _whole(to_ours: Op, from_ours: Op, stored: list[StoredTensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Read tensors that have to be laid out anew."""
    read = (_narrowed(read_tensor(one, STORED_DTYPES[one.dtype]), dtype, one.name) for one in stored)
    return from_ours.from_ours(to_ours.to_ours(tuple(read)))
