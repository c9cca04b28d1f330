"""``minidiff generate PROMPT``: pictures of a checkpoint, as PNG files that say how they were made."""

import argparse
import inspect
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.embedded import DEFAULT, GUIDANCE, embedded_checkpoint, embedded_names
from minidiff.registry import HOME, __version__, public

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from minidiff.pipelines.base import DiffusionPipeline

USUAL_GUIDANCE = 7.5  # the reference's default
TEXT_STEPS, PLAIN_STEPS = 25, 50  # with a prompt and without; the scheduler of DDPM needs more
FOR_TEXT = {
    "prompt": "the prompt",
    "negative": "--negative",
    "guidance": "--guidance",
    "size": "--size",
    "film": "--film",
}


def add_generate(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``minidiff generate``."""
    add = parser.add_argument
    add("prompt", nargs="?", help="what to draw; left out for a checkpoint that draws without a prompt")
    add("-o", "--output", type=_png, help="PNG file to write; OUT-0.png, OUT-1.png, ... for several pictures")
    model = f"folder, embedded checkpoint ({', '.join(embedded_names())}) or Hub id, the first of these that is there"
    add("--model", help=f"{model}, in diffusers layout, or a single file (default: the embedded {DEFAULT})")
    add("--negative", metavar="PROMPT", help="what to stay away from")
    add("--steps", type=_positive, help=f"denoising steps (default: {TEXT_STEPS}, without a prompt {PLAIN_STEPS})")
    guidance = f"guidance scale, 1 is off (default: {USUAL_GUIDANCE}, for the embedded checkpoint {GUIDANCE})"
    add("--guidance", type=float, help=guidance)
    add("--scheduler", type=_scheduler, help=f"{', '.join(_schedulers())}, or a class name (default: the checkpoint's)")
    add("--seed", type=_seed, help="picture k is drawn with SEED + k (default: a random one, printed)")
    add("--size", type=_size, metavar="N|WxH", help="pixels (default: the checkpoint's)")
    add("--num", type=_positive, default=1, help="number of pictures (default: %(default)s)")
    add("--grid", action="store_true", help="write one sheet with all pictures")
    add("--film", type=_png, metavar="FILE", help="also write what each step predicted, side by side, to this PNG file")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: %(default)s)")
    add("--device", type=str, help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    add("--no-safety-checker", action="store_true", help="leave the safety checker out, if there is one")
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    model, name = _checkpoint(args.model), args.model or DEFAULT
    output = args.output or Path(f"{_slug(Path(name).name if args.prompt is None else args.prompt)}-{seed}.png")
    for file in filter(None, (output, args.film)):
        if not file.parent.is_dir():  # said now, not after minutes of work
            raise FileNotFoundError(f"the folder {file.parent} of the output file {file.name} does not exist")
    kind = _pipeline_class(model)
    needs_prompt = _needs_prompt(args, kind.__call__)

    unchecked = args.no_safety_checker and "safety_checker" in inspect.signature(kind).parameters
    pipe = _load(model, args.dtype, args.device, **({"safety_checker": None} if unchecked else {}))
    if args.scheduler:
        pipe.scheduler = public(args.scheduler).from_config(pipe.scheduler.config)
    steps = args.steps or (TEXT_STEPS if needs_prompt else PLAIN_STEPS)
    call, said = _text_arguments(args, model) if needs_prompt else ({"batch_size": args.num}, {})
    if args.film:
        from minidiff.previews import FilmStrip, previewer

        call["callback_on_step_end"] = film = FilmStrip(previewer(pipe))
    out = pipe(**call, num_inference_steps=steps, seeds=[seed + k for k in range(args.num)])
    settings = said | {
        "steps": steps,
        "scheduler": type(pipe.scheduler).__name__,
        "checkpoint": name,
        "size": "{}x{}".format(*out.images[0].size),
        "dtype": args.dtype,
        "minidiff": __version__,
    }
    _write(out.images, out.seeds, output, settings, grid=args.grid)
    if args.film:
        _write([film.image()], [", ".join(map(str, out.seeds))], args.film, settings, grid=False)


def _checkpoint(model: str | None) -> str | Path:
    """Return what to load: a folder, else an embedded checkpoint of that name, else a Hub id."""
    if model is None or (model in embedded_names() and not Path(model).is_dir()):
        return embedded_checkpoint(model or DEFAULT)
    return model


def _pipeline_class(model: str | Path) -> type["DiffusionPipeline"]:
    """Return the class that the checkpoint is for, before any weights are read or downloaded."""
    from minidiff.checkpoints.hub import Repo
    from minidiff.config import read_json
    from minidiff.pipelines.index import INDEX

    pipeline = public("DiffusionPipeline")
    if Path(model).is_file():
        from minidiff.checkpoints.original.read import SingleFile
        from minidiff.checkpoints.original.single_file import describe

        _, configs, _ = describe(SingleFile.of(Path(model)), None, None, {}, ask=False)
        return pipeline._class_for(configs.read(INDEX), configs)
    path = Repo(model).file(INDEX)
    return pipeline._class_for(read_json(path), path)


def _needs_prompt(args: argparse.Namespace, call: Callable) -> bool:
    """Say whether the pipeline draws from a prompt. Raises ValueError if the options do not suit it."""
    kind = f"{args.model or DEFAULT} is a checkpoint for {call.__qualname__.split('.')[0]}"
    if "prompt" in inspect.signature(call).parameters:
        if args.prompt is None:
            raise ValueError(f'{kind}, which needs a prompt: minidiff generate "red apple"')
        if args.negative is not None and "negative_prompt" not in inspect.signature(call).parameters:
            raise ValueError(f"{kind}, which takes no negative prompt: leave out --negative")
        return True
    if given := [spelling for option, spelling in FOR_TEXT.items() if getattr(args, option) is not None]:
        raise ValueError(f"{kind}, which draws without a prompt and in one size: leave out {', '.join(given)}")
    return False


def _text_arguments(args: argparse.Namespace, model: str | Path) -> tuple[dict, dict]:
    """Return what a text-to-image pipeline is called with, and what of it is written into the file."""
    usual = GUIDANCE if model == embedded_checkpoint(DEFAULT) else USUAL_GUIDANCE
    guidance = usual if args.guidance is None else args.guidance
    width, height = args.size or (None, None)
    call = {"prompt": args.prompt, "negative_prompt": args.negative, "guidance_scale": guidance}
    said = {"prompt": args.prompt, "negative": args.negative or "", "guidance": guidance}
    return call | {"width": width, "height": height, "num_images_per_prompt": args.num}, said


def _load(model: str | Path, dtype: str, device: str | None, **options: None) -> "DiffusionPipeline":
    import torch

    device = _device(device)  # before the weights are read
    pipeline = public("DiffusionPipeline")  # brings torch
    load = pipeline.from_single_file if Path(model).is_file() else pipeline.from_pretrained
    return load(model, torch_dtype=getattr(torch, dtype), **options).to(device)


def _device(name: str | None) -> "torch.device":
    import torch

    from minidiff.pipelines.offload import accelerator

    name = name or accelerator() or "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one exception for this
        raise ValueError(f"the device {name!r} is not available: {str(error).splitlines()[0]}") from error


def _write(
    images: "list[Image.Image]", seeds: list[int] | list[str], output: Path, settings: dict, *, grid: bool
) -> None:
    from minidiff.images.tensors import make_image_grid, save_png

    if grid:
        rows = max(n for n in range(1, math.isqrt(len(images)) + 1) if len(images) % n == 0)
        pictures = [(output, make_image_grid(images, rows, len(images) // rows), ", ".join(map(str, seeds)))]
    elif len(images) == 1:
        pictures = [(output, images[0], str(seeds[0]))]
    else:
        paths = [output.with_stem(f"{output.stem}-{k}") for k in range(len(images))]
        pictures = zip(paths, images, map(str, seeds), strict=True)
    for path, image, seed in pictures:
        save_png(image, path, settings | {"seed": seed})
        print(f"{path}  seed {seed}")


def _schedulers() -> dict[str, str]:
    """Map the short name of every scheduler to its class name: "unipc" to "UniPCMultistepScheduler"."""
    names = [name for name in HOME if name.endswith("Scheduler")]
    return {name.removesuffix("Scheduler").removesuffix("Multistep").lower(): name for name in names}


def _scheduler(text: str) -> str:
    schedulers = _schedulers()
    name = schedulers.get(text.lower(), text)
    if name not in schedulers.values():
        known = ", ".join(f"{short} ({name})" for short, name in schedulers.items())
        raise argparse.ArgumentTypeError(f"unknown scheduler {text!r}; known: {known}")
    return name


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png" or path.is_dir():
        raise argparse.ArgumentTypeError(f"pictures are written as PNG files, name one ending in .png, not {text!r}")
    return path


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"write the size as 512 or as 768x512 (width x height), not {text!r}")
    width, height = match.groups()
    return int(width), int(height or width)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"needs a whole number of at least 1, found {text!r}")
    return int(text)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"needs a whole number from 0 to 2^63 - 1, found {text!r}")
    return int(text)


def _slug(prompt: str) -> str:
    return re.sub(r"[\W_]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "image"
