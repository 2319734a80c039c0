"""A file for other programs."""

from featherweight.export.model import Exported as Exported
from featherweight.export.model import export_onnx as export_onnx
