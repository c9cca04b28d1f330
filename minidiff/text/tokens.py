"""What a tokenizer knows: tokens and their ids, special tokens with a role, and tokens that are added later.

A word that textual inversion has learned with several vectors is several added tokens, and ``expand`` spells them::

    prompt "a <cat> cake"  ->  "a <cat> <cat>_1 <cat>_2 cake"
"""

import copy
import threading
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from minidiff.text.bpe import bpe
from minidiff.text.tokenizer_files import ROLES

_adding = threading.Lock()  # one for all tokenizers, so that a tokenizer can be copied and pickled


def _id_of(role: str) -> Any:
    return property(lambda self: self._backend.token_to_id(getattr(self, role)), doc=f"The id of ``{role}``.")


class TokenTable:
    """Tokens and their ids, both ways.

    The object of the `tokenizers` library is replaced, never changed, so any number of threads may use one table.
    """

    bos_token: str
    eos_token: str
    unk_token: str
    pad_token: str
    _backend: Tokenizer
    _merges: list[tuple[str, str]]
    outputs: Mapping[str, Tensor] = MappingProxyType({})  # added token -> (D,): what stands for its state, if not that
    owners: Mapping[str, str] = MappingProxyType({})  # added word -> the adapter that it came with

    bos_token_id, eos_token_id, unk_token_id, pad_token_id = map(_id_of, ROLES)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Look up tokens as they are spelled in the vocabulary; an unknown one has the id of ``unk_token``."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        found = self._backend.token_to_id(tokens)
        return self.unk_token_id if found is None else found

    def convert_ids_to_tokens(self, ids: int | Sequence[int], skip_special_tokens: bool = False) -> str | list[str]:
        """Return the spelling of ids in the vocabulary; raise ``ValueError`` for an id that it does not have."""
        if isinstance(ids, int):
            return self._backend.id_to_token(*self._checked_ids([ids]))
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        return [self._backend.id_to_token(i) for i in self._checked_ids([int(i) for i in ids]) if i not in skipped]

    def add_tokens(
        self, new_tokens: str | AddedToken | Sequence[str | AddedToken], special_tokens: bool = False
    ) -> int:
        """Add tokens that are never split and return how many were new; a special token stays what it is.

        Calls that are under way in other threads finish with the old vocabulary.
        """
        tokens = [new_tokens] if isinstance(new_tokens, str | AddedToken) else list(new_tokens)
        with _adding:
            backend = copy.deepcopy(self._backend)
            special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
            tokens = [token for token in tokens if str(token) not in special]
            count = backend.add_special_tokens(tokens) if special_tokens else backend.add_tokens(tokens)
            self._backend = backend
        return count

    def remove_tokens(self, tokens: Iterable[str]) -> None:
        """Remove added tokens that are not special; the ids of those added after them move up.

        Calls that are under way in other threads finish with the old vocabulary. Raise ``ValueError`` for other tokens.
        """
        tokens = set(tokens)
        with _adding:
            added = self.added_tokens_decoder
            if unknown := tokens - {token.content for token in added.values() if not token.special}:
                raise ValueError(f"{', '.join(map(repr, sorted(unknown)))}: not added, or special; they stay")
            backend = bpe(self._backend.get_vocab(with_added_tokens=False), self._merges, self.unk_token)
            backend.add_tokens([token for _, token in sorted(added.items()) if token.content not in tokens])
            self._backend = backend
            self.outputs, self.owners = (
                {token: value for token, value in kept.items() if token not in tokens}
                for kept in (self.outputs, self.owners)
            )

    @property
    def added_tokens_decoder(self) -> dict[int, AddedToken]:
        """The tokens that are never split, the special ones included, by id."""
        return self._backend.get_added_tokens_decoder()

    @property
    def added_tokens_encoder(self) -> dict[str, int]:
        """The ids of the tokens that are never split, by token."""
        return {token.content: i for i, token in self.added_tokens_decoder.items()}

    def get_added_vocab(self) -> dict[str, int]:
        """Return ``added_tokens_encoder``."""
        return self.added_tokens_encoder

    def get_vocab(self) -> dict[str, int]:
        """Return all tokens with their ids, the added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    def __len__(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """The number of tokens without the added ones."""
        return self._backend.get_vocab_size(with_added_tokens=False)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by their role."""
        return {role: getattr(self, role) for role in ROLES}

    @property
    def all_special_tokens(self) -> list[str]:
        """The special tokens, each once."""
        return list(dict.fromkeys(self.special_tokens_map.values()))

    @property
    def all_special_ids(self) -> list[int]:
        """The ids of the special tokens, each once."""
        return [self._backend.token_to_id(token) for token in self.all_special_tokens]

    def _checked_ids(self, ids: list[int]) -> list[int]:
        for i in ids:
            if i < 0 or self._backend.id_to_token(i) is None:
                raise ValueError(f"token id {i} is not in the vocabulary of {len(self)} tokens")
        return ids


def special_tokens(roles: Iterable[str | AddedToken], known: Iterable[AddedToken]) -> list[AddedToken]:
    """Return the tokens of ``roles`` that are not ``known``, in the order in which they must be added.

    Where one role describes a token by its name and another by flags, the later of the two counts, and a description
    that was met before does not count again: the reference's rule. SD 1.5 depends on it: with ``normalized`` unset,
    "<|EndOfText|>" in a prompt is plain text; SD 2.x has it set, and there it is the end token.
    """
    names, found = {token.content for token in known}, []
    for token in roles:
        if str(token) not in names and token not in found:
            found.append(token)
    return [AddedToken(token, special=True) if isinstance(token, str) else token for token in found]


def expand(prompt: str, tokenizer: TokenTable) -> str:
    """Write all tokens of a word with several vectors in its place: "<cat>" becomes "<cat> <cat>_1 <cat>_2"."""
    added = added_words(tokenizer)
    if any(f"{token}_1" in added for token in added):
        for token in dict.fromkeys(tokenizer.tokenize(prompt)):
            if token in added:
                prompt = prompt.replace(token, " ".join(tokens_of(token, added)))
    return prompt


def added_words(tokenizer: TokenTable) -> dict[str, int]:
    """Return the tokens that were added, without the special ones."""
    return {token.content: i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if not token.special}


def tokens_of(word: str, added: Mapping[str, int]) -> list[str]:
    """Return the tokens of a word, one for each of its vectors."""
    found = [word]
    while (following := f"{word}_{len(found)}") in added:
        found.append(following)
    return found
