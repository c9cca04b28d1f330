"""Embeddings inside a LoRA file: new words that come and go with the adapter.

==============================================  ======================================================================
bundle_emb.<word>.                              holds
==============================================  ======================================================================
``clip_l``, ``clip_g``                          vectors for the first and the second text encoder (OneTrainer)
``clip_l_out``, ``clip_g_out``                  outputs in their places (OneTrainer), see ``textual_inversion``
``emb_params``, ``string_to_param.*``           what A1111's embeddings hold, for the only text encoder
==============================================  ======================================================================

Written by OneTrainer and by tools for A1111's stable-diffusion-webui, which reads them. The word is known to prompts
from then on, as after ``load_textual_inversion``.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from minidiff.adapters.source import AdapterFile
from minidiff.adapters.textual_inversion import Word, addressed, check, forget, pairs_of, read_tensors, teach, words_of
from minidiff.errors import CheckpointError, shortened
from minidiff.text.tokens import added_words, tokens_of

PREFIX = "bundle_emb."
_KEY = re.compile(r"bundle_emb\.(.+)\.(clip_[lg](?:_out)?|em[bp]_params(?:_out)?|string_to_param\.\*)")

Words = dict[str, list[Word]]  # component -> its new words


def split_words(file: AdapterFile, parts: Mapping[str, Any]) -> tuple[AdapterFile, Words]:
    """Take the words of a file away from its LoRA, checked against the text encoders among ``parts``.

    Raises:
        CheckpointError: naming tensors of no known layout, or if nothing else is in the file.
        ValueError: if a text encoder cannot learn a word, which may be known already.
    """
    mine = {key: tensor for key, tensor in file.tensors.items() if key.startswith(PREFIX)}
    if not mine:
        return file, {}
    if unknown := [key for key in mine if not _KEY.fullmatch(key)]:
        raise CheckpointError(f"{file.label}: no embedding in any layout that minidiff knows: {shortened(unknown)}")
    if len(mine) == len(file.tensors):
        raise CheckpointError(f"{file.label} holds only embeddings: pass the tensors of each to load_textual_inversion")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in mine.items():
        word, name = _KEY.fullmatch(key).groups()
        found.setdefault(word, {})[name] = tensor
    if not (pairs := pairs_of(parts)):
        raise ValueError(f"{file.label} brings words, and this pipeline has no text encoder with a tokenizer")
    words = Words()
    for word, tensors in found.items():
        for vectors in addressed(read_tensors(f"{file.label}: {PREFIX}{word}", tensors), tensors, {}, pairs, False):
            words.setdefault(str(vectors.component), []).extend(words_of(vectors, word))
    check(words, pairs)
    return file._replace(tensors={key: one for key, one in file.tensors.items() if key not in mine}), words


def teach_words(words: Words, parts: Mapping[str, Any], adapter: str) -> None:
    """Teach the text encoders words that came with an adapter."""
    pairs = pairs_of(parts)
    teach(words, pairs)
    for component, new in words.items():
        tokenizer = pairs[component][0]
        tokenizer.owners = tokenizer.owners | {word.token: adapter for word in new}


def owners(parts: Mapping[str, Any]) -> set[str]:
    """Return the adapters that words came with, which may be another pipeline's with the same text encoders."""
    return {adapter for tokenizer, _ in pairs_of(parts).values() for adapter in tokenizer.owners.values()}


def forget_words(parts: Mapping[str, Any], gone: set[str], kept: set[str]) -> None:
    """Forget the words of the adapters that are ``gone``; those of the ``kept`` ones stay, and are nobody's now."""
    for tokenizer, encoder in pairs_of(parts).values():
        added = added_words(tokenizer)
        words = [word for word, adapter in tokenizer.owners.items() if adapter in gone - kept]
        if words:
            forget({token for word in words for token in tokens_of(word, added)}, tokenizer, encoder)
        tokenizer.owners = {word: adapter for word, adapter in tokenizer.owners.items() if adapter not in gone}
