"""A graph under construction: ONNX nodes and constants, with short names."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from torch import Tensor

from featherweight._pack import pack

Value = str
"""The name of a tensor in the graph."""

_NATIVE = {2: ("INT2", "UINT2"), 4: ("INT4", "UINT4"), 8: ("INT8", "UINT8")}  # (zero in the middle, from 0)
_OPSETS = {2: 25, 4: 21, 8: 13}  # of the first that has them; a scale for each block has 21


@final
@dataclass(slots=True, eq=False)
class Nodes:
    """nodes, constants: ONNX protos, in an order that can be run. opset: the lowest that knows all of them."""

    nodes: list[Any] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)
    opset: int = 18
    _known: dict[Any, Value] = field(default_factory=dict)
    _count: int = 0

    def name(self) -> Value:
        self._count += 1
        return f"_{self._count}"

    def add(self, kind: str, *inputs: Value, out: Value | None = None, **attributes: Any) -> Value:
        from onnx import helper

        out = out or self.name()
        self.nodes.append(helper.make_node(kind, list(inputs), [out], **attributes))
        return out

    def constant(self, values: Any, name: Value | None = None) -> Value:
        """Of a numpy array, each contents once."""
        from onnx import numpy_helper

        array = np.asarray(values, order="C")
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self._known:
            self._known[key] = name or self.name()
            self.constants.append(numpy_helper.from_array(array, self._known[key]))
        return self._known[key]

    def ints(self, *values: int) -> Value:
        """(n,) int64."""
        return self.constant(np.array(values, np.int64))

    def floats(self, tensor: Tensor, name: Value | None = None) -> Value:
        """float32, stored in fp16 where the tensor is."""
        tensor = tensor.detach().cpu().contiguous()
        if tensor.numel() > 2 and bool((tensor == tensor.reshape(-1)[0]).all()):
            return self.filled(tensor.shape, float(tensor.reshape(-1)[0]))
        stored = self.constant(tensor.numpy(), name)
        return self.once("Cast", stored, to=1) if tensor.numpy().dtype == np.float16 else stored

    def filled(self, shape: Sequence[int], value: float) -> Value:
        """float32, all the same."""
        from onnx import helper

        tensor = helper.make_tensor("", 1, [1], [value])
        return self.once("ConstantOfShape", self.ints(*shape), value=tensor)

    def once(self, kind: str, *inputs: Value, **attributes: Any) -> Value:
        """Like `add`, one node for the same inputs and attributes."""
        key = kind, inputs, tuple((k, str(v)) for k, v in sorted(attributes.items()))
        if key not in self._known:
            self._known[key] = self.add(kind, *inputs, **attributes)
        return self._known[key]

    def codes(self, codes: Tensor, bits: int, middle: bool, name: Value | None = None) -> Value:
        """Integers below 2**bits (2, 4 or 8), as they are or, with `middle`, less 2**(bits - 1)."""
        from onnx import TensorProto

        self.opset = max(self.opset, _OPSETS[bits])
        kind = getattr(TensorProto, _NATIVE[bits][not middle])
        flat = codes.reshape(-1).cpu().numpy().astype(np.uint8)
        flat = (flat - 2 ** (bits - 1)) & (2**bits - 1) if middle else flat  # two's complement
        raw = pack(_tensor(flat), bits).numpy().tobytes()
        key = "codes", kind, tuple(codes.shape), raw
        if key not in self._known:
            self._known[key] = name or self.name()
            self.constants.append(
                TensorProto(name=self._known[key], data_type=kind, dims=list(codes.shape), raw_data=raw)
            )
        return self._known[key]

    def unpacked(self, codes: Tensor, bits: int, name: Value | None = None) -> Value:
        """float32 in the shape of `codes`, whole numbers below 2**bits of any width: bits packed without gaps, which
        the graph takes apart."""
        flat = codes.reshape(-1)
        stored = self.constant(pack(flat, bits).numpy(), name)
        shifts, ones = self.constant(np.arange(8, dtype=np.uint8)), self.constant(np.array([2], np.uint8))
        split = self.add("BitShift", self.add("Unsqueeze", stored, self.ints(1)), shifts, direction="RIGHT")
        found = self.add("Cast", self.add("Mod", split, ones), to=1)
        found = self.add("Reshape", found, self.ints(-1))
        if len(flat) * bits % 8:
            found = self.add("Slice", found, self.ints(0), self.ints(len(flat) * bits), self.ints(0))
        if bits > 1:
            found = self.add("Reshape", found, self.ints(len(flat), bits))
            found = self.add("MatMul", found, self.constant(np.exp2(np.arange(bits, dtype=np.float32))[:, None]))
        return self.add("Reshape", found, self.ints(*codes.shape))


def _tensor(array: np.ndarray) -> Tensor:
    import torch

    return torch.from_numpy(array.astype(np.uint8))
