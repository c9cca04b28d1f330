"""Fill a network that was built on the meta device with the tensors of safetensors files.

Three stages. The headers are read first (names, dtypes, shapes, positions: a few kilobytes) and compared with what the
network expects, so that everything that is wrong is reported together before any weight is read. Then each tensor is
taken from its file: memory-mapped and not copied where the stored dtype is the wanted one, otherwise converted on its
own through a small buffer, so that the stored and the converted weights are never in memory together. Last, the
tensors become the network's parameters, one for one.
"""

import gc
import json
import os
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidiff.atomic import unchanged
from minidiff.checkpoints.gguf_blocks import BLOCKS
from minidiff.checkpoints.hub import Weights
from minidiff.checkpoints.names import unwrapped
from minidiff.checkpoints.original.strangers import outside
from minidiff.checkpoints.remap import Row, Spelling, translate
from minidiff.compat.published import own_modules
from minidiff.errors import CheckpointError, shortened
from minidiff.sniff import what_is

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # to compute in
FLOAT8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}  # only to store: there is no arithmetic in them
# What a stored tensor may be, and the dtype of its values when they are read.
STORED_DTYPES = {**dict.fromkeys(BLOCKS, torch.float32), **DTYPES, **FLOAT8}
CHUNK = 2**20  # bytes converted at a time: a piece and its result stay in the processor's cache


class OpenFile:
    """A file that is held open: whatever takes its name meanwhile, what is read is of one save."""

    mapped: Any = None  # the same file, as safetensors maps it

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._handle)
        self._lock = threading.Lock()

    def read_into(self, buffer: memoryview, start: int) -> int:
        """Fill a buffer with what begins at byte ``start``; return how much there was. Threads may share the file."""
        if hasattr(os, "preadv"):
            return os.preadv(self._handle, [buffer], start)
        with self._lock:  # Windows
            os.lseek(self._handle, start, os.SEEK_SET)
            content = os.read(self._handle, len(buffer))
        buffer[: len(content)] = content
        return len(content)


class SafetensorsFile(OpenFile):
    """A safetensors file that is held open.

    Raises:
        CheckpointError: if the file is empty, cut short, or anything else; ``sniff`` says what.
    """

    def __init__(self, path: Path) -> None:
        with unchanged(path):  # both are the same file then
            try:
                self.mapped = safe_open(path, framework="pt")  # validates the header, and that the file is long enough
            except SafetensorError as error:
                what = what_is(path) or f"{error}; if it was cut short, download or save it again (force_download=True)"
                raise CheckpointError(f"{path} is not a complete safetensors file: {what}") from error
            except RuntimeError as error:  # of torch, which maps it
                raise CheckpointError(f"{path} could not be opened: {error}") from error
            super().__init__(path)

    def header(self) -> tuple[dict[str, Any], int]:
        """Return the header as it is stored, and the position of the first byte behind it."""
        size = bytearray(8)
        self.read_into(memoryview(size), 0)
        text = bytearray(int.from_bytes(size, "little"))
        self.read_into(memoryview(text), 8)
        return json.loads(text), 8 + len(text)


class StoredTensor(NamedTuple):
    """One tensor in a file, as its header describes it."""

    name: str
    source: OpenFile
    dtype: str
    shape: tuple[int, ...]
    start: int  # position of the first byte in the file
    size: int  # in bytes
    added: str = ""  # what stands before the name here, but not in the file

    @property
    def path(self) -> Path:
        """The file on this machine."""
        return self.source.path

    @property
    def file(self) -> str:
        """The name of the file."""
        return self.source.path.name

    @property
    def mapped(self) -> Tensor:
        """A view of the file; its pages are private: training such a weight does not change the file."""
        return self.source.mapped.get_tensor(self.name.removeprefix(self.added))


_FACTORIES = frozenset((torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange))


class OnMeta(TorchFunctionMode):
    """Context in which modules are built on the meta device and ``torch.nn.init`` does nothing.

    It is ``torch.device("meta")`` with less work per call, without initial values that loading would throw away: the
    two take most of the time of a load whose weights are mapped.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        if func in _FACTORIES:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep Python's garbage collector from walking the whole process while thousands of lasting objects are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def as_dtype(torch_dtype: torch.dtype | str | None, dtype: torch.dtype | str | None = None) -> torch.dtype:
    """Return the dtype to load in, given under either of the reference's two names; float32 if neither is given.

    float32 is the default even where the files hold float16, as in diffusers. Raises ``ValueError`` for "auto", for
    what is not one of the four floating types, and if the two names are given different values.
    """
    asked = [_one_dtype(value) for value in (torch_dtype, dtype) if value is not None]
    if len(set(asked)) > 1:
        raise ValueError(f"dtype={dtype} and torch_dtype={torch_dtype} are two names of one argument; give one of them")
    return asked[0] if asked else torch.float32


def _one_dtype(value: torch.dtype | str) -> torch.dtype:
    allowed = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    name = str(value).removeprefix("torch.")
    if name.startswith("float8"):
        raise ValueError(
            f"torch_dtype={value!r} is for storage only, nothing can be computed in it: load in float32, bfloat16 or "
            "float16, whatever the file holds; .enable_layerwise_casting() then keeps a network's weights in float8"
        )
    if name not in allowed:
        raise ValueError(f"torch_dtype={value!r} is not one of {', '.join(allowed)} (a torch.dtype or its name)")
    return allowed[name]


def read_header(source: SafetensorsFile) -> list[StoredTensor]:
    """List the tensors of a file without reading them."""
    header, data = source.header()  # positions are counted from the end of the header
    header.pop("__metadata__", None)
    return [
        StoredTensor(key, source, entry["dtype"], tuple(entry["shape"]), data + start, end - start)
        for key, entry in header.items()
        for start, end in [entry["data_offsets"]]
    ]


Opened = tuple[Weights, list[StoredTensor]]  # the files of a network, and their tensors


def read_headers(weights: Weights) -> list[StoredTensor]:
    """List the tensors of all files, which are held open from now on."""
    return [tensor for path in weights.files.values() for tensor in read_header(SafetensorsFile(path))]


def load_weights(model: nn.Module, weights: Weights, stored: list[StoredTensor], dtype: torch.dtype) -> None:
    """Fill ``model``, built on the meta device, with the Hub checkpoint ``weights``, read as ``stored``, in ``dtype``.

    Raises:
        CheckpointError: one error with all tensors that are missing, unexpected, stored twice, of a wrong shape or of a
            dtype that is not floating, and the names of their files.
    """
    rows = model.rows()
    found, wrong = match(expected_shapes(model, rows), stored, model.canonical_hub_name)
    problems = listed(wrong) + _index_problems(weights, stored)
    if problems:
        where = stored[0].path.parent if stored else next(iter(weights.files.values())).parent
        files = f"{', '.join(weights.files)} in {where}"
        if what := outside(unwrapped(tensor.name) for tensor in stored):
            raise CheckpointError(f"{files} is {what}")
        raise CheckpointError(
            f"{files} do not fit {type(model).__name__} as its config.json describes it; is it the configuration of "
            "another model?\n" + "\n".join(problems)
        )
    fill(model, rows, found, dtype)


def fill(
    model: nn.Module,
    rows: Iterable[Row],
    found: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    spelling: Spelling = "hub",
) -> None:
    """Give ``model``, built on the meta device, the tensors ``found`` under the names of ``spelling``, in ``dtype``."""
    state = translate(_read(found, dtype), rows, spelling, "ours")
    _assign(model, {name: tensor.contiguous() for name, tensor in state.items()})


def _assign(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Make ``state`` the parameters and buffers of ``model``, one for one.

    It is ``load_state_dict(strict=True, assign=True)`` without its hooks and its comparisons, which were made before.
    """
    for prefix, module in own_modules(model):
        dot = prefix and f"{prefix}."
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(state.pop(dot + name), requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:  # one that is not saved would have no row: networks compute such things when needed
                module._buffers[name] = state.pop(dot + name)
    if state:
        raise AssertionError(f"{type(model).__name__} has rows for tensors that it lacks: {', '.join(state)}")


def match(
    expected: Mapping[str, tuple[int, ...]],
    stored: Iterable[StoredTensor],
    canonical: Callable[[str], str | None],
    flat: Container[str] = (),
) -> tuple[dict[str, StoredTensor], dict[str, list[str]]]:
    """Pair the expected names with the stored tensors, and describe everything that does not fit.

    Args:
        expected: shapes by name.
        stored: what the files hold.
        canonical: turns a stored name, without wrappers, into an expected one, or into None for a tensor that is left
            out on purpose.
        flat: names that may also be stored without their trailing axes of length 1.

    Returns:
        the stored tensors by expected name, and lines of text by what is wrong with the tensors that they name.
    """
    found: dict[str, StoredTensor] = {}
    wrong: dict[str, list[str]] = defaultdict(list)
    for tensor in stored:
        name = canonical(unwrapped(tensor.name))
        if name is None:
            continue
        if name not in expected:
            wrong["unexpected"].append(f"{tensor.name} {tensor.shape} in {tensor.file}")
        elif name in found:
            both = f"{found[name].name} in {found[name].file} and {tensor.name} in {tensor.file}"
            wrong["stored twice"].append(both)
        elif tensor.dtype not in STORED_DTYPES:
            accepted = ", ".join([*DTYPES, *FLOAT8])
            wrong["of a wrong dtype"].append(f"{tensor.name} in {tensor.file} is {tensor.dtype}, not {accepted}")
        elif tensor.shape != expected[name] and not (name in flat and _flat(tensor.shape) == _flat(expected[name])):
            shapes = f"{tensor.shape} in {tensor.file}, expected {expected[name]}"
            wrong["of a wrong shape"].append(f"{tensor.name} is {shapes}")
        found.setdefault(name, tensor)
    wrong["missing"] = [f"{name} {shape}" for name, shape in expected.items() if name not in found]
    return found, {kind: lines for kind, lines in wrong.items() if lines}


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its trailing ones."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def listed(wrong: Mapping[str, list[str]]) -> list[str]:
    """Return one paragraph for each kind of problem that ``match`` found."""
    return [
        f"{len(lines)} {kind}:\n" + "\n".join(f"  {line}" for line in shortened(lines)) for kind, lines in wrong.items()
    ]


def expected_shapes(model: nn.Module, rows: Iterable[Row], spelling: Spelling = "hub") -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor under its name in ``spelling``, by laying the meta tensors out as it does."""
    laid_out = translate(nn.Module.state_dict(model), rows, "ours", spelling)
    return {name: tuple(tensor.shape) for name, tensor in laid_out.items()}


def _index_problems(weights: Weights, stored: Iterable[StoredTensor]) -> list[str]:
    if weights.index is None:
        return []
    actual = {tensor.name: tensor.file for tensor in stored}
    lines = [
        f"{name}: {weights.index.get(name, 'not listed')} in {weights.index_name}, {actual.get(name, 'in no shard')}"
        for name in sorted(weights.index.keys() | actual.keys())
        if weights.index.get(name) != actual.get(name)
    ]
    return listed({"where the index and the shards disagree": lines} if lines else {})


def _read(stored: Mapping[str, StoredTensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors in ``dtype``: views of the files where they are stored so, else converted, several at once."""
    same = {name: one for name, one in stored.items() if one.source.mapped and STORED_DTYPES[one.dtype] == dtype}
    tensors: dict[str, Tensor] = {name: tensor.mapped for name, tensor in same.items()}
    others = stored.keys() - same.keys()
    with ThreadPoolExecutor(max(1, min(4, torch.get_num_threads(), len(others)))) as pool:
        tensors.update(zip(others, pool.map(lambda name: read_tensor(stored[name], dtype), others), strict=True))
    return tensors


def read_tensor(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """Read and convert one tensor in pieces. Mapped pages would count as memory of this process until unmapped."""
    result = torch.empty(stored.shape, dtype=dtype)
    start = 0
    for piece in read_pieces(stored):
        result.view(-1)[start : start + len(piece)].copy_(piece)
        start += len(piece)
    return result


def read_pieces(stored: StoredTensor) -> Iterator[Tensor]:
    """Yield the values of a stored tensor in order, ``CHUNK`` bytes at a time; the next piece overwrites the last."""
    block = BLOCKS.get(stored.dtype)
    buffer = bytearray(min(CHUNK if block is None else CHUNK // block.size * block.size, stored.size))
    if not buffer:
        return
    values = torch.frombuffer(buffer, dtype=STORED_DTYPES[stored.dtype] if block is None else torch.uint8)
    for start in range(0, stored.size, len(buffer)):
        size = min(len(buffer), stored.size - start)
        if stored.source.read_into(memoryview(buffer)[:size], stored.start + start) != size:
            raise CheckpointError(f"{stored.path} became shorter while {stored.name} was read from it")
        piece = values[: size // values.itemsize]
        yield piece if block is None else block.unpack(piece.view(-1, block.size)).flatten()
