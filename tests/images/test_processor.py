"""Pictures and masks that pipelines begin with, bit for bit as the reference prepares them."""

import subprocess
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff import VaeImageProcessor, load_image
from minidiff.images.processor import mask_tensor, to_tensor
from minidiff.images.regions import RESIZE_MODES
from minidiff.images.tensors import read_metadata
from tests.theirs import diffusers

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (37, 45, 4), dtype=np.uint8)
MODES = ("RGB", "RGBA", "L", "P", "1", "LA", "CMYK")


def picture(mode: str = "RGB", size: tuple[int, int] = (45, 37)) -> Image.Image:
    """Return noise in this mode; as a palette picture with its own palette."""
    rgba = Image.fromarray(PIXELS).resize(size, Image.Resampling.NEAREST)
    if mode == "P":
        return rgba.convert("RGB").quantize(32)
    return rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode)


UNIT = torch.rand(2, 3, 37, 45, generator=torch.Generator().manual_seed(0))
GREY = UNIT[:, 0]
INPUTS: dict[str, Any] = {
    **{f"PIL {mode}": picture(mode) for mode in MODES},
    "list of PIL": [picture(), picture(size=(30, 61))],
    "array": UNIT[0].permute(1, 2, 0).numpy(),
    "arrays": UNIT.permute(0, 2, 3, 1).numpy(),
    "grey array": GREY[0].numpy(),
    "float64 array": GREY[0].numpy().astype(np.float64),
    "list of arrays": list(UNIT.permute(0, 2, 3, 1).numpy()),
    "list of grey arrays": list(GREY.numpy()),
    "list of batches of arrays": [UNIT.permute(0, 2, 3, 1).numpy()] * 2,
    "array from -1 to 1": UNIT.permute(0, 2, 3, 1).numpy() * 2 - 1,
    "tensor": UNIT[0],
    "tensors": UNIT,
    "list of tensors": list(UNIT),
    "list of batches of tensors": [UNIT, UNIT[:1]],
    "tensor from -1 to 1": UNIT * 2 - 1,
    "tensor that overshoots": UNIT * 1.2 + 0.1,
    "one channel": UNIT[:, :1],
    "latents": torch.randn(2, 4, 9, 11),
    "list of latents": [torch.randn(4, 9, 11)] * 2,
}
MASKS: dict[str, Any] = {
    **{f"PIL {mode}": picture(mode) for mode in MODES},
    "list of PIL": [picture("L"), picture("RGB", (30, 61))],
    "array (H, W)": GREY[0].numpy(),
    "array (H, W, 1)": GREY[0].numpy()[..., None],
    "array (B, H, W)": GREY.numpy(),
    "array (B, H, W, 1)": GREY.numpy()[..., None],
    "array of bytes": PIXELS[..., 0],
    "list of arrays (H, W)": list(GREY.numpy()),
    "list of arrays (H, W, 1)": list(GREY.numpy()[..., None]),
    "tensor (H, W)": GREY[0],
    "tensor (1, H, W)": GREY[:1],
    "tensor (B, H, W)": GREY,
    "tensor (B, 1, H, W)": GREY[:, None],
    "tensor of bytes": torch.from_numpy(PIXELS[..., 0]),
    "tensor of halves": torch.full((1, 1, 16, 16), 0.5),
    "list of tensors (H, W)": list(GREY),
    "list of tensors (1, H, W)": list(GREY[:, None]),
}


def both(switches: dict[str, Any], method: str, *args: Any, **options: Any) -> tuple[Any, Any]:
    """Return what our processor and theirs make of it; they warn alike."""
    results, warned = [], []
    for cls in (VaeImageProcessor, diffusers.image_processor.VaeImageProcessor):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(getattr(cls(**switches), method)(*args, **options))
        warned.append([one.category for one in caught])
    assert warned[0] == warned[1]
    return results[0], results[1]


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 50}], ids=["own size", "given size"])
@pytest.mark.parametrize("name", INPUTS)
def test_images(name: str, size: dict[str, int]) -> None:
    assert_equal(*both({}, "preprocess", INPUTS[name], **size))


@pytest.mark.parametrize("size", [{}, {"height": 24, "width": 50}], ids=["own size", "given size"])
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, size: dict[str, int]) -> None:
    switches = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    ours, theirs = both(switches, "preprocess", MASKS[name], **size)
    assert_equal(ours, theirs)
    if size:
        assert torch.equal(mask_tensor(MASKS[name], 8, **size), theirs)


@pytest.mark.parametrize(
    "switches",
    [
        {"do_convert_rgb": True},
        {"do_convert_grayscale": True},
        {"do_normalize": False},
        {"do_binarize": True},
        {"vae_scale_factor": 4},
        {"vae_latent_channels": 3},
        {"reducing_gap": 2},
        *({"resample": name} for name in ("linear", "bilinear", "bicubic", "nearest")),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["PIL RGB", "PIL RGBA", "PIL L", "PIL P", "arrays", "tensors"])
def test_every_switch(switches: dict[str, Any], name: str) -> None:
    assert_equal(*both(switches, "preprocess", INPUTS[name], height=19, width=16))


def test_without_resizing() -> None:
    for name in ("PIL RGB", "arrays", "tensors"):
        assert_equal(*both({"do_resize": False}, "preprocess", INPUTS[name]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize_mode", RESIZE_MODES)
def test_every_way_to_fit(resize_mode: str, mode: str) -> None:
    """Wider, taller and of the same proportions as the size to fit; the bands to fill are odd and even."""
    for size in ((16, 64), (64, 16), (72, 24), (48, 40), (45, 37)):
        options = {"width": size[0], "height": size[1], "resize_mode": resize_mode, "crops_coords": (3, 1, 43, 35)}
        assert_equal(*both({"vae_scale_factor": 1}, "preprocess", picture(mode), **options))


def test_regions_around_masks() -> None:
    """Masks in all corners, thin and wide, with and without room around them."""
    for box in ((0, 0, 1, 1), (44, 36, 45, 37), (10, 12, 13, 30), (2, 30, 43, 33), (0, 0, 45, 37), (20, 3, 22, 5)):
        mask = Image.new("RGB", (45, 37))
        mask.paste((1, 2, 255), box)
        for pad in (0, 5, 50):
            for size in ((64, 64), (128, 32), (32, 120)):
                ours, theirs = both({}, "get_crop_region", mask, *size, pad=pad)
                assert ours == theirs and len(ours) == 4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("region", [None, (5, 3, 31, 36)], ids=["whole", "region"])
def test_pasting_back(mode: str, region: tuple[int, int, int, int] | None) -> None:
    painted = picture("RGB", (45, 37) if region is None else (64, 48)).rotate(180)
    ours, theirs = both({}, "apply_overlay", picture("L"), picture(mode), painted, region)
    assert ours.mode == theirs.mode and np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert np.asarray(ours).std() > 10


def test_blur() -> None:
    for factor in ({}, {"blur_factor": 33}):
        ours, theirs = both({}, "blur", picture("L"), **factor)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


def same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Image.Image):
        return ours.mode == theirs.mode and np.array_equal(np.asarray(ours), np.asarray(theirs))
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if isinstance(ours, torch.Tensor | np.ndarray):
        return ours.dtype == theirs.dtype and np.array_equal(np.asarray(ours), np.asarray(theirs))
    return ours == theirs


TOOLS = {
    "numpy_to_pil": [
        (UNIT.permute(0, 2, 3, 1).numpy(),),
        (UNIT[0].permute(1, 2, 0).numpy(),),
        (GREY.numpy()[..., None],),
    ],
    "pil_to_numpy": [(picture("RGB"),), ([picture("L"), picture("L").rotate(180)],)],
    "numpy_to_pt": [(UNIT.permute(0, 2, 3, 1).numpy(),), (GREY.numpy(),)],
    "pt_to_numpy": [(UNIT,), (UNIT.bfloat16(),)],
    "normalize": [(UNIT,), (UNIT.numpy(),)],
    "denormalize": [(UNIT * 3 - 1.5,)],
    "binarize": [(UNIT,), (torch.full((1, 1, 2, 2), 0.5),)],
    "convert_to_rgb": [(picture("L"),)],
    "convert_to_grayscale": [(picture("RGB"),)],
    "resize": [
        (picture("RGB"), 20, 24),
        (picture("RGB"), 20, 24, "fill"),
        (UNIT, 20, 24),
        (UNIT.permute(0, 2, 3, 1).numpy(), 9, 7),
    ],
    "get_default_height_width": [(picture("RGB"),), (UNIT,), (UNIT.numpy(), 33, 41), (UNIT, None, 50)],
}


@pytest.mark.parametrize(("name", "arguments"), [(name, one) for name, some in TOOLS.items() for one in some])
def test_tools(name: str, arguments: tuple[Any, ...]) -> None:
    copies = [tuple(one.clone() if isinstance(one, torch.Tensor) else one for one in arguments) for _ in range(2)]
    ours = getattr(VaeImageProcessor(resample="bilinear"), name)(*copies[0])
    theirs = getattr(diffusers.image_processor.VaeImageProcessor(resample="bilinear"), name)(*copies[1])
    assert same(ours, theirs)


def test_switches_are_read_as_config() -> None:
    switches = {"resample": "nearest", "do_normalize": False}
    ours, theirs = (cls(**switches).config for cls in (VaeImageProcessor, diffusers.image_processor.VaeImageProcessor))
    assert dict(ours) == {name: theirs[name] for name in ours} and ours.resample == "nearest"


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64])
def test_masks_of_integers(dtype: torch.dtype) -> None:
    """The reference takes them where nothing is resized; with a size its torch function has none for them."""
    mask = torch.tensor([[0, 1], [1, 0]]).repeat_interleave(8, 0).repeat_interleave(8, 1)[None, None]
    switches = {"do_normalize": False, "do_binarize": True, "do_convert_grayscale": True}
    theirs = diffusers.image_processor.VaeImageProcessor(**switches, do_resize=False).preprocess(mask.to(dtype))
    assert torch.equal(VaeImageProcessor(**switches, do_resize=False).preprocess(mask.to(dtype)), theirs.float())
    for given in (mask.to(dtype), mask.to(dtype)[0, 0].numpy()):
        assert torch.equal(mask_tensor(given, 8, 32, 32), mask_tensor(mask.float(), 8, 32, 32))


@pytest.mark.parametrize("switches", [{}, {"do_normalize": False}], ids=str)
@pytest.mark.parametrize("flags", [None, [True, False]])
@pytest.mark.parametrize("channels", [1, 3])
def test_results(switches: dict[str, bool], flags: list[bool] | None, channels: int) -> None:
    x = UNIT[:, :channels] if switches or flags else UNIT[:, :channels] * 3 - 1.5
    for output_type in ("pt", "latent"):
        assert_equal(*both(switches, "postprocess", x, output_type, flags))
    ours, theirs = both(switches, "postprocess", x, "np", flags)
    assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs)
    ours, theirs = both(switches, "postprocess", x, do_denormalize=flags)
    for one, other in zip(ours, theirs, strict=True):
        assert one.mode == other.mode and np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("name", ["PIL RGB", "list of PIL", "arrays", "list of arrays", "tensors", "latents"])
def test_pipelines_prepare_images_so(name: str) -> None:
    theirs = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    assert_equal(to_tensor(INPUTS[name], 4, 4), theirs.preprocess(INPUTS[name]))
    sized = theirs.preprocess(INPUTS[name], 20, 32)
    assert_equal(to_tensor(INPUTS[name], 4, 4, height=20, width=32), sized)


@pytest.mark.parametrize("mode", MODES)
def test_pipelines_cut_out_so(mode: str) -> None:
    """A view of a part is RGB whatever the picture was."""
    theirs = diffusers.image_processor.VaeImageProcessor(vae_scale_factor=4)
    options = {"height": 20, "width": 32, "resize_mode": "fill", "crops_coords": (3, 1, 43, 35)}
    ours = to_tensor(picture(mode), 4, 4, height=20, width=32, region=(3, 1, 43, 35))
    assert_equal(ours, theirs.preprocess(picture(mode), **options))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def saved(folder: Path, name: str) -> Path:
    """Write a picture as a camera does that lies on its side, or with transparency."""
    if name.endswith(".jpg"):
        note = Image.Exif()
        note[0x0112] = 6  # the top of the scene is at the right
        picture().save(folder / name, exif=note)
    else:
        picture("RGBA").save(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["turned.jpg", "transparent.png"])
def test_load_image(name: str, tmp_path: Path) -> None:
    """From a path, an address and a PIL picture; upright and in RGB, or as a function has it."""
    path = str(saved(tmp_path, name))
    handler = partial(Quiet, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        for source in (path, f"http://127.0.0.1:{server.server_port}/{name}", Image.open(path)):
            for convert in ({}, {"convert_method": lambda one: one.convert("L").rotate(90)}):
                ours = load_image(source, **convert)
                theirs = diffusers.utils.load_image(source, **convert)
                assert ours.mode == theirs.mode and np.array_equal(np.asarray(ours), np.asarray(theirs))
        server.shutdown()
    assert load_image(Path(path)).size == ((37, 45) if name == "turned.jpg" else (45, 37))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_formats_of_files(kind: str, tmp_path: Path) -> None:
    picture().save(tmp_path / "picture", format=kind)
    assert load_image(tmp_path / "picture").size == (45, 37)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For EPS, whatever the file is called, PIL starts Ghostscript."""

    def start(*arguments: Any, **options: Any) -> None:
        raise AssertionError(f"a program was started: {arguments}")

    picture().save(tmp_path / "picture.eps")
    (tmp_path / "picture.eps").rename(tmp_path / "picture.png")
    monkeypatch.setattr("PIL.EpsImagePlugin.has_ghostscript", lambda: True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", "gs")
    monkeypatch.setattr(subprocess, "check_call", start)
    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(ValueError, match=r"picture\.png is not a picture that can be read \(PNG, JPEG, "):
        load_image(tmp_path / "picture.png")
    with pytest.raises(ValueError, match=r"picture\.png is not a picture that can be read \(PNG"):
        read_metadata(tmp_path / "picture.png")


@pytest.mark.parametrize("damage", ["cut", "bomb", "chunk", "empty", "text"])
def test_broken_pictures(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.png"
    picture().save(path)
    content = path.read_bytes()
    if damage == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    else:
        cut = {
            "cut": content[:200],
            "chunk": content[:60] + b"\0\xff" * 8 + content[76:],
            "empty": b"",
            "text": b"hello",
        }
        path.write_bytes(cut[damage])
    with pytest.raises(ValueError, match=r"picture\.png is not a picture that can be read"):
        load_image(path)
