"""Compare minidiff with the reference, part by part: ``python -m benchmarks.parity PART``."""

import argparse
import importlib
import json
from pathlib import Path

PARTS = ("schedulers",)  # a module each, with add_arguments(parser), measure(options) and table(result)


def main(arguments: list[str] | None = None) -> None:
    """Run one part, print its table and write its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity", description=__doc__)
    commands = parser.add_subparsers(dest="part", required=True)
    modules = {part: importlib.import_module(f"benchmarks.parity.{part}") for part in PARTS}
    for part, module in modules.items():
        command = commands.add_parser(part, help=module.__doc__.splitlines()[0])
        command.add_argument("--json", type=Path, default=Path(f"runs/parity_{part}.json"), help="where to write it")
        module.add_arguments(command)
    options = parser.parse_args(arguments)
    result = modules[options.part].measure(options)
    print(modules[options.part].table(result))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
