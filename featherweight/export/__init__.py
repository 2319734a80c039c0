"""Files for other programs: ONNX, torch.export, safetensors, compressed-tensors."""

from featherweight.export.checkpoint import export_checkpoint as export_checkpoint
from featherweight.export.fast import Int8Export as Int8Export
from featherweight.export.fast import export_int8 as export_int8
from featherweight.export.onnx import OnnxExport as OnnxExport
from featherweight.export.onnx import export_onnx as export_onnx
from featherweight.export.packed import export_compressed_tensors as export_compressed_tensors
from featherweight.export.program import export_program as export_program
from featherweight.export.result import Export as Export
from featherweight.export.result import ExportedWeight as ExportedWeight
