"""What a single file holds besides the weights of its networks, and why it is left out."""

import re
from collections.abc import Container

# Tensors of an original single file that no column of the table names, by the pattern of their name.
LDM_DROPPED = {
    r"model_ema\..*": "a moving average of the UNet's weights; the weights under model.diffusion_model are the model",
    r"(low_scale_model\.)?(betas|(sqrt_)?(one_minus_)?alphas_cumprod(_prev)?|log_one_minus_alphas_cumprod"
    r"|sqrt_recipm?1?_alphas_cumprod|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar)"
    r"|scale_factor|denoiser\..*": ("the noise schedule, which the scheduler computes from its configuration"),
    r"v_pred|ztsnr": "marks of what the UNet predicts and how it was trained: they are read, but are no weights",
    r"vae_scale": "the factor of ComfyUI's latents; the tiny autoencoder reads those of the process itself",
    r"edm_(mean|std)|edm_vpred\.sigma_(max|min)": "numbers of the noise process (EDM): read, but no weights",
    r"global_step": "the number of training steps",
    r"(first_stage_model\.)?loss\..*": "the discriminator and perceptual loss the autoencoder was trained with",
    r".*\.embeddings\.position_ids": "a constant 0..76, saved as a buffer",
    r"(cond_stage_model|conditioner\.embedders\.0)(\.transformer)?\.text_projection(\.weight)?": (
        "maps to the space shared with pictures, which conditions nothing"
    ),
    r"(cond_stage_model|conditioner\.embedders\.[01])\.((model|transformer)\.)?logit_scale": (
        "temperature of the contrastive loss the text encoder was trained with"
    ),
    r"embedding_manager\..*": "what was trained beside the model for new words, which are files of their own",
}
_DROPPED = [(re.compile(pattern), reason) for pattern, reason in LDM_DROPPED.items()]
_BEHIND = re.compile(r"(.*\.model\.)(?:transformer\.resblocks\.(\d+)\..*|text_projection(?:\.weight)?)")


def why_dropped(name: str, expected: Container[str] = ()) -> str | None:
    """Return why a tensor of an original single file is left out on purpose; None if it is not.

    OpenCLIP's text encoders have a layer behind the state that SD 2.x conditions on, and a projection. They are told by
    the names that are ``expected``: one layer less, and no projection.
    """
    if (match := _BEHIND.fullmatch(name)) and name not in expected:
        prefix, n = match[1], match[2]
        before = f"{prefix}transformer.resblocks.{int(n or 1) - 1}.ln_1.weight"
        projects = any(f"{prefix}text_projection{end}" in expected for end in ("", ".weight"))
        if before in expected and not projects and f"{prefix}transformer.resblocks.{n}.ln_1.weight" not in expected:
            return "stands behind the state of OpenCLIP that SD 2.x conditions on"
    return next((reason for pattern, reason in _DROPPED if pattern.fullmatch(name)), None)
