"""Tensor names, shapes and dtypes of published checkpoints: make such a list from any checkpoint, and compare two.

    python weights/headers.py compare v1-5-pruned-emaonly runwayml/stable-diffusion-v1-5/v1-5-pruned-emaonly.safetensors
    python weights/headers.py make SOURCE FILE.json
    python weights/headers.py derive

SOURCE is a .safetensors file, a folder in Hub layout, or ``OWNER/NAME/FILE`` on the Hub, of which only the header is
downloaded (a few hundred kilobytes). ``derive`` writes the lists in weights/headers/ from minidiff's name table and the
packaged configurations: they say what minidiff expects, and ``compare`` says whether a published file agrees.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent / "headers"
Tensors = dict[str, list[Any]]  # name -> [dtype, shape]


class Published(NamedTuple):
    """A published single file: where it is, its configuration in the package, dtype, and the list it differs from."""

    source: str
    config: str
    dtype: str
    like: str | None = None


PUBLISHED = {
    "v1-5-pruned-emaonly": Published("runwayml/stable-diffusion-v1-5", "stable-diffusion-v1-5", "F32"),
    "sd-v1-5-inpainting": Published(
        "runwayml/stable-diffusion-inpainting", "stable-diffusion-inpainting", "F32", "v1-5-pruned-emaonly"
    ),
    "instruct-pix2pix-00-22000": Published(
        "timbrooks/instruct-pix2pix", "instruct-pix2pix", "F32", "v1-5-pruned-emaonly"
    ),
    "v2-1_768-ema-pruned": Published("stabilityai/stable-diffusion-2-1", "stable-diffusion-2-1", "F32"),
    "v2-1_512-ema-pruned": Published(
        "stabilityai/stable-diffusion-2-1-base", "stable-diffusion-2-1-base", "F32", "v2-1_768-ema-pruned"
    ),
    "512-inpainting-ema": Published(
        "stabilityai/stable-diffusion-2-inpainting", "stable-diffusion-2-inpainting", "F32", "v2-1_768-ema-pruned"
    ),
    "sd_xl_base_1.0": Published("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-base-1.0", "F16"),
    "sd_xl_refiner_1.0": Published(
        "stabilityai/stable-diffusion-xl-refiner-1.0", "stable-diffusion-xl-refiner-1.0", "F16"
    ),
}
NOTE = (
    "derived from minidiff's name table and configuration on the meta device, not read from the published file. Names "
    "and shapes agree with components/*.txt of github.com/arenasys/stable-diffusion-webui-model-toolkit, which lists "
    "what published files hold; dtypes follow from their sizes. What minidiff leaves out on purpose (moving averages, "
    "noise schedule, position_ids) is not listed"
)


def main() -> int:
    """Run one command; 1 if a comparison finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write the list of a checkpoint")
    make.add_argument("source")
    make.add_argument("output", type=Path)
    compare = commands.add_parser("compare", help="compare a list with a checkpoint")
    compare.add_argument("list", help="a .json file, or the name of one in weights/headers/")
    compare.add_argument("source")
    commands.add_parser("derive", help="write weights/headers/*.json")
    args = parser.parse_args()
    if args.command == "make":
        write_list(args.output, {"source": args.source, "note": "read from the file"}, tensors_of(args.source))
    elif args.command == "derive":
        derive_all()
    else:
        path = Path(args.list) if args.list.endswith(".json") else HERE / f"{args.list}.json"
        lines = differences(read_list(path), tensors_of(args.source))
        print("\n".join(lines) or f"{args.source} has every tensor of {path.name}, and no other")
        return bool(lines)
    return 0


def tensors_of(source: str) -> Tensors:
    """Read names, dtypes and shapes of a file, a folder (names with the component before them) or a file on the Hub."""
    from minidiff.checkpoints.load import SafetensorsFile, read_header

    path = Path(source)
    if path.is_dir():
        files = [(file, file.parent.relative_to(path)) for file in sorted(path.rglob("*.safetensors"))]
        return {
            (folder / tensor.name).as_posix(): [tensor.dtype, list(tensor.shape)]
            for file, folder in files
            for tensor in read_header(SafetensorsFile(file))
        }
    if path.is_file():
        return {tensor.name: [tensor.dtype, list(tensor.shape)] for tensor in read_header(SafetensorsFile(path))}
    from huggingface_hub import HfApi

    owner, name, file = source.split("/", 2)
    header = HfApi().parse_safetensors_file_metadata(f"{owner}/{name}", file)
    return {name: [tensor.dtype, list(tensor.shape)] for name, tensor in header.tensors.items()}


def differences(expected: Tensors, found: Tensors) -> list[str]:
    """Say what a checkpoint has otherwise than a list; tensors that are left out on purpose may be there."""
    from minidiff.checkpoints.original.dropped import why_dropped

    lines = [f"missing     {name} {expected[name]}" for name in expected if name not in found]
    lines += [
        f"different   {name} is {found[name]}, listed {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    extra = [name for name in found if name not in expected and not why_dropped(name, expected)]
    return lines + [f"unexpected  {name} {found[name]}" for name in extra]


def derive(published: Published) -> Tensors:
    """Return what a published file should hold, by the name table and the packaged configuration."""
    from minidiff.checkpoints.load import OnMeta, expected_shapes
    from minidiff.checkpoints.original.configs import PackagedConfigs
    from minidiff.checkpoints.original.prefixes import NETWORKS
    from minidiff.checkpoints.original.write import original_tables
    from minidiff.checkpoints.tools.checkpoint import model_class

    configs = PackagedConfigs(published.config)
    index = configs.read("model_index.json")
    with OnMeta():
        networks = {
            name: model_class(index[name][1], configs).from_config(configs.read(f"{name}/config.json"))
            for name in NETWORKS
            if index.get(name) not in (None, [None, None])
        }
    tensors: Tensors = {}
    for name, rows in original_tables(networks).items():
        shapes = expected_shapes(networks[name], rows, "ldm")
        tensors |= {name: [published.dtype, list(shape)] for name, shape in shapes.items()}
    return tensors


def derive_all() -> None:
    """Write weights/headers/*.json."""
    lists = {name: derive(published) for name, published in PUBLISHED.items()}
    for name, published in PUBLISHED.items():
        head = {"source": f"{published.source}/{name}.safetensors", "note": NOTE}
        tensors = lists[name]
        if published.like:
            base = lists[published.like]
            if tensors.keys() != base.keys():
                raise AssertionError(f"{name} has other names than {published.like}")
            head["like"] = published.like
            tensors = {key: value for key, value in tensors.items() if value != base[key]}
        write_list(HERE / f"{name}.json", head, tensors)


def write_list(path: Path, head: dict[str, str], tensors: Tensors) -> None:
    """Write a list, one tensor a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()]
    body = ",\n".join(f"    {json.dumps(name)}: {json.dumps(value)}" for name, value in tensors.items())
    path.write_text("\n".join(["{", *lines, '  "tensors": {', body, "  }", "}", ""]), encoding="utf-8")


def read_list(path: Path) -> Tensors:
    """Read a list; one that says which other list it is like holds the differing tensors alone."""
    content = json.loads(path.read_text(encoding="utf-8"))
    base = read_list(path.with_name(f"{content['like']}.json")) if "like" in content else {}
    return base | content["tensors"]


if __name__ == "__main__":
    sys.exit(main())
