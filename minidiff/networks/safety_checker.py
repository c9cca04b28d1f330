"""``StableDiffusionSafetyChecker``: which pictures come too close to a list of concepts. These are made black.

A picture's embedding e, of CLIP's vision encoder, is compared with 17 concepts c and with 3 for which special care is
taken. Published are only these embeddings and thresholds, not the words behind them.

    flagged = any_c  round(cos(e, c) - threshold_c + 0.01 · care, 3) > 0
    care    = any_s  round(cos(e, s) - threshold_s, 3) > 0

A special concept so lowers the thresholds of all others by 0.01. Rando et al. 2022 (https://arxiv.org/abs/2210.04610)
describe and measure it. Checked against
``diffusers.pipelines.stable_diffusion.safety_checker.StableDiffusionSafetyChecker``.
"""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minidiff.checkpoints.names_clip import canonical_checker_name, checker_rows
from minidiff.checkpoints.remap import Row
from minidiff.config import Config
from minidiff.networks.clip_vision import CLIPVisionModelWithProjection
from minidiff.networks.specs.clip_vision import checker_config

logger = logging.getLogger("minidiff")

CONCEPTS, SPECIAL = 17, 3  # how many there are


def cosine_distance(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Return the cosine of each of the first (B, D) with each of the second (N, D): (B, N). The name is published."""
    return F.normalize(image_embeds) @ F.normalize(text_embeds).T


class StableDiffusionSafetyChecker(CLIPVisionModelWithProjection):
    """Flag pictures and make them black; see the head of this file.

    Args:
        config: a mapping of the fields of its ``config.json``, that of a whole CLIP: ``vision_config``,
            ``projection_dim``.

    Raises:
        ConfigError: naming each field that is unknown or has a value that is not implemented.
    """

    model_type = "clip"
    canonical_hub_name = staticmethod(canonical_checker_name)

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        for kind, count in (("concept", CONCEPTS), ("special_care", SPECIAL)):
            embeds, thresholds = torch.ones(count, self.config.projection_dim), torch.ones(count)
            setattr(self, f"{kind}_embeds", nn.Parameter(embeds, requires_grad=False))
            setattr(self, f"{kind}_embeds_weights", nn.Parameter(thresholds, requires_grad=False))

    @staticmethod
    def _completed(config: Mapping[str, Any]) -> Config:
        return checker_config(config)

    @classmethod
    def _of_fields(cls, fields: Mapping[str, Any], **overrides: Any) -> "StableDiffusionSafetyChecker":
        return cls({**fields, **overrides})

    @torch.no_grad()
    def cosines(self, clip_input: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosines between pictures and the special concepts (B, 3), and all others (B, 17)."""
        embeds = self.visual_projection(self.vision_model(clip_input).pooler_output)
        return cosine_distance(embeds, self.special_care_embeds), cosine_distance(embeds, self.concept_embeds)

    def forward(self, clip_input: Tensor, images: Any) -> tuple[Any, list[bool]]:
        """Look at pictures.

        Args:
            clip_input: what ``CLIPImageProcessor`` makes of them, (B, 3, 224, 224).
            images: the same pictures, a tensor or an array with B rows, or a list of them. Those that are flagged are
                set to 0, in place.

        Returns:
            the pictures, and B flags.
        """
        special, concepts = (cosine.float() for cosine in self.cosines(clip_input))
        care = (special - self.special_care_embeds_weights.float()).round(decimals=3) > 0
        lowered = 0.01 * care.any(dim=1, keepdim=True)  # (B, 1)
        scores = (concepts - self.concept_embeds_weights.float() + lowered).round(decimals=3)
        flags = (scores > 0).any(dim=1).tolist()
        for i in (i for i, flagged in enumerate(flags) if flagged):
            images[i] = (torch if isinstance(images[i], Tensor) else np).zeros_like(images[i])
        if any(flags):
            logger.warning(
                "the safety checker flagged %d of %d pictures, which come back black; try another prompt or seed",
                sum(flags),
                len(flags),
            )
        return images, flags

    def rows(self) -> list[Row]:
        """Return the name table of this configuration: ours and the Hub's."""
        return list(checker_rows(self.spec))

    def config_to_save(self) -> dict[str, Any]:
        """Return the fields of ``config.json``, which transformers reads as those of a whole CLIP."""
        fields = super().config_to_save()
        return {name: value for name, value in fields.items() if value is not None}
