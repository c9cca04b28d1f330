"""Draw docs/adapter_forms.webp: ``python -m docs.figures.adapter_forms --run runs/adapter_forms``.

Four small adapters of the embedded checkpoint, each of another form, are trained with diffusers and peft to draw in
blue. The pictures that they learn from are the checkpoint's own, recoloured. minidiff then draws names that were not
among them: without an adapter, and with each at two weights. What a run has trained already is not trained again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from docs.figures.table import table
from minidiff import StableDiffusionPipeline
from minidiff.embedded import GUIDANCE, embedded_checkpoint

NAMES = Path(__file__).parents[2] / "weights/emoji_reference.json"
SHOWN = ("red apple", "penguin", "rocket", "sunflower", "cat face", "slice of pizza")  # none of them is trained on
RANK, DARK = 4, "#001060"
TARGETS = r"(.*\.)?(conv\d?|conv_in|conv_out|conv_shortcut|to_[qkv]|to_out\.0|proj_in|proj_out)"
FORMS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> configuration of peft
    "LoRA": ("LoraConfig", {"lora_alpha": RANK}),
    "DoRA": ("LoraConfig", {"lora_alpha": RANK, "use_dora": True}),
    "LoHa": ("LoHaConfig", {"alpha": RANK}),
    "LoKr": ("LoKrConfig", {"alpha": RANK}),
}
WEIGHTS, DRAWN, BATCH, LEARNING_RATE = (1.0, 0.5), 160, 16, 2e-3
LEFT = 124


def names() -> list[str]:
    """Return the names that are trained on: evenly spread over all that the checkpoint knows, but for those shown."""
    known = [name for name in json.loads(NAMES.read_text(encoding="utf-8"))["names"] if name not in SHOWN]
    return known[:: len(known) // DRAWN][:DRAWN]


def in_blue(image: Image.Image) -> Image.Image:
    """Return the picture in shades of blue."""
    return ImageOps.colorize(ImageOps.grayscale(image), DARK, "white")


def training_data(theirs: Any) -> tuple[Tensor, Tensor]:
    """Return latents (N, 4, 16, 16) of pictures in blue and states of their names (N, L, D)."""
    ours = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    ours.set_progress_bar_config(disable=True)
    latents, states = [], []
    for start in range(0, DRAWN, BATCH):
        texts = names()[start : start + BATCH]
        seeds = list(range(start, start + len(texts)))
        images = ours(texts, num_inference_steps=10, guidance_scale=GUIDANCE, seeds=seeds).images
        pixels = np.stack([np.asarray(in_blue(image), np.float32) / 127.5 - 1 for image in images])
        latents.append(theirs.vae.encode(torch.from_numpy(pixels).permute(0, 3, 1, 2)).latent_dist.mean)
        states.append(theirs.encode_prompt(texts, "cpu", 1, False)[0])
    return torch.cat(latents) * theirs.vae.config.scaling_factor, torch.cat(states)


def train(form: str, steps: int, theirs: Any, latents: Tensor, states: Tensor) -> Any:
    """Return peft's network with an adapter that was trained for so many steps."""
    import peft
    from diffusers import DDPMScheduler, UNet2DConditionModel

    torch.manual_seed(0)
    kind, options = FORMS[form]
    unet = UNet2DConditionModel.from_pretrained(embedded_checkpoint() / "unet", torch_dtype=torch.float32)
    unet = peft.get_peft_model(unet, getattr(peft, kind)(r=RANK, target_modules=TARGETS, **options))
    scheduler = DDPMScheduler.from_config(theirs.scheduler.config)
    trained = [value for value in unet.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    for _ in range(steps):
        rows = torch.randint(len(latents), (BATCH,))
        x0, noise, t = latents[rows], torch.randn(BATCH, *latents.shape[1:]), torch.randint(1000, (BATCH,))
        out = unet(scheduler.add_noise(x0, noise, t), t, encoder_hidden_states=states[rows]).sample
        loss = torch.nn.functional.mse_loss(out, scheduler.get_velocity(x0, noise, t))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    return unet


def train_missing(run: Path, steps: int) -> None:
    """Train the forms that the run lacks, in PEFT's folders, and note how long each took."""
    missing = [form for form in FORMS if not (run / form / "took.json").is_file()]
    if not missing:
        return
    from diffusers import StableDiffusionPipeline as Theirs

    theirs = Theirs.from_pretrained(embedded_checkpoint(), torch_dtype=torch.float32)
    with torch.no_grad():
        latents, states = training_data(theirs)
    for form in missing:
        start = time.perf_counter()
        unet = train(form, steps, theirs, latents, states)
        seconds, count = time.perf_counter() - start, sum(p.numel() for p in unet.parameters() if p.requires_grad)
        unet.save_pretrained(run / form)
        took = {"steps": steps, "seconds": round(seconds, 1), "parameters": count}
        (run / form / "took.json").write_text(json.dumps(took), encoding="utf-8")


def rows(run: Path, steps: int) -> dict[str, list[Image.Image]]:
    """Return the label and the pictures of each row."""
    pipe = StableDiffusionPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    asked = {"num_inference_steps": steps, "guidance_scale": GUIDANCE, "seeds": list(range(len(SHOWN)))}
    plain = pipe(list(SHOWN), **asked).images
    drawn = {"no adapter": plain, "the same, turned\nblue by hand": [in_blue(image) for image in plain]}
    for form in FORMS:
        took = json.loads((run / form / "took.json").read_text(encoding="utf-8"))
        pipe.load_lora_weights(run / form, adapter_name=form)
        for weight in WEIGHTS:
            pipe.set_adapters([form], [weight])
            drawn[f"{form}, weight {weight:g}\n{took['parameters']:,} parameters"] = pipe(list(SHOWN), **asked).images
        pipe.unload_lora_weights()
    return drawn


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/adapter_forms"))
    parser.add_argument("--steps", type=int, default=400, help="of training, for each form")
    parser.add_argument("--to", type=Path, default=Path("docs/adapter_forms.webp"))
    options = parser.parse_args(arguments)
    train_missing(options.run, options.steps)
    table(rows(options.run, 20), LEFT).save(options.to, quality=85)


if __name__ == "__main__":
    main()
