"""The payload of a weight as a file holds it: whole numbers entropy-coded where that takes fewer bytes.

Codes of grids are coded as distances from their zero point, masks as zeros and ones, codes of books as symbols. Floats
are left to the file, which has all of them together.
"""

from functools import lru_cache

import torch
from torch import Tensor

from featherweight._pack import pack, unpack
from featherweight.coding import decode_integers, decode_symbols, encode_integers, encode_symbols
from featherweight.errors import FormatError
from featherweight.weights.base import Meta, Weight
from featherweight.weights.codebook import Codebook, vector_counts
from featherweight.weights.factors import Factors, matrix_of
from featherweight.weights.grid import Grid, per_entry, scale_shape, symmetric_zero
from featherweight.weights.masks import Bitmap
from featherweight.weights.sparse import Sparse, inner


@lru_cache(maxsize=256)  # the same weight is measured and written several times
def coded(weight: Weight) -> dict[str, Tensor]:
    """The fields of `weight.tensors()` that take fewer bytes coded, coded: uint8 vectors."""
    packed = weight.tensors()
    found: dict[str, Tensor | None] = {}
    match weight:
        case Grid():
            found = _grid(weight, None)
        case Codebook():
            found = _words(weight)
        case Sparse(values=values):
            if isinstance(weight.form, Bitmap):
                found["mask"] = encode_integers(weight.mask.to(torch.int16), 1, signed=False)
            if isinstance(values, Grid):
                found |= _grid(values, weight.mask)
            elif isinstance(values, Codebook):
                found |= _words(values)
        case Factors(parts=parts, shared=shared):
            own = {k: part for k, part in enumerate(parts) if k not in shared}
            found = {f"{k}.{name}": t for k, part in own.items() for name, t in coded(part).items()}
    return {name: t for name, t in found.items() if t is not None and len(t) < len(packed[name])}


def stored_bytes(weight: Weight) -> int:
    """Bytes of the payload in a file, floats as they are."""
    packed = weight.tensors()
    return weight.bits() // 8 - sum(len(packed[name]) - len(t) for name, t in coded(weight).items())


def uncoded(
    kind: type[Weight], shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor], names: frozenset[str]
) -> dict[str, Tensor]:
    """A payload whose fields `names` are coded, with them as `layout` says that they are.

    Raises:
        FormatError: a field cannot be coded, or is no code of what it should be.
    """
    found = dict(tensors)
    if kind is Factors:
        for k, own in enumerate(meta["factors"]):
            mine = {n.partition(".")[2]: n for n in tensors if n.partition(".")[0] == str(k)}
            if part := frozenset(name for name, whole in mine.items() if whole in names):
                pieces = {name: tensors[whole] for name, whole in mine.items()}
                made = uncoded(Grid, matrix_of(meta["terms"][k], meta["sizes"]), own, pieces, part)
                found |= {mine[name]: made[name] for name in part}
        return found
    values, keep = kind.kind, None
    if kind is Sparse:
        values, meta, form = meta["values"], inner(meta), meta
        if "mask" in names:
            if "mask" in form:
                raise FormatError("field 'mask' is coded, which a mask of a pattern cannot be")
            found["mask"] = pack(decode_integers(tensors["mask"], shape, 1, signed=False), 1)
        keep = Sparse.mask_of(shape, form, found["mask"])
    for name in sorted(names - {"mask"}):
        if values == Grid.kind and name == "codes":
            found[name] = _codes(shape, meta, found, keep)
        elif values == Codebook.kind and name.startswith("codes"):
            count = shape[0] * -(-shape[1] // meta["d"]) if keep is None else int(vector_counts(keep, meta["d"]).sum())
            width = meta["bits"][int(name.removeprefix("codes"))]
            found[name] = pack(decode_symbols(tensors[name], count, width), width)
        else:
            raise FormatError(f"field '{name}' cannot be coded")
    return found


def _grid(weight: Grid, keep: Tensor | None) -> dict[str, Tensor | None]:
    if weight.nbits == 1:
        return {}
    zero = symmetric_zero(weight.nbits) if weight.zero is None else per_entry(weight.zero, weight.shape, weight.group)
    values = weight.codes.to(torch.int16) - zero
    most = _most(weight.nbits, weight.zero is None)
    return {"codes": encode_integers(values if keep is None else torch.where(keep, values, 0), most, keep)}


def _codes(shape: tuple[int, int], meta: Meta, tensors: dict[str, Tensor], keep: Tensor | None) -> Tensor:
    """The packed codes of a grid."""
    bits, group, symmetric = meta["bits"], meta["group"], bool(meta["sym"])
    if bits == 1:
        raise FormatError("field 'codes' is coded, which codes of one bit cannot be")
    if symmetric:
        zero = torch.tensor(symmetric_zero(bits), dtype=torch.int16)
    else:
        scales = scale_shape(shape, group)
        try:
            zeros = unpack(tensors["zero"], bits, scales[0] * scales[1]).reshape(scales)
        except ValueError as error:
            raise FormatError(str(error)) from None
        zero = per_entry(zeros.to(torch.int16), shape, group)
    codes = decode_integers(tensors["codes"], shape, _most(bits, symmetric), keep) + zero
    codes = codes if keep is None else codes[keep]
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise FormatError(f"damaged: coded integers are no codes of {bits} bits")
    return pack(codes, bits)


def _most(bits: int, symmetric: bool) -> int:
    """How far a code can be from its zero point."""
    return 2 ** (bits - 1) if symmetric else 2**bits - 1


def _words(weight: Codebook) -> dict[str, Tensor | None]:
    widths = weight.meta()["bits"]
    codes = weight.codes.flatten(0, 1) if weight.keep is None else weight.codes[weight.stored()]
    return {f"codes{m}": encode_symbols(codes[:, m], width) for m, width in enumerate(widths)}
