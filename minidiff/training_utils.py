"""What training programs need around their loop: averaged weights, the weight of a timestep in the loss, seeds.

Checked against ``diffusers.training_utils``.
"""

import copy
import gc
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# What is stored of an average beside its weights, and of which type.
_STATE: dict[str, type | tuple[type, ...]] = {
    "decay": (float, int),
    "min_decay": float,
    "optimization_step": int,
    "update_after_step": int,
    "use_ema_warmup": bool,
    "inv_gamma": (float, int),
    "power": (float, int),
}


class EMAModel:
    """An exponential moving average of weights: after every step of the optimizer, avg <- avg - (1 - d) (avg - w).

    d grows from 0 to ``decay``: at step n, counted after ``update_after_step``, it is (1 + n) / (10 + n), or with
    ``use_ema_warmup`` 1 - (1 + n / inv_gamma)^-power. Weights that are not trained are copied.

    Args:
        parameters: the weights; the order must stay the same in all calls.
        foreach: average many tensors at a time, which is faster on a GPU and equal up to rounding.
        model_cls, model_config: the network's class and configuration, for ``save_pretrained``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        decay: float = 0.9999,
        min_decay: float = 0.0,
        update_after_step: int = 0,
        use_ema_warmup: bool = False,
        inv_gamma: float = 1.0,
        power: float = 2 / 3,
        foreach: bool = False,
        model_cls: Any | None = None,
        model_config: Mapping[str, Any] | None = None,
    ) -> None:
        self.shadow_params = [parameter.clone().detach() for parameter in _weights(parameters)]
        self.temp_stored_params: list[Tensor] | None = None
        self.decay, self.min_decay, self.update_after_step = decay, min_decay, update_after_step
        self.use_ema_warmup, self.inv_gamma, self.power = use_ema_warmup, inv_gamma, power
        self.optimization_step = 0
        self.cur_decay_value: float | None = None  # d of the last step
        self.foreach, self.model_cls, self.model_config = foreach, model_cls, model_config

    @classmethod
    def from_pretrained(cls, path: str | Path, model_cls: Any, foreach: bool = False) -> "EMAModel":
        """Load an average that ``save_pretrained`` wrote."""
        model = model_cls.from_pretrained(path)
        average = cls(model.parameters(), model_cls=model_cls, model_config=model.config, foreach=foreach)
        average.load_state_dict({name: model.config[name] for name in _STATE if name in model.config})
        return average

    def save_pretrained(self, path: str | Path) -> None:
        """Write the averaged network in Hub layout, and into its ``config.json`` how it was averaged."""
        if self.model_cls is None or self.model_config is None:
            raise ValueError("save_pretrained needs the network: give EMAModel(...) model_cls= and model_config=")
        model = self.model_cls.from_config(self.model_config)
        model.register_to_config(**{name: getattr(self, name) for name in _STATE})
        self.copy_to(model.parameters())
        model.save_pretrained(path)

    def get_decay(self, optimization_step: int) -> float:
        """Return d of a step."""
        n = optimization_step - self.update_after_step - 1
        if n <= 0:
            return 0.0
        grown = 1 - (1 + n / self.inv_gamma) ** -self.power if self.use_ema_warmup else (1 + n) / (10 + n)
        return max(min(grown, self.decay), self.min_decay)

    @torch.no_grad()
    def step(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the weights of one more step into the average."""
        pairs = self._pairs(self.shadow_params, parameters)
        self.optimization_step += 1
        self.cur_decay_value = self.get_decay(self.optimization_step)
        for average, weight in pairs:
            if not weight.requires_grad:
                average.copy_(weight)
            elif not self.foreach:
                average.sub_((1 - self.cur_decay_value) * (average - weight))
        trained = [pair for pair in pairs if pair[1].requires_grad] if self.foreach else []
        if trained:
            averages, weights = map(list, zip(*trained, strict=True))
            torch._foreach_sub_(averages, torch._foreach_sub(averages, weights), alpha=1 - self.cur_decay_value)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace weights by their average."""
        for average, weight in self._pairs(self.shadow_params, parameters):
            weight.data.copy_(average)

    def store(self, parameters: Iterable[nn.Parameter]) -> None:
        """Keep weights, on the CPU, for ``restore`` after ``copy_to``."""
        self.temp_stored_params = [parameter.detach().cpu().clone() for parameter in parameters]

    def restore(self, parameters: Iterable[nn.Parameter]) -> None:
        """Put back the weights that ``store`` kept, and keep them no longer."""
        if self.temp_stored_params is None:
            raise RuntimeError("restore: store was not called before")
        for kept, weight in self._pairs(self.temp_stored_params, parameters):
            weight.data.copy_(kept)
        self.temp_stored_params = None

    def _pairs(self, tensors: list[Tensor], parameters: Iterable[nn.Parameter]) -> list[tuple[Tensor, nn.Parameter]]:
        parameters = _weights(parameters)
        if [tensor.shape for tensor in tensors] != [parameter.shape for parameter in parameters]:
            raise ValueError(f"these {len(parameters)} weights are not the {len(tensors)} that were averaged")
        return list(zip(tensors, parameters, strict=True))

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None, non_blocking: bool = False
    ) -> None:
        """Move the average; ``dtype`` concerns floating-point weights."""
        self.shadow_params = [
            p.to(device=device, dtype=dtype if p.is_floating_point() else None, non_blocking=non_blocking)
            for p in self.shadow_params
        ]

    def pin_memory(self) -> None:
        """Put the average into memory that a GPU reads faster."""
        self.shadow_params = [parameter.pin_memory() for parameter in self.shadow_params]

    def state_dict(self) -> dict[str, Any]:
        """Return what ``load_state_dict`` takes; the tensors are not copied."""
        return {**{name: getattr(self, name) for name in _STATE}, "shadow_params": self.shadow_params}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, this class's or the reference's; what it does not name stays.

        Raises:
            ValueError: naming what is not of its type, or out of range.
        """
        state = copy.deepcopy(dict(state_dict))
        for name, kind in _STATE.items():
            value = state.get(name, getattr(self, name))
            if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
                raise ValueError(f"{name} should be of type {kind}, found {value!r}")
            if name == "decay" and not 0 <= value <= 1:
                raise ValueError(f"decay should be from 0 to 1, found {value}")
            setattr(self, name, value)
        weights = state.get("shadow_params", self.shadow_params)
        if not isinstance(weights, list) or not all(isinstance(weight, Tensor) for weight in weights):
            raise ValueError("shadow_params should be a list of tensors")
        self.shadow_params = weights


def _weights(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    if isinstance(parameters, nn.Module):
        raise TypeError("EMAModel takes the weights: pass model.parameters() instead of the model")
    return list(parameters)


def set_seed(seed: int) -> None:
    """Seed the global random numbers of Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def compute_snr(noise_scheduler: Any, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) at integer times, float32 and of their shape.

    Hang et al. 2023 (min-SNR, https://arxiv.org/abs/2303.09556) weight the loss by it.
    """
    alpha_bar = noise_scheduler.alphas_cumprod
    alpha, sigma = (x.to(timesteps.device)[timesteps].float() for x in (alpha_bar**0.5, (1.0 - alpha_bar) ** 0.5))
    return (alpha / sigma) ** 2


def compute_dream_and_update_latents(
    unet: nn.Module,
    noise_scheduler: Any,
    timesteps: Tensor,
    noise: Tensor,
    noisy_latents: Tensor,
    target: Tensor,
    encoder_hidden_states: Tensor,
    dream_detail_preservation: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return noisy latents and target moved by what the network gets wrong now, so that training meets its own errors.

    x <- x + sigma^(1 + p) (eps - out),  target <- target + sigma^p (eps - out),  for networks that predict eps.
    Zhou et al. 2023 (DREAM, https://arxiv.org/abs/2312.00210), p = ``dream_detail_preservation``.
    """
    if noise_scheduler.config.prediction_type != "epsilon":
        raise NotImplementedError("DREAM is defined for prediction_type 'epsilon' alone")
    sigma = (1.0 - noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps, None, None, None]) ** 0.5
    with torch.no_grad():
        out = unet(noisy_latents, timesteps, encoder_hidden_states).sample
    wrong = (noise - out) * sigma**dream_detail_preservation
    return noisy_latents + sigma * wrong, target + wrong


def cast_training_params(model: nn.Module | list[nn.Module], dtype: torch.dtype = torch.float32) -> None:
    """Convert the weights that are trained, such as adapters on a half-precision network."""
    for one in model if isinstance(model, list) else [model]:
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.to(dtype)


def free_memory() -> None:
    """Give back the memory of objects that nobody refers to, on the GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
