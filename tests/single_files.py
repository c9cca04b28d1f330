"""Single files for tests: full-size ones that hold no data, and pictures drawn from tiny ones."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8}


def sparse_file(path: Path, tensors: Mapping[str, list[Any]], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file of the given dtypes and shapes; its data is a hole that takes no room on the disk."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + SIZES[dtype] * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    """Draw two small pictures with a pipeline of ours or the reference's; return levels from 0 to 255."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator, "output_type": "np"}
    images = pipe(**{"prompt": ["red heart", "two cats"], **options, **arguments}).images
    return np.round(images * 255)


def states_equal(a: Any, b: Any) -> bool:
    """Tell whether two networks have the same weights bit for bit, under the same names."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)
