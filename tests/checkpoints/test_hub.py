"""Files from a folder and from the Hub: what is asked for, what is cached, and what each failure says.

The Hub here is a server on this machine. huggingface_hub reads its environment once, when it is imported, so each of
these tests runs a few lines in a fresh process that starts with the environment a user would set.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minidiff.atomic import write_file
from minidiff.checkpoints.hub import MissingFileError, Repo, weight_names
from minidiff.checkpoints.save import save_json
from minidiff.errors import CheckpointError, CheckpointNotFoundError
from tests.hub_server import HubServer, Repository, run_with


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    return folder


# --- local folders ---------------------------------------------------------------------------------------------------


def test_local_file(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "unet/config.json")
    assert Repo(tmp_path).file("config.json") == tmp_path / "config.json"
    assert Repo(str(tmp_path), subfolder="unet").file("config.json") == tmp_path / "unet" / "config.json"


def test_local_path_never_touches_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it now fails
    touch(tmp_path, "config.json")
    assert Repo(tmp_path).file("config.json").is_file()
    with pytest.raises(MissingFileError, match=r"has no absent\.json; it holds config\.json"):
        Repo(tmp_path).file("absent.json")
    with pytest.raises(CheckpointNotFoundError, match="only model"):
        Repo(touch(tmp_path / "pickles", "model.bin")).weights("model")


def test_a_relative_folder_with_the_look_of_an_id_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(touch(tmp_path, "some/repo/config.json"))
    assert Repo("some/repo").file("config.json") == Path("some/repo/config.json")


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "../nowhere", "~/nowhere", "a/b/c", Path("a/b")])
def test_missing_folder(source: str | Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="there is no folder"):
        Repo(source).file("config.json")


def test_missing_subfolder_and_single_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match="has no folder 'unet'"):
        Repo(tmp_path, subfolder="unet").file("config.json")
    with pytest.raises(CheckpointError, match="is a single file"):
        Repo(touch(tmp_path, "model.safetensors") / "model.safetensors").file("config.json")


def test_not_a_hub_id() -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"neither an existing folder .* nor a Hub id"):
        Repo("what is this?").file("config.json")


# --- which weights ---------------------------------------------------------------------------------------------------

STEM = "diffusion_pytorch_model"


def test_weight_names_are_those_of_the_reference() -> None:
    from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
    from diffusers.utils.hub_utils import _add_variant
    from transformers.utils import SAFE_WEIGHTS_NAME

    assert weight_names(STEM, None) == (SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME)
    index, older, single = weight_names(STEM, "fp16")
    assert index == _add_variant(SAFE_WEIGHTS_INDEX_NAME, "fp16")
    assert older == f"{STEM}.safetensors.fp16.index.json"  # as in diffusers' _fetch_index_file_legacy
    assert single == _add_variant(SAFETENSORS_WEIGHTS_NAME, "fp16")
    assert weight_names("model", None)[0] == SAFE_WEIGHTS_NAME  # transformers prefers the single file


@pytest.mark.parametrize(
    "index", [f"{STEM}.safetensors.index.fp16.json", f"{STEM}.safetensors.fp16.index.json"], ids=["new", "old"]
)
def test_sharded_variant_in_both_spellings(tmp_path: Path, index: str) -> None:
    shards = [f"{STEM}.fp16-00001-of-00002.safetensors", f"{STEM}.fp16-00002-of-00002.safetensors"]
    touch(tmp_path, *shards)
    save_json({"weight_map": {"a": shards[0], "b": shards[1]}}, tmp_path / index)
    weights = Repo(tmp_path).weights(STEM, "fp16")
    assert list(weights.files) == shards
    assert weights.index == {"a": shards[0], "b": shards[1]}


def test_missing_variant_lists_those_that_exist(tmp_path: Path) -> None:
    touch(tmp_path, f"{STEM}.safetensors", f"{STEM}.non_ema.safetensors")
    with pytest.raises(CheckpointNotFoundError, match=r"variant='fp16'\); it has no variant, variant='non_ema'"):
        Repo(tmp_path).weights(STEM, "fp16")
    (tmp_path / f"{STEM}.safetensors").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"\(no variant\); it has variant='non_ema'"):
        Repo(tmp_path).weights(STEM)


@pytest.mark.parametrize("name", ["model.bin", "pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickles_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match=rf"has only {name}.*unpickling a file runs whatever code"):
        Repo(touch(tmp_path, name)).weights("model")


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"has no model\.safetensors; it holds README\.md"):
        Repo(touch(tmp_path, "README.md")).weights("model")


def test_index_that_lists_absent_shards(tmp_path: Path) -> None:
    touch(tmp_path, "model-00001-of-00003.safetensors")
    names = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    save_json({"weight_map": dict(zip("abc", names, strict=True))}, tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointNotFoundError, match=f"lists 3 shards, and .* lacks {names[1]}, {names[2]}"):
        Repo(tmp_path).weights("model")


@pytest.mark.parametrize("name", ["../model.safetensors", "sub/model.safetensors", "model.bin"])
def test_index_that_points_elsewhere(tmp_path: Path, name: str) -> None:
    save_json({"weight_map": {"a": name}}, tmp_path / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="shards must be"):
        Repo(tmp_path).weights("model")


@pytest.mark.parametrize(
    "content",
    ['{"metadata": {}}', '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "[]", "{"],
)
def test_broken_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json"):
        Repo(tmp_path).weights("model")


def test_interrupted_save_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise KeyboardInterrupt

    touch(tmp_path, "a.json")
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "a.json", fail)
    assert (tmp_path / "a.json").read_text() == "content of a.json"
    assert os.listdir(tmp_path) == ["a.json"]


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    main = tmp_path_factory.mktemp("main")
    shards = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
    touch(main, "config.json", "README.md", "unet/config.json", "unet/model.safetensors", "unet/model.bin", "big.ckpt")
    touch(main, *(f"sharded/{name}" for name in shards))
    save_json({"weight_map": {"a": shards[0], "b": shards[1]}}, main / "sharded/model.safetensors.index.fp16.json")
    touch(main, "pickles/model.bin")
    other = touch(tmp_path_factory.mktemp("other"), "config.json")
    (other / "config.json").write_text("of the branch")
    repositories = {
        "some/repo": Repository({"main": main, "branch": other}),
        "private/repo": Repository({"main": main}, token="hf_secret"),
        "gated/repo": Repository({"main": main}, gated=True),
    }
    with HubServer(repositories) as server:
        yield server


def run(hub: HubServer, cache: Path, code: str, **environment: str) -> str:
    return run_with(hub, cache, "import json\nfrom minidiff.checkpoints.hub import *\n" + code, **environment)


def test_hub_downloads_one_file_then_uses_the_cache(hub: HubServer, tmp_path: Path) -> None:
    code = 'print(Repo("some/repo", subfolder="unet").file("config.json").read_text())'
    assert run(hub, tmp_path, code) == "content of unet/config.json"
    assert hub.downloaded() == ["some/repo/main/unet/config.json"]
    assert run(hub, tmp_path, code) == "content of unet/config.json"
    assert hub.downloaded() == []
    assert run(hub, tmp_path, code, HF_HUB_OFFLINE="1") == "content of unet/config.json"
    assert hub.requests == []
    assert run(hub, tmp_path, code.replace('"unet"', '"unet", local_files_only=True')) == "content of unet/config.json"
    assert hub.requests == []


def test_hub_cache_dir_and_force_download(hub: HubServer, tmp_path: Path) -> None:
    where = f"cache_dir={str(tmp_path / 'here')!r}"
    code = f'print(Repo("some/repo", {where}).file("config.json"))'
    assert run(hub, tmp_path, code).startswith(str(tmp_path / "here"))
    run(hub, tmp_path, code.replace(where, f"{where}, force_download=True"))
    assert hub.downloaded() == ["some/repo/main/config.json"]


def test_hub_revision(hub: HubServer, tmp_path: Path) -> None:
    code = 'print(Repo("some/repo", revision="branch").file("config.json").read_text())'
    assert run(hub, tmp_path, code) == "of the branch"


def test_hub_pins_the_commit(hub: HubServer, tmp_path: Path) -> None:
    code = """
repo = Repo("some/repo", revision="branch")
print(repo.pinned(repo.file("config.json")).revision)"""
    commit, _ = hub.repositories["some/repo"].commit("branch")
    assert run(hub, tmp_path, code) == commit


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_hub_token(hub: HubServer, tmp_path: Path, way: str) -> None:
    argument = ", token='hf_secret'" if way == "argument" else ""
    code = f'print(Repo("private/repo"{argument}).file("config.json").read_text())'
    environment = {"HF_TOKEN": "hf_secret"} if way == "environment" else {}
    assert run(hub, tmp_path, code, **environment) == "content of config.json"
    assert {request.token for request in hub.requests} == {"hf_secret"}


REFUSALS = {  # expression -> what the error says
    'Repo("private/repo").file("config.json")': "no such public repository.*HF_TOKEN",
    'Repo("private/repo", token="hf_wrong").file("config.json")': "no such public repository.*token=",
    'Repo("gated/repo").file("config.json")': "gated/repo is a gated repository: accept its terms",
    'Repo("no/repo").file("config.json")': "there is no folder 'no/repo' .* the Hub has no such public repository",
    'Repo("some/repo", revision="nothing").file("config.json")': "some/repo has no revision 'nothing'",
    'Repo("some/repo").file("absent.json")': r"MissingFileError: some/repo has no absent\.json on the Hub",
    'Repo("some/repo", local_files_only=True).file("README.md")': r"NotCachedError: README.md .*local_files_only=True",
    'Repo("some/repo", "unet").weights("model", "fp16")': r"variant='fp16'\); it has no variant: ask for that",
    'Repo("some/repo", "sharded").weights("model")': r"\(no variant\); it has variant='fp16': ask for that",
    'Repo("some/repo", "pickles").weights("model")': r"has only model\.bin, no model\.safetensors: minidiff reads only",
}


def test_hub_refusals(hub: HubServer, tmp_path: Path) -> None:
    code = f"""
for expression in {list(REFUSALS)!r}:
    try:
        eval(expression)
    except ValueError as error:
        print(f"{{type(error).__name__}}: {{error}}")"""
    printed = run(hub, tmp_path, code).splitlines()
    assert len(printed) == len(REFUSALS)
    for message, (expression, expected) in zip(printed, REFUSALS.items(), strict=True):
        assert re.search(expected, message), f"{expression}: {message}"
    assert hub.downloaded() == []


def test_hub_offline_and_not_cached(hub: HubServer, tmp_path: Path) -> None:
    message = run(hub, tmp_path, 'Repo("some/repo").file("config.json")', HF_HUB_OFFLINE="1")
    assert "NotCachedError: config.json of some/repo is not in the Hugging Face cache" in message
    assert "HF_HUB_OFFLINE" in message  # says how it came to be offline
    assert hub.requests == []


def test_hub_out_of_reach(hub: HubServer, tmp_path: Path) -> None:
    code = 'import time; time.sleep = lambda _: None; Repo("some/repo").file("config.json")'  # no waits between retries
    message = run(hub, tmp_path, code, HF_ENDPOINT="http://127.0.0.1:9")
    assert "NotCachedError: config.json of some/repo is not in the Hugging Face cache" in message


@pytest.mark.parametrize("status", [403, 429, 500, 503])
def test_hub_that_answers_with_an_error_is_not_a_hub_without_the_file(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setitem(hub.faults, "README.md", status)
    code = 'import time; time.sleep = lambda _: None; print(Repo("some/repo").optional_file("README.md"))'
    message = run(hub, tmp_path, code)
    assert (
        "CheckpointNotFoundError: the Hub did not give README.md of some/repo, and the Hugging Face cache has it not: "
        in message
    )
    assert str(status) in message and "local_files_only=True" in message
    assert run(hub, tmp_path, code.replace('"some/repo"', '"some/repo", local_files_only=True')) == "None"


def test_hub_marks_of_absence(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub once said not to be there is known to be missing without it; at a commit it is not asked again."""
    code = """
repo = Repo("some/repo")
repo = repo.pinned(repo.file("config.json"))
try:
    repo.file("absent.json")
except Exception as error:
    print(type(error).__name__)"""
    assert run(hub, tmp_path, code) == "MissingFileError"
    asked = "/some/repo/resolve/{}/absent.json"
    commit, _ = hub.repositories["some/repo"].commit("main")
    assert [request.path for request in hub.requests][-1] == asked.format(commit)
    assert run(hub, tmp_path, code) == "MissingFileError"
    assert asked.format(commit) not in [request.path for request in hub.requests]
    assert run(hub, tmp_path, code, HF_HUB_OFFLINE="1") == "MissingFileError"
    unpinned = code.replace("repo = repo.pinned", "repo.pinned")
    assert run(hub, tmp_path, unpinned, HF_HUB_OFFLINE="1") == "MissingFileError"
    assert run(hub, tmp_path, unpinned.replace("absent", "other"), HF_HUB_OFFLINE="1") == "NotCachedError"
    forced = code.replace('"some/repo"', '"some/repo", force_download=True')
    assert run(hub, tmp_path, forced) == "MissingFileError"
    assert asked.format(commit) in [request.path for request in hub.requests]


def test_hub_download_that_breaks_off(hub: HubServer, tmp_path: Path) -> None:
    code = """
import huggingface_hub
def broken(*args, **options):
    raise OSError("Consistency check failed: file should be of size 10 but has size 5")
huggingface_hub.hf_hub_download = broken
Repo("some/repo").file("config.json")"""
    message = run(hub, tmp_path, code)
    assert "CheckpointNotFoundError: config.json of some/repo could not be downloaded: Consistency" in message


def test_hub_weights_download_only_what_is_loaded(hub: HubServer, tmp_path: Path) -> None:
    code = 'print(json.dumps(sorted(Repo("some/repo", SUB).weights("model", VARIANT).files)))'
    single = run(hub, tmp_path, code.replace("SUB", '"unet"').replace("VARIANT", "None"))
    assert json.loads(single) == ["model.safetensors"]
    assert hub.downloaded() == ["some/repo/main/unet/model.safetensors"]
    sharded = run(hub, tmp_path, code.replace("SUB", '"sharded"').replace("VARIANT", '"fp16"'))
    assert len(json.loads(sharded)) == 2
    assert len(hub.downloaded()) == 3  # the index and its shards
    assert (
        run(hub, tmp_path, code.replace("SUB", '"sharded"').replace("VARIANT", '"fp16"'), HF_HUB_OFFLINE="1") == sharded
    )


def test_hub_weights_offline(hub: HubServer, tmp_path: Path) -> None:
    message = run(hub, tmp_path, 'Repo("some/repo", "unet").weights("model")', HF_HUB_OFFLINE="1")
    assert "NotCachedError" in message and "unet/model" in message


def test_hub_that_cannot_be_asked_what_there_is_instead(hub: HubServer, tmp_path: Path) -> None:
    """It was a raw error of huggingface_hub, offline with the marks of absence of an earlier try."""
    code = 'Repo("some/repo", "unet").weights("absent")'
    assert "some/repo/unet has only model.bin" in run(hub, tmp_path, code)
    message = run(hub, tmp_path, code, HF_HUB_OFFLINE="1")
    assert "CheckpointNotFoundError: some/repo/unet lacks a file" in message and "the Hub did not say" in message


def test_local_folder_wins_over_the_hub(hub: HubServer, tmp_path: Path) -> None:
    touch(tmp_path, "some/repo/config.json")
    code = f'import os; os.chdir({str(tmp_path)!r}); print(Repo("some/repo").file("config.json"))'
    assert run(hub, tmp_path / "cache", code) == "some/repo/config.json"
    assert hub.requests == []
