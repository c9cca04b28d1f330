"""A Hub cache with random-weight stand-ins of the small repositories that the reference's tests load.

The real ones cannot be reached from everywhere. Which tests pass with the reference itself is counted from the same
cache, so the comparison is fair: a published value that depends on the real vocabulary fails on both sides.
"""

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PIPELINES = ("tiny-stable-diffusion-torch", "tiny-stable-diffusion-pipe", "tiny-sd-pipe")
PIPELINES_XL = ("tiny-stable-diffusion-xl-pipe",)


def make(cache: Path) -> None:
    """Fill ``cache``, the folder that HF_HUB_CACHE names."""
    from tests.tiny import save_tiny  # bring the Hub's client, which reads the environment once
    from tests.tiny_xl import save_base

    tiny = save_tiny(cache / "made/tiny")
    base = save_base(cache / "made/base")
    for repo in PIPELINES:
        place(cache, f"hf-internal-testing/{repo}", tiny)
    for repo in PIPELINES_XL:
        place(cache, f"hf-internal-testing/{repo}", base)
    place(cache, "peft-internal-testing/tiny-clip-text-2", _text_encoder(tiny / "tokenizer", cache / "made/text"))
    # its tokenizer alone: networks are made by the tests
    place(cache, "hf-internal-testing/tiny-random-clip", tiny / "tokenizer")


def _text_encoder(tokenizer: Path, folder: Path) -> Path:
    """Save a text encoder with a tokenizer beside it, of the width that the tests of LoRA expect."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 5}
    vocabulary = len(transformers.CLIPTokenizer.from_pretrained(tokenizer))
    config = transformers.CLIPTextConfig(vocab_size=vocabulary, projection_dim=32, **sizes)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(folder)
    return Path(shutil.copytree(tokenizer, folder, dirs_exist_ok=True))


def place(cache: Path, repo: str, source: Path) -> None:
    """Put the files of ``source`` where the Hub's client looks for the repository ``repo``."""
    home = cache / f"models--{repo.replace('/', '--')}"
    shutil.copytree(source, home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT, encoding="utf-8")
