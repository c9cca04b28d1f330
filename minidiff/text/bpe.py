"""Byte-level byte-pair encoding (BPE): steps 1 to 4 of CLIP's tokenizer, done by the `tokenizers` library.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision" (2021), section 2.4; BPE is
Sennrich et al. (2016), algorithm 1. The steps are listed in ``minidiff.text.tokenizer``.
"""

from collections.abc import Mapping, Sequence

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from minidiff.errors import CheckpointError

END_OF_WORD = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

NORMALIZER = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
# ByteLevel splits once more, by GPT-2's pattern, as the reference's does. That matters for one word only: a special
# token that is not special because of its capitals falls apart into "<|", its letters and "|>".
PRE_TOKENIZER = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ]
)


def split_into_words(text: str) -> list[str]:
    """Return the words of ``text`` (steps 1 to 3), each as printable characters that stand for its bytes."""
    return [word for word, _ in PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(text))]


def pairs(merges: Sequence[str | tuple[str, str]]) -> list[tuple[str, str]]:
    """Return merges, of which each is spelled "a b" or as a pair, as pairs."""
    found = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in merges]
    for n, pair in enumerate(found):
        if len(pair) != 2:
            raise CheckpointError(f"merge {n + 1} is {merges[n]!r}; expected two symbols with one space between them")
    return found


def bpe(vocab: Mapping[str, int], merges: list[tuple[str, str]], unk_token: str) -> Tokenizer:
    """Build steps 1 to 4. Raise ``CheckpointError`` if merges and vocabulary do not belong together."""
    _check_vocab(vocab, unk_token)
    _check_merges(merges, vocab)
    model = BPE(
        vocab=dict(vocab),
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix=END_OF_WORD,
        fuse_unk=False,
        unk_token=unk_token,
    )
    backend = Tokenizer(model)
    backend.normalizer, backend.pre_tokenizer, backend.decoder = NORMALIZER, PRE_TOKENIZER, decoders.ByteLevel()
    return backend


def _check_vocab(vocab: Mapping[str, int], unk_token: str) -> None:
    if unk_token not in vocab:
        raise CheckpointError(f"unk_token={unk_token!r} is not in the vocabulary of {len(vocab)} tokens")
    owner: dict[int, str] = {}
    for token, i in vocab.items():
        if type(i) is not int or i < 0:
            raise CheckpointError(f"token {token!r} has the id {i!r} in the vocabulary; expected an int of at least 0")
        if owner.setdefault(i, token) != token:
            raise CheckpointError(f"tokens {owner[i]!r} and {token!r} have the same id {i} in the vocabulary")


def _check_merges(merges: list[tuple[str, str]], vocab: Mapping[str, int]) -> None:
    for n, (a, b) in enumerate(merges, start=1):
        for symbol in (a, b, a + b):
            if symbol not in vocab:
                raise CheckpointError(f"merge {n} ({a} + {b}) uses {symbol!r}, which is not in the vocabulary")
