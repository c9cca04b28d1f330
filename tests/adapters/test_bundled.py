"""Embeddings inside a LoRA, and those that stand for the encoder's output: loaded, and gone without a trace."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minidiff
from minidiff.errors import CheckpointError
from tests.loras import Pipes, assert_same, cleaned, draw, every, outputs, peft
from tests.pictures import seeded
from tests.theirs import relative_error

WIDTHS = {"clip_l": 24, "clip_g": 16}  # of the tiny text encoders
PROMPT = "a <cat> and a <dog>, <cat>"
BOUND = 1e-10  # measured: at most 1.5e-15


@pytest.fixture(scope="module")
def loaded(loaded: dict[str, Pipes]) -> dict[str, Pipes]:
    # Theirs would pool where the largest id stands, which is a new word's.
    loaded["xl"][1].text_encoder_2.text_model.eos_token_id = loaded["xl"][1].tokenizer_2.eos_token_id
    return loaded


def pairs_of(pipe: Any) -> list[tuple[Any, Any]]:
    suffixes = ("", "_2") if hasattr(pipe, "tokenizer_2") else ("",)
    return [tuple(getattr(pipe, f"{name}{suffix}") for name in ("tokenizer", "text_encoder")) for suffix in suffixes]


@pytest.fixture(params=["sd", "xl"])
def pipes(request: pytest.FixtureRequest, loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    """Ours and theirs; ours must come out with the very embedding tables and vocabularies that it went in with."""
    ours, theirs = pair = loaded[request.param]
    before = [
        (encoder.token_embed.weight, encoder.config, tokenizer.get_vocab()) for tokenizer, encoder in pairs_of(ours)
    ]
    yield from cleaned(pair)
    ours.unload_textual_inversion()
    for tokenizer, encoder in pairs_of(theirs):
        theirs.unload_textual_inversion(tokenizer=tokenizer, text_encoder=encoder)
    for (tokenizer, encoder), (weight, config, vocabulary) in zip(pairs_of(ours), before, strict=True):
        assert encoder.token_embed.weight is weight and encoder.config == config
        assert tokenizer.get_vocab() == vocabulary and not tokenizer.outputs and not tokenizer.owners


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64) / 3


def embeddings(pipe: Any, n: int = 2, seed: int = 0) -> dict[str, Tensor]:
    names = list(WIDTHS)[: len(pairs_of(pipe))]
    return {name: vectors(n, WIDTHS[name], seed=seed + k) for k, name in enumerate(names)}


def bundled(pipe: Any, word: str, **options: Any) -> dict[str, Tensor]:
    return {f"bundle_emb.{word}.{name}": one for name, one in embeddings(pipe, **options).items()}


def encoded(pipe: Any, prompt: str = PROMPT, **options: Any) -> list[Tensor]:
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False} | options
    return [one for one in pipe.encode_prompt(prompt, **arguments) if one is not None]


# --- embeddings inside a LoRA ----------------------------------------------------------------------------------------


def test_words_come_with_the_lora_and_go_with_it(pipes: Pipes) -> None:
    """The reference is given LoRA and embeddings apart, and each half of an embedding by itself."""
    ours, theirs = pipes
    lora = peft(draw(theirs, only=every(3)))
    plain = outputs(ours), encoded(ours)
    found = ours.load_lora_weights(lora | bundled(ours, "<cat>") | bundled(ours, "<dog>", n=1, seed=5), "pet")
    assert found.words == ("<cat>", "<dog>") and str(found).endswith(", and brings the words <cat>, <dog>")
    theirs.load_lora_weights(dict(lora))
    for word, options in (("<cat>", {}), ("<dog>", {"n": 1, "seed": 5})):
        for (tokenizer, encoder), one in zip(pairs_of(theirs), embeddings(ours, **options).values(), strict=True):
            theirs.load_textual_inversion(one, token=word, tokenizer=tokenizer, text_encoder=encoder)
    assert_same(outputs(ours), outputs(theirs))
    for a, b, before in zip(encoded(ours), encoded(theirs), plain[1], strict=True):
        assert relative_error(a, b) < BOUND and relative_error(a, before) > 1e-2
    ours.unload_lora_weights()
    assert all(map(torch.equal, [*outputs(ours), *encoded(ours)], [*plain[0], *plain[1]]))


def test_several_adapters_and_words_of_ones_own(pipes: Pipes) -> None:
    ours = pipes[0]
    lora = peft(draw(pipes[1], only=every(4)))
    ours.load_textual_inversion(embeddings(ours, seed=9), token="<mine>")
    ours.load_lora_weights(lora | bundled(ours, "<cat>"), "one")
    ours.load_lora_weights(lora | bundled(ours, "<dog>", seed=3), "two")
    with_both = encoded(ours, "<dog> <mine>")
    ours.delete_adapters("one")
    for tokenizer, _ in pairs_of(ours):
        assert tokenizer.get_vocab().keys() & {"<mine>", "<dog>", "<dog>_1", "<cat>", "<cat>_1"} == {
            "<mine>",
            "<dog>",
            "<dog>_1",
        }
    ours.set_adapters("two")
    assert all(map(torch.equal, encoded(ours, "<dog> <mine>"), with_both))  # their ids have moved, and mean the same
    ours.unload_textual_inversion("<dog>")  # one may forget a word that came with an adapter oneself
    ours.unload_lora_weights()
    assert all("<mine>" in tokenizer.get_vocab() for tokenizer, _ in pairs_of(ours))


def test_a_fused_adapter_leaves_its_words(loaded: dict[str, Pipes], tmp_path: Path) -> None:
    """As its weights: the saved pipeline knows them."""
    ours, theirs = loaded["sd"]
    ours = minidiff.StableDiffusionPipeline(**{name: copy.deepcopy(part) for name, part in ours.components.items()})
    lora = peft(draw(theirs, only=every(4)))
    ours.load_lora_weights(lora | bundled(ours, "<cat>"), "pet")
    ours.fuse_lora()
    ours.unload_lora_weights()
    expected = encoded(ours)
    ours.load_lora_weights(lora, "another")
    ours.unload_lora_weights()
    assert all(map(torch.equal, encoded(ours), expected)) and "<cat>_1" in ours.tokenizer.get_vocab()
    ours.save_pretrained(tmp_path)
    again = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float64)
    assert relative_error(encoded(again)[0], expected[0]) < 1e-10


def test_a_pipeline_leaves_the_words_of_others_alone(loaded: dict[str, Pipes]) -> None:
    """Pipelines may share text encoders, and not the UNet that has the adapter."""
    ours, theirs = loaded["sd"]
    another = minidiff.StableDiffusionPipeline(**ours.components | {"unet": copy.deepcopy(ours.unet)})
    lora = {key: one for key, one in peft(draw(theirs, only=every(4))).items() if key.startswith("unet.")}
    assert ours.load_lora_weights(lora | bundled(ours, "<cat>")).adapter_name == "default_0"
    with pytest.raises(ValueError, match="there is an adapter 'default_0' already"):
        another.load_lora_weights(lora, "default_0")
    for _ in range(2):
        another.load_lora_weights(lora)
    another.delete_adapters("default_1")
    another.unload_lora_weights()
    assert "<cat>" in ours.tokenizer.get_vocab()
    ours.unload_lora_weights()
    assert "<cat>" not in ours.tokenizer.get_vocab()


def test_an_optimized_pipeline(loaded: dict[str, Pipes], tmp_path: Path) -> None:
    ours, theirs = loaded["sd"]
    ours.save_pretrained(tmp_path)
    lora = {key: one.float() for key, one in peft(draw(theirs, only=every(4))).items()}
    drawn = []
    for optimized in (False, True):
        pipe = minidiff.StableDiffusionPipeline.from_pretrained(tmp_path)
        if optimized:
            pipe.optimize()
        pipe.load_lora_weights(lora | {f"bundle_emb.<cat>.{key}": one.float() for key, one in outputs_of(pipe).items()})
        drawn.append(pipe("a <cat>", num_inference_steps=2, output_type="latent", generator=seeded(0)).images)
    assert relative_error(*drawn) < 1e-5  # measured: 2.2e-6, in float32


def test_what_a1111_embeddings_hold(loaded: dict[str, Pipes]) -> None:
    ours, theirs = loaded["sd"]
    lora, one = peft(draw(theirs, only=every(5))), vectors(2, 24)
    ours.load_textual_inversion(one, token="<cat>")
    expected = encoded(ours)[0]
    ours.unload_textual_inversion()
    for word, name in (("<cat>", "string_to_param.*"), ("<cat>", "emb_params"), ("<cat>", "clip_l")):
        ours.load_lora_weights(lora | {f"bundle_emb.{word}.{name}": one})
        ours.disable_lora()
        assert torch.equal(encoded(ours)[0], expected)
        ours.unload_lora_weights()
    ours.load_lora_weights(lora | {"bundle_emb.v1.5 cat.clip_l": one})
    assert "v1.5 cat_1" in ours.tokenizer.get_vocab()
    ours.unload_lora_weights()


# --- outputs ---------------------------------------------------------------------------------------------------------


def outputs_of(pipe: Any, n: int = 2) -> dict[str, Tensor]:
    found = embeddings(pipe, n)
    return {key: torch.zeros_like(one) for key, one in found.items()} | {
        f"{key}_out": one for key, one in found.items()
    }


@pytest.mark.parametrize("skip", [None, 1])
@pytest.mark.parametrize("inside", [False, True])
def test_outputs_take_the_place_of_states(pipes: Pipes, tmp_path: Path, inside: bool, skip: int | None) -> None:
    """By OneTrainer's definition: zeros go in, what comes out at the tokens is replaced, the pooled state is not."""
    ours = pipes[0]
    given = outputs_of(ours)
    inputs = {key: one for key, one in given.items() if not key.endswith("_out")}
    ours.load_textual_inversion(inputs, token="<cat>")
    expected = encoded(ours, clip_skip=skip)
    at = 0
    for (tokenizer, encoder), key in zip(pairs_of(ours), inputs, strict=True):
        ids = tokenizer(ours.maybe_convert_prompt(PROMPT, tokenizer), padding="max_length").input_ids
        D = encoder.config.hidden_size
        assert [tokenizer.convert_ids_to_tokens(i) for i in ids].count("<cat>_1") == 2
        for k, token in enumerate(("<cat>", "<cat>_1")):
            for place in (i for i, one in enumerate(ids) if one == tokenizer.convert_tokens_to_ids(token)):
                expected[0][0, place, at : at + D] = given[f"{key}_out"][k]
        at += D
    ours.unload_textual_inversion()
    ours.load_textual_inversion(embeddings(ours, seed=7), token="<other>")  # it is forgotten before: ids move
    if inside:
        lora = peft(draw(pipes[1], only=lambda layer: layer[1].startswith("down_blocks") and layer[0] % 9 == 0))
        ours.load_lora_weights(lora | {f"bundle_emb.<cat>.{key}": one for key, one in given.items()})
    else:
        ours.load_textual_inversion(given, token="<cat>")
    ours.unload_textual_inversion("<other>")
    assert all(map(torch.equal, encoded(ours, clip_skip=skip), expected))
    for whole in (ours, ours.tokenizer):
        with pytest.raises(ValueError, match=r"'<cat>', '<cat>_1' stand for outputs.*unload_textual_inversion\(\)"):
            whole.save_pretrained(tmp_path / "saved")
    ours.unload_lora_weights()
    assert ("<cat>" in ours.tokenizer.get_vocab()) != inside
    ours.unload_textual_inversion()
    assert not (tmp_path / "saved").exists()


def test_outputs_of_a_file_for_one_encoder(loaded: dict[str, Pipes], tmp_path: Path) -> None:
    """OneTrainer's files for SD 1.x and 2.x; with a name for each vector; a picture is drawn with them."""
    ours = loaded["sd"][0]
    file = {"emp_params": torch.zeros(2, 24), "emp_params_out": vectors(2, 24).float()}
    save_file(file, tmp_path / "cat.safetensors")
    with pytest.raises(ValueError, match=r"cat.safetensors does not say what its token is called \(emp_params is no"):
        ours.load_textual_inversion(tmp_path / "cat.safetensors")
    ours.load_textual_inversion(tmp_path / "cat.safetensors", token=["<s0>", "<s1>"])
    states = encoded(ours, "<s1> <s0>")[0]
    assert torch.equal(states[0, 1:3], load_file(tmp_path / "cat.safetensors")["emp_params_out"].double().flip(0))
    long = encoded(ours, "a <s1>, " * 40, long_prompt="chunk")[0]
    assert long.shape[1] > 77 and torch.equal(long[0, 79], states[0, 1])
    ours.unload_textual_inversion()


def test_outputs_of_two_files(loaded: dict[str, Pipes], tmp_path: Path) -> None:
    """diffusers' names for the files of two encoders, with what OneTrainer trains in them."""
    ours = loaded["xl"][0]
    for end, (_, encoder) in zip(("", "_2"), pairs_of(ours), strict=True):
        file = {f"emp_params{out}": torch.ones(1, encoder.config.hidden_size) for out in ("", "_out")}
        save_file(file, tmp_path / f"learned_embeds{end}.safetensors")
    ours.load_textual_inversion(tmp_path, token="<cat>")
    assert [list(tokenizer.outputs) for tokenizer, _ in pairs_of(ours)] == [["<cat>"]] * 2
    ours.unload_textual_inversion()
    assert not any(tokenizer.outputs for tokenizer, _ in pairs_of(ours))


# --- pivotal tuning --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("clip_l", "clip_g"), ("text_encoders_0", "text_encoders_1")])
def test_pivotal_tuning(pipes: Pipes, tmp_path: Path, names: tuple[str, str]) -> None:
    """As train_dreambooth_lora_sdxl_advanced.py says to: each half by hand; and the file as it is."""
    ours, theirs = pipes
    file = dict(zip(names, embeddings(ours).values(), strict=False))
    save_file(file, tmp_path / "emb.safetensors")
    state_dict, tokens = load_file(tmp_path / "emb.safetensors"), ["<s0>", "<s1>"]
    for pipe in pipes:
        for (tokenizer, encoder), name in zip(pairs_of(pipe), names, strict=False):
            pipe.load_textual_inversion(state_dict[name], token=tokens, text_encoder=encoder, tokenizer=tokenizer)
    expected = encoded(ours, "<s1> a <s0>")
    for a, b in zip(expected, encoded(theirs, "<s1> a <s0>"), strict=True):
        assert relative_error(a, b) < BOUND
    ours.unload_textual_inversion()
    ours.load_textual_inversion(tmp_path / "emb.safetensors", token=tokens)
    assert all(map(torch.equal, encoded(ours, "<s1> a <s0>"), expected))


# --- bad input -------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, Tensor], type[Exception], str]] = {
    "of no layout": ({"bundle_emb.<dog>.x": vectors(24)}, CheckpointError, r"no embedding in any.*bundle_emb.<dog>.x"),
    "of another width": ({"bundle_emb.<dog>.clip_l": vectors(1, 9)}, ValueError, r"vectors of '<dog>' are \(1, 9\)"),
    "for another encoder": (
        {"bundle_emb.<dog>.clip_g": vectors(1, 16)}, ValueError, "bundle_emb.<dog>: clip_g is for text_encoder_2",
    ),
    "an output alone": ({"bundle_emb.<dog>.clip_l_out": vectors(1, 24)}, CheckpointError, "clip_l_out without clip_l"),
    "another output": (
        {"bundle_emb.<dog>.clip_l": vectors(1, 24), "bundle_emb.<dog>.clip_l_out": vectors(2, 24)},
        ValueError, r"clip_l_out is \(2, 24\), expected \(1, 24\) like clip_l",
    ),
    "known already": ({"bundle_emb.<cat>.clip_l": vectors(1, 24)}, ValueError, "the tokenizer knows '<cat>' already"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_half_loaded(loaded: dict[str, Pipes], name: str) -> None:
    """Neither LoRA nor word, if one of them does not fit."""
    tensors, kind, message = WRONG[name]
    ours, theirs = loaded["sd"]
    lora = peft(draw(theirs, only=every(5)))
    ours.load_textual_inversion(vectors(24), token="<cat>")
    before, vocabulary = ours.text_encoder.token_embed.weight, ours.tokenizer.get_vocab()
    good = {"bundle_emb.<good>.clip_l": vectors(24)}
    for file, wanted in (
        (lora | good | tensors, (kind, message)),
        (good | {"unet.x": vectors(1)}, (CheckpointError, "unet.x")),
    ):
        with pytest.raises(wanted[0], match=wanted[1]):
            ours.load_lora_weights(file)
        assert ours.text_encoder.token_embed.weight is before and ours.tokenizer.get_vocab() == vocabulary
        assert ours.get_list_adapters() == {} and not ours.tokenizer.owners
    ours.unload_textual_inversion()


def test_words_without_a_text_encoder(loaded: dict[str, Pipes]) -> None:
    alone = type(loaded["sd"][0])(**loaded["sd"][0].components | {"text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="the given state dict brings words, and this pipeline has no text encoder"):
        alone.load_lora_weights({"unet.x.alpha": torch.tensor(1.0), "bundle_emb.<cat>.clip_l": torch.ones(1, 24)})


def test_words_alone_and_exchanged(loaded: dict[str, Pipes]) -> None:
    ours, theirs = loaded["sd"]
    lora, words = peft(draw(theirs, only=every(5))), bundled(ours, "<cat>")
    with pytest.raises(CheckpointError, match="holds only embeddings: pass the tensors of each to load_textual_invers"):
        ours.load_lora_weights(words)
    ours.load_lora_weights(lora, "one")
    with pytest.raises(ValueError, match="brings words, which hotswap=True cannot exchange: delete 'one' first"):
        ours.load_lora_weights(lora | words, "one", hotswap=True)
    ours.unload_lora_weights()
    assert "<cat>" not in ours.tokenizer.get_vocab()
