"""New words for text encoders against diffusers: token for token, and in float64 what the encoders make of them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import minidiff
from tests.theirs import diffusers, relative_error

Pipes = tuple[Any, Any]
BOUND = 1e-10  # measured: at most 3.5e-15 everywhere below
PROMPTS = ["a <cat> and a red heart", "<cat>", "two cats, <dog> <cat>, sky <dog>", "no new word"]


def load(library: Any, name: str, folder: Path) -> Any:
    pipe = getattr(library, name).from_pretrained(folder, torch_dtype=torch.float64).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cleaned(pipes: Pipes) -> Iterator[Pipes]:
    yield pipes
    pipes[0].unload_textual_inversion()
    for suffix in ("", "_2") if hasattr(pipes[1], "tokenizer_2") else ("",):
        pair = {f"{name}": getattr(pipes[1], f"{name}{suffix}") for name in ("tokenizer", "text_encoder")}
        pipes[1].unload_textual_inversion(**pair)


@pytest.fixture
def sd(loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    yield from cleaned(loaded["sd"])


@pytest.fixture
def xl(loaded: dict[str, Pipes]) -> Iterator[Pipes]:
    yield from cleaned(loaded["xl"])


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / 3


def assert_same_texts(pipes: Pipes, prompts: list[str] = PROMPTS) -> None:
    for prompt in prompts:
        texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for pipe in pipes]
        assert texts[0] == texts[1]
        found = [pipe.tokenizer(text).input_ids for pipe, text in zip(pipes, texts, strict=True)]
        assert found[0] == found[1]
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    results = [pipe.encode_prompt(prompts, **arguments, negative_prompt=prompts[::-1]) for pipe in pipes]
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < BOUND


def test_one_vector_and_several(sd: Pipes) -> None:
    before = sd[0].encode_prompt(PROMPTS, "cpu", 1, False)[0]
    for pipe in sd:
        pipe.load_textual_inversion({"<cat>": vectors(24)})
        pipe.load_textual_inversion({"<dog>": vectors(3, 24, seed=1)})
        assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    assert_same_texts(sd)
    after = sd[0].encode_prompt(PROMPTS, "cpu", 1, False)[0]
    assert all(relative_error(a, b) > 1e-2 for a, b in zip(after[:3], before[:3], strict=True))
    assert torch.equal(after[3], before[3])


def test_sources_and_names(sd: Pipes, tmp_path: Path) -> None:
    """A file, a folder, A1111's key, a tensor, lists of these, a tensor with a name for each vector."""
    (tmp_path / "folder").mkdir()
    save_file({"its name": vectors(2, 24, seed=1)}, tmp_path / "folder" / "learned_embeds.safetensors")
    save_file({"emb_params": vectors(2, 24, seed=2)}, tmp_path / "a1111.safetensors")
    for pipe in sd:
        pipe.load_textual_inversion(str(tmp_path / "folder"))
        pipe.load_textual_inversion(str(tmp_path / "a1111.safetensors"), token="<a1111>")
        pipe.load_textual_inversion([{"x": vectors(24, seed=3)}, vectors(2, 24, seed=4)], token=["<one>", "<two>"])
        pipe.load_textual_inversion(vectors(2, 24, seed=5), token=["<s0>", "<s1>"])
    assert sd[0].tokenizer.get_vocab() == sd[1].tokenizer.get_vocab()
    assert_same_texts(sd, ["a <a1111> its name <one>", "<two><s1> <s0>, <s0>", "ITS NAME <A1111>"])


def test_unload(sd: Pipes) -> None:
    """One of two words; the other one's ids move up. Then all: tensor, ids and configuration are those from before."""
    ours, theirs = sd
    encoder, vocabulary = ours.text_encoder, ours.tokenizer.get_vocab()
    weight, config = encoder.token_embed.weight, encoder.config
    for pipe in sd:
        pipe.load_textual_inversion({"<cat>": vectors(24)})
        pipe.load_textual_inversion({"<dog>": vectors(3, 24, seed=1)})
        pipe.unload_textual_inversion("<cat>")
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()
    assert_same_texts(sd)
    ours.unload_textual_inversion("<dog>")  # with all three vectors; theirs wants each name
    assert encoder.token_embed.weight is weight and encoder.config is config
    assert ours.tokenizer.get_vocab() == vocabulary


def test_two_encoders(xl: Pipes, tmp_path: Path) -> None:
    """Theirs takes each half of the file by hand, ours the file.

    The checkpoint says ``eos_token_id`` 2, as all published ones do, with which theirs pools where the largest id
    stands: from then on that of the new word, and no longer the end of the text. Ours puts the true id there; so it is
    compared with theirs with the true id.
    """
    ours, theirs = xl
    file = {"clip_l": vectors(2, 24), "clip_g": vectors(2, 16, seed=1)}
    save_file(file, tmp_path / "both.safetensors")
    ours.load_textual_inversion(tmp_path / "both.safetensors", token="<cat>")
    theirs.load_textual_inversion({"": file["clip_l"]}, token="<cat>")
    second = {"tokenizer": theirs.tokenizer_2, "text_encoder": theirs.text_encoder_2}
    theirs.load_textual_inversion({"": file["clip_g"]}, token="<cat>", **second)
    wrong = theirs.encode_prompt(PROMPTS[0])[2]
    theirs.text_encoder_2.text_model.eos_token_id = theirs.tokenizer_2.eos_token_id
    try:
        assert_same_texts(xl)
        assert relative_error(ours.encode_prompt(PROMPTS[0])[2], wrong) > 1e-2
    finally:
        theirs.text_encoder_2.text_model.eos_token_id = 2
    assert ours.text_encoder_2.config.eos_token_id == ours.tokenizer_2.eos_token_id
    ours.unload_textual_inversion("<cat>")
    assert ours.text_encoder_2.config.eos_token_id == 2 and len(ours.tokenizer) == len(ours.tokenizer_2) == 540


def test_a_name_for_each_vector_of_two_encoders(xl: Pipes) -> None:
    ours, theirs = xl
    file = {"clip_l": vectors(2, 24), "clip_g": vectors(2, 16, seed=1)}
    names = ["<s0>", "<s1>"]
    ours.load_textual_inversion(file, token=names)
    theirs.load_textual_inversion(file["clip_l"], token=names)
    second = {"tokenizer": theirs.tokenizer_2, "text_encoder": theirs.text_encoder_2}
    theirs.load_textual_inversion(file["clip_g"], token=names, **second)
    prompt, plain = "<s1> a <s0>", {"num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    found = [pipe.encode_prompt(prompt, device="cpu", **plain)[0] for pipe in xl]
    assert relative_error(*found) < BOUND


def test_a_picture(sd: Pipes) -> None:
    for pipe in sd:
        pipe.load_textual_inversion({"<cat>": vectors(2, 24)})
    options = {"num_inference_steps": 2, "output_type": "latent"}
    found = [pipe(PROMPTS[0], **options, generator=torch.Generator().manual_seed(0)).images for pipe in sd]
    assert relative_error(*found) < BOUND


def test_saved_with_new_words(sd: Pipes, tmp_path: Path) -> None:
    """The folder loads in both libraries, pools at the end of the text there, and can be made to forget."""
    sd[0].load_textual_inversion({"<cat>": vectors(2, 24)})
    expected = sd[0].encode_prompt(PROMPTS[0], "cpu", 1, False)[0]
    sd[0].save_pretrained(tmp_path)
    for pipe in (load(one, "StableDiffusionPipeline", tmp_path) for one in (minidiff, diffusers)):
        assert relative_error(pipe.encode_prompt(PROMPTS[0], "cpu", 1, False)[0], expected) < BOUND
    ours, plain = load(minidiff, "StableDiffusionPipeline", tmp_path), sd[0].text_encoder._untaught
    assert ours.text_encoder.config.eos_token_id == ours.tokenizer.eos_token_id != 2
    ours.unload_textual_inversion()
    assert torch.equal(ours.text_encoder.token_embed.weight, plain.weight) and len(ours.tokenizer) == 540
