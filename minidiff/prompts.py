r"""Weights in prompts, in the notation of A1111's stable-diffusion-webui: ``a (red:1.3) apple``.

    (words)       weight x 1.1          (words:1.3)   weight x 1.3
    [words]       weight / 1.1          \( \) \[ \] \\   the sign itself

Brackets nest and their weights multiply: ``((words))`` is 1.21. Nothing does this unasked; a pipeline takes brackets
for text, as the reference does::

    from minidiff import prompts

    pipe(**prompts.encode(pipe, "a (red:1.3) apple, [shadow]", "blurry"), num_inference_steps=25)

The text is encoded without its brackets, in windows of 77 tokens (``minidiff.text.windows``), and in each window

    z'_l = w_l z_l        z'' = z' mean(z) / mean(z')

with the state z_l of token l, its weight w_l (1 for start, end and padding), and the mean over all tokens and channels
of the window. With SDXL this is done for each text encoder by itself, and the pooled embedding is not weighted.

It differs from A1111 where that guesses. Brackets that do not match are an error here; A1111 closes them at the end of
the text, and takes a closing one too many for text. A lone backslash is text here and lost there. What else A1111 reads
into a prompt is refused: ``BREAK``, ``AND``, ``[from:to:when]``, ``[one|other]``, ``<lora:...>``. The mean is that of
each text, so that a picture is the same alone and in a batch; A1111 takes it over the batch.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minidiff.errors import LONGEST_TEXT
from minidiff.pipelines.foreign import encoding
from minidiff.pipelines.request import Prompt, Request
from minidiff.pipelines.request_xl import XLRequest
from minidiff.text.windows import Piece

if TYPE_CHECKING:
    from minidiff.pipelines.stable_diffusion import StableDiffusion
    from minidiff.pipelines.stable_diffusion_xl import StableDiffusionXL

STEP = 1.1  # the weight of a pair of round brackets
DEEPEST = 100  # brackets in brackets: each multiplies every piece in it

_PARTS = re.compile(
    r"""
    \\(?P<sign>[\\()\[\]])              # an escaped sign
    | :\s*(?P<weight>[+-]?[\d.]+)\s*\)  # the end of (words:1.3)
    | :\s*[+-]?[\d.]+\s*(?P<when>\])    # the end of [from:to:0.5]
    | (?P<bracket>[()\[\]])
    | (?P<text>[^\\()\[\]:]+|.)
    """,
    re.VERBOSE | re.DOTALL,
)
_NOT_HERE = re.compile(r"\b(BREAK|AND)\b|<(?:lora|lyco|hypernet):")
_PAIRS = {")": "(", "]": "["}


def parse(text: str) -> list[Piece]:
    """Take a prompt apart into pieces of text and their weights; a text without brackets is one piece of weight 1.

    >>> parse("a (red:1.3) apple")
    [('a ', 1.0), ('red', 1.3), (' apple', 1.0)]

    Raises:
        ValueError: on brackets that do not match, a weight that is no number, or notation that is not implemented,
            saying where.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"the prompt has {len(text):,} characters; expected at most {LONGEST_TEXT:,}")
    if found := _NOT_HERE.search(text):
        instead = "if it is a word, write it in lower case" if found[1] else "load adapters with load_lora_weights()"
        raise _error(text, found.start(), f"{found[0]} is not implemented; {instead}")
    pieces: list[list] = []  # [text, weight]
    opened: list[tuple[str, int, int]] = []  # the sign, where it stands in the text, and how many pieces came before

    def close(position: int, bracket: str, weight: float) -> None:
        if not opened or opened[-1][0] != _PAIRS[bracket]:
            raise _error(text, position, rf"{bracket!r} closes nothing; write \{bracket} if it is text")
        _, _, first = opened.pop()
        for piece in pieces[first:]:
            piece[1] *= weight

    for part in _PARTS.finditer(text):
        start, end = part.span()
        other = part["bracket"] == "]" and opened and "|" in text[opened[-1][1] : start]
        if part["when"] or other:
            raise _error(text, start, "[from:to:when] and [one|other] are not implemented")
        if part["weight"]:
            close(end - 1, ")", _number(text, start, part["weight"]))
        elif part["bracket"] in ("(", "["):
            if len(opened) == DEEPEST:
                raise _error(text, start, f"brackets are more than {DEEPEST} deep here")
            opened.append((part["bracket"], start, len(pieces)))
        elif part["bracket"]:
            close(start, part["bracket"], STEP if part["bracket"] == ")" else 1 / STEP)
        else:
            pieces.append([part["sign"] or part["text"], 1.0])
    if opened:
        bracket, position, _ = opened[-1]
        raise _error(text, position, rf"{bracket!r} is not closed; write \{bracket} if it is text")
    return _merged(pieces)


def _merged(pieces: list[list]) -> list[Piece]:
    """Join neighbours of one weight; nothing is one empty piece."""
    found: list[Piece] = []
    for text, weight in pieces:
        if found and found[-1][1] == weight:
            found[-1] = (found[-1][0] + text, weight)
        else:
            found.append((text, weight))
    return found or [("", 1.0)]


def _number(text: str, position: int, weight: str) -> float:
    try:
        return float(weight)
    except ValueError:
        raise _error(text, position, f"the weight {weight!r} is not a number") from None


def _error(text: str, position: int, what: str) -> ValueError:
    near = text if len(text) <= 200 else f"...{text[max(0, position - 40) : position + 40]}..."
    return ValueError(f"{what} (at position {position} of the prompt {near!r})")


@torch.no_grad()
def encode(
    pipe: "StableDiffusion | StableDiffusionXL",
    prompt: str | list[str],
    negative_prompt: Prompt = None,
    *,
    prompt_2: Prompt = None,
    negative_prompt_2: Prompt = None,
    clip_skip: int | None = None,
) -> dict[str, Tensor]:
    """Encode weighted prompts: the result is passed to a call in place of the texts, ``pipe(**encode(pipe, ...))``.

    Args:
        pipe: any pipeline of Stable Diffusion 1.x, 2.x or XL.
        prompt, negative_prompt: texts with weights, as in a call; so are the following.
        prompt_2, negative_prompt_2: other texts for the second encoder of SDXL.
        clip_skip: as of a call, which does not look at it where embeddings are given.

    Returns:
        ``prompt_embeds`` and ``negative_prompt_embeds`` (B, 77 K, D); for SDXL also ``pooled_prompt_embeds`` and
        ``negative_pooled_prompt_embeds`` (B, P). A text without brackets gives the bits of
        ``encode_prompt(..., long_prompt="chunk")``, which up to 75 tokens are those of ``encode_prompt``.

    Raises:
        TypeError, ValueError: as for a call, and as ``parse``.
    """
    texts = {"prompt": prompt, "negative_prompt": negative_prompt}
    second = {"prompt_2": prompt_2, "negative_prompt_2": negative_prompt_2}
    if "text_encoder_2" in pipe.components:
        request = XLRequest(**texts, **second, clip_skip=clip_skip, long_prompt="chunk")
    elif any(text is not None for text in second.values()):
        raise TypeError(f"{type(pipe).__name__} has one text encoder: it takes no prompt_2 and negative_prompt_2")
    else:
        request = Request(**texts, clip_skip=clip_skip, long_prompt="chunk")
    pipe._check_clip_skip(clip_skip)
    *found, _ = pipe._embed(encoding(request, guided=True, device=pipe.device), read=parse)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return dict(zip(names, found, strict=False))
