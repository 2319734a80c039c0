"""Files for other programs: ONNX."""
