"""Single files for tests: full-size ones that hold no data, tiny twins of each layout, and pictures drawn from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import minidiff
from tests.theirs import diffusers, randomize, transformers
from tests.tiny import SCHEDULER, TEXT, UNET, VAE, save_tiny
from tests.tiny_xl import save_base, save_refiner, vocabulary

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F8_E4M3": 1}


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


def save_sd2(folder: Path) -> Path:
    """Make a tiny pipeline with the traits of SD 2.x: an OpenCLIP text encoder (gelu), linear projections, v."""
    vocab, merges = vocabulary()
    text = transformers.CLIPTextConfig(**TEXT, hidden_act="gelu", vocab_size=len(vocab))
    unet = diffusers.UNet2DConditionModel(**UNET, use_linear_projection=True)
    diffusers.StableDiffusionPipeline(
        vae=randomize(diffusers.AutoencoderKL(**VAE), seed=1),
        text_encoder=randomize(transformers.CLIPTextModel(text), seed=2),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77, pad_token="!"),
        unet=randomize(unet, seed=3),
        scheduler=diffusers.DDIMScheduler.from_config(SCHEDULER | {"prediction_type": "v_prediction"}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


TWINS = {
    "sd1": (save_tiny, "StableDiffusionPipeline", {}),
    "sd2": (save_sd2, "StableDiffusionPipeline", {}),
    "xl": (save_base, "StableDiffusionXLPipeline", {}),
    "refiner": (
        save_refiner,
        "StableDiffusionXLImg2ImgPipeline",
        {"image": np.full((2, 32, 32, 3), 0.4, "float32"), "strength": 1.0},
    ),
}


class Twin:
    """A tiny pipeline in Hub layout, made by the reference, and the single file that we wrote of it."""

    def __init__(self, kind: str, folder: Path) -> None:
        save, self.class_name, self.arguments = TWINS[kind]
        self.kind, self.folder, self.file = kind, save(folder / kind), folder / f"{kind}.safetensors"
        self.ours = self.our_class.from_pretrained(self.folder)
        self.ours.save_single_file(self.file)

    @property
    def our_class(self) -> Any:
        return getattr(minidiff, self.class_name)

    @property
    def their_class(self) -> Any:
        return getattr(diffusers, self.class_name)
