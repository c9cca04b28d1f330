"""The forms of adapters: which tensors describe the change of a layer, and what they make of its weight W (O, I, h, w).

    W' = W + w s D,   s = alpha / r         for each form but DoRA; w is the adapter's weight in the call

    form            tensors                                                       D (O, I, h, w)
    LoRA            down A (r, I, h, w), up B (O, r)                              B A
    LoRA (Tucker)   down A (r, I), mid T (q, r, h, w), up B (O, q)                sum_pq B[:, p] T[p, q] A[q]
    LoHa            a_n (O, r), b_n (r, I h w) for n = 1, 2                       (a_1 b_1) * (a_2 b_2), by elements
    LoHa (Tucker)   t_n (r, r, h, w), a_n (r, O), b_n (r, I)                      the same, such sums for a_n b_n
    LoKr            w_1 (a, c) or its factors (a, r), (r, c),                     w_1 kron w_2
                    w_2 (O/a, I/c, h, w) or factors (O/a, r), (r, I/c h w),
                    or by Tucker (r, O/a), (r, I/c) and (r, r, h, w)
    difference      the tensor itself, s = 1                                      diff, w_norm

A linear layer has h = w = 1; the weight of a norm is (O,) and has a difference alone. A bias becomes b + w diff_b, or
b + w s lora_B.bias. DoRA sets the norm of each row of the weight to a magnitude m (O,), or in LyCORIS that of each
column, m (1, I): the shape of m says so. The norm | | is that of the original W_0 with the change:

    peft      W' = m / |W_0 + w s D| * (W + w s D)            lora_magnitude_vector; at w = 0 it is no longer W
    LyCORIS   W' = W + w (m / |W_0 + s D| * (W_0 + s D) - W_0)   dora_scale, for LoHa and LoKr too

where W holds what the adapters before have made of W_0: the first depends on their order, the second does not. At w = 1
and with one adapter both are the same.

LoRA: Hu et al. 2021 (https://arxiv.org/abs/2106.09685). LoHa is FedPara, Hyeon-Woo et al. 2022
(https://arxiv.org/abs/2108.06098), section 2. LoKr and the Tucker forms: Yeh et al. 2024
(https://arxiv.org/abs/2309.14859), section 3. DoRA: Liu et al. 2024 (https://arxiv.org/abs/2402.09353), equation 5.
Checked against ``peft`` and against ``lycoris-lora``, whose ``merge_to`` multiplies LoHa and LoKr with s twice: here it
is what its modules compute when they are called.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]  # name of a part -> the tensor
Keyed = Mapping[str, tuple[str, Tensor]]  # name of a part -> (its name in the file, the tensor)

# --- what there is ---------------------------------------------------------------------------------------------------

# The letters of a shape: O, I, h and w are the layer's, N = I h w; b = O / a, d = I / c and M = d h w follow from the
# first factor of LoKr; all others are the adapter's, and the same for all parts of a layer.
_LOKR_1 = ({"lokr_w1": "ac"}, {"lokr_w1_a": "ar", "lokr_w1_b": "rc"})
_LOKR_2 = (
    {"lokr_w2": "bdhw"},
    {"lokr_w2_a": "br", "lokr_w2_b": "rM"},
    {"lokr_w2_a": "rb", "lokr_w2_b": "rd", "lokr_t2": "rrhw"},
)
_LOHA = {f"hada_w{n}_{side}": shape for n in "12" for side, shape in (("a", "Or"), ("b", "rN"))}
_LOHA_TUCKER = {f"hada_{part}": shape for n in "12" for part, shape in ((f"w{n}_a", "rO"), (f"w{n}_b", "rI"))}
_FORMS: list[tuple[str, dict[str, str]]] = [
    ("LoRA", {"down": "rIhw", "up": "Or11"}),
    ("LoRA (Tucker)", {"down": "rI11", "mid": "qrhw", "up": "Oq11"}),
    ("LoHa", _LOHA),
    ("LoHa (Tucker)", _LOHA_TUCKER | {"hada_t1": "rrhw", "hada_t2": "rrhw"}),
    *(("LoKr (Tucker)" if "lokr_t2" in w2 else "LoKr", w1 | w2) for w1 in _LOKR_1 for w2 in _LOKR_2),
    ("difference", {"diff": "OIhw"}),
    ("difference", {}),  # of a bias alone
]
LYCORIS_PARTS = sorted({part for _, shapes in _FORMS for part in shapes if part.startswith(("hada", "lokr"))})
# What has the axes of a kernel where the layer is a convolution; all else has at most two.
KERNELS = {part for _, shapes in _FORMS for part, letters in shapes.items() if len(letters) == 4} | {"dora_scale"}
_BESIDE = {"diff_b": "", "up_bias": "LoRA", "magnitude": "LoRA", "dora_scale": "Lo", "alpha": ""}  # -> only with these
_COFACTORS = {"a": ("O", "b"), "c": ("I", "d")}
_NAMES = {"r": "the rank r", "q": "the rank q"}
_TITLES = {"down": "down (A)", "up": "up (B)", "mid": "mid (T)"}


class Update(NamedTuple):
    """What an adapter does to one layer."""

    form: str
    rank: int  # r, 0 if it has none
    scale: float  # s
    parts: Parts


def read_form(given: Keyed) -> tuple[str, dict[str, str]]:
    """Return the name of the form that has these parts, and the shapes of those that make D.

    Raises:
        ValueError: naming what is missing, or what belongs to another form.
    """
    core = [part for part in given if part not in _BESIDE]
    fitting = [form for form in _FORMS if form[1].keys() >= set(core)]
    if not fitting:
        raise ValueError(f"{_keys(given, core)}: parts of several forms of adapters in one layer")
    name, shapes = min(fitting, key=lambda form: len(form[1]))
    if not core and "diff_b" not in given:
        name, shapes = _FORMS[0]
    if lacking := [_TITLES.get(part, part) for part in shapes if part not in given]:
        raise ValueError(f"{_keys(given, given)}: its layer lacks the matrix {' and '.join(lacking)}")
    for part in given:
        if not name.startswith(_BESIDE.get(part, "")):
            raise ValueError(f"{given[part][0]}: its layer is changed by a {name}, which has no such part")
    if len(several := given.keys() & {"up_bias", "magnitude", "dora_scale"}) > 1:
        raise ValueError(f"{_keys(given, sorted(several))}: not defined together")
    if several and "up_bias" not in several:
        name = "DoRA" if name == "LoRA" else f"{name} with DoRA"
    return name, shapes


def described(kinds: Iterable[tuple[str, int]]) -> str:
    """Return what is said of the layers of a network, given their forms and ranks: "2 LoHa of rank 4-8, 1 LoKr"."""
    found: dict[str, list[int]] = {}
    for form, rank in kinds:
        found.setdefault(form, []).append(rank)
    spread = {form: "-".join(map(str, sorted({min(ranks), max(ranks)} - {0}))) for form, ranks in found.items()}
    texts = (f"{len(found[form])} {form}" + f" of rank {r}" * bool(r) for form, r in sorted(spread.items()))
    return ", ".join(texts)


def rank_of(given: Mapping[str, Sequence[int]], shapes: Mapping[str, str]) -> int:
    """Return r of a layer, of whose parts the shapes are ``given``; 0 if it has none."""
    found = (given[part][letters.index("r") :] for part, letters in shapes.items() if "r" in letters)
    return next((sizes[0] for sizes in found if sizes), 0)


def _keys(given: Keyed, parts: Iterable[str]) -> str:
    return ", ".join(given[part][0] for part in parts)


# --- whether it fits a layer -----------------------------------------------------------------------------------------


def read_update(given: Keyed, weight: Tensor, bias: Tensor | None) -> tuple[Update, list[str]]:
    """Return the update that these parts are, of scale 1, and a line for each part that does not fit the layer.

    Raises:
        ValueError: if they are no form, or none that such a layer can have.
    """
    form, shapes = read_form(given)
    if weight.ndim == 1 and form != "difference":
        raise ValueError(f"{_keys(given, shapes)}: a {form} of a norm, which can only have a difference")
    sizes = dict(zip("OIhw", (*weight.shape, 1, 1, 1), strict=False)) | {"1": 1}
    sizes["N"] = sizes["I"] * sizes["h"] * sizes["w"]
    bound: dict[str, str] = {}  # letter -> key of the part that says how large it is
    problems = []
    for part, letters in shapes.items():
        (key, tensor), letters, known = given[part], letters[: weight.ndim], dict(sizes)
        if not _fits(letters, tensor.shape, sizes):
            wanted = ", ".join(c if c in bound else _wanted(c, known) for c in letters) + "," * (len(letters) == 1)
            why = [f" with {_NAMES.get(c, c)} = {known[c]} of {bound[c]}" for c in bound if c in letters]
            problems.append(f"{key} is {tuple(tensor.shape)}, expected ({wanted}){''.join(why)}")
        bound |= {c: key for c in letters if c in "acqr" and c in sizes and c not in bound}
    problems += _misfits(given, sizes["O"], sizes["I"], bias)
    for key, tensor in given.values():
        if weight.dtype == torch.float16 and not key.endswith("alpha") and not tensor.half().isfinite().all():
            problems.append(f"{key} is not finite in {weight.dtype}, the dtype of its layer: load in another")
    parts = {part: tensor for part, (_, tensor) in given.items() if part != "alpha"}
    return Update(form, sizes.get("r", 0), 1.0, parts), problems


def _wanted(letter: str, sizes: Mapping[str, int]) -> str:
    whole, _ = _COFACTORS.get(letter, ("", ""))
    return f"a divisor of {sizes[whole]}" if whole else str(sizes.get(letter, letter))


def _fits(letters: str, shape: Sequence[int], sizes: dict[str, int]) -> bool:
    """Return whether a shape is what its letters say; letters that are not known yet become known."""
    if len(shape) == 4 and tuple(shape[2:]) == (1, 1):  # a linear layer may be stored as a 1x1 convolution, or as one
        shape = shape[:2]
    if letters[2:] == "11" or (sizes["h"], sizes["w"], letters[2:]) == (1, 1, "hw"):
        letters = letters[:2]
    fits = len(shape) == len(letters) and 0 not in shape
    for letter, size in zip(letters, shape, strict=False):
        fits &= sizes.setdefault(letter, size) == size
        if letter in _COFACTORS and size:
            whole, other = _COFACTORS[letter]
            fits &= sizes[whole] % size == 0
            sizes[other] = sizes[whole] // size
            sizes["M"] = sizes.get("d", 0) * sizes["h"] * sizes["w"]
    return fits


def _misfits(given: Keyed, rows: int, columns: int, bias: Tensor | None) -> Iterator[str]:
    """Yield a line for each vector beside D that does not fit the layer."""
    shapes = {
        "magnitude": [(rows,), (rows, 1), (1, rows), (1, rows, 1, 1), (rows, 1, 1, 1)],
        "dora_scale": [(rows,), (rows, 1), (1, columns), (rows, 1, 1, 1), (1, columns, 1, 1)],
    }
    for part in [part for part in given if part in _BESIDE and part != "alpha"]:
        key, tensor = given[part]
        expected = shapes.get(part, [(rows,)])
        if part not in shapes and bias is None:
            yield f"{key}: its layer has no bias"
        elif tuple(tensor.shape) not in expected:
            yield f"{key} is {tuple(tensor.shape)}, expected {' or '.join(map(str, expected))}"


# --- what it makes of a layer ----------------------------------------------------------------------------------------


def changed(W: Tensor, b: Tensor | None, update: Update, w: float, W_0: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a layer, changed by an adapter of the weight ``w``.

    Args:
        W, b: what the adapters before have made of them; b may be None.
        W_0: the layer's own weight.
    """
    dtype, s = W.dtype, update.scale
    # Half precision is computed in float32, as in the reference.
    parts = {name: part.float() if dtype.itemsize < 4 else part for name, part in update.parts.items()}
    if "magnitude" in parts:
        D = _change(parts, W.shape)
        W = (W + w * s * D) * _ratio(parts["magnitude"].flatten(), W_0 + w * s * D)
    elif "dora_scale" in parts:
        V = W_0 + s * _change(parts, W.shape)
        W = W + w * (V * _ratio(parts["dora_scale"], V) - W_0)
    elif parts.keys() - _BESIDE.keys():
        W = W + (_change(parts, W.shape) * (w * s)).to(dtype)
    if "diff_b" in parts:
        b = b + (w * parts["diff_b"]).to(dtype)
    if "up_bias" in parts:
        b = b + (w * s * parts["up_bias"]).to(dtype)
    return W.to(dtype), b


def _ratio(m: Tensor, V: Tensor) -> Tensor:
    """Return m / |V| for each row of V, or for each column if m is (1, I)."""
    axis = 1 if m.ndim > 1 and len(m) == 1 else 0
    norm = torch.linalg.vector_norm(V, dim=[i for i in range(V.ndim) if i != axis], keepdim=True)
    return m.reshape(norm.shape) / norm.clamp_min(1e-12)  # a row of zeros stays one


def _change(parts: Parts, shape: torch.Size) -> Tensor:
    """Return D."""
    if "diff" in parts:
        D = parts["diff"]
    elif "down" in parts:
        A, B = parts["down"].flatten(1), parts["up"].flatten(1)
        D = _product(B.T if "mid" in parts else B, A, parts.get("mid"))
    elif "hada_w1_a" in parts:
        first, second = (_product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"], parts.get(f"hada_t{n}")) for n in "12")
        D = first * second
    else:
        w_1, w_2 = (
            parts[name] if name in parts else _product(parts[f"{name}_a"], parts[f"{name}_b"], t)
            for name, t in (("lokr_w1", None), ("lokr_w2", parts.get("lokr_t2")))
        )
        D = torch.kron(w_1[..., None], w_2.reshape(len(w_2), shape[1] // w_1.shape[1], -1))
    return D.reshape(shape)


def _product(a: Tensor, b: Tensor, t: Tensor | None) -> Tensor:
    """Return a b, (O, I h w), or the Tucker sum over p and q of a[p, o] t[p, q, h, w] b[q, i], (O, I, h w)."""
    return a @ b if t is None else torch.einsum("pqk,po,qi->oik", t.reshape(*t.shape[:2], -1), a, b)
