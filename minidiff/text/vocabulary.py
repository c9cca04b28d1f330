"""Words of several tokens: what textual inversion adds to a vocabulary, and how a prompt spells it.

prompt "a <cat> cake"  ->  "a <cat> <cat>_1 <cat>_2 cake"
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minidiff.text.tokenizer import CLIPTokenizer


def expand(prompt: str, tokenizer: "CLIPTokenizer") -> str:
    """Write all tokens of a word with several vectors in its place: "<cat>" becomes "<cat> <cat>_1 <cat>_2"."""
    added = added_words(tokenizer)
    if any(f"{token}_1" in added for token in added):
        for token in dict.fromkeys(tokenizer.tokenize(prompt)):
            if token in added:
                prompt = prompt.replace(token, " ".join(tokens_of(token, added)))
    return prompt


def added_words(tokenizer: "CLIPTokenizer") -> dict[str, int]:
    """Return the tokens that were added to a vocabulary, without the special ones."""
    return {token.content: i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if not token.special}


def tokens_of(word: str, added: Mapping[str, int]) -> list[str]:
    """Return the tokens of a word, one for each of its vectors."""
    found = [word]
    while (following := f"{word}_{len(found)}") in added:
        found.append(following)
    return found
