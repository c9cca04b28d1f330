"""CLIPTokenizer against transformers.CLIPTokenizer, token for token: text is discrete, so every comparison is exact."""

import copy
import pickle
import random
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken

from minidiff import CLIPTokenizer
from tests.theirs import transformers
from tests.vocabulary import PUBLISHED, clip_vocabulary, load_script, write_folder

CAPTIONS = [
    "a smiling face",
    "red heart",
    "the red dragon's face",
    "two cats and 3 dogs",
    "don't sign",
    "café ☕ au lait",
]
NASTY = [
    "",
    " ",
    "\n\t\r\v\f\u00a0\u2003\u3000\u200b\u2028\x85\x1c",
    "a photo of a cat",
    "  leading,   inner\t\tand trailing   ",
    "A Photo Of A CAT",
    "wow!! ! !a! a!b",
    "<|endoftext|>",
    "a<|endoftext|>b <|startoftext|> c<|startoftext|><|endoftext|>",
    "<|EndOfText|> and <|STARTOFTEXT|>",
    "<|endoftext |> <| endoftext|> <|endoftext|",
    "a</w>b </w>",
    "it's we're I'LL DON'T 'tis 's 'S ’s o'clock y'all'd've",
    "3.14159 1,000,000 ½ ² Ⅷ ٣٤٥ 2024年",
    "caf\u00e9 = cafe\u0301 \u212b \ufb01 \u0130stanbul \u1e9e \u01c5",  # composed, decomposed, ligature, capitals
    "o\u0323\u0302 o\u0302\u0323 \u1ed9 \u0344 \u1100\u1161\u11a8 \u0e33",  # NFC reorders and joins
    "👨‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☃️ 1️⃣ \U0001fae8",
    "&amp; &lt;b&gt; &#39; &nbsp; <b>bold</b>",
    "\x00 a\x00b \x01\x07\x1b[31m\x7f \ufeff bom \ufffd \ufffe",
    "שלום עולם مرحبا بالعالم \u202eright to left\u202c",
    "日本語のテキスト 中文字符 한국어 ภาษาไทย हिन्दी",
    "Привет мир Ελληνικά ΣΑΣ ქართული Ա",
    "x" * 300,
    "!" * 100,
    "word " * 2000,  # 10,000 characters
    "🎉" * 500,
    "\U0010ffff \ue000 \U000e0041 \U0001d54f",
    '{"json": [1, 2.5e-3]} C:\\path\\to http://a.b/c?d=e&f=g #tag @user (((weight:1.3)))',
]


def small_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    return load_script("bpe").train_clip_bpe(CAPTIONS, 560)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published tokenizers, and one with a vocabulary of its own."""
    root = tmp_path_factory.mktemp("tokenizers")
    made = {name: write_folder(root / name, files) for name, files in PUBLISHED.items()}
    made["small"] = write_folder(root / "small", PUBLISHED["sd15"], small_vocabulary())
    made["small, pads with !"] = write_folder(root / "tiny", PUBLISHED["sd21"], small_vocabulary())
    return made


@lru_cache
def pair(folder: Path) -> tuple:
    """Open one folder by us and by them."""
    return CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=["sd15", "sd21", "small"])
def both(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple:
    """The same folder opened by us and by them."""
    return pair(folders[request.param])


def assert_same(ours: CLIPTokenizer, theirs: "transformers.CLIPTokenizer", texts: list[str]) -> None:
    """Compare ids, tokens and text of every prompt, and the vocabulary around them."""
    expected = theirs(texts).input_ids
    assert ours(texts).input_ids == expected
    assert [ours.convert_ids_to_tokens(ids) for ids in expected] == [theirs.convert_ids_to_tokens(i) for i in expected]
    for skip in (False, True):
        assert ours.batch_decode(expected, skip) == theirs.batch_decode(expected, skip)
    for name in ("bos", "eos", "unk", "pad"):
        for suffix in ("token", "token_id"):
            assert getattr(ours, f"{name}_{suffix}") == getattr(theirs, f"{name}_{suffix}"), (name, suffix)
    assert ours.get_vocab() == theirs.get_vocab()
    assert (len(ours), ours.vocab_size) == (len(theirs), theirs.vocab_size)
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.all_special_ids == theirs.all_special_ids
    assert ours.model_max_length == theirs.model_max_length


def test_ids_are_the_published_ones(both: tuple) -> None:
    ours, theirs = both
    if len(ours) == 49408:  # the ids that everybody knows, should the reference and we ever be wrong together
        assert ours("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert_same(ours, theirs, ["a photo of a cat"])


def test_nasty_text(both: tuple) -> None:
    ours, theirs = both
    assert_same(ours, theirs, NASTY)
    for text in NASTY:
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours.encode(text) == theirs.encode(text)


def fuzz(count: int, seed: int) -> list[str]:
    """Draw strings that mix every kind of trouble: planes of Unicode, special tokens, white space, contractions."""
    draw = random.Random(seed)
    words = "a photo of an astronaut riding horse don't I'LL 's ! !! <|endoftext|> <|EndOfText|> <|startoftext|> </w>"
    pieces = [*words.split(), " ", "  ", "\n", "\t", "\x00", "\u00a0", "\u200d", "\ufe0f", "\u0301", "\u0323", "&amp;"]
    planes = [(0x00, 0x7F), (0x80, 0x24F), (0x250, 0x1FFF), (0x2000, 0x2FFF), (0x3000, 0xD7FF), (0xE000, 0x10FFFF)]

    def piece() -> str:
        return draw.choice(pieces) if draw.random() < 0.5 else chr(draw.randint(*draw.choice(planes)))

    return ["".join(piece() for _ in range(draw.randint(0, 40))) for _ in range(count)]


def test_fuzz(both: tuple) -> None:
    ours, theirs = both
    texts = fuzz(3000, seed=77)
    expected = theirs(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    found = ours(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.attention_mask, expected.attention_mask)
    assert ours.batch_decode(found.input_ids) == theirs.batch_decode(expected.input_ids)
    assert [ours.tokenize(text) for text in texts[:300]] == [theirs.tokenize(text) for text in texts[:300]]


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("max_length", [None, 2, 5, 77])
@pytest.mark.parametrize("truncation", [True, False, None, "longest_first", "do_not_truncate"])
@pytest.mark.parametrize("padding", [True, False, "longest", "max_length", "do_not_pad"])
def test_options(
    folders: dict[str, Path], padding: object, truncation: object, max_length: int | None, add_special_tokens: bool
) -> None:
    ours, theirs = pair(folders["small, pads with !"])
    options = {"padding": padding, "truncation": truncation, "max_length": max_length}
    options["add_special_tokens"] = add_special_tokens
    for text in ("a red cat", ["a red cat", "", "two cats and 3 dogs!"], "word " * 90):
        expected, found = theirs(text, **options), ours(text, **options)
        assert found.input_ids == expected.input_ids
        assert found["attention_mask"] == expected["attention_mask"]
        rows = [expected.input_ids] if isinstance(text, str) else expected.input_ids
        if len({len(row) for row in rows}) == 1:
            for kind in ("pt", "np"):
                expected_tensor = theirs(text, return_tensors=kind, **options)
                found_tensor = ours(text, return_tensors=kind, **options)
                for name in ("input_ids", "attention_mask"):
                    assert type(found_tensor[name]) is type(expected_tensor[name])
                    assert found_tensor[name].dtype == expected_tensor[name].dtype or not rows[0]
                    assert found_tensor[name].tolist() == expected_tensor[name].tolist()


PLAIN, FLAGGED = "<|endoftext|>", AddedToken("<|endoftext|>", normalized=True, special=True)


@pytest.mark.parametrize("eos", [PLAIN, FLAGGED])
@pytest.mark.parametrize("unk", [PLAIN, FLAGGED])
@pytest.mark.parametrize("pad", [PLAIN, FLAGGED, "!", "<pad>"])
def test_roles_that_describe_one_token_differently(eos: object, unk: object, pad: object) -> None:
    """Whether "<|EndOfText|>" in a prompt is the end token depends on which description counts."""
    roles = {"eos_token": eos, "unk_token": unk, "pad_token": pad}
    vocab, merges = small_vocabulary()
    ours, theirs = CLIPTokenizer(vocab, merges, **roles), transformers.CLIPTokenizer(vocab, merges, **roles)
    assert_same(ours, theirs, ["<|EndOfText|> <|endoftext|> <|StartOfText|> ! <pad> <PAD>"])


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl_2", "small"])
def test_they_load_what_we_save(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    ours = CLIPTokenizer.from_pretrained(folders[name])
    ours.add_tokens(["<my-cat>", "Cat"])
    ours.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
        "vocab.json",
    ]
    texts = [*NASTY, "<my-cat> <MY-CAT> Cat cat scatter"]
    for loaded in (ours, CLIPTokenizer.from_pretrained(tmp_path)):
        assert_same(loaded, transformers.CLIPTokenizer.from_pretrained(tmp_path), texts)


@pytest.mark.parametrize("name", ["sd21", "small"])
def test_we_load_what_they_save(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    theirs = transformers.CLIPTokenizer.from_pretrained(folders[name])
    theirs.add_tokens(["<my-cat>", "Cat"])
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "merges.txt").exists()  # transformers 5 writes tokenizer.json only
    texts = [*NASTY, "<my-cat> <MY-CAT> Cat cat scatter"]
    assert_same(CLIPTokenizer.from_pretrained(tmp_path), transformers.CLIPTokenizer.from_pretrained(tmp_path), texts)


@pytest.mark.parametrize("missing", [["tokenizer_config.json"], ["special_tokens_map.json"], list(PUBLISHED["sd21"])])
def test_small_files_are_optional(missing: list[str], tmp_path: Path) -> None:
    files = {name: content for name, content in PUBLISHED["sd21"].items() if name not in missing}
    folder = write_folder(tmp_path, files, small_vocabulary())
    assert_same(CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder), NASTY)


def test_oldest_spelling_of_added_tokens(tmp_path: Path) -> None:
    """``added_tokens.json`` has no flags: a token with a role is special and found as written, others in any case."""
    files = PUBLISHED["sd21"] | {"added_tokens.json": {"<my-cat>": 560, "<Dog>": 561, "<pad>": 562}}
    files["special_tokens_map.json"] = files["special_tokens_map.json"] | {"pad_token": "<pad>"}
    folder = write_folder(tmp_path, files, small_vocabulary())
    ours, theirs = CLIPTokenizer.from_pretrained(folder), transformers.CLIPTokenizer.from_pretrained(folder)
    assert_same(ours, theirs, ["<my-cat> <MY-CAT><Dog> <dog> a <pad> <PAD>"])
    assert ours("<my-cat>").input_ids[1] == 560


@pytest.mark.parametrize("name", ["sd15", "small"])
def test_added_tokens(folders: dict[str, Path], name: str) -> None:
    ours, theirs = pair.__wrapped__(folders[name])  # fresh ones, because adding changes theirs
    steps = [("<a>", False), ("two Words", False), (["<b>", "<a>", "<b>"], False), (["red"], False), (["<c>"], True)]
    steps += [([AddedToken("<d>", lstrip=True, rstrip=True, single_word=True)], False), ([], False)]
    for tokens, special in steps:
        assert ours.add_tokens(tokens, special) == theirs.add_tokens(tokens, special_tokens=special)
    assert_same(ours, theirs, ["a <a> b<b>red redder <C> <c> <d> x<d>", "RED two \n\twords twowords"])


def test_tokens_and_ids(both: tuple) -> None:
    ours, theirs = both
    for tokens in ("a</w>", "no such token", ["a</w>", "no such token", "<|endoftext|>"], []):
        assert ours.convert_tokens_to_ids(tokens) == theirs.convert_tokens_to_ids(tokens)
    for ids in (0, [0, 511, ours.eos_token_id], []):
        assert ours.convert_ids_to_tokens(ids) == theirs.convert_ids_to_tokens(ids)
    ids = ours("a cat!").input_ids
    assert ours.convert_ids_to_tokens(ids, True) == theirs.convert_ids_to_tokens(ids, skip_special_tokens=True)
    for given in (5, [], ids, [ids, ids[:2]], torch.tensor(ids), torch.tensor([ids, ids]), torch.tensor(ids).numpy()):
        for skip in (False, True):
            assert ours.decode(given, skip_special_tokens=skip) == theirs.decode(given, skip_special_tokens=skip)
    tidy = {"clean_up_tokenization_spaces": True}
    assert ours.decode(ids, **tidy) == theirs.decode(ids, **tidy)  # the reference ignores it, with a warning


def test_the_trainer_writes_vocabularies_that_both_read_alike() -> None:
    bpe = load_script("bpe")
    vocab, merges = bpe.train_clip_bpe(CAPTIONS, 560)
    ours, theirs = CLIPTokenizer(vocab, merges), transformers.CLIPTokenizer(vocab, merges)
    assert_same(ours, theirs, NASTY)
    for caption in CAPTIONS:
        decoded = ours.decode(ours(caption).input_ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == caption.lower().replace(" ", "")


def test_clip_vocabulary_is_complete() -> None:
    vocab, merges = clip_vocabulary()
    assert (len(vocab), len(merges)) == (49408, 48894)
    assert (vocab["!"], vocab["<|startoftext|>"], vocab["<|endoftext|>"]) == (0, 49406, 49407)


# --- what programs do with the result --------------------------------------------------------------------------------

IDS = [[538, 5, 6], [538, 7]]
USES: dict[str, Callable[[Any], Any]] = {
    "moved": lambda t: t("red heart", return_tensors="pt").to("cpu").input_ids,
    "moved by item": lambda t: t(["red heart"], return_tensors="pt").to(torch.device("cpu"))["attention_mask"],
    "a list stays": lambda t: t("red heart").to("cpu").input_ids,
    "handed on": lambda t: sorted(dict(**t("red", return_tensors="pt"))),
    "data": lambda t: t("red heart").data,
    "a key set": lambda t: {**t("red"), **(e := t("red"), e.update(x=1), e)[2]},
    "copied": lambda t: copy.deepcopy(t("red heart")).input_ids,
    "pickled": lambda t: pickle.loads(pickle.dumps(t("red heart"))).input_ids,
    "no mask": lambda t: list(t("red", return_attention_mask=False)),
    "lengths": lambda t: t(["red", "red heart"], return_length=True)["length"],
    "nothing overflows": lambda t: t("red heart", return_overflowing_tokens=False).input_ids,
    "pad": lambda t: dict(t.pad({"input_ids": IDS}, padding=True, return_tensors="pt")),
    "pad tensors": lambda t: dict(t.pad({"input_ids": [torch.tensor(row) for row in IDS]}, return_tensors="pt")),
    "pad to a length": lambda t: dict(
        t.pad({"input_ids": IDS}, padding="max_length", max_length=6, return_tensors="np")
    ),
    "pad records": lambda t: dict(t.pad([{"input_ids": row} for row in IDS], return_tensors="pt")),
    "pad one": lambda t: dict(t.pad({"input_ids": IDS[0]}, padding="max_length", max_length=5)),
    "pad with masks": lambda t: dict(t.pad({"input_ids": IDS, "attention_mask": [[1, 0, 1], [0, 1]]})),
    "pad without masks": lambda t: dict(t.pad({"input_ids": IDS}, return_attention_mask=False)),
    "pad nothing": lambda t: dict(t.pad({"input_ids": IDS}, padding=False)),
    "padding on the left": lambda t: (
        setattr(c := copy.deepcopy(t), "padding_side", "left"),
        dict(c(["a", "red heart"], padding=True)),
    )[1],
    "added": lambda t: (
        (c := copy.deepcopy(t)).add_tokens(["<x>", "<y>"]),
        c.get_added_vocab(),
        c.added_tokens_encoder,
    ),
    "special": lambda t: (t.special_tokens_map, t.is_fast, t.name_or_path),
}


@pytest.mark.parametrize("name", USES)
def test_uses(name: str) -> None:
    vocab, merges = small_vocabulary()
    made = {"vocab": vocab, "merges": merges, "model_max_length": 77}
    ours, theirs = (USES[name](cls(**made)) for cls in (CLIPTokenizer, transformers.CLIPTokenizer))
    assert plain(ours) == plain(theirs)


def plain(result: Any) -> Any:
    """Return tensors and arrays as lists, with their dtypes."""
    if isinstance(result, torch.Tensor | np.ndarray):
        return str(result.dtype).removeprefix("torch."), result.tolist()
    return {name: plain(one) for name, one in result.items()} if isinstance(result, dict) else result


def test_name_or_path_and_use_fast(folders: dict[str, Path]) -> None:
    ours, theirs = (
        cls.from_pretrained(folders["small"], use_fast=False) for cls in (CLIPTokenizer, transformers.CLIPTokenizer)
    )
    assert ours.name_or_path == theirs.name_or_path == str(folders["small"])
