"""Files for other programs: ONNX."""

from featherweight.export.onnx import Exported as Exported
from featherweight.export.onnx import export_onnx as export_onnx
