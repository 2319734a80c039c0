"""Factored weights that run as chains of layers."""

from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from featherweight.chains.layers import sequence
from featherweight.counting import chain_macs, counted, dense_macs, places
from featherweight.data import Batch
from featherweight.layers import View
from featherweight.methods.forms import form_at
from featherweight.stages import chain_of, stored_as
from featherweight.weights import Dense, Factors
from featherweight.weights.factors import matrix_of

OUT, IN, R, S = 6, 4, 3, 2


def factors(shape: tuple[int, int], axes: str, terms: str, sizes: dict[str, int]) -> Factors:
    """With random numbers."""
    split = tuple(terms.split(","))
    return Factors(shape, axes, split, sizes, tuple(Dense(torch.randn(matrix_of(t, sizes))) for t in split))


def exact(weight: Factors, view: View) -> Tensor:
    """Decoded by one einsum in float64, and not rounded."""
    tensors = [weight.tensor_of(k).double() for k in range(len(weight.terms))]
    return view.tensor(torch.einsum(f"{','.join(weight.terms)}->{weight.axes}", *tensors).reshape(weight.shape))


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-10 * b.abs().max())


def conv_factors(name: str, kernel: tuple[int, ...]) -> Factors:
    """A convolution's weight in one of the forms."""
    kh, kw = (*kernel, 1)[:2]
    taps = {"o": OUT, "i": IN, "t": prod(kernel), "y": kh, "x": kw, "r": R, "s": S}
    parts = {"m": 3, "n": 2, "j": 2, "k": 2, "t": prod(kernel), "r": 2, "u": 3, "v": 2, "w": 2, "z": 2}
    axes, terms, sizes = {
        "rows": ("oc", "or,rc", {"o": OUT, "r": R, "c": IN * prod(kernel)}),
        "cols": ("oit", "otr,ri", taps),
        "spatial": ("oiyx", "oxr,riy", taps),
        "spatial, the other side first": ("oiyx", "rxi,yor", taps),
        "tucker": ("oit", "or,rst,si", taps),
        "tucker, in another order": ("oit", "is,tsr,ro", taps),
        "tensor train": ("mnjkt", "mr,rnu,utv,vjw,wk", parts),
        "tensor ring": ("oit", "zor,rts,siz", taps | {"z": 2}),
        "tensor ring, longer": ("mnjkt", "zmr,rnu,utv,vjw,wkz", parts),
        "cp": ("oiyx", "yr,xr,ir,or", taps),
        "blocks": ("obc", "obr,rbc", {"o": OUT, "b": 2, "r": R, "c": IN // 2 * prod(kernel)}),
        "blocks of one channel": ("oit", "oir,rit", taps),
    }[name]
    return factors((OUT, IN * prod(kernel)), axes, terms, {k: n for k, n in sizes.items() if k in terms})


ALL = [
    {"stride": s, "padding": p, "dilation": d, "padding_mode": m}
    for s, p, d, m in product(
        [1, (2, 3)], [0, (1, 2), "same", "valid"], [1, (2, 1)], ["zeros", "reflect", "replicate", "circular"]
    )
    if not (p == "same" and s != 1)
]
SOME = [{}, {"stride": (2, 1), "padding": (1, 2)}, {"padding": "same", "dilation": (1, 2), "padding_mode": "circular"}]
FORMS = {  # name: (every combination, what it is recognised as)
    "rows": (ALL, "rows r=3"),
    "cols": (ALL, "cols r=3"),
    "spatial": (ALL, "spatial r=3"),
    "spatial, the other side first": (SOME, "spatial r=3"),
    "tucker": (ALL, "tucker r=3,2"),
    "tucker, in another order": (SOME, "tucker r=2,3"),
    "tensor train": (SOME, "tensor train r=2,3,2,2"),
    "tensor ring": (SOME, "tensor ring r=2,3,2"),
    "tensor ring, longer": (SOME, "tensor ring r=2,2,3,2,2"),
    "cp": (ALL, "cp r=3"),
    "blocks": (SOME, "blocks r=3"),
    "blocks of one channel": (SOME, "blocks r=3"),
}


def check(layer: Any, weight: Factors, x: Tensor, count: bool = True) -> nn.Sequential:
    """That the chain gives what the layer gives, and costs what was foretold."""
    layer = layer.double().requires_grad_(False)
    view = View(tuple(layer.weight.shape), int(layer.weight.shape[0] == IN and OUT != IN))
    layer.weight.copy_(exact(weight, view))
    chain = chain_of(weight, view)
    assert chain is not None
    made = sequence(layer, weight, view, chain)
    assert close(made(x), layer(x)), (layer, made)
    if not count:
        return made
    kind = "conv_transpose" if view.transposed_groups else "conv"
    calls = places(nn.Sequential(layer), batch := Batch((x,), {}), ["0"])["0"]
    assert chain_macs(chain, view, kind, calls) == sum(counted(made, batch).values())
    assert dense_macs(view, kind, calls) == sum(counted(layer, batch).values()) > 0
    assert chain.numbers == sum(p.numel() for n, p in made.named_parameters() if n.endswith("weight"))
    return made


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("name", FORMS)
def test_convolutions(name):
    torch.manual_seed(0)
    geometries, label = FORMS[name]
    x = torch.randn(2, IN, 9, 8, dtype=torch.float64)
    for kernel in (3, 2), (1, 3), (1, 1):
        weight = conv_factors(name, kernel)
        for k, geometry in enumerate(geometries if kernel != (1, 1) else SOME):
            made = check(nn.Conv2d(IN, OUT, kernel, bias=k % 2 == 0, **geometry), weight, x, k % 5 == 1)
            assert {type(m) for m in made} == {nn.Conv2d}
    assert stored_as(conv_factors(name, (3, 2)), View((OUT, IN, 3, 2))) == f"{label} fp32"


@pytest.mark.parametrize("name", FORMS)
def test_transposed_convolutions(name):
    torch.manual_seed(0)
    x = torch.randn(2, IN, 5, 4, dtype=torch.float64)
    for kernel, stride, padding, dilation in product([(3, 2), (1, 3)], [1, (2, 3)], [0, (0, 1)], [1, (1, 2)]):
        extra = 0 if stride == 1 else (1, 2)
        layer = nn.ConvTranspose2d(IN, OUT, kernel, stride, padding, extra, bias=padding == 0, dilation=dilation)
        made = check(layer, conv_factors(name, kernel), x)
        assert {type(m) for m in made} <= {nn.Conv2d, nn.ConvTranspose2d}


@pytest.mark.parametrize(
    ("kind", "kernel", "x"), [(nn.Conv1d, (3,), (2, IN, 9)), (nn.Conv3d, (3, 2, 2), (2, IN, 5, 6, 4))]
)
def test_other_dimensions(kind, kernel, x):
    torch.manual_seed(0)
    x = torch.randn(x, dtype=torch.float64)
    for name in ("rows", "cols", "tucker", "tensor train", "tensor ring", "blocks"):
        check(kind(IN, OUT, kernel, stride=2, padding=1), conv_factors(name, kernel), x)
    if len(kernel) == 3:
        sizes = {"o": OUT, "i": IN, "d": 3, "y": 2, "x": 2, "r": R}
        spatial = factors((OUT, IN * 12), "oidyx", "odr,riyx", sizes)
        made = check(kind(IN, OUT, kernel, stride=(1, 2, 1), padding=(1, 0, 1)), spatial, x)
        assert [m.kernel_size for m in made] == [(1, 2, 2), (3, 1, 1)]


@pytest.mark.parametrize(("form", "name"), [("spatial", "spatial"), ("tt", "tensor train"), ("tr", "tensor ring")])
def test_forms_of_a_usual_layer_can_be_stored_and_are_called_what_they_are(form, name):
    """A ring of 64 channels, contracted from left to right, would be forty times as large as the matrix on the way."""
    chosen = form_at(form, (64, 576), (3, 3), 0.36)
    parts = tuple(Dense(torch.zeros(matrix_of(t, chosen.sizes))) for t in chosen.terms)
    weight = Factors((64, 576), chosen.axes, chosen.terms, dict(chosen.sizes), parts)
    assert stored_as(weight, View((64, 64, 3, 3))).startswith(f"{name} r=")
