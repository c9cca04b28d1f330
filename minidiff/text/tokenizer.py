"""CLIP's tokenizer: text -> token ids, by byte-level byte-pair encoding (BPE).

1. normalise: Unicode NFC, white space -> one space, lower case
2. split into words: letters | one digit | other signs | 's 't 're ... | special tokens
3. each word: its UTF-8 bytes as printable characters, the last one with the suffix ``</w>``
4. merge neighbouring symbols in the order in which the merges were learned; each final symbol is a token
5. ``<|startoftext|> tokens <|endoftext|>``, cut to ``max_length``, filled up with the pad token

Steps 1 to 4 are done by the `tokenizers` library (``minidiff.text.bpe``), 5 here, so that the text that was cut off can
be named. Checked against ``transformers.CLIPTokenizer`` token for token.
"""

import logging
from collections import UserDict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken

from minidiff.errors import LONGEST_TEXT, CheckpointError, check_count
from minidiff.text.bpe import END_OF_WORD, bpe, pairs
from minidiff.text.tokenizer_files import NO_LIMIT, ROLES, read_fields, read_tokenizer, write_tokenizer
from minidiff.text.tokens import TokenTable, special_tokens

logger = logging.getLogger("minidiff")


class TokenizerOutput(UserDict):
    """Token ids of one or several prompts: a dict whose items are also attributes.

    ``input_ids`` and ``attention_mask`` (1 = token, 0 = padding) are (B, L) int64 tensors or arrays, or lists.
    ``dropped`` holds, for each prompt, the part of its text that truncation removed ("" where nothing was).
    """

    def __init__(self, items: Mapping[str, Any] | None = None, dropped: Sequence[str] = ()) -> None:
        super().__init__(items)
        self.dropped = list(dropped)

    def __getattr__(self, name: str) -> Any:
        if name == "data" or name not in self.data:  # data is missing while a copy is being made
            raise AttributeError(f"the tokenizer's output has no {name!r}")
        return self.data[name]

    def __missing__(self, name: str) -> Any:
        raise KeyError(f"{name!r}; the tokenizer returned {', '.join(map(repr, self.data))}")

    def to(self, device: torch.device | str | int, **options: Any) -> "TokenizerOutput":
        """Move the tensors to a device, and return this output itself."""
        moved = {name: x.to(device, **options) for name, x in self.data.items() if isinstance(x, torch.Tensor)}
        self.data.update(moved)
        return self


class CLIPTokenizer(TokenTable):
    """Turn text into CLIP's token ids and back; see the module's head for the steps.

    ``vocab`` maps each token to its id; ``merges`` are pairs of symbols ("a b" or ("a", "b")), most important first.
    A special token is a string or an ``AddedToken``; ``added_tokens_decoder`` maps ids to tokens besides ``vocab``.
    Raise ``CheckpointError`` if merges and vocabulary do not belong together.
    """

    padding_side = truncation_side = "right"  # a program may set the first to "left"
    name_or_path = ""  # where it was loaded from
    is_fast = True

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[str | tuple[str, str]],
        unk_token: str | AddedToken = "<|endoftext|>",
        bos_token: str | AddedToken = "<|startoftext|>",
        eos_token: str | AddedToken = "<|endoftext|>",
        pad_token: str | AddedToken = "<|endoftext|>",
        *,
        model_max_length: int = NO_LIMIT,
        added_tokens_decoder: Mapping[int, AddedToken] | None = None,
    ) -> None:
        roles = {"bos_token": bos_token, "eos_token": eos_token, "unk_token": unk_token, "pad_token": pad_token}
        check_count("model_max_length", model_max_length)
        self.model_max_length = model_max_length
        self.bos_token, self.eos_token, self.unk_token, self.pad_token = (str(roles[role]) for role in ROLES)
        self._merges = pairs(merges)
        self._backend = bpe(vocab, self._merges, self.unk_token)
        added = dict(sorted((added_tokens_decoder or {}).items()))
        self._backend.add_tokens([*added.values(), *special_tokens(roles.values(), added.values())])
        for i, token in added.items():
            if (found := self._backend.token_to_id(token.content)) != i:
                raise CheckpointError(f"added token {token.content!r} has id {i} in the files, but would get {found}")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        force_download: bool = False,
        use_fast: bool | None = None,
    ) -> "CLIPTokenizer":
        """Load a tokenizer from a folder or a Hub repository.

        The vocabulary comes from ``tokenizer.json`` or from ``vocab.json`` and ``merges.txt``; what
        ``special_tokens_map.json`` says comes before ``tokenizer_config.json`` (SD 2.x names its pad token only there).
        ``use_fast`` asks for nothing: the reference's two tokenizers read the same files and give the same ids.
        Raise ``CheckpointNotFoundError`` if the vocabulary is missing, ``ConfigError`` if a field asks for another
        kind of tokenizer, ``CheckpointError`` if a file is damaged.
        """
        where = {"subfolder": subfolder, "revision": revision, "cache_dir": cache_dir, "token": token}
        where |= {"local_files_only": local_files_only, "force_download": force_download}
        tokenizer = cls(**read_tokenizer(pretrained_model_name_or_path, **where))
        tokenizer.name_or_path = str(pretrained_model_name_or_path)
        return tokenizer

    @classmethod
    def of_content(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[str | tuple[str, str]],
        config: Mapping[str, Any],
        special_map: Mapping[str, Any],
    ) -> "CLIPTokenizer":
        """Make a tokenizer of what its files hold; errors as ``from_pretrained``."""
        return cls(vocab, merges, **read_fields(config, special_map, []))

    def check_saveable(self) -> None:
        """Raise ``ValueError`` if words have output vectors, for which no folder has a place."""
        if self.outputs:
            raise ValueError(
                f"{', '.join(map(repr, self.outputs))} stand for outputs of the text encoder (clip_l_out), which no "
                "folder can hold: forget them first with unload_textual_inversion()"
            )

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``vocab.json``, ``merges.txt``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

        Errors as of ``check_saveable``.
        """
        self.check_saveable()
        backend = self._backend
        write_tokenizer(
            Path(save_directory),
            vocab=backend.get_vocab(with_added_tokens=False),
            merges=self._merges,
            added=backend.get_added_tokens_decoder(),
            fields=self.special_tokens_map | {"model_max_length": self.model_max_length},
        )

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_length: bool = False,
        return_overflowing_tokens: bool = False,
    ) -> TokenizerOutput:
        """Turn one prompt or a list of prompts into ids.

        ``padding``: "max_length", True or "longest" (to the longest prompt), False or "do_not_pad".
        ``truncation``: True cuts to ``max_length`` tokens, the special ones included; None does so only if
        ``max_length`` is given and ``padding`` is False. The cut text is logged and returned as ``.dropped``.
        ``max_length`` defaults to ``model_max_length``. ``return_tensors``: "pt", "np" or None for lists.
        ``return_attention_mask``: False leaves it out. ``return_length``: True adds the number of ids, as ``length``.
        ``return_overflowing_tokens`` must be False: what was cut off is in ``.dropped``.
        Raise ``TypeError`` for what is not text, ``ValueError`` for a bad option, text that is not valid Unicode, or
        tensors of prompts of different lengths.
        """
        texts = _checked_texts(text)
        length = self.model_max_length if max_length is None else max_length
        check_count("max_length", length)
        if truncation is None:  # the reference cuts for False, not for "do_not_pad"
            truncation = max_length is not None and padding is False
        if truncation not in (True, False, "longest_first", "do_not_truncate"):
            raise ValueError(f"truncation={truncation!r}; expected True ('longest_first') or False ('do_not_truncate')")
        if return_overflowing_tokens or self.truncation_side != "right":
            raise TypeError("return_overflowing_tokens and truncation_side='left' are not implemented: see .dropped")

        limit = length if truncation in (True, "longest_first") else None
        rows, dropped = self._encode(texts, limit, add_special_tokens)
        options = (return_tensors, return_attention_mask, return_length)
        return TokenizerOutput(self._filled(rows, None, isinstance(text, str), padding, max_length, *options), dropped)

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str = True,
        max_length: int | None = None,
        *,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> TokenizerOutput:
        """Bring token ids to one length: ``{"input_ids": [[1, 2], [3]]}``, or a list of ``{"input_ids": [1, 2]}``.

        What is not ``input_ids`` or ``attention_mask`` is refused, as nobody says what to fill it up with. Arguments
        and errors as of a call.
        """
        if not isinstance(encoded_inputs, Mapping):
            encoded_inputs = {name: [one[name] for one in encoded_inputs] for name in encoded_inputs[0]}
        given = {name: [_as_list(row) for row in rows] for name, rows in encoded_inputs.items()}
        if not {"input_ids"} <= set(given) <= {"input_ids", "attention_mask"}:
            raise ValueError(f"pad takes input_ids and attention_mask, found {', '.join(given)}")
        alone = bool(given["input_ids"]) and isinstance(given["input_ids"][0], int)
        both = (given["input_ids"], given.get("attention_mask"))
        rows, masks = ([values] if alone and values else values for values in both)
        options = (return_tensors, return_attention_mask)
        return TokenizerOutput(self._filled(rows, masks, alone, padding, max_length, *options))

    def _filled(
        self,
        rows: list[list[int]],
        masks: list[list[int]] | None,
        alone: bool,
        padding: bool | str,
        max_length: int | None,
        return_tensors: str | None,
        return_attention_mask: bool | None,
        return_length: bool = False,
    ) -> dict[str, Any]:
        """Return ids filled up with the pad token, and the mask that says where; of one text ``alone`` no rows.

        ``masks`` are those of the rows, by default all 1. The options are those of a call.
        """
        if isinstance(padding, bool):
            padding = "longest" if padding else "do_not_pad"
        if padding not in ("max_length", "longest", "do_not_pad"):
            raise ValueError(f"padding={padding!r}; expected 'max_length', 'longest' (True) or 'do_not_pad' (False)")
        if return_tensors not in (None, "pt", "np"):
            raise ValueError(f"return_tensors={return_tensors!r}; expected 'pt', 'np' or None")
        length = self.model_max_length if max_length is None else max_length
        if padding == "max_length" and length >= NO_LIMIT:
            raise ValueError(
                "padding='max_length' needs max_length=...: this tokenizer's files give no model_max_length"
            )
        width = {"max_length": length, "longest": max(map(len, rows)), "do_not_pad": 0}[padding]

        def fill(row: list[int], value: int) -> list[int]:
            more = [value] * (width - len(row))
            return more + row if self.padding_side == "left" else row + more

        found = {"input_ids": [fill(row, self.pad_token_id) for row in rows]}
        if return_attention_mask is not False:
            found["attention_mask"] = [fill(row, 0) for row in masks or [[1] * len(row) for row in rows]]
        if return_length:
            found["length"] = list(map(len, found["input_ids"]))
        if alone and return_tensors is None:
            return {name: values[0] for name, values in found.items()}
        return {name: _as_tensor(values, return_tensors) for name, values in found.items()}

    def _encode(
        self, texts: list[str], limit: int | None, add_special_tokens: bool
    ) -> tuple[list[list[int]], list[str]]:
        """Return the ids of each text, at most ``limit`` of them, and the text that did not fit."""
        backend = self._backend  # which another thread may replace
        bos, eos = [backend.token_to_id(self.bos_token)], [backend.token_to_id(self.eos_token)]
        if not add_special_tokens:
            bos, eos = [], []
        if limit is not None and limit < len(bos + eos):
            raise ValueError(f"max_length={limit} leaves no room for the start and end tokens; give at least 2")
        rows, dropped = [], []
        for text, encoding in zip(texts, backend.encode_batch(texts, add_special_tokens=False), strict=True):
            keep = len(encoding.ids) if limit is None else limit - len(bos + eos)
            cut = encoding.offsets[keep:]
            dropped.append(text[cut[0][0] :].strip() if cut else "")
            rows.append(bos + encoding.ids[:keep] + eos)
        for part in filter(None, dropped):
            logger.warning("A prompt is longer than %d tokens; this part of it was dropped: %r", limit, part)
        return rows, dropped

    def encode(self, text: str, **options: Any) -> list[int]:
        """Return the ids of one prompt; the options are those of a call."""
        if not isinstance(text, str):
            raise TypeError(f"encode takes one str, not {type(text).__name__}; call the tokenizer for several prompts")
        return self(text, **options).input_ids

    def tokenize(self, text: str) -> list[str]:
        """Return the tokens of ``text`` as they are spelled in the vocabulary, without start and end."""
        return self._backend.encode(_checked_texts(text)[0], add_special_tokens=False).tokens

    def words(self, text: str) -> list[list[int]]:
        """Return the ids of ``text``, without start and end, word by word: what should stay together."""
        encoding = self._backend.encode(_checked_texts(text)[0], add_special_tokens=False)
        by_word = groupby(zip(encoding.word_ids, encoding.ids, strict=True), key=lambda pair: pair[0])
        return [[i for _, i in pairs] for _, pairs in by_word]

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str | list[str]:
        """Turn ids (an int, a sequence, a tensor; or several sequences) back into text.

        ``clean_up_tokenization_spaces`` has no effect, as in the reference, where byte-level BPE ignores it.
        """
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, str):
            raise TypeError(f"token_ids should be integers, found the text {ids!r:.80}")
        ids = [ids] if isinstance(ids, int) else list(ids)
        if ids and not isinstance(ids[0], int):
            return [self.decode(row, skip_special_tokens) for row in ids]
        text = self._backend.decode(self._checked_ids(ids), skip_special_tokens=skip_special_tokens)
        return text.replace(END_OF_WORD, " ").strip()

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> list[str]:
        """Turn several sequences of ids back into text; see :meth:`decode`."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]


def _checked_texts(text: str | Sequence[str]) -> list[str]:
    """Return the prompts as a list; raise if one is not a str, or holds half of a surrogate pair."""
    if not isinstance(text, str | list | tuple):
        raise TypeError(f"a prompt is a str or a list of str, not {type(text).__name__}")
    texts = [text] if isinstance(text, str) else list(text)
    if not texts:
        raise ValueError("the list of prompts is empty; for an unconditional prompt give ''")
    for n, one in enumerate(texts):
        if not isinstance(one, str):
            raise TypeError(f"prompt {n} is a {type(one).__name__}, not a str")
        if len(one) > LONGEST_TEXT:
            raise ValueError(f"prompt {n} has {len(one):,} characters; expected at most {LONGEST_TEXT:,}")
        try:
            one.encode()
        except UnicodeEncodeError as error:
            found = f"{one[error.start]!r} at position {error.start}"
            raise ValueError(
                f"prompt {n} is not valid Unicode: lone surrogate {found}; decode the text again"
            ) from None
    return texts


def _as_list(row: Any) -> Any:
    return row.tolist() if hasattr(row, "tolist") else row


def _as_tensor(rows: list, kind: str | None) -> Any:
    if kind is None:
        return rows
    if len({len(row) for row in rows if isinstance(row, list)}) > 1:
        lengths = ", ".join(str(len(row)) for row in rows)
        raise ValueError(f"prompts of {lengths} tokens make no tensor; give padding and truncation=True")
    return torch.tensor(rows, dtype=torch.int64) if kind == "pt" else np.array(rows, dtype=np.int64)
