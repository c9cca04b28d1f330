"""The command line: ``minidiff generate "red apple" -o apple.png``.

Arguments are checked before anything heavy is imported, so a typing error is answered at once. Whatever is wrong with
the input ends as one line on stderr and exit code 2.
"""

import argparse
import inspect
import math
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import minidiff
from minidiff.embedded import DEFAULT, GUIDANCE, embedded_checkpoint

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from minidiff.pipelines.base import DiffusionPipeline

USUAL_GUIDANCE = 7.5  # the reference's default


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 on bad input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"minidiff {args.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minidiff", description="Diffusion models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minidiff {minidiff.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands.add_parser("generate", help="turn a prompt into pictures"))
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", help="what to draw")
    add("-o", "--output", type=_png, help="PNG file to write; OUT-0.png, OUT-1.png, ... for several pictures")
    add("--model", help=f"folder or Hub id of a checkpoint in diffusers layout (default: the embedded {DEFAULT})")
    add("--negative", metavar="PROMPT", help="what to stay away from")
    add("--steps", type=_positive, default=25, help="denoising steps (default: %(default)s)")
    guidance = f"guidance scale, 1 is off (default: {USUAL_GUIDANCE}, for the embedded checkpoint {GUIDANCE})"
    add("--guidance", type=float, help=guidance)
    add("--scheduler", type=_scheduler, help=f"{', '.join(_schedulers())}, or a class name (default: the checkpoint's)")
    add("--seed", type=_seed, help="picture k is drawn with SEED + k (default: a random one, printed)")
    add("--size", type=_size, metavar="N|WxH", help="pixels (default: the checkpoint's)")
    add("--num", type=_positive, default=1, help="number of pictures (default: %(default)s)")
    add("--grid", action="store_true", help="write one sheet with all pictures")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: %(default)s)")
    add("--device", type=str, help="cpu, cuda, cuda:1, mps (default: the fastest there is)")
    parser.set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> None:
    seed = random.SystemRandom().randrange(2**32) if args.seed is None else args.seed
    guidance = (USUAL_GUIDANCE if args.model else GUIDANCE) if args.guidance is None else args.guidance
    output = args.output or Path(f"{_slug(args.prompt)}-{seed}.png")
    if not output.parent.is_dir():  # said now, not after minutes of work
        raise FileNotFoundError(f"the folder {output.parent} of the output file {output.name} does not exist")

    pipe = _load(args.model or embedded_checkpoint(), args.dtype, args.device)
    if "prompt" not in inspect.signature(pipe.__call__).parameters:
        raise ValueError(f"{args.model} is a checkpoint for {type(pipe).__name__}, which draws without a prompt")
    if args.scheduler:
        pipe.scheduler = getattr(minidiff, args.scheduler).from_config(pipe.scheduler.config)
    width, height = args.size or (None, None)
    out = pipe(
        args.prompt,
        negative_prompt=args.negative,
        num_inference_steps=args.steps,
        guidance_scale=guidance,
        height=height,
        width=width,
        num_images_per_prompt=args.num,
        seeds=[seed + k for k in range(args.num)],
    )
    settings = {
        "prompt": args.prompt,
        "negative": args.negative or "",
        "steps": args.steps,
        "scheduler": type(pipe.scheduler).__name__,
        "guidance": guidance,
        "checkpoint": args.model or DEFAULT,
        "size": "{}x{}".format(*out.images[0].size),
        "dtype": args.dtype,
        "minidiff": minidiff.__version__,
    }
    _write(out.images, out.seeds, output, settings, grid=args.grid)


def _load(model: str | Path, dtype: str, device: str | None) -> "DiffusionPipeline":
    import torch

    device = _device(device)  # before the weights are read
    return minidiff.DiffusionPipeline.from_pretrained(model, torch_dtype=getattr(torch, dtype)).to(device)


def _device(name: str | None) -> "torch.device":
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one exception for this
        raise ValueError(f"the device {name!r} is not available: {str(error).splitlines()[0]}") from error


def _write(images: "list[Image.Image]", seeds: list[int], output: Path, settings: dict, *, grid: bool) -> None:
    from minidiff.images import make_image_grid, save_png

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
    names = [name for name in minidiff.__all__ if name.endswith("Scheduler")]
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
