"""Weighted prompts: nothing is lost, every mistake is its own error; and wrong arguments of long prompts."""

import random
import re
from typing import Any

import pytest
import torch

from minidiff import StableDiffusionPipeline, prompts
from minidiff.pipelines.request import Request
from tests.tiny import save_tiny

PIECES = {
    "": [("", 1.0)],
    "a cat": [("a cat", 1.0)],
    "a (cat)": [("a ", 1.0), ("cat", 1.1)],
    "((a)) b": [("a", 1.1 * 1.1), (" b", 1.0)],
    "[a]b": [("a", 1 / 1.1), ("b", 1.0)],
    "(a:1.3)": [("a", 1.3)],
    "(a:1.3 )(b: -.5)": [("a", 1.3), ("b", -0.5)],
    "(a [b:c] d:2)": [("a ", 2.0), ("b:c", 2 * (1 / 1.1)), (" d", 2.0)],
    "(a:1.3 b)": [("a:1.3 b", 1.1)],  # a weight stands at the end
    "(a:b)": [("a:b", 1.1)],
    "(a:)": [("a:", 1.1)],
    "(a::2)": [("a:", 2.0)],
    "a:2": [("a:2", 1.0)],
    "()": [("", 1.0)],
    "(:2)": [("", 1.0)],
    r"\(a\) \[b\] \\": [(r"(a) [b] " + "\\", 1.0)],
    r"(a\):1.5)": [("a)", 1.5)],
    r"a \cat\ ": [(r"a \cat" + "\\ ", 1.0)],
    "a\n(b\n)": [("a\n", 1.0), ("b\n", 1.1)],
    "CAN AND\u00c9E <lora> (a|b)": [("CAN AND\u00c9E <lora> ", 1.0), ("a|b", 1.1)],
}


@pytest.mark.parametrize("text", PIECES)
def test_pieces_and_weights(text: str) -> None:
    assert prompts.parse(text) == PIECES[text]


WRONG = {
    "a (cat": r"'\(' is not closed; write \\\( if it is text \(at position 2 of the prompt 'a \(cat'\)",
    "a cat)": r"'\)' closes nothing; write \\\) .*position 5",
    "a cat]": r"'\]' closes nothing",
    "(" * 101 + ")" * 101: "brackets are more than 100 deep here .at position 100 of the prompt '...\\(\\(",
    "(a)" * 40_000: "the prompt has 120,000 characters; expected at most 100,000",
    "(a]": r"'\]' closes nothing.*position 2",
    "[a)": r"'\)' closes nothing",
    "a :1.3)": r"'\)' closes nothing.*position 6",
    "[a (b:1.3": r"'\(' is not closed.*position 3",
    "([a:1.3)": r"'\)' closes nothing.*position 7",
    "(a:1.2.3)": r"the weight '1.2.3' is not a number.*position 2",
    "(a:.)": "the weight '.' is not a number",
    "[a:b:0.5]": r"\[from:to:when\].*not implemented.*position 4",
    "[a:10]": r"\[from:to:when\]",
    "[a|b]": r"\[one\|other\].*not implemented",
    "a cat BREAK a dog": "BREAK is not implemented; if it is a word, write it in lower case.*position 6",
    "a cat AND a dog": "AND is not implemented",
    "a cat <lora:cats:1>": "<lora: is not implemented",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_read(text: str) -> None:
    with pytest.raises(ValueError, match=WRONG[text]):
        prompts.parse(text)


def grown(rng: random.Random, depth: int) -> tuple[str, list[tuple[str, float]]]:
    """Return a random well-formed prompt and what it means."""
    written, meant = "", []
    for _ in range(rng.randrange(4)):
        kind = rng.randrange(5) if depth else 0
        if kind in (0, 1):
            text = "".join(rng.choices("ab ,:.1|\u00e9()[]\\", k=rng.randrange(6)))
            written += re.sub(r"([\\()\[\]])", r"\\\1", text) + ";"  # so that no piece ends like a weight
            meant.append((text + ";", 1.0))
            continue
        inside, pieces = grown(rng, depth - 1)
        inside = inside.replace("|", "/") if kind == 4 else inside
        factor = {2: 1.1, 3: round(rng.uniform(-1, 3), 2), 4: 1 / 1.1}[kind]
        written += {2: f"({inside})", 3: f"({inside}:{factor})", 4: f"[{inside}]"}[kind]
        meant += [(text.replace("|", "/") if kind == 4 else text, weight * factor) for text, weight in pieces]
    return written, meant


def test_well_formed_prompts_mean_what_they_were_made_from() -> None:
    rng = random.Random(0)
    for _ in range(500):
        written, meant = grown(rng, 4)
        found = [(sign, weight) for text, weight in prompts.parse(written) for sign in text]  # sign by sign
        expected = [(sign, weight) for text, weight in meant for sign in text]
        assert found == expected, written


def test_nothing_is_lost_of_any_text() -> None:
    rng = random.Random(1)
    signs = re.compile(r"\\([\\()\[\]])|:\s*[+-]?[\d.]+\s*\)|[()\[\]]")
    read = 0
    for _ in range(3000):
        text = "".join(rng.choices(r"()[]\:|1.- aB", k=rng.randrange(10)))
        try:
            pieces = prompts.parse(text)
        except ValueError as error:
            assert "position" in str(error)
            continue
        read += 1
        assert "".join(part for part, _ in pieces) == signs.sub(lambda found: found[1] or "", text)
    assert read > 300


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(save_tiny(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_wrong_arguments(pipe: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="long_prompt should be one of cut, chunk, found 'cat'"):
        pipe("a", long_prompt="cat")
    with pytest.raises(ValueError, match="long_prompt"):
        Request("a", long_prompt=None)
    with pytest.raises(ValueError, match="give either prompt or prompt_embeds"):
        pipe.encode_prompt(None, "cpu", 1, True)
    with pytest.raises(TypeError, match="has one text encoder: it takes no prompt_2"):
        prompts.encode(pipe, "a", prompt_2="b")
    with pytest.raises(TypeError, match="negative_prompt should be of the type of prompt"):
        prompts.encode(pipe, ["a"], "b")
    with pytest.raises(ValueError, match="clip_skip should be None or 0 to 3, found 4"):
        prompts.encode(pipe, "a", clip_skip=4)
    with pytest.raises(ValueError, match="is not closed"):
        prompts.encode(pipe, "a", "(b")


def test_embeddings_that_cannot_be_filled_up(pipe: StableDiffusionPipeline) -> None:
    def embeds(length: int) -> torch.Tensor:
        return torch.zeros(1, length, 24)

    wrong: list[dict[str, Any]] = [
        {"prompt_embeds": embeds(100)},
        {"prompt_embeds": embeds(77), "negative_prompt_embeds": embeds(70)},
        {"prompt": "a", "negative_prompt_embeds": embeds(80)},
    ]
    for arguments in wrong:
        with pytest.raises(ValueError, match="same shape, or be whole windows of 77 tokens"):
            pipe(**arguments)
    bare = StableDiffusionPipeline(**{**pipe.components, "text_encoder": None, "tokenizer": None})
    with pytest.raises(ValueError, match="no text encoder.*of the same shape"):
        bare(prompt_embeds=embeds(77), negative_prompt_embeds=embeds(154))
    options = {"num_inference_steps": 1, "output_type": "latent"}
    for length in (20, 100):  # two of one length need no encoder and no windows
        assert bare(prompt_embeds=embeds(length), negative_prompt_embeds=embeds(length), **options).images.ndim == 4


def test_a_tokenizer_without_a_length(pipe: StableDiffusionPipeline) -> None:
    tokenizer = type(pipe.tokenizer)(pipe.tokenizer.get_vocab(), pipe.tokenizer._merges)
    other = StableDiffusionPipeline(**{**pipe.components, "tokenizer": tokenizer})
    for how in ("cut", "chunk"):
        with pytest.raises(ValueError, match="give no model_max_length"):
            other("a", long_prompt=how)
