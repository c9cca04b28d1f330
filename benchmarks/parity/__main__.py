"""Compare minidiff with the reference on a checkpoint, or over the options of all schedulers, or at full size.

python -m benchmarks.parity                          # the embedded checkpoint
python -m benchmarks.parity CHECKPOINT               # a folder, a Hub id or a single file
python -m benchmarks.parity BROKEN --reference GOOD  # where does a checkpoint differ from a good copy?
python -m benchmarks.parity schedulers               # thousands of combinations of options
python -m benchmarks.parity --full-size              # the published configurations with random weights
"""

import argparse
import json
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run one part, print its tables and write its figures; return 1 if something is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["schedulers"]:
        return _schedulers(arguments[1:])
    if arguments[:1] == ["--full-size"]:
        from benchmarks import full_size

        return full_size.main(arguments[1:]) or 0
    from benchmarks.parity import certificate

    options = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    certificate.add_arguments(options)
    return 0 if certificate.run(options.parse_args(arguments)) else 1


def _schedulers(arguments: list[str]) -> int:
    from benchmarks.parity import schedulers

    parser = argparse.ArgumentParser(prog="python -m benchmarks.parity schedulers", description=schedulers.__doc__)
    parser.add_argument("--json", type=Path, default=Path("runs/parity_schedulers.json"), help="where to write it")
    schedulers.add_arguments(parser)
    options = parser.parse_args(arguments)
    result = schedulers.measure(options)
    print(schedulers.table(result))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
