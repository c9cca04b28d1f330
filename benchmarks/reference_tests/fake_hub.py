"""A Hub cache with random-weight stand-ins of the small repositories that the reference's tests load.

The real ones cannot be reached from everywhere. Which tests pass with the reference itself is counted from the same
cache, so the comparison is fair: a published value that depends on the real vocabulary fails on both sides.
"""

import shutil
from pathlib import Path

from benchmarks.from_tests import from_tests

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIPELINES = ("tiny-stable-diffusion-torch", "tiny-stable-diffusion-pipe", "tiny-sd-pipe")
PIPELINES_XL = ("tiny-stable-diffusion-xl-pipe",)


def make(cache: Path) -> None:
    """Fill ``cache``, the folder that HF_HUB_CACHE names."""
    tiny = from_tests("tiny").save_tiny(cache / "made/tiny")
    base = from_tests("tiny_xl").save_base(cache / "made/base")
    for repo in PIPELINES:
        place(cache, f"hf-internal-testing/{repo}", tiny)
    for repo in PIPELINES_XL:
        place(cache, f"hf-internal-testing/{repo}", base)
    # its tokenizer alone: networks are made by the tests
    place(cache, "hf-internal-testing/tiny-random-clip", tiny / "tokenizer")


def place(cache: Path, repo: str, source: Path) -> None:
    """Put the files of ``source`` where the Hub's client looks for the repository ``repo``."""
    home = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT, encoding="utf-8")
