"""Files for other programs: ONNX, torch.export, safetensors, compressed-tensors."""

from featherweight.export.checkpoint import export_checkpoint as export_checkpoint
from featherweight.export.onnx import Exported as Exported
from featherweight.export.onnx import export_onnx as export_onnx
from featherweight.export.packed import export_compressed_tensors as export_compressed_tensors
from featherweight.export.program import export_program as export_program
from featherweight.export.result import Export as Export
from featherweight.export.result import ExportedWeight as ExportedWeight
