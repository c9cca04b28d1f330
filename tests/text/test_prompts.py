"""Long prompts and weights: windows against the reference's encode_prompt of each, weights against their formula."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import minidiff
from minidiff import StableDiffusionPipeline, StableDiffusionXLImg2ImgPipeline, prompts
from minidiff.text.windows import pack_windows as pack
from tests.pictures import load_both
from tests.tiny_xl import save_base, save_refiner

Pair = tuple[Any, Any]  # ours and theirs
PAGE = Path(__file__).parents[2] / "docs/prompts.md"
WORD, PER_WINDOW = "smiling", 12  # 6 tokens: 12 words fill 72 places of 75, and the 13th is not torn
LONG = " ".join([WORD] * 30)  # windows of 12, 12 and 6
PARTS = [" ".join([WORD] * n) for n in (12, 12, 6)]
SHORT = "a red heart"
PIPELINES = [name for name in minidiff.__all__ if name.startswith("StableDiffusion") and name.endswith("Pipeline")]


@pytest.fixture(scope="module")
def sd(folder: Path) -> Pair:
    """Ours and theirs from the same files, in float64."""
    return load_both("StableDiffusionPipeline", folder)


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return load_both("StableDiffusionXLPipeline", save_base(tmp_path_factory.mktemp("xl")))


def encoded(pipe: Any, *texts: str, guided: bool = True, **options: Any) -> tuple[torch.Tensor | None, ...]:
    """Call ``encode_prompt`` of either family, with prompt and negative prompt."""
    negative = texts[1] if len(texts) > 1 else None
    options = {"num_images_per_prompt": 1, "do_classifier_free_guidance": guided, "negative_prompt": negative} | options
    return pipe.encode_prompt(texts[0], device="cpu", **options)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Compare states of float64 networks: measured at most 1.2e-14."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


# --- cut, the default ------------------------------------------------------------------------------------------------


def test_what_is_cut_off_is_returned(sd: Pair, xl: Pair, caplog: pytest.LogCaptureFixture) -> None:
    options = {"num_inference_steps": 1, "output_type": "latent"}
    pipe, _ = sd
    out = pipe([LONG, SHORT], negative_prompt=["", SHORT], **options)
    (rest, nothing) = out.dropped["prompt"]
    assert nothing == "" and set(out.dropped) == {"prompt"}
    assert sum(rest in record.getMessage() for record in caplog.records) == 1
    kept = pipe.tokenizer.decode(pipe.tokenizer(LONG, truncation=True).input_ids, skip_special_tokens=True)
    assert (kept + rest).replace(" ", "") == LONG.replace(" ", "")
    assert pipe(SHORT, negative_prompt=LONG, **options).dropped == {"negative_prompt": [rest]}
    assert pipe(SHORT, negative_prompt=LONG, guidance_scale=1.0, **options).dropped is None  # it is not read

    assert pipe(SHORT, **options).dropped is None
    assert list(out) == ["images", "dropped"] and out[0] is out.images  # the reference's fields come first
    assert len(pipe(LONG, return_dict=False, **options)) == 2

    pipe, _ = xl
    assert pipe(LONG, **options).dropped == {"prompt": [rest]}  # once for both tokenizers
    both = pipe(SHORT, LONG, negative_prompt=LONG, negative_prompt_2=SHORT, **options)
    assert both.dropped == {"prompt_2": [rest], "negative_prompt": [rest]}
    assert len(pipe(LONG, return_dict=False, **options)) == 1


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_takes_long_prompts(name: str) -> None:
    cls = getattr(minidiff, name)
    parameter = inspect.signature(cls.__call__).parameters["long_prompt"]
    assert (parameter.kind, parameter.default) == (parameter.KEYWORD_ONLY, "cut")
    assert "dropped" in cls.output_class.__dataclass_fields__


def test_image_to_image_says_what_was_cut_off(tmp_path: Path) -> None:
    pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(save_refiner(tmp_path))
    options = {"image": torch.zeros(1, 3, 32, 32), "num_inference_steps": 2, "strength": 0.5, "output_type": "latent"}
    assert pipe(LONG, **options).dropped.keys() == {"prompt"}
    assert pipe(LONG, long_prompt="chunk", **options).dropped is None


# --- windows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_each_window_is_encoded_alone(sd: Pair, xl: Pair, clip_skip: int | None) -> None:
    """Against what the reference makes of the text of each window; fewer words of the negative are filled up."""
    for ours, theirs in (sd, xl):
        found = encoded(ours, LONG, PARTS[0], long_prompt="chunk", clip_skip=clip_skip)
        if theirs is sd[1] and clip_skip:  # the reference's clip_skip fails with transformers 5
            windows = [encoded(ours, part, PARTS[0], clip_skip=clip_skip) for part in PARTS]
        else:
            windows = [encoded(theirs, part, PARTS[0], clip_skip=clip_skip) for part in PARTS]
        assert_close(found[0], torch.cat([window[0] for window in windows], dim=1))
        empty = encoded(theirs, "", "")[1]
        assert_close(found[1], torch.cat([windows[0][1], empty, empty], dim=1))
        for pooled, of_first in zip(found[2:], windows[0][2:], strict=True):
            assert_close(pooled, of_first)


def test_the_longest_text_of_any_encoder_counts(xl: Pair) -> None:
    ours, theirs = xl
    for texts in ({"prompt_2": LONG}, {"negative_prompt": LONG}, {"negative_prompt": "", "negative_prompt_2": LONG}):
        positive, negative, pooled, _ = encoded(ours, SHORT, **texts, long_prompt="chunk")
        assert positive.shape == negative.shape == (1, 3 * 77, 40)
    assert_close(pooled, encoded(theirs, SHORT)[2])
    positive, zeros, _, _ = encoded(ours, LONG, long_prompt="chunk")
    assert positive.shape == zeros.shape and not zeros.any()
    batch = ours.encode_prompt([SHORT, LONG], long_prompt="chunk")[0]
    assert_close(batch[1:], positive)


def test_one_window_gives_the_same_bits(sd: Pair, xl: Pair) -> None:
    fits = " ".join([WORD] * 12 + ["a a a"])  # 75 tokens
    for ours, _ in (sd, xl):
        for texts in ((SHORT,), (fits, ""), (SHORT, fits)):
            found, expected = (encoded(ours, *texts, long_prompt=how) for how in ("chunk", "cut"))
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True))
            assert found[0].shape[1] == 77
        options = {"num_inference_steps": 2, "seed": 1, "output_type": "latent"}
        assert torch.equal(ours(SHORT, long_prompt="chunk", **options).images, ours(SHORT, **options).images)


def test_words_are_packed_whole() -> None:
    assert pack([], 4) == [[]]
    assert pack(["abcd"], 4) == [list("abcd")]
    assert pack(["abc", "d", "ef"], 4) == [list("abcd"), list("ef")]
    assert pack(["abc", "de", "fghijk"], 4) == [list("abc"), list("defg"), list("hijk")]  # too long for any window


def test_words_of_a_text(sd: Pair) -> None:
    tokenizer = sd[0].tokenizer
    text = f"{WORD} dog's 12 caf\u00e9<|endoftext|>!!"
    words = tokenizer.words(text)
    assert [i for word in words for i in word] == tokenizer(text, add_special_tokens=False).input_ids
    decoded = [tokenizer.decode(word) for word in words]
    assert decoded == [WORD, "dog", "'s", "1", "2", "caf\u00e9", "<|endoftext|>", "!!"]


# --- lengths that differ ---------------------------------------------------------------------------------------------


def pictures(pipes: Pair, *calls: dict[str, Any]) -> list[torch.Tensor]:
    options = {"num_inference_steps": 2, "output_type": "pt"}
    seeded = [torch.Generator("cpu").manual_seed(3) for _ in calls]
    return [pipe(**call, **options, generator=g).images for pipe, call, g in zip(pipes, calls, seeded, strict=True)]


def test_the_picture_of_a_long_prompt(sd: Pair, xl: Pair) -> None:
    """The reference takes embeddings of any length: ours give the same picture there, the cut text another."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for pipes in (sd, xl):
        ours, _ = pipes
        embeds = encoded(ours, LONG, SHORT, long_prompt="chunk")
        text = {"prompt": LONG, "negative_prompt": SHORT, "long_prompt": "chunk"}
        found, expected = pictures(pipes, text, dict(zip(names, embeds, strict=False)))
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-7)  # measured: 3.8e-8
        (cut,) = pictures(pipes[:1], {**text, "long_prompt": "cut"})
        assert (cut - found).abs().max() > 1e-4


def test_embeddings_of_other_lengths_are_filled_up(sd: Pair, xl: Pair) -> None:
    for ours, theirs in (sd, xl):
        long = encoded(ours, LONG, LONG, long_prompt="chunk")
        short, empty = encoded(theirs, SHORT, SHORT), encoded(theirs, "", "")
        padded = torch.cat([short[0], empty[0], empty[0]], dim=1)
        given = {"prompt_embeds": long[0]} | ({"pooled_prompt_embeds": long[2]} if ours is xl[0] else {})
        negative = {"negative_prompt_embeds": short[1]}
        negative |= {"negative_pooled_prompt_embeds": short[3]} if ours is xl[0] else {}
        for found in (encoded(ours, None, SHORT, **given), encoded(ours, None, None, **given, **negative)):
            assert_close(found[0], long[0])
            assert_close(found[1], padded)
        # and the other way round: a text beside long embeddings of the negative prompt
        negative |= {"negative_prompt_embeds": long[1]}
        found = encoded(ours, SHORT, None, **negative)
        assert_close(found[0], padded)
        assert_close(found[1], long[1])
        (picture,) = pictures((ours,), {"prompt": SHORT, **negative})
        assert picture.isfinite().all()


def test_a_text_beside_short_embeddings_is_as_short(sd: Pair) -> None:
    """As in the reference."""
    embeds = torch.randn(1, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, theirs = (encoded(pipe, None, SHORT, prompt_embeds=embeds) for pipe in sd)
    assert ours[1].shape == (1, 20, 24)
    assert_close(ours[1], theirs[1])


# --- weights ---------------------------------------------------------------------------------------------------------


def weighted(z: torch.Tensor, weights: list[float]) -> torch.Tensor:
    """The formula at the head of ``minidiff.prompts``, token by token, for one window (1, L, D)."""
    result = z.clone()
    for i, weight in enumerate(weights):
        result[0, i] *= weight
    return result * (z.sum() / result.sum())


def row(*pairs: tuple[int, float]) -> list[float]:
    """Return the weights of a window: those of the start, of the texts, and 1 for the rest."""
    weights = [1.0] + [weight for count, weight in pairs for _ in range(count)]
    return weights + [1.0] * (77 - len(weights))


def test_weights_multiply_states_and_keep_their_mean(sd: Pair, xl: Pair) -> None:
    text = "a (red:1.3) [[heart]] over (two ((cats:0.5)))"
    pairs = [("a", 1), ("red", 1.3), ("heart", 1 / 1.1**2), ("over", 1), ("two", 1.1), ("cats", 1.1 * 1.1 * 0.5)]
    weights = row(*((len(sd[0].tokenizer.tokenize(word)), weight) for word, weight in pairs))
    for ours, theirs in (sd, xl):
        found = prompts.encode(ours, text, "(blue:2) sky")
        z = encoded(theirs, "a red heart over two cats", "blue sky")
        states = z[0].split([24, 16], dim=-1) if ours is xl[0] else [z[0]]  # each encoder keeps its own mean
        assert_close(found["prompt_embeds"], torch.cat([weighted(one, weights) for one in states], dim=-1))
        assert (found["prompt_embeds"] - z[0]).abs().max() > 0.1
        negative = encoded(theirs, "", "blue sky")[1]
        assert (found["negative_prompt_embeds"] - negative).abs().max() > 0.1
        if ours is xl[0]:  # the pooled ones are not weighted
            assert_close(found["pooled_prompt_embeds"], z[2])
            assert_close(found["negative_pooled_prompt_embeds"], z[3])


def test_weights_in_the_second_window(sd: Pair) -> None:
    ours, theirs = sd
    found = prompts.encode(ours, f"{PARTS[0]} ({WORD}:1.5) {SHORT}")["prompt_embeds"]
    first, second = (encoded(theirs, text)[0] for text in (PARTS[0], f"{WORD} {SHORT}"))
    assert_close(found, torch.cat([first, weighted(second, row((6, 1.5)))], dim=1))


def test_without_brackets_the_bits_are_those_of_encode_prompt(sd: Pair, xl: Pair) -> None:
    for ours, _ in (sd, xl):
        for texts, how in (((SHORT, "blue: sky \\"), "cut"), ((SHORT, LONG), "chunk"), ((LONG, None), "chunk")):
            found = tuple(prompts.encode(ours, *texts).values())
            expected = encoded(ours, *texts, long_prompt=how)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    second = prompts.encode(xl[0], SHORT, "", prompt_2=LONG, negative_prompt_2="sky", clip_skip=1)
    options = {"prompt_2": LONG, "negative_prompt_2": "sky", "clip_skip": 1, "long_prompt": "chunk"}
    assert all(map(torch.equal, second.values(), encoded(xl[0], SHORT, "", **options)))


def test_a_weighted_picture_is_the_same_alone_and_in_a_batch(sd: Pair) -> None:
    ours, _ = sd
    texts = ["a (red:1.4) heart", "two ((cats)) and [3 dogs]"]
    options = {"num_inference_steps": 2, "output_type": "pt"}
    batch = ours(**prompts.encode(ours, texts, ["sky", "(hills)"]), seed=4, **options).images
    alone = ours(**prompts.encode(ours, texts[1], "(hills)"), seed=5, **options).images
    torch.testing.assert_close(batch[1:], alone, rtol=0, atol=1e-12)  # measured: at most 1.2e-14


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_code_of_the_page(folder: Path) -> None:
    """Run what docs/prompts.md shows, one block after the other, on a tiny checkpoint."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    code = "\n".join(blocks)
    checkpoint = '"stable-diffusion-v1-5/stable-diffusion-v1-5"'
    assert len(blocks) >= 4 and code.count(checkpoint) == 1
    code = code.replace(checkpoint, repr(str(folder))).replace("num_inference_steps=25", "num_inference_steps=2")
    names: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), names)
    assert isinstance(names["pipe"], StableDiffusionPipeline)
    assert names["out"].dropped and names["long"].dropped is None
    assert names["parsed"] == [("a ", 1.0), ("red", 1.3), (" apple, ", 1.0), ("shadow", 1 / 1.1)]
