"""What CLIPTokenizer does beyond the reference: named errors, the dropped text, and safety between threads."""

import copy
import json
import logging
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minidiff import CLIPTokenizer
from minidiff.errors import CheckpointError, CheckpointNotFoundError, ConfigError
from tests.hub_server import HubServer, Repository, run_with
from tests.theirs import transformers
from tests.vocabulary import PUBLISHED, clip_vocabulary, load_script, write_folder

CAPTIONS = ["a smiling face", "red heart", "the red dragon's face", "two cats and 3 dogs"]
Vocabulary = tuple[dict[str, int], list[tuple[str, str]]]


@pytest.fixture(scope="module")
def small() -> Vocabulary:
    return load_script("bpe").train_clip_bpe(CAPTIONS, 540)


@pytest.fixture
def tokenizer(small: Vocabulary) -> CLIPTokenizer:
    return CLIPTokenizer(*small, model_max_length=77)


@pytest.fixture(scope="module")
def clip() -> CLIPTokenizer:
    return CLIPTokenizer(*clip_vocabulary(), model_max_length=77)


def test_the_dropped_text_is_named(clip: CLIPTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    prompts = ["A Red  cat, on Café\tchairs", "a red", "Ünïcødé 👍🏽 ÀÉ"]
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        output = clip(prompts, max_length=4, truncation=True)
    # As it was written, not in lower case. The cut through the two bytes of ï drops the whole letter.
    assert output.dropped == ["cat, on Café\tchairs", "", "ïcødé 👍🏽 ÀÉ"]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and all("4 tokens" in message for message in messages)
    assert "'cat, on Café\\tchairs'" in messages[0] and "'ïcødé 👍🏽 ÀÉ'" in messages[1]


def test_nothing_is_logged_if_all_fits(clip: CLIPTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    fits = " ".join(["cat"] * 75)  # 77 with start and end
    with caplog.at_level(logging.WARNING, logger="minidiff"):
        output = clip(fits, padding="max_length", truncation=True)
        assert (output.dropped, len(output.input_ids), caplog.records) == ([""], 77, [])
        assert clip(fits + "  dog ", padding="max_length", truncation=True).dropped == ["dog"]


def test_kept_and_dropped_text_are_the_prompt(clip: CLIPTokenizer) -> None:
    """A cut between two words leaves the kept tokens and text with the rest, however letters move in NFC."""
    prompt = "e\u0301 \u01c5 a\u0302 \u212b  x\u3000 3 cats \u1e9e 👍 the end"
    whole = clip.encode(prompt, add_special_tokens=False)
    between = [n for n, token in enumerate(clip.tokenize(prompt), start=1) if token.endswith("</w>")]
    assert len(between) >= 10
    for keep in between:
        output = clip(prompt, max_length=keep, truncation=True, add_special_tokens=False)
        (rest,) = output.dropped
        assert prompt.endswith(rest)
        assert output.input_ids + clip.encode(rest, add_special_tokens=False) == whole


def test_output_is_a_mapping_with_attributes(tokenizer: CLIPTokenizer) -> None:
    output = tokenizer(["red", "red heart"], padding=True, return_tensors="pt")
    assert dict(output).keys() == {"input_ids", "attention_mask"} and len(output) == 2
    assert output["input_ids"] is output.input_ids and output.input_ids.dtype == torch.int64
    assert output.attention_mask.sum(1).tolist() == [len(tokenizer.encode(text)) for text in ("red", "red heart")]
    with pytest.raises(KeyError, match="token_type_ids"):
        output["token_type_ids"]


BAD_TEXT = [
    (5, TypeError, "a prompt is a str or a list of str, not int"),
    (None, TypeError, "not NoneType"),
    (b"red", TypeError, "not bytes"),
    ([], ValueError, "the list of prompts is empty"),
    (["red", 5], TypeError, "prompt 1 is a int, not a str"),
    ([["red"]], TypeError, "prompt 0 is a list, not a str"),
    ("a\ud800b", ValueError, r"lone surrogate '\\ud800' at position 1"),
    (["red", "\udcff"], ValueError, r"prompt 1 is not valid Unicode: lone surrogate '\\udcff' at position 0"),
]


@pytest.mark.parametrize(("text", "error", "message"), BAD_TEXT)
def test_bad_text(tokenizer: CLIPTokenizer, text: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer(text)


BAD_OPTIONS = [
    ({"padding": "left"}, ValueError, "padding='left'; expected 'max_length', 'longest'"),
    ({"padding": 1}, ValueError, "padding=1"),
    ({"truncation": "only_second"}, ValueError, "truncation='only_second'; expected True"),
    ({"return_tensors": "tf"}, ValueError, "return_tensors='tf'; expected 'pt', 'np' or None"),
    ({"max_length": 0}, ValueError, "max_length should be at least 1, found 0"),
    ({"max_length": 1, "truncation": True}, ValueError, "max_length=1 leaves no room for the start and end tokens"),
    ({"max_length": 5.0}, TypeError, "max_length should be an integer, found 5.0"),
    ({"max_length": True}, TypeError, "max_length should be an integer, found True"),
    ({"text_pair": "b"}, TypeError, "text_pair"),
    ({"return_overflowing_tokens": True}, TypeError, "return_overflowing_tokens"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD_OPTIONS)
def test_bad_options(tokenizer: CLIPTokenizer, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer(["red", "red heart"], **options)


def test_bad_padding(tokenizer: CLIPTokenizer) -> None:
    with pytest.raises(ValueError, match="pad takes input_ids and attention_mask, found input_ids, labels"):
        tokenizer.pad({"input_ids": [[1]], "labels": [[1]]})
    with pytest.raises(ValueError, match="padding='left'"):
        tokenizer.pad({"input_ids": [[1]]}, padding="left")
    other = copy.deepcopy(tokenizer)
    other.truncation_side = "left"
    with pytest.raises(TypeError, match="truncation_side='left' are not implemented"):
        other("red heart")
    with pytest.raises(AttributeError, match="the tokenizer's output has no 'token_type_ids'"):
        _ = tokenizer("red").token_type_ids


def test_ragged_tensors_and_unknown_length(small: Vocabulary, tokenizer: CLIPTokenizer) -> None:
    for kind in ("pt", "np"):
        with pytest.raises(ValueError, match=r"prompts of \d+, \d+ tokens make no tensor; give padding"):
            tokenizer(["red", "red heart"], return_tensors=kind)
    with pytest.raises(ValueError, match="needs max_length"):
        CLIPTokenizer(*small)("red", padding="max_length")
    assert isinstance(tokenizer("red", return_tensors="np").input_ids, np.ndarray)


@pytest.mark.parametrize("bad", [-1, 540, 10**6])
def test_ids_outside_the_vocabulary(tokenizer: CLIPTokenizer, bad: int) -> None:
    for call in (tokenizer.decode, tokenizer.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=f"token id {bad} is not in the vocabulary of 540 tokens"):
            call([0, bad])
    with pytest.raises(TypeError, match="encode takes one str, not list"):
        tokenizer.encode(["red"])


def test_vocabularies_that_make_no_sense(small: Vocabulary) -> None:
    vocab, merges = small
    first = merges[0]
    cases = [
        (vocab, [("a", "b", "c")], r"merge 1 is \('a', 'b', 'c'\); expected two symbols"),
        (vocab, ["ab"], "merge 1 is 'ab'; expected two symbols"),
        (vocab, [*merges, ("zz", "q")], rf"merge {len(merges) + 1} \(zz \+ q\) uses 'zz', which is not in the vocab"),
        ({k: v for k, v in vocab.items() if k != "".join(first)}, merges, r"merge 1 .* is not in the vocabulary"),
        (vocab | {"twice": 3}, merges, "have the same id 3"),
        (vocab | {"float": 600.0}, merges, "'float' has the id 600.0"),
        ({k: v for k, v in vocab.items() if k != "<|endoftext|>"}, merges, "unk_token='<|endoftext|>' is not in"),
    ]
    for bad_vocab, bad_merges, message in cases:
        with pytest.raises(CheckpointError, match=message.replace("|", r"\|")):
            CLIPTokenizer(bad_vocab, bad_merges)


def test_missing_files(small: Vocabulary, tmp_path: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        folder = write_folder(tmp_path / name, PUBLISHED["sd21"], small)
        (folder / name).unlink()
        with pytest.raises(CheckpointNotFoundError, match=name):
            CLIPTokenizer.from_pretrained(folder)
    with pytest.raises(CheckpointNotFoundError, match="nowhere"):
        CLIPTokenizer.from_pretrained(tmp_path / "nowhere")
    write_folder(tmp_path / "model" / "tokenizer", PUBLISHED["sd21"], small)
    assert CLIPTokenizer.from_pretrained(tmp_path / "model", subfolder="tokenizer").pad_token == "!"


REFUSED = [
    ("do_lower_case", False),
    ("add_prefix_space", True),
    ("padding_side", "left"),
    ("truncation_side", "left"),
    ("errors", "strict"),
    ("split_special_tokens", True),
    ("tokenizer_class", "T5Tokenizer"),
    ("additional_special_tokens", ["<x>"]),
    ("extra_special_tokens", ["<x>"]),
    ("pad_token", None),
    ("eos_token", {"text": "<|endoftext|>"}),
    ("model_max_length", "77"),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_fields_that_ask_for_another_tokenizer(small: Vocabulary, tmp_path: Path, field: str, value: Any) -> None:
    config = PUBLISHED["sd15"]["tokenizer_config.json"] | {field: value}
    folder = write_folder(tmp_path, {"tokenizer_config.json": config}, small)
    with pytest.raises((ConfigError, TypeError), match=f"{field}.*{re.escape(repr(value))}"):
        CLIPTokenizer.from_pretrained(folder)


def test_a_field_is_named_with_its_file(small: Vocabulary, tmp_path: Path) -> None:
    CLIPTokenizer(*small).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    path = tmp_path / "special_tokens_map.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"additional_special_tokens": ["<x>"]}))
    with pytest.raises(ConfigError, match=r"special_tokens_map.json: additional_special_tokens=\['<x>'\]"):
        CLIPTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265\n", "it is a Git LFS pointer"),
        (b"Entry not found", "it is a server's answer instead of the file: 'Entry not found'"),
        (b'{"error":"Repository not found"}', "it is a server's answer instead of the file"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
    ],
)
def test_files_that_are_something_else(
    small: Vocabulary, tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    CLIPTokenizer(*small).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / name).write_bytes(content)
    with pytest.raises((CheckpointError, ConfigError), match=expected) as error:
        CLIPTokenizer.from_pretrained(tmp_path)
    assert name in str(error.value)


def test_damaged_files(small: Vocabulary, tmp_path: Path) -> None:
    for name, content, message in [
        ("vocab.json", b"{", "vocab.json is not valid JSON"),
        ("vocab.json", b"[]", "vocab.json should hold a JSON object"),
        ("merges.txt", b"\xff\xfe", "merges.txt is not UTF-8"),
        ("merges.txt", b"#version: 0.2\none two three\n", "merge 1 is 'one two three'"),
        ("tokenizer_config.json", b"nonsense", "tokenizer_config.json is not valid JSON"),
        ("tokenizer.json", b'{"model": {"type": "WordPiece"}}', "tokenizer.json: the model is 'WordPiece'"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "end_of_word_suffix": "</w>"}}', "'model' has no 'vocab'"),
    ]:
        folder = write_folder(tmp_path / message[:12] / name, PUBLISHED["sd21"], small)
        (folder / name).write_bytes(content)
        with pytest.raises((ConfigError, CheckpointError), match=message):
            CLIPTokenizer.from_pretrained(folder)


def test_an_added_token_with_another_id(small: Vocabulary, tmp_path: Path) -> None:
    files = PUBLISHED["sd21"] | {"added_tokens.json": {"<my-cat>": 600}}
    with pytest.raises(CheckpointError, match="'<my-cat>' has id 600 in the files, but would get 540"):
        CLIPTokenizer.from_pretrained(write_folder(tmp_path, files, small))


def test_merges_with_windows_line_ends(small: Vocabulary, tmp_path: Path, tokenizer: CLIPTokenizer) -> None:
    folder = write_folder(tmp_path, PUBLISHED["sd15"], small)
    path = folder / "merges.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert CLIPTokenizer.from_pretrained(folder).encode(CAPTIONS[2]) == tokenizer.encode(CAPTIONS[2])


def test_saving_is_reproducible(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    tokenizer.add_tokens(["<b>", "<a>"])
    tokenizer.save_pretrained(tmp_path / "one")
    CLIPTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert list(json.loads((tmp_path / "one" / "vocab.json").read_text()))[:2] == ["!", '"']


def test_special_tokens_stay_special(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.add_tokens(["<|endoftext|>", "<new>"]) == 1
    ids = tokenizer.encode("red <new>")
    assert "<|endoftext|>" not in tokenizer.decode(ids, skip_special_tokens=True)


def test_copies_are_independent(tokenizer: CLIPTokenizer) -> None:
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert twin.add_tokens("<new>") == 1
        assert twin.encode("red <new>") != tokenizer.encode("red <new>")
        assert twin.encode(CAPTIONS[2]) == tokenizer.encode(CAPTIONS[2])


def test_one_tokenizer_serves_many_threads(tokenizer: CLIPTokenizer) -> None:
    """Different padding and truncation at once, while tokens are being added: every answer is that of a quiet run.

    The reference sets padding and truncation on the shared object: of these 1,000 calls it answered 28 wrongly.
    """
    jobs = [
        {"padding": padding, "max_length": length, "truncation": True}
        for padding in ("max_length", True, False)
        for length in (3, 8, 20)
    ]
    quiet = [tokenizer(CAPTIONS, **options).input_ids for options in jobs]

    def encode(n: int) -> bool:
        return tokenizer(CAPTIONS, **jobs[n % len(jobs)]).input_ids == quiet[n % len(jobs)]

    def add(n: int) -> int:
        return tokenizer.add_tokens(f"<new-{n}>")

    with ThreadPoolExecutor(8) as pool:
        encoded, added = [], []
        for n in range(1000):
            encoded.append(pool.submit(encode, n))
            if n % 50 == 0:
                added.append(pool.submit(add, n))
        assert all(future.result() for future in encoded)
        assert sum(future.result() for future in added) == 20
    assert len(tokenizer) == 560  # no addition was lost
    ids = [tokenizer.convert_tokens_to_ids(f"<new-{n}>") for n in range(0, 1000, 50)]
    assert sorted(ids) == list(range(540, 560))


def test_adding_swaps_the_vocabulary(tokenizer: CLIPTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody sees a vocabulary change under a running call, and additions at the same time all count."""
    before, deepcopy = tokenizer._backend, copy.deepcopy

    def slow_copy(value: Any) -> Any:
        made = deepcopy(value)
        time.sleep(0.02)
        return made

    monkeypatch.setattr(copy, "deepcopy", slow_copy)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tokenizer.add_tokens, ["<a>", "<b>", "<c>", "<d>"]))
    assert (len(tokenizer), before.get_vocab_size()) == (544, 540)


def test_trainer() -> None:
    bpe = load_script("bpe")
    vocab, merges = bpe.train_clip_bpe(CAPTIONS, 540)
    tokens = list(vocab)
    letters = bpe.byte_alphabet()
    assert list(vocab.values()) == list(range(540))
    assert tokens[:256] == letters and tokens[256:512] == [letter + "</w>" for letter in letters]
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert set(tokens[512:-2]) == {"".join(pair) for pair in merges}
    assert bpe.train_clip_bpe(CAPTIONS[::-1], 540) == (vocab, merges)
    with pytest.raises(ValueError, match="vocab_size=513; 512 byte symbols and 2 special tokens need at least 514"):
        bpe.train_clip_bpe(CAPTIONS, 513)
    with pytest.raises(ValueError, match=r"vocab_size=5000, but these texts give at most \d+ tokens"):
        bpe.train_clip_bpe(CAPTIONS, 5000)


def test_trainer_merges_the_most_frequent_pair() -> None:
    """The example of Sennrich et al., figure 1, with an end-of-word mark on the last letter."""
    texts = ["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3
    _, merges = load_script("bpe").train_clip_bpe(texts, 514 + 4)
    assert merges[:3] == [("e", "s"), ("es", "t</w>"), ("l", "o")]


@pytest.mark.parametrize("fault", [500, 403, 429, "offline", "offline, with tokenizer.json"])
def test_a_map_of_special_tokens_that_nobody_knows_of(
    tokenizer: CLIPTokenizer, tmp_path: Path, fault: int | str
) -> None:
    """Stable Diffusion 2.x pads with "!" because the map says so: it was loaded with another pad token."""
    folder = tmp_path / "main"
    tokenizer.save_pretrained(folder)
    code = "import time; time.sleep = lambda _: None\nfrom minidiff import CLIPTokenizer\n"
    code += "tokenizer = CLIPTokenizer.from_pretrained('some/repo')\nprint('loaded')"
    with HubServer({"some/repo": Repository({"main": folder})}) as hub:
        if isinstance(fault, int):
            hub.faults["special_tokens_map.json"] = fault
            said = run_with(hub, tmp_path / "cache", code)
            assert "the Hub did not give special_tokens_map.json" in said and str(fault) in said
            return
        whole = ["tokenizer.json"] if "with" in fault else []
        if whole:
            transformers.CLIPTokenizer.from_pretrained(folder).save_pretrained(folder)
        names = ["vocab.json", "merges.txt", "tokenizer_config.json", *whole]
        fill = f"import huggingface_hub as h\nfor name in {names}: h.hf_hub_download('some/repo', name)"
        assert run_with(hub, tmp_path / "cache", fill) == ""
        said = run_with(hub, tmp_path / "cache", code, HF_HUB_OFFLINE="1")
        expected = "loaded" if whole else "NotCachedError: special_tokens_map.json of some/repo is not in"
        assert expected in said


def test_a_text_is_no_list_of_ids(tokenizer: CLIPTokenizer) -> None:
    for call in (lambda: tokenizer.decode("abc"), lambda: tokenizer.batch_decode(["abc"])):
        with pytest.raises(TypeError, match="token_ids should be integers, found the text 'abc'"):
            call()
