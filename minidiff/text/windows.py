"""Texts -> windows of token ids -> embeddings: what every pipeline with CLIP text encoders does with its prompts.

    window = <start> up to L - 2 tokens <end> padding                           L = 77, what CLIP was trained on
    ctx    = [encoder(window 1), encoder(window 2), ..., encoder(window K)]     (B, K L, D), along the tokens

``long_prompt="cut"``, the reference's way, keeps the first window of a text and names what it drops. ``"chunk"`` makes
as many windows as the longest text of the call needs:

* A window is filled word by word: a word that does not fit begins the next one, and only a word that is longer than a
  window is torn.
* Each window is encoded alone: its words do not see those of another, and its positions begin again at 0.
* Shorter texts, and the other side of guidance, are filled up with windows of the empty text, so the picture of a short
  text depends on how many windows the longest text beside it needs, but not on what it says.
* The pooled embedding is that of the first window, which holds what is said first: there is one vector for the whole
  text, and a mean would be a vector that the UNet never saw in training.

A text of one window gives the same bits either way. This is how A1111's stable-diffusion-webui takes long prompts, but
for its search for a comma to break at. Without windows it is checked against the ``encode_prompt`` of the reference's
pipelines; it has nothing to compare windows with.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from minidiff.text.tokenizer import CLIPTokenizer
from minidiff.text.tokens import expand

T = TypeVar("T")
Piece = tuple[str, float]  # a part of a text, and the weight of its tokens
Read = Callable[[str], list[Piece]]
Dropped = dict[str, list[str]]  # the name of an argument -> what was cut off each of its texts, "" where nothing was


class TextEncoder(NamedTuple):
    """A text encoder: ids (n, L) and layers to skip -> states (n, L, D) and, if it has them, pooled ones (n, P)."""

    tokenizer: CLIPTokenizer
    states: Callable[[Tensor, int | None], tuple[Tensor, Tensor | None]]


TextsOfSides = Mapping[str, list[tuple[str, list[str]]]]
"""Side of guidance ("" or "negative_") -> for each encoder, the name of the argument that its B texts come from, and
these; nothing where the caller has encoded them."""


def prompts_of(given: Mapping[str, Any]) -> list[str] | None:
    """Return the prompts among the arguments of ``encode_prompt`` as a list, None if they are given as embeddings."""
    if given["prompt"] is None and given["prompt_embeds"] is None:
        raise ValueError("give either prompt or prompt_embeds")
    return [given["prompt"]] if isinstance(given["prompt"], str) else given["prompt"]


def negative_texts(given: Mapping[str, Any]) -> list[str]:
    """Return the negative prompts that the arguments of ``encode_prompt`` ask for, one for each prompt; "" is none."""
    if isinstance(given["negative_prompt"], list):
        return given["negative_prompt"]
    count = len(prompts_of(given) if given["prompt_embeds"] is None else given["prompt_embeds"])
    return [given["negative_prompt"] or ""] * count


def plain(text: str) -> list[Piece]:
    """Return the whole text with weight 1."""
    return [(text, 1.0)]


class Windows(NamedTuple):
    """One text in windows."""

    ids: list[list[int]]  # K windows of L
    weights: list[list[float]]
    dropped: str = ""


def embed(
    encoders: Callable[[], list[TextEncoder]],
    asked: TextsOfSides,
    given: Mapping[str, Any],
    device: torch.device | str,
    read: Read = plain,
) -> tuple[list[tuple[Tensor, Tensor | None]], Dropped | None]:
    """Encode all sides of guidance to one length; embeddings that are given are only filled up.

    Args:
        encoders: makes the encoders; it is called only if there is something to encode.
        asked: the texts of each side.
        given: the arguments of ``encode_prompt``: ``prompt_embeds`` and the like, ``clip_skip``, ``long_prompt``.
        read: takes a text apart into pieces with weights, where it is read in windows.

    Returns:
        embeddings (B, K L, D) and pooled ones (B, P) of each side, and what was cut off.

    Raises:
        ValueError: if given embeddings cannot be filled up to the length of the other side.
    """
    ready = {side: (given[f"{side}prompt_embeds"], given.get(f"{side}pooled_prompt_embeds")) for side in asked}
    lengths = [z.shape[1] for z, _ in ready.values() if z is not None]
    if len(lengths) == len(ready) and len(set(lengths)) == 1:
        return list(ready.values()), None
    parts = encoders()
    W = parts[0].tokenizer.model_max_length
    L = min(W, max(lengths, default=W))  # a text beside embeddings of fewer tokens gets as many, as in the reference
    if any(n % L for n in lengths):
        raise ValueError(
            f"prompt_embeds and negative_prompt_embeds should have the same shape, or be whole windows of {L} tokens, "
            f"which can be filled up; found {' and '.join(map(str, lengths))} tokens"
        )
    how = None if given.get("long_prompt", "cut") == "cut" else read
    texts = {  # side -> for each encoder, the windows of each text
        side: [tokenize(part.tokenizer, some, L, how) for part, (_, some) in zip(parts, of, strict=False)]
        for side, of in asked.items()
        if ready[side][0] is None
    }
    K = max([len(text.ids) for of in texts.values() for some in of for text in some] + [n // L for n in lengths])
    found = []
    for side, (z, pooled) in ready.items():
        skip = given["clip_skip"] if side == "" else None  # the negative side is never encoded with it, as in theirs
        if z is None:
            found.append(_encode_side(parts, texts[side], K, L, skip, device))
        else:
            found.append((_fill_up(z, parts, K - z.shape[1] // L, L, skip, device), pooled))
    return found, _dropped(asked, texts)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], L: int, read: Read | None) -> list[Windows]:
    """Return the windows of each text, ``L`` ids in each, start, end and padding included; without ``read`` the first.

    Args:
        read: takes a text apart into pieces with weights; None cuts it off after one window.
    """
    texts = [expand(text, tokenizer) for text in texts]
    if read is None:
        tokens = tokenizer(texts, padding="max_length", max_length=L, truncation=True)
        return [Windows([ids], [[1.0] * L], cut) for ids, cut in zip(tokens.input_ids, tokens.dropped, strict=True)]
    found = []
    for text in texts:
        words = [[(i, w) for i in word] for piece, w in read(text) for word in tokenizer.words(piece)]
        windows = pack_windows(words, L - 2)
        ids = [pad(tokenizer, [i for i, _ in tokens], L) for tokens in windows]
        weights = [[1.0] + [w for _, w in tokens] + [1.0] * (L - 1 - len(tokens)) for tokens in windows]
        found.append(Windows(ids, weights))
    return found


def pad(tokenizer: CLIPTokenizer, ids: list[int], L: int) -> list[int]:
    """Return a window of ``L`` ids: start, ``ids``, end, padding."""
    empty = tokenizer("", padding="max_length", max_length=L).input_ids
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *empty[len(ids) + 2 :]]


def pack_windows(words: Iterable[Sequence[T]], size: int) -> list[list[T]]:
    """Deal words out to windows of at most ``size`` tokens, in order; only longer words are torn. There is always one.

    >>> pack_windows(["abc", "de", "fghijk"], 4)
    [['a', 'b', 'c'], ['d', 'e', 'f', 'g'], ['h', 'i', 'j', 'k']]
    """
    windows: list[list[T]] = [[]]
    for word in words:
        if len(windows[-1]) + len(word) > size >= len(word):
            windows.append([])
        for token in word:
            if len(windows[-1]) == size:
                windows.append([])
            windows[-1].append(token)
    return windows


def apply_weights(z: Tensor, weights: Tensor) -> Tensor:
    """Multiply the states of a window by the weights of its tokens, and restore its mean.

        z'_l = w_l z_l,    result = z' mean(z) / mean(z')

    the mean over all tokens and channels of a window, so that the window as a whole keeps its level.

    Args:
        z: states, (n, L, D).
        weights: (n, L).

    Source: "original" emphasis of A1111's stable-diffusion-webui, which takes the mean over all texts of a batch.
    """
    weighted = z * weights[..., None]
    axes = (1, 2)
    return weighted * (z.mean(axes, keepdim=True) / weighted.mean(axes, keepdim=True))


def _encode_side(
    parts: list[TextEncoder], texts: list[list[Windows]], K: int, L: int, skip: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Return the states (B, K L, D) of a side, those of several encoders side by side, and its pooled states (B, P)."""
    found = [_encode(part, some, K, L, skip, device) for part, some in zip(parts, texts, strict=True)]
    return torch.cat([z for z, _ in found], dim=-1), found[-1][1]  # SDXL pools with its last encoder


def _fill_up(
    z: Tensor, parts: list[TextEncoder], missing: int, L: int, skip: int | None, device: torch.device | str
) -> Tensor:
    """Return given states with ``missing`` windows of the empty text behind them."""
    if not missing:
        return z
    empty, _ = _encode_side(parts, [[Windows([], [])]] * len(parts), missing, L, skip, device)
    return torch.cat([z, empty.to(z).expand(len(z), -1, -1)], dim=1)


def _encode(
    part: TextEncoder, texts: list[Windows], K: int, L: int, skip: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Return the states (B, K L, D) of texts filled up to K windows, and the pooled ones (B, P) of the first window."""
    empty = pad(part.tokenizer, [], L)
    ids = [window for text in texts for window in text.ids + [empty] * (K - len(text.ids))]
    weights = [window for text in texts for window in text.weights + [[1.0] * L] * (K - len(text.weights))]
    tokens = torch.tensor(ids, device=device)
    z, pooled = part.states(tokens, skip)
    z = _with_outputs(z, tokens, part.tokenizer)
    if any(w != 1 for window in weights for w in window):
        z = apply_weights(z, torch.tensor(weights, device=z.device, dtype=z.dtype))
    return rearrange(z, "(B K) L D -> B (K L) D", K=K), None if pooled is None else pooled[::K]


def _with_outputs(z: Tensor, ids: Tensor, tokenizer: CLIPTokenizer) -> Tensor:
    """Return states (n, L, D) with the vectors of words that were trained as outputs in the places of their tokens.

    Source: ``_apply_output_embeddings`` of OneTrainer, which leaves the pooled state alone too.
    """
    for token, vector in tokenizer.outputs.items():
        z = torch.where((ids == tokenizer.convert_tokens_to_ids(token))[..., None], vector.to(z), z)
    return z


def _dropped(asked: TextsOfSides, read: Mapping[str, list[list[Windows]]]) -> Dropped | None:
    """Return what was cut off, by argument; where two tokenizers read the same text, the longer of the two."""
    found: Dropped = {}
    for side, of_side in read.items():
        for (name, texts), windows in zip(asked[side], of_side, strict=False):
            before = found.get(name, [""] * len(texts))
            found[name] = [max(cut, text.dropped, key=len) for cut, text in zip(before, windows, strict=True)]
    return {name: parts for name, parts in found.items() if any(parts)} or None
