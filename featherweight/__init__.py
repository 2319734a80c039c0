"""featherweight: make a trained PyTorch network small, and prove that it still works."""

__version__ = "0.1.0"
