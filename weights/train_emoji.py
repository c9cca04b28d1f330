"""Train emoji64, the text-to-image checkpoint that minidiff carries: 64x64 emoji from their names.

Every stage resumes where it was interrupted; its losses are in ``runs/emoji64/*/log.jsonl``::

    npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz     # gives package/
    python weights/train_emoji.py vae --data package
    torchrun --nproc-per-node 2 weights/train_emoji.py denoiser --data package
    python weights/train_emoji.py export --data package --to runs/emoji64/export
    python -m weights.emoji_quality --model runs/emoji64/export --json runs/emoji64/quality.json
    python weights/train_emoji.py export --data package --to weights/emoji64                   # card with the quality

The stages are ``emoji_vae.py`` (pictures <-> latents), ``emoji_denoiser.py`` (text encoder and UNet) and
``emoji_export.py`` (Hub layout, float16, model card). Networks, noise schedule and tokenizer are minidiff's.
"""

import argparse
from pathlib import Path

import emoji_denoiser
import emoji_export
import emoji_vae

STAGES = {
    "vae": (emoji_vae.add_arguments, emoji_vae.train),
    "denoiser": (emoji_denoiser.add_arguments, emoji_denoiser.train),
    "export": (emoji_export.add_arguments, emoji_export.export),
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for name, (add_arguments, run) in STAGES.items():
        stage = stages.add_parser(name, help=run.__doc__.splitlines()[0])
        stage.add_argument("--data", type=Path, required=True, help="the unpacked npm package emoji-datasource-google")
        stage.add_argument("--run", type=Path, default=Path("runs/emoji64"), help="where state and logs are kept")
        stage.add_argument("--seed", type=int, default=0)
        add_arguments(stage)
    args = parser.parse_args()
    STAGES[args.stage][1](args)


if __name__ == "__main__":
    main()
