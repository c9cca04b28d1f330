"""Real tokenizer folders for tests: CLIP's vocabulary with the small files of the published checkpoints."""

import gzip
import importlib.util
import json
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parent.parent
MERGES = ROOT / "minidiff" / "checkpoints" / "original" / "published" / "clip_merges.txt.gz"


def load_script(name: str) -> ModuleType:
    """Import a script of weights/, which is not a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "weights" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _flags(content: str) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _small_files(pad_in_config: str, pad_in_map: str) -> dict[str, dict[str, Any]]:
    """tokenizer_config.json and special_tokens_map.json as they are on the Hub, which differ in the pad token only."""
    bos, end = _flags("<|startoftext|>"), _flags("<|endoftext|>")
    typed = {"__type": "AddedToken"}
    config = {
        "add_prefix_space": False,
        "bos_token": typed | bos,
        "do_lower_case": True,
        "eos_token": typed | end,
        "errors": "replace",
        "model_max_length": 77,
        "name_or_path": "openai/clip-vit-large-patch14",
        "pad_token": pad_in_config,
        "special_tokens_map_file": "./special_tokens_map.json",
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed | end,
    }
    roles = {"bos_token": bos, "eos_token": end, "pad_token": pad_in_map, "unk_token": end}
    return {"tokenizer_config.json": config, "special_tokens_map.json": roles}


PUBLISHED = {
    "sd15": _small_files("<|endoftext|>", "<|endoftext|>"),  # also the first tokenizer of SDXL
    "sd21": _small_files("<|endoftext|>", "!"),
    "sdxl_2": _small_files("!", "!"),  # also the refiner's
}


@lru_cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's 49,408 tokens and 48,894 merges."""
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:-1]
    letters = load_script("bpe").byte_alphabet()
    symbols = letters + [letter + "</w>" for letter in letters] + [line.replace(" ", "") for line in lines]
    tokens = [*symbols, "<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, [tuple(line.split(" ")) for line in lines]


def write_folder(folder: Path, small_files: dict[str, dict[str, Any]], vocabulary: tuple | None = None) -> Path:
    """Write a tokenizer in the Hub's layout: the vocabulary (CLIP's by default) and the given small files."""
    vocab, merges = vocabulary or clip_vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {"vocab.json": vocab, **small_files}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_bytes("\n".join(lines).encode())
    return folder
