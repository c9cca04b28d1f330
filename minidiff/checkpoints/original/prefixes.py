"""What stands before the names of each network in a single file, and which spelling stands behind it.

Both are the file's property: a network's name table knows nothing of them.
"""

import re
from collections.abc import Iterable

from minidiff.checkpoints.remap import Row

UNET, VAE = "model.diffusion_model.", "first_stage_model."
PREFIXES = {  # family -> component -> what its names begin with
    "1.x": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.transformer."},
    "2.x": {"unet": UNET, "vae": VAE, "text_encoder": "cond_stage_model.model."},
    "XL": {
        "unet": UNET,
        "vae": VAE,
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "XL, by some tools": {"text_encoder_2": "conditioner.embedders.1.transformer."},
    "XL refiner": {"unet": UNET, "vae": VAE, "text_encoder_2": "conditioner.embedders.0.model."},
    "a network alone": {"unet": "diffusion_model.", "vae": "vae."},
    "nothing": {"unet": "", "vae": ""},
}
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")  # the components that a single file may hold
TRANSFORMERS = "transformer."  # the end of a prefix behind which transformers' names stand; OpenCLIP's stand elsewhere
EMA = "model_ema."
_ANY = re.compile("|".join(re.escape(prefix) for family in PREFIXES.values() for prefix in family.values() if prefix))


def usual_prefixes(component: str) -> list[str]:
    """Return what may stand before the names of a component, the usual first."""
    return list(dict.fromkeys(family[component] for family in PREFIXES.values() if component in family))


def without_prefix(name: str) -> str:
    """Return a tensor's name without what stands before it in any single file."""
    match = _ANY.match(name)
    return name[match.end() :] if match else name


def ema_name(name: str) -> str:
    """Return what the moving average of a UNet's tensor is called; ``name`` has no prefix, and loses its dots."""
    return f"{EMA}diffusion_model{name.replace('.', '')}"


def rows_in_file(rows: Iterable[Row], prefix: str, like_hub: bool = False) -> list[Row]:
    """Return a name table whose column ``ldm`` is what a file has: behind a prefix the original names, or the Hub's."""
    if like_hub or prefix.endswith(TRANSFORMERS):
        rows = [row.like_hub() for row in rows]
    return [row._replace(ldm=tuple(prefix + name for name in row.ldm)) for row in rows]
