"""The table of token embeddings of a text encoder, made longer or shorter: what training of new words begins with.

Checked against ``resize_token_embeddings`` of ``transformers``. See Gal et al. 2023 (textual inversion,
https://arxiv.org/abs/2208.01618), section 4, for what the new rows are for.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Vocabulary:
    """What a text encoder can do about its vocabulary."""

    token_embed: nn.Embedding
    config: Any
    spec: Any
    register_to_config: Callable[..., None]

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the table of token embeddings, (vocabulary, D)."""
        return self.token_embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Exchange the table of token embeddings, (vocabulary, D)."""
        if not isinstance(value, nn.Embedding) or value.embedding_dim != self.spec.D:
            raise ValueError(f"the token embeddings should be an nn.Embedding of width {self.spec.D}, found {value!r}")
        self.token_embed = value

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Give the table ``new_num_tokens`` rows; those that are there keep their values.

        Args:
            new_num_tokens: by default as many as there are.
            pad_to_multiple_of: round it up to a multiple of this.
            mean_resizing: draw the new rows from N(mean, 1e-9 covariance) of the old ones, instead of N(0, 0.02^2).
        """
        table = self.token_embed
        old, D = table.weight.shape
        count = old if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if count < 1:
            raise ValueError(f"new_num_tokens should be at least 1, found {new_num_tokens}")
        if count != old:
            weight = nn.Embedding(count, D, device=table.weight.device, dtype=table.weight.dtype).weight.detach()
            if count > old and mean_resizing:
                weight[old:] = _like(table.weight.detach().float(), count - old)
            elif count > old:
                weight.normal_(std=self.config.get("initializer_range", 0.02))
            weight[: min(old, count)] = table.weight.detach()[:count]
            table.weight = nn.Parameter(weight, requires_grad=table.weight.requires_grad)
            table.num_embeddings = count
            self.spec = self.spec._replace(vocabulary=count)
            self.register_to_config(vocab_size=count)
        return table


def _like(rows: Tensor, count: int) -> Tensor:
    """Draw ``count`` rows around the mean of ``rows``, with a millionth of their spread where that can be drawn."""
    mean = rows.mean(dim=0)
    spread = 1e-9 * ((rows - mean).T @ (rows - mean) / len(rows))
    if not torch.distributions.constraints.positive_definite.check(spread).all():
        return mean.expand(count, -1)
    return torch.distributions.MultivariateNormal(mean, covariance_matrix=spread).sample((count,))
