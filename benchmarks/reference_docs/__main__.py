"""Run the code of the reference's documentation with minidiff's classes in place of its own, and count.

python -m benchmarks.reference_docs CHECKOUT             # every page and docstring that concerns what minidiff claims
python -m benchmarks.reference_docs CHECKOUT img2img     # those whose path holds a word
python -m benchmarks.reference_docs CHECKOUT --show      # with the first line of each error

CHECKOUT is a checkout of the reference's repository; its pages, the examples' README files, and the docstrings of the
installed package are read. The blocks of a page run in order in one namespace, on small checkpoints with random weights
under the Hub ids that the pages name (``hub``). Each page runs twice: as it is, and with the page's imports migrated
(``benchmarks.reference_tests.stand_in``). A block that does not run with the reference is not counted; one that
concerns something outside minidiff's scope is not run (``scope``).
"""

import argparse
import json
import multiprocessing
import os
import tempfile
from collections import Counter
from pathlib import Path

import torch

from benchmarks.reference_docs import hub, page
from benchmarks.reference_docs.scope import outside

PAGE_LIMIT = 600  # seconds


def pages(checkout: Path, package: Path) -> dict[str, list[str]]:
    """Return the blocks in scope of each page: of the documentation, of the examples, and of docstrings."""
    files = [(file, checkout) for file in sorted((checkout / "docs/source/en").rglob("*.md"))]
    files += [(file, checkout) for file in sorted((checkout / "examples").rglob("README*.md"))]
    files += [(file, package.parent) for file in sorted(package.rglob("*.py"))]
    found = {}
    for file, root in files:
        name = str(file.relative_to(root))
        if kept := [block for block in page.blocks(file.read_text(encoding="utf-8")) if not outside(name, block)]:
            found[name] = kept
    return found


def run(sources: list[str], pictures: Path, *, migrated: bool) -> list[str]:
    """Run a page in a process of its own, forked from this one, which has imported the libraries."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        arguments = (sources, Path(folder), pictures)
        process = context.Process(target=page.run, args=arguments, kwargs={"migrated": migrated, "answer": theirs})
        process.start()
        theirs.close()
        while len(outcomes) < len(sources) and ours.poll(PAGE_LIMIT):
            try:
                outcomes.append(ours.recv())
            except EOFError:
                break
        process.kill()
        process.join()
    return outcomes + ["the process ended"] * (len(sources) - len(outcomes))


def main(arguments: list[str] | None = None) -> int:
    """Run and count; return 1 if a block that counts fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("words", nargs="*", help="only pages whose path holds one of these")
    parser.add_argument("--show", action="store_true", help="print each failing block's number and error")
    parser.add_argument("--baseline", type=Path, help="keep the outcomes with the reference itself in this JSON file")
    parser.add_argument("--json", type=Path, help="write the counts")
    options = parser.parse_args(arguments)
    known = json.loads(options.baseline.read_text()) if options.baseline and options.baseline.exists() else {}
    totals, causes, table = Counter(), Counter(), {}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)
        _prepare(cache)
        import diffusers

        for name, sources in pages(options.checkout, Path(diffusers.__file__).parent).items():
            if options.words and not any(word in name for word in options.words):
                continue
            if len(known.get(name, [])) != len(sources):
                known[name] = run(sources, cache, migrated=False)
            if "ran" not in known[name]:
                continue
            counts = Counter()
            for i, outcome in enumerate(run(sources, cache, migrated=True)):
                if known[name][i] != "ran":
                    continue
                counts["ran" if outcome == "ran" else "failing"] += 1
                if outcome != "ran":
                    causes[outcome[:110]] += 1
                    if options.show:
                        print(f"    block {i}: {outcome}")
            totals += counts
            table[name] = dict(counts)
            print(f"{name}: {counts['ran']} run, {counts['failing']} failing", flush=True)
    print(f"in all: {totals['ran']} of {totals['ran'] + totals['failing']} blocks that run with the reference")
    for cause, count in causes.most_common(40):
        print(f"{count:4d}  {cause}")
    if options.baseline:
        options.baseline.write_text(json.dumps(known, indent=1))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1))
    return 1 if totals["failing"] else 0


def _prepare(cache: Path) -> None:
    """Set the environment, fill the cache with checkpoints and pictures, and import the libraries once."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "MPLBACKEND": "Agg"}
    torch.set_num_threads(1)  # threads do not survive the fork
    hub.make(cache)
    from PIL import Image

    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(cache / "image.png")
    Image.radial_gradient("L").resize((64, 64)).point(lambda level: 255 * (level < 100)).save(cache / "mask.png")


if __name__ == "__main__":
    raise SystemExit(main())
