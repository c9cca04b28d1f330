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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from minidiff.adapters.textual_inversion import expand
from minidiff.pipelines.request import Prompt, Request
from minidiff.text.tokenizer import CLIPTokenizer

T = TypeVar("T")
Piece = tuple[str, float]  # a part of a text, and the weight of its tokens
Read = Callable[[str], list[Piece]]
Dropped = dict[str, list[str]]  # the name of an argument -> what was cut off each of its texts, "" where nothing was


class Encoder(NamedTuple):
    """A text encoder: ids (n, L) and layers to skip -> states (n, L, D) and, if it has them, pooled ones (n, P)."""

    tokenizer: CLIPTokenizer
    states: Callable[[Tensor, int | None], tuple[Tensor, Tensor | None]]


def plain(text: str) -> list[Piece]:
    """Return the whole text with weight 1."""
    return [(text, 1.0)]


@dataclass(frozen=True)
class Texts:
    """What a caller says about the texts, by the names that a call has for it."""

    prompt: Prompt = None
    prompt_2: Prompt = None
    negative_prompt: Prompt = None
    negative_prompt_2: Prompt = None
    prompt_embeds: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    num_images_per_prompt: int = 1
    guided: bool = True
    clip_skip: int | None = None
    long_prompt: str = "cut"
    read: Read = plain  # takes a text apart into pieces with weights, where it is read in windows

    def __post_init__(self) -> None:
        if self.prompt is None and self.prompt_embeds is None:
            raise ValueError("give either prompt or prompt_embeds")

    @classmethod
    def of(cls, request: Request) -> "Texts":
        """Return what a request says."""
        names = [field.name for field in fields(cls) if hasattr(request, field.name)]
        return cls(**{name: getattr(request, name) for name in names})

    @property
    def prompts(self) -> list[str] | None:
        """The prompts as a list, None if they are given as embeddings."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def negative_prompts(self) -> list[str]:
        """The negative prompts as a list, one for each prompt; the empty text if there are none."""
        if isinstance(self.negative_prompt, list):
            return self.negative_prompt
        batch = len(self.prompts if self.prompt_embeds is None else self.prompt_embeds)
        return [self.negative_prompt or ""] * batch


@dataclass(frozen=True)
class Side:
    """What one side of guidance is conditioned on: B texts for each encoder, or what the caller has encoded.

    ``texts`` holds, for each encoder, the name of the argument that its texts come from and the texts.
    """

    texts: list[tuple[str, list[str]]]
    skip: int | None
    embeds: Tensor | None = None  # (B, L, D)
    pooled: Tensor | None = None  # (B, P)

    @property
    def to_read(self) -> list[tuple[str, list[str]]]:
        """The texts that must be encoded."""
        return self.texts if self.embeds is None else []


class Embedded(NamedTuple):
    """Encoded texts by the names that a call has for them, and what was cut off."""

    prompt_embeds: Tensor
    negative_prompt_embeds: Tensor | None
    pooled_prompt_embeds: Tensor | None = None
    negative_pooled_prompt_embeds: Tensor | None = None
    dropped: Dropped | None = None


class Windows(NamedTuple):
    """One text in windows."""

    ids: list[list[int]]  # K windows of L
    weights: list[list[float]]
    dropped: str = ""


def embed(
    encoders: Callable[[], list[Encoder]], sides: Sequence[Side], texts: Texts, device: torch.device | str
) -> tuple[list[tuple[Tensor, Tensor | None]], Dropped | None]:
    """Encode all sides of guidance to one length; embeddings that are given are only filled up.

    Args:
        encoders: makes the encoders; it is called only if there is something to encode.
        sides: the positive and, under guidance, the negative one.
        texts: how to read them: its ``long_prompt`` and ``read``.

    Returns:
        embeddings (B, K L, D) and pooled ones (B, P) of each side, and what was cut off.

    Raises:
        ValueError: if given embeddings cannot be filled up to the length of the other side.
    """
    given = [side.embeds.shape[1] for side in sides if side.embeds is not None]
    if len(given) == len(sides) and len(set(given)) == 1:
        return [(side.embeds, side.pooled) for side in sides], None
    parts = encoders()
    W = parts[0].tokenizer.model_max_length
    L = min(W, max(given, default=W))  # a text beside embeddings of fewer tokens gets as many, as in the reference
    if any(n % L for n in given):
        raise ValueError(
            f"prompt_embeds and negative_prompt_embeds should have the same shape, or be whole windows of {L} tokens, "
            f"which can be filled up; found {' and '.join(map(str, given))} tokens"
        )
    read = [
        [split(part.tokenizer, some, L, texts) for part, (_, some) in zip(parts, side.to_read, strict=False)]
        for side in sides
    ]
    K = max([len(text.ids) for side in read for some in side for text in some] + [n // L for n in given])
    found = [_encode_side(side, parts, of_side, K, L, device) for side, of_side in zip(sides, read, strict=True)]
    return found, _dropped(sides, read)


def split(tokenizer: CLIPTokenizer, texts: list[str], L: int, how: Texts) -> list[Windows]:
    """Return the windows of each text, ``L`` ids in each, start, end and padding included."""
    texts = [expand(text, tokenizer) for text in texts]
    if how.long_prompt == "cut":
        tokens = tokenizer(texts, padding="max_length", max_length=L, truncation=True)
        return [Windows([ids], [[1.0] * L], cut) for ids, cut in zip(tokens.input_ids, tokens.dropped, strict=True)]
    found = []
    for text in texts:
        words = [[(i, w) for i in word] for piece, w in how.read(text) for word in tokenizer.words(piece)]
        windows = pack(words, L - 2)
        ids = [fill(tokenizer, [i for i, _ in tokens], L) for tokens in windows]
        weights = [[1.0] + [w for _, w in tokens] + [1.0] * (L - 1 - len(tokens)) for tokens in windows]
        found.append(Windows(ids, weights))
    return found


def fill(tokenizer: CLIPTokenizer, ids: list[int], L: int) -> list[int]:
    """Return a window of ``L`` ids: start, ``ids``, end, padding."""
    empty = tokenizer("", padding="max_length", max_length=L).input_ids
    return [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id, *empty[len(ids) + 2 :]]


def pack(words: Iterable[Sequence[T]], size: int) -> list[list[T]]:
    """Deal words out to windows of at most ``size`` tokens, in order; only longer words are torn. There is always one.

    >>> pack(["abc", "de", "fghijk"], 4)
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


def weigh(z: Tensor, weights: Tensor) -> Tensor:
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
    side: Side, parts: list[Encoder], texts: list[list[Windows]], K: int, L: int, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Return the states (B, K L, D) of a side, those of several encoders side by side, and its pooled states (B, P)."""
    if side.embeds is None:
        found = [_encode(part, some, K, L, side.skip, device) for part, some in zip(parts, texts, strict=True)]
        return torch.cat([z for z, _ in found], dim=-1), found[-1][1]  # SDXL pools with its last encoder
    missing = K - side.embeds.shape[1] // L
    if not missing:
        return side.embeds, side.pooled
    nothing = [Windows([], [])]
    empty = torch.cat([_encode(part, nothing, missing, L, side.skip, device)[0] for part in parts], dim=-1)
    return torch.cat([side.embeds, empty.to(side.embeds).expand(len(side.embeds), -1, -1)], dim=1), side.pooled


def _encode(
    part: Encoder, texts: list[Windows], K: int, L: int, skip: int | None, device: torch.device | str
) -> tuple[Tensor, Tensor | None]:
    """Return the states (B, K L, D) of texts filled up to K windows, and the pooled ones (B, P) of the first window."""
    empty = fill(part.tokenizer, [], L)
    ids = [window for text in texts for window in text.ids + [empty] * (K - len(text.ids))]
    weights = [window for text in texts for window in text.weights + [[1.0] * L] * (K - len(text.weights))]
    z, pooled = part.states(torch.tensor(ids, device=device), skip)
    if any(w != 1 for window in weights for w in window):
        z = weigh(z, torch.tensor(weights, device=z.device, dtype=z.dtype))
    return rearrange(z, "(B K) L D -> B (K L) D", K=K), None if pooled is None else pooled[::K]


def _dropped(sides: Sequence[Side], read: list[list[list[Windows]]]) -> Dropped | None:
    """Return what was cut off, by argument; where two tokenizers read the same text, the longer of the two."""
    found: Dropped = {}
    for side, of_side in zip(sides, read, strict=True):
        for (name, texts), windows in zip(side.to_read, of_side, strict=False):
            before = found.get(name, [""] * len(texts))
            found[name] = [max(cut, text.dropped, key=len) for cut, text in zip(before, windows, strict=True)]
    return {name: parts for name, parts in found.items() if any(parts)} or None
