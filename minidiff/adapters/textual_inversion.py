"""Textual inversion: new words for the text encoder, each with one or several learned vectors in its embedding table.

    prompt "a <cat> cake"  ->  "a <cat> <cat>_1 <cat>_2 cake"  ->  ids  ->  rows of token_embed: (vocabulary + 3, D)

Gal et al. 2022 (https://arxiv.org/abs/2208.01618), section 3. A word with n vectors is n tokens, and ``expand`` writes
them into the prompt. Checked against ``diffusers.loaders.TextualInversionLoaderMixin``.

========================  ==================================================
a file of                 holds
========================  ==================================================
diffusers                 the token: (D,) or (n, D)
A1111, SD 1.x and 2.x     ``emb_params``: (n, D)
A1111 and others, SDXL    ``clip_l``: (n, 768), ``clip_g``: (n, 1280)
========================  ==================================================
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minidiff.adapters.source import check_tensors, options_of, read_adapter
from minidiff.checkpoints.hub import Repo
from minidiff.checkpoints.model import Model
from minidiff.checkpoints.original.families import no_adapter
from minidiff.config import Config
from minidiff.errors import CheckpointError, shortened
from minidiff.networks.specs.clip import LEGACY_EOS, clip_spec
from minidiff.text.tokenizer import CLIPTokenizer
from minidiff.text.tokens import added_words, expand, tokens_of

logger = logging.getLogger("minidiff")

Source = str | Path | Mapping[str, Tensor] | Tensor

_STEM = "learned_embeds"  # diffusers' script for two encoders writes learned_embeds_2 beside it
FILE_NAME = f"{_STEM}.safetensors"
_ENCODERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}  # in files for two encoders
_NAMELESS = "emb_params"  # in files that do not say what their token is called


class Word(NamedTuple):
    """A new token and its vectors (n, D), for one text encoder."""

    token: str
    vectors: Tensor
    label: str  # where it comes from, for error messages

    @property
    def tokens(self) -> list[str]:
        """One token for each vector."""
        return [self.token, *(f"{self.token}_{k}" for k in range(1, len(self.vectors)))]


class Untaught(NamedTuple):
    """What a text encoder was before it learned new words."""

    weight: nn.Parameter
    config: Config


Pair = tuple[CLIPTokenizer, Model]


class TextualInversionLoader:
    """Adds new words to a pipeline with ``tokenizer`` and ``text_encoder``, or two of each."""

    components: Mapping[str, Any]

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source | Sequence[Source],
        token: str | Sequence[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: Model | None = None,
        **options: Any,
    ) -> None:
        """Teach tokenizer and text encoder new words. Everything is checked before anything is changed.

        Args:
            pretrained_model_name_or_path: a safetensors file, a folder, a Hub id, tensors by name, or one tensor; or
                several of these.
            token: what to call it, by default as the file does. A list for several sources, or one for each vector of a
                single source.
            tokenizer, text_encoder: where to, by default the pipeline's; those of a file for two encoders, or of
                learned_embeds.safetensors and learned_embeds_2.safetensors, go to both.
            options: ``weight_name``, the file in the folder or repository (default: learned_embeds.safetensors, or the
                only safetensors file there); ``hf_token``, the login for the Hub, as ``token`` is taken; ``subfolder``,
                ``revision``, ``cache_dir``, ``local_files_only`` and ``force_download`` as of ``from_pretrained``.

        Raises:
            ValueError: if a word is known already, has no name, its vectors do not fit the text encoder, or they are
                for one of two text encoders and nobody says which.
        """
        options["token"] = options.pop("hf_token", None)
        where = options_of("load_textual_inversion", options)
        weight_name = where.pop("weight_name", None)
        source = pretrained_model_name_or_path
        sources = list(source) if isinstance(source, list | tuple) else [source]
        names = list(token) if isinstance(token, list | tuple) else [token] * len(sources)
        if len(sources) > 1 and len(names) != len(sources):
            raise ValueError(f"token has {len(names)} names for {len(sources)} sources")
        several = names if len(sources) == 1 and len(names) > 1 else None
        pairs, chosen = self._pairs(tokenizer, text_encoder), tokenizer is not None
        words: dict[str, list[Word]] = {}  # component -> its new words
        for one, name in zip(sources, names, strict=False):
            read = _read(one, weight_name, where)
            for component, label, key, vectors in _addressed(read, one, where, pairs, chosen):
                words.setdefault(component, []).extend(_words(label, key, vectors, several or name))
        for component, new in words.items():
            _check(new, *pairs[component])
        for component, new in words.items():
            _learn(new, *pairs[component])
            for word in new:
                logger.info("%s knows %r now: %d vector(s)", component, word.token, len(word.vectors))

    def unload_textual_inversion(
        self,
        tokens: str | Sequence[str] | None = None,
        tokenizer: CLIPTokenizer | None = None,
        text_encoder: Model | None = None,
    ) -> None:
        """Forget words with all their vectors, by default all that are not part of the vocabulary.

        Args:
            tokens: the names under which they were loaded.
            tokenizer, text_encoder: from where, by default from all of the pipeline.

        Raises:
            ValueError: naming a word that is not there.
        """
        names = [tokens] if isinstance(tokens, str) else list(tokens or [])
        pairs = self._pairs(tokenizer, text_encoder)
        there = {component: added_words(tokenizer) for component, (tokenizer, _) in pairs.items()}
        if unknown := [name for name in names if not any(name in added for added in there.values())]:
            raise ValueError(f"there is no added token {', '.join(map(repr, unknown))}; there are {there}")
        for component, (tokenizer, encoder) in pairs.items():
            added = there[component]
            gone = {one for name in names if name in added for one in tokens_of(name, added)} if names else set(added)
            if gone:
                _forget(gone, tokenizer, encoder)

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: CLIPTokenizer) -> str | list[str]:
        """Write out the tokens of words with several vectors, as the reference's method of this name does."""
        return expand(prompt, tokenizer) if isinstance(prompt, str) else [expand(one, tokenizer) for one in prompt]

    def _pairs(self, tokenizer: CLIPTokenizer | None, text_encoder: Model | None) -> dict[str, Pair]:
        """Return tokenizers and text encoders by component, the given ones alone if there are some."""
        parts = self.components
        pairs = {
            f"text_encoder{suffix}": (parts[f"tokenizer{suffix}"], parts[f"text_encoder{suffix}"])
            for suffix in ("", "_2")
            if parts.get(f"tokenizer{suffix}") is not None and parts.get(f"text_encoder{suffix}") is not None
        }
        if tokenizer is None and text_encoder is None:
            if not pairs:
                raise ValueError("this pipeline has no text encoder with a tokenizer")
            return pairs
        if tokenizer is None or text_encoder is None:
            raise ValueError("give tokenizer= and text_encoder= together: a word is part of both")
        known = [component for component, pair in pairs.items() if pair[1] is text_encoder]
        return {known[0] if known else "text_encoder": (tokenizer, text_encoder)}


# --- reading ---------------------------------------------------------------------------------------------------------


Read = tuple[str | None, str, str, Tensor]  # component or None for the first, where it comes from, key, vectors


def _read(source: Source, weight_name: str | None, where: Mapping[str, Any]) -> list[Read]:
    """Return the vectors of a source, for each text encoder that it is for."""
    if isinstance(source, Tensor):
        check_tensors("the given tensor", {_NAMELESS: source})
        return [(None, "the given tensor", _NAMELESS, source)]
    if isinstance(source, Mapping) and "string_to_param" in source:
        raise CheckpointError(
            "string_to_param is the layout of A1111's pickles: pass state['string_to_param']['*'] and token= instead"
        )
    label, tensors, *_ = read_adapter(source, FILE_NAME, weight_name, **where)
    if set(tensors) == set(_ENCODERS):
        return [(_ENCODERS[key], label, key, vectors) for key, vectors in tensors.items()]
    if len(tensors) != 1:
        if what := no_adapter(tensors, "a textual inversion"):
            raise CheckpointError(f"{label} is {what}")
        raise CheckpointError(
            f"{label} holds {', '.join(shortened(list(tensors)))}; expected one tensor under the name of its token or "
            f"as {_NAMELESS}, or {' and '.join(_ENCODERS)}"
        )
    ((key, vectors),) = tensors.items()
    return [(_ENCODERS.get(key), label, key, vectors)]


def _addressed(
    read: list[Read], source: Source, where: Mapping[str, Any], pairs: Mapping[str, Pair], chosen: bool
) -> list[Read]:
    """Return vectors with the text encoder that they go to, which the caller has ``chosen`` or the file says."""
    first = next(iter(pairs))
    if chosen:  # of a file for both, the other half is left alone
        read = [(first, *rest) for component, *rest in read if len(read) == 1 or component == first]
    elif len(pairs) == 2:
        read = _of_both(read, source, where, pairs)
    read = [(component or first, *rest) for component, *rest in read]
    if lost := [f"{label}: {key} is for {component}" for component, label, key, _ in read if component not in pairs]:
        raise ValueError(f"{lost[0]}, which this pipeline does not have")
    return read


def _of_both(read: list[Read], source: Source, where: Mapping[str, Any], pairs: Mapping[str, Pair]) -> list[Read]:
    """Return vectors for both text encoders: of a file for one, with those of the file beside it."""
    component, label, key, vectors = read[0]
    if component is not None:
        return read
    name = Path(label).name
    if name.startswith(f"{_STEM}_2"):
        return [("text_encoder_2", label, key, vectors)]
    if isinstance(source, str | Path) and name.startswith(_STEM):
        path = Path(source)
        repo = Repo(path.parent) if path.is_file() else Repo(source, **where)
        if beside := repo.optional_file(f"{_STEM}_2{name.removeprefix(_STEM)}"):
            return [("text_encoder", label, key, vectors), ("text_encoder_2", *_read(beside, None, {})[0][1:])]
    fits = [one for one, (_, encoder) in pairs.items() if encoder.config.hidden_size == vectors.shape[-1]]
    reads = f"which {' and '.join(fits)} reads" if fits else "which neither reads"
    raise ValueError(
        f"{label}: {key} {tuple(vectors.shape)} is for one text encoder, and this pipeline has two: pass tokenizer= "
        f"and text_encoder= to teach one of them alone (it is of width {vectors.shape[-1]}, {reads})"
    )


def _words(label: str, key: str, vectors: Tensor, names: str | list[str] | None) -> list[Word]:
    """Give the vectors of a source their names: one for all of them, or one each."""
    if vectors.ndim not in (1, 2) or vectors.numel() == 0:
        raise ValueError(f"{label}: {key} is {tuple(vectors.shape)}, expected vectors (n, D) or one (D,)")
    vectors = vectors.reshape(-1, vectors.shape[-1])
    if isinstance(names, list):
        if len(names) != len(vectors):
            raise ValueError(f"{label}: {key} has {len(vectors)} vectors for the {len(names)} names in token")
        return [Word(name, vector[None], label) for name, vector in zip(names, vectors, strict=True)]
    if names is None and (key == _NAMELESS or key in _ENCODERS):
        raise ValueError(f"{label} does not say what its token is called ({key} is no name): pass token=")
    return [Word(key if names is None else names, vectors, label)]


def _check(words: Sequence[Word], tokenizer: CLIPTokenizer, encoder: Model) -> None:
    """Raise if a word cannot be learned."""
    vocabulary, D = tokenizer.get_vocab(), encoder.config.hidden_size
    seen: set[str] = set()
    for word in words:
        if not isinstance(word.token, str) or not word.token.strip():
            raise ValueError(f"a token should be a text that is not empty, found {word.token!r}")
        if word.vectors.shape[1] != D:
            raise ValueError(
                f"{word.label}: the vectors of {word.token!r} are {tuple(word.vectors.shape)}, expected (n, {D}) for "
                "this text encoder; others belong to another model family"
            )
        if not word.vectors.to(encoder.dtype).isfinite().all():
            raise ValueError(f"{word.label}: the vectors of {word.token!r} are not finite in {encoder.dtype}")
        needed = dict.fromkeys([*word.tokens, f"{word.token}_1"])
        known = [token for token in needed if token in vocabulary or token in seen]
        if known:
            raise ValueError(
                f"the tokenizer knows {', '.join(map(repr, known))} already: pass another token=, or forget it with "
                "unload_textual_inversion()"
            )
        seen.update(word.tokens)


# --- changing a tokenizer and its text encoder -----------------------------------------------------------------------


def _learn(words: Sequence[Word], tokenizer: CLIPTokenizer, encoder: Model) -> None:
    """Add words: to the table first, so that no other thread meets a token without a row."""
    tokens = [token for word in words for token in word.tokens]
    first = len(tokenizer)
    table = encoder.token_embed.weight.detach()
    rows = {i: table[i] for i in added_words(tokenizer).values()}
    rows |= dict(enumerate((vector for word in words for vector in word.vectors), start=first))
    _set_rows(encoder, _untaught(tokenizer, encoder), rows, tokenizer.eos_token_id)
    tokenizer.add_tokens(tokens)
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(first, first + len(tokens)))


def _forget(tokens: set[str], tokenizer: CLIPTokenizer, encoder: Model) -> None:
    """Remove words; the ids of those added after them move up."""
    before, table = _untaught(tokenizer, encoder), encoder.token_embed.weight.detach()
    vectors = {token: table[i] for token, i in added_words(tokenizer).items() if token not in tokens}
    tokenizer.remove_tokens(tokens)
    rows = {i: vectors[token] for token, i in added_words(tokenizer).items()}
    _set_rows(encoder, before, rows, tokenizer.eos_token_id)


def _untaught(tokenizer: CLIPTokenizer, encoder: Model) -> Untaught:
    """Return what the encoder was without new words; one that was saved with some is cut off before the first."""
    before = getattr(encoder, "_untaught", None)
    if before is None:
        weight, config, added = encoder.token_embed.weight, encoder.config, added_words(tokenizer)
        if added:
            weight = nn.Parameter(weight.detach()[: min(added.values())].clone(), requires_grad=weight.requires_grad)
            config = type(config)(**{**config, "vocab_size": len(weight)})
        before = Untaught(weight, config)
    return before


def _set_rows(encoder: Model, before: Untaught, rows: Mapping[int, Tensor], eos: int) -> None:
    """Make the embedding table that of ``before`` with these rows; without any, put the very tensor back."""
    now = encoder.token_embed.weight
    weight, config = before
    if (weight.dtype, weight.device) != (now.dtype, now.device):  # moved since
        weight = nn.Parameter(weight.detach().to(now), requires_grad=weight.requires_grad)
    if rows:
        table = weight.new_empty(max(len(weight), max(rows) + 1), weight.shape[1], requires_grad=False)
        with torch.no_grad():
            table[: len(weight)] = weight
            for i, row in rows.items():
                table[i] = row.to(table)
        # The end of a text is where its largest id stands only as long as no added token has a larger one.
        true_eos = {"eos_token_id": eos} if config.eos_token_id == LEGACY_EOS else {}
        weight = nn.Parameter(table, requires_grad=weight.requires_grad)
        config = type(config)(**{**config, "vocab_size": len(table), **true_eos})
    encoder.config, encoder.spec = config, clip_spec(config)
    encoder.token_embed.num_embeddings = len(weight)
    encoder.token_embed.weight = weight
    encoder._untaught = before if rows else None
