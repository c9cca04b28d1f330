"""``minidiff convert IN OUT``: a checkpoint in the other layout, or in another dtype, without loading it."""

import argparse
from pathlib import Path

from minidiff.errors import CheckpointNotFoundError

DTYPES = "float32 bfloat16 float16 float8_e4m3fn float8_e5m2"


def add_convert(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``minidiff convert``."""
    add = parser.add_argument
    add("source", metavar="IN", type=Path, help="a .safetensors or .gguf file, or a folder")
    add("target", metavar="OUT", type=Path, help="a file that ends in .safetensors, or a folder")
    add("--to", choices=["hub", "single-file"], help="layout of OUT (default: what its name says)")
    add("--dtype", choices=DTYPES.split(), help="(default: what is stored)")
    add("--config", metavar="FOLDER|ID", help="what describes IN, if not the published model")
    add("--prediction-type", choices=["epsilon", "v_prediction"], help="of a Stable Diffusion 2.x file")
    add("--variant", metavar="NAME", help="which weights of a folder, such as fp16")
    add("--ema", action="store_true", help="take the moving average of the UNet's weights")
    add("--force", action="store_true", help="replace OUT if it exists")
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    if not args.source.exists():  # said before torch is imported
        raise CheckpointNotFoundError(f"there is no file or folder {str(args.source)!r} (looked from {Path.cwd()})")
    import torch
    from tqdm.auto import tqdm

    from minidiff.checkpoints.tools.convert import convert

    dtype = getattr(torch, args.dtype) if args.dtype else None
    options = {name: getattr(args, name) for name in ("to", "config", "prediction_type", "variant", "force")}
    with tqdm(unit="B", unit_scale=True, desc=args.target.name) as bar:

        def progress(now: int, total: int) -> None:
            bar.total = total
            bar.update(now)

        convert(args.source, args.target, dtype=dtype, use_ema=args.ema, progress=progress, **options)
    print(args.target)
