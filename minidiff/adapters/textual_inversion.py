"""Textual inversion: new words for the text encoder, each with one or several learned vectors in its embedding table.

    prompt "a <cat> cake"  ->  "a <cat> <cat>_1 <cat>_2 cake"  ->  ids  ->  rows of token_embed: (vocabulary + 3, D)

Gal et al. 2022 (https://arxiv.org/abs/2208.01618), section 3. A word with n vectors is n tokens, and ``expand`` writes
them into the prompt. Checked against ``diffusers.loaders.TextualInversionLoaderMixin``.

========================  ==========================================================================================
a file of                 holds
========================  ==========================================================================================
diffusers                 the token: (D,) or (n, D)
A1111, SD 1.x and 2.x     ``emb_params``: (n, D); OneTrainer spells it ``emp_params``
A1111 and others, SDXL    ``clip_l``: (n, 768), ``clip_g``: (n, 1280)
pivotal tuning            the same; before 2024 ``text_encoders_0``, ``text_encoders_1``
OneTrainer                also ``clip_l_out``, ``clip_g_out``, ``emp_params_out``: as many vectors as without ``_out``
========================  ==========================================================================================

Vectors that end in ``_out`` take the place of what the encoder returns for their tokens, of the layer that the UNet
reads (``minidiff.text.windows``): those without ``_out`` are zeros then.
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
_ENCODERS = {  # in files for two encoders
    "clip_l": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",
    "text_encoders_1": "text_encoder_2",
}
_NAMELESS = ("emb_params", "emp_params")  # in files that do not say what their token is called


class Word(NamedTuple):
    """A new token and its vectors (n, D), for one text encoder."""

    token: str
    vectors: Tensor
    label: str  # where it comes from, for error messages
    outputs: Tensor | None = None  # (n, D): what the encoder is to return in their places

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
            for vectors in addressed(read, one, where, pairs, chosen):
                words.setdefault(vectors.component, []).extend(words_of(vectors, several or name))
        check(words, pairs)
        teach(words, pairs)

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
                forget(gone, tokenizer, encoder)

    def _index(self) -> dict[str, Any]:
        """Raise ``ValueError`` before anything is written if words have outputs, see ``CLIPTokenizer``."""
        for tokenizer, _ in pairs_of(self.components).values():
            tokenizer.check_saveable()
        return super()._index()

    def maybe_convert_prompt(self, prompt: str | list[str], tokenizer: CLIPTokenizer) -> str | list[str]:
        """Write out the tokens of words with several vectors, as the reference's method of this name does."""
        return expand(prompt, tokenizer) if isinstance(prompt, str) else [expand(one, tokenizer) for one in prompt]

    def _pairs(self, tokenizer: CLIPTokenizer | None, text_encoder: Model | None) -> dict[str, Pair]:
        """Return tokenizers and text encoders by component, the given ones alone if there are some."""
        pairs = pairs_of(self.components)
        if tokenizer is None and text_encoder is None:
            if not pairs:
                raise ValueError("this pipeline has no text encoder with a tokenizer")
            return pairs
        if tokenizer is None or text_encoder is None:
            raise ValueError("give tokenizer= and text_encoder= together: a word is part of both")
        known = [component for component, pair in pairs.items() if pair[1] is text_encoder]
        return {known[0] if known else "text_encoder": (tokenizer, text_encoder)}


def pairs_of(parts: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the tokenizers and text encoders of a pipeline, by component."""
    return {
        f"text_encoder{suffix}": (parts[f"tokenizer{suffix}"], parts[f"text_encoder{suffix}"])
        for suffix in ("", "_2")
        if parts.get(f"tokenizer{suffix}") is not None and parts.get(f"text_encoder{suffix}") is not None
    }


# --- reading ---------------------------------------------------------------------------------------------------------


class Read(NamedTuple):
    """The vectors of a file for one text encoder."""

    component: str | None  # None if the file does not say
    label: str  # where it comes from
    key: str
    vectors: Tensor
    outputs: Tensor | None = None


def _read(source: Source, weight_name: str | None, where: Mapping[str, Any]) -> list[Read]:
    """Return the vectors of a source, for each text encoder that it is for."""
    if isinstance(source, Tensor):
        check_tensors("the given tensor", {_NAMELESS[0]: source})
        return [Read(None, "the given tensor", _NAMELESS[0], source)]
    if isinstance(source, Mapping) and "string_to_param" in source:
        raise CheckpointError(
            "string_to_param is the layout of A1111's pickles: pass state['string_to_param']['*'] and token= instead"
        )
    label, tensors, *_ = read_adapter(source, FILE_NAME, weight_name, **where)
    return read_tensors(label, tensors)


def read_tensors(label: str, tensors: Mapping[str, Tensor]) -> list[Read]:
    """Return the vectors among the tensors of an embedding, for each text encoder that it is for."""
    outputs = {f"{key}_out": key for key in (*_ENCODERS, *_NAMELESS)}
    if alone := [key for key, of in outputs.items() if key in tensors and of not in tensors]:
        raise CheckpointError(f"{label} holds {alone[0]} without {outputs[alone[0]]}: nothing says what goes in")
    vectors = {key: one for key, one in tensors.items() if key not in outputs}
    if len(vectors) != 1 and not (vectors and vectors.keys() <= _ENCODERS.keys()):
        if what := no_adapter(tensors, "a textual inversion"):
            raise CheckpointError(f"{label} is {what}")
        raise CheckpointError(
            f"{label} holds {', '.join(shortened(list(tensors)))}; expected one tensor under the name of its token or "
            f"as {_NAMELESS[0]}, or clip_l and clip_g, or text_encoders_0 and text_encoders_1"
        )
    return [Read(_ENCODERS.get(key), label, key, one, tensors.get(f"{key}_out")) for key, one in vectors.items()]


def addressed(
    read: list[Read], source: Source, where: Mapping[str, Any], pairs: Mapping[str, Pair], chosen: bool
) -> list[Read]:
    """Return vectors with the text encoder that they go to, which the caller has ``chosen`` or the file says."""
    first = next(iter(pairs))
    if chosen:  # of a file for both, the other half is left alone
        read = [one._replace(component=first) for one in read if len(read) == 1 or one.component == first]
    elif len(pairs) == 2:
        read = _of_both(read, source, where, pairs)
    read = [one._replace(component=one.component or first) for one in read]
    if lost := [f"{one.label}: {one.key} is for {one.component}" for one in read if one.component not in pairs]:
        raise ValueError(f"{lost[0]}, which this pipeline does not have")
    return read


def _of_both(read: list[Read], source: Source, where: Mapping[str, Any], pairs: Mapping[str, Pair]) -> list[Read]:
    """Return vectors for both text encoders: of a file for one, with those of the file beside it."""
    component, label, key, vectors, _ = first = read[0]
    if component is not None:
        return read
    name = Path(label).name
    if name.startswith(f"{_STEM}_2"):
        return [first._replace(component="text_encoder_2")]
    if isinstance(source, str | Path) and name.startswith(_STEM):
        path = Path(source)
        repo = Repo(path.parent) if path.is_file() else Repo(source, **where)
        if beside := repo.optional_file(f"{_STEM}_2{name.removeprefix(_STEM)}"):
            second = _read(beside, None, {})[0]._replace(component="text_encoder_2")
            return [first._replace(component="text_encoder"), second]
    fits = [one for one, (_, encoder) in pairs.items() if encoder.config.hidden_size == vectors.shape[-1]]
    reads = f"which {' and '.join(fits)} reads" if fits else "which neither reads"
    raise ValueError(
        f"{label}: {key} {tuple(vectors.shape)} is for one text encoder, and this pipeline has two: pass tokenizer= "
        f"and text_encoder= to teach one of them alone (it is of width {vectors.shape[-1]}, {reads})"
    )


def words_of(read: Read, names: str | list[str] | None) -> list[Word]:
    """Give the vectors of a source their names: one for all of them, or one each."""
    _, label, key, vectors, outputs = read
    if vectors.ndim not in (1, 2) or vectors.numel() == 0:
        raise ValueError(f"{label}: {key} is {tuple(vectors.shape)}, expected vectors (n, D) or one (D,)")
    if outputs is not None and outputs.shape != vectors.shape:
        raise ValueError(f"{label}: {key}_out is {tuple(outputs.shape)}, expected {tuple(vectors.shape)} like {key}")
    vectors, outputs = (None if x is None else x.reshape(-1, x.shape[-1]) for x in (vectors, outputs))
    if isinstance(names, list):
        if len(names) != len(vectors):
            raise ValueError(f"{label}: {key} has {len(vectors)} vectors for the {len(names)} names in token")
        of_words = [None] * len(names) if outputs is None else outputs[:, None]
        return [Word(*one[:2], label, one[2]) for one in zip(names, vectors[:, None], of_words, strict=True)]
    if names is None and (key in _NAMELESS or key in _ENCODERS):
        raise ValueError(f"{label} does not say what its token is called ({key} is no name): pass token=")
    return [Word(key if names is None else names, vectors, label, outputs)]


def check(words: Mapping[str, Sequence[Word]], pairs: Mapping[str, Pair]) -> None:
    """Raise ``ValueError`` if a text encoder cannot learn its words, component by component."""
    for component, new in words.items():
        _check(new, *pairs[component])


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
        given = [word.vectors, *([] if word.outputs is None else [word.outputs])]
        if not all(one.to(encoder.dtype).isfinite().all() for one in given):
            raise ValueError(f"{word.label}: the vectors of {word.token!r} are not finite in {encoder.dtype}")
        needed = dict.fromkeys([*word.tokens, f"{word.token}_1"])
        if known := [token for token in needed if token in vocabulary or token in seen]:
            raise ValueError(
                f"the tokenizer knows {', '.join(map(repr, known))} already: pass another token=, or forget it with "
                "unload_textual_inversion()"
            )
        seen.update(word.tokens)


# --- changing a tokenizer and its text encoder -----------------------------------------------------------------------


def teach(words: Mapping[str, Sequence[Word]], pairs: Mapping[str, Pair]) -> None:
    """Add words that ``check`` has let pass, component by component."""
    for component, new in words.items():
        _learn(new, *pairs[component])
        for word in new:
            logger.info("%s knows %r now: %d vector(s)", component, word.token, len(word.vectors))


def _learn(words: Sequence[Word], tokenizer: CLIPTokenizer, encoder: Model) -> None:
    """Add words: to the table first, so that no other thread meets a token without a row."""
    tokens = [token for word in words for token in word.tokens]
    first = len(tokenizer)
    table = encoder.token_embed.weight.detach()
    rows = {i: table[i] for i in added_words(tokenizer).values()}
    rows |= dict(enumerate((vector for word in words for vector in word.vectors), start=first))
    _set_rows(encoder, _untaught(tokenizer, encoder), rows, tokenizer.eos_token_id)
    tokenizer.add_tokens(tokens)
    told = [word for word in words if word.outputs is not None]
    tokenizer.outputs = tokenizer.outputs | {
        token: vector.detach() for word in told for token, vector in zip(word.tokens, word.outputs, strict=True)
    }
    assert tokenizer.convert_tokens_to_ids(tokens) == list(range(first, first + len(tokens)))


def forget(tokens: set[str], tokenizer: CLIPTokenizer, encoder: Model) -> None:
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
