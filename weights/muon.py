"""Muon: momentum whose update is made orthogonal, for the weight matrices inside a network.

    M <- mu M + G                      momentum of the gradient
    O  = U V^T,  G + mu M = U S V^T    the update with all singular values set to 1 (Nesterov form)
    W <- W (1 - lr wd) - lr max(1, rows / columns)^0.5 O

O is found without a singular value decomposition, by five steps of the Newton-Schulz iteration
X <- a X + (b X X^T + c (X X^T)^2) X. Directions that occur rarely in the data, such as what sets one emoji apart from
its neighbours, move as fast as the common ones; under Adam they lag behind.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). Convolutions count as matrices (C_out, C_in kh kw).
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from workers import from_owner, owns

_A, _B, _C = 3.4445, -4.7750, 2.0315  # chosen there so that small singular values grow fastest
_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return about U V^T for ``matrix`` = U S V^T; the singular values end between 0.7 and 1.2."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """The optimiser above, for parameters of two dimensions and more."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter; several workers share the products out among them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # many products of small matrices: a second CPU thread costs more than it gives
        for group in self.param_groups:
            mu, updates = group["momentum"], []
            for i, weight in enumerate(group["params"]):
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                moment = state["momentum"].mul_(mu).add_(weight.grad)
                update = weight.grad.add(moment, alpha=mu).reshape(len(weight), -1)
                updates.append(orthogonalise(update).contiguous() if owns(i) else torch.empty_like(update))
            for i, (weight, update) in enumerate(zip(group["params"], updates, strict=True)):
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(from_owner(i, update).reshape(weight.shape), alpha=-group["lr"] * scale)
        torch.set_num_threads(threads)


def optimisers_for(networks: nn.Module, lr: float, muon_lr: float) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the weight matrices inside ``networks`` and AdamW for everything else.

    Embeddings, vectors, and the convolutions at the border to the data are not maps between hidden states.
    """
    border = ("embed", "conv_in", "conv_out")
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in networks.named_parameters():
        groups[weight.ndim > 1 and not any(word in name for word in border)].append(weight)
    groups[True].sort(key=torch.numel, reverse=True)  # neighbours cost about the same, which shares the work evenly
    return {"muon": Muon(groups[True], muon_lr), "adamw": torch.optim.AdamW(groups[False], lr, betas=(0.9, 0.99))}
