"""Train a vocabulary of CLIP's kind: byte-level byte-pair encoding (BPE) with an end-of-word mark.

A word is the sequence of its UTF-8 bytes, the last of which carries the suffix ``</w>``. Training repeats one step:
find the pair of neighbouring symbols (a, b) that occurs most often over all words and replace it by the symbol ab.

Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units" (2016), algorithm 1; the byte alphabet
and the order of ids are those of CLIP (Radford et al., 2021): 256 bytes, 256 bytes with ``</w>``, one id per merge,
``<|startoftext|>``, ``<|endoftext|>``. Token 0 is therefore "!", as in every CLIP vocabulary.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise

from minidiff.text.bpe import split_into_words

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
Word = tuple[str, ...]
Pair = tuple[str, str]


def byte_alphabet() -> list[str]:
    """Return the 256 printable characters that stand for the bytes, in the order of CLIP's ids.

    Printable bytes stand for themselves and come first; the other 68 are moved to U+0100 and up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def train_clip_bpe(texts: Iterable[str], vocab_size: int) -> tuple[dict[str, int], list[Pair]]:
    """Train a vocabulary of exactly ``vocab_size`` tokens on ``texts`` and return ``(vocab, merges)``.

    The result depends only on the multiset of words: equally frequent pairs are merged in alphabetical order.
    Raise ``ValueError`` if ``vocab_size`` is below 514 (bytes and special tokens) or if the texts run out of pairs.
    """
    letters = byte_alphabet()
    vocab = {symbol: i for i, symbol in enumerate(letters + [letter + "</w>" for letter in letters])}
    if vocab_size < len(vocab) + 2:
        raise ValueError(f"vocab_size={vocab_size}; 512 byte symbols and 2 special tokens need at least 514")

    words = Counter(w for text in texts for w in split_into_words(text))
    pieces: dict[str, Word] = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    pairs, where = _count_pairs(pieces, words)
    merges: list[Pair] = []
    while len(vocab) + 2 < vocab_size:
        if not pairs:
            raise ValueError(f"vocab_size={vocab_size}, but these texts give at most {len(vocab) + 2} tokens")
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word in sorted(where[best]):
            old, new = pieces[word], _merge(pieces[word], best)
            for pair in pairwise(old):
                pairs[pair] -= words[word]
                where[pair].discard(word)
            for pair in pairwise(new):
                pairs[pair] += words[word]
                where[pair].add(word)
            pieces[word] = new
        pairs = +pairs  # forget the pairs that no longer occur
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))  # two merges may spell the same symbol: a+bc and ab+c
    return {**vocab, BOS: len(vocab), EOS: len(vocab) + 1}, merges


def _count_pairs(pieces: dict[str, Word], words: dict[str, int]) -> tuple[Counter[Pair], dict[Pair, set[str]]]:
    """Count every neighbouring pair, and list the words in which it occurs."""
    pairs, where = Counter(), defaultdict(set)
    for word, symbols in pieces.items():
        for pair in pairwise(symbols):
            pairs[pair] += words[word]
            where[pair].add(word)
    return pairs, where


def _merge(symbols: Word, pair: Pair) -> Word:
    """Replace each occurrence of ``pair``, from left to right, by one symbol."""
    merged, i = [], 0
    while i < len(symbols):
        n = 2 if symbols[i : i + 2] == pair else 1
        merged.append("".join(symbols[i : i + n]))
        i += n
    return tuple(merged)
