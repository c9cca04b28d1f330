"""``minidiff inspect FILE_OR_FOLDER``: what a checkpoint or an adapter holds, from its headers."""

import argparse
from pathlib import Path

from minidiff.errors import printable


def add_inspect(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``minidiff inspect``."""
    parser.add_argument("checkpoint", type=Path, help="a .safetensors or .gguf file, or a folder")
    parser.add_argument("--keys", action="store_true", help="list every tensor's name: ours, Hub, original")
    parser.add_argument("--config", metavar="FOLDER|ID", help="what describes the file, if not the published model")
    parser.add_argument("--variant", metavar="NAME", help="which weights of a folder, such as fp16")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> None:
    from minidiff.adapters.report import report_adapter
    from minidiff.checkpoints.tools.checkpoint import open_checkpoint
    from minidiff.checkpoints.tools.inspect import keys, report, report_stranger

    if page := report_adapter(args.checkpoint) or report_stranger(args.checkpoint):
        print(printable(page))
        return
    checkpoint = open_checkpoint(args.checkpoint, config=args.config, variant=args.variant, ask=False)
    print(printable(keys(checkpoint) if args.keys else report(checkpoint)))
