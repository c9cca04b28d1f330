"""The command line: ``minidiff generate "red apple" -o apple.png``; each command is a file beside this one.

Arguments are checked before anything heavy is imported, so a typing error is answered at once. Whatever is wrong with
the input ends as one line on stderr and exit code 2.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from minidiff.cli.convert import add_convert
from minidiff.cli.generate import add_generate
from minidiff.cli.inspect import add_inspect
from minidiff.errors import printable
from minidiff.registry import __version__

MOST_CHARACTERS = 4000  # of an error


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 on bad input, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # what reads our output has seen enough: `minidiff inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at the end
        return 0
    except (ValueError, OSError) as error:
        text = printable(" ".join(str(error).split()))
        text = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}... ({len(text):,} characters)"
        print(f"minidiff {args.command}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="minidiff", description="Diffusion models in plain PyTorch.")
    parser.add_argument("--version", action="version", version=f"minidiff {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_generate(commands.add_parser("generate", help="draw pictures, from a prompt or without one"))
    add_inspect(commands.add_parser("inspect", help="say what a checkpoint holds"))
    add_convert(commands.add_parser("convert", help="write a checkpoint in the other layout, or in another dtype"))
    return parser
