"""Rows of the name table: which tensors of three spellings are the same weights, and how they are laid out in each.

A ``Row`` names one group of weights in our network, in a Hub checkpoint and in an original CompVis / Stability single
file. Nearly every row has one name per spelling; where one side stacks what the others keep apart (query, key and value
in one matrix), its tuple has one name and theirs three. Each ``Op`` carries its inverse, so choosing any two columns
gives a bijection, and Hub <-> single file comes free.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Spelling = Literal["ours", "hub", "ldm"]


class Op(NamedTuple):
    """A change of layout that loses nothing: ``from_ours(to_ours(file)) == file``, bit for bit."""

    name: str
    to_ours: Callable[[Tensors], Tensors]
    from_ours: Callable[[Tensors], Tensors]
    in_order: bool = True  # whether the values of all tensors, read one after the other, are the same before and after


def _cat(tensors: Tensors) -> Tensor:
    """Stack along the first axis. On the meta device torch.cat first imports torch's compiler, a second of work."""
    first = tensors[0]
    return first.new_empty(sum(map(len, tensors)), *first.shape[1:]) if first.is_meta else torch.cat(tensors)


SAME = Op("same", lambda file: file, lambda ours: ours)
CONV1X1 = Op(  # a 1x1 convolution (O, I, 1, 1) in the file is a linear layer (O, I) here
    "1x1 convolution -> linear",
    lambda file: (file[0].flatten(1),),
    lambda ours: (ours[0][:, :, None, None],),
)
TRANSPOSED = Op("transposed", lambda file: (file[0].T,), lambda ours: (ours[0].T,), in_order=False)
STACKED = Op("stacked q, k, v", lambda file: file[0].chunk(3, dim=0), lambda ours: (_cat(ours),))


class Row(NamedTuple):
    """The same weights in the three spellings; ``hub_op`` and ``ldm_op`` turn a file's layout into ours."""

    ours: tuple[str, ...]
    hub: tuple[str, ...]
    ldm: tuple[str, ...]
    hub_op: Op = SAME
    ldm_op: Op = SAME

    def like_hub(self) -> "Row":
        """Return the row of a single file that has the Hub's names and layout."""
        return self._replace(ldm=self.hub, ldm_op=self.hub_op)

    def op(self, spelling: Spelling) -> Op:
        """Return the change of layout from ``spelling`` to ours."""
        return {"ours": SAME, "hub": self.hub_op, "ldm": self.ldm_op}[spelling]

    def names(self, spelling: Spelling) -> tuple[str, ...]:
        """Return the tensor names in ``spelling``."""
        return {"ours": self.ours, "hub": self.hub, "ldm": self.ldm}[spelling]


def translate(
    tensors: Mapping[str, Tensor], rows: Iterable[Row], source: Spelling, target: Spelling
) -> dict[str, Tensor]:
    """Rename and re-lay tensors from one spelling to another.

    Raises:
        KeyError: if a tensor that the rows name is absent.
    """
    result: dict[str, Tensor] = {}
    for row in rows:
        ours = row.op(source).to_ours(tuple(tensors[name] for name in row.names(source)))
        result.update(zip(row.names(target), row.op(target).from_ours(ours), strict=True))
    return result
