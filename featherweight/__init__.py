"""featherweight: make a trained PyTorch network small, and prove that it still works."""

from featherweight._memory import reuse_memory
from featherweight.activations import ActivationGrid, simulate
from featherweight.artifact import load
from featherweight.chains import chained, chains_of, load_chained
from featherweight.errors import FeatherweightError, FormatError, InfeasibleError, SolveError, UsageError
from featherweight.export import export_checkpoint, export_compressed_tensors, export_int8, export_onnx, export_program
from featherweight.finetune import Finetune, finetune
from featherweight.layers import scan
from featherweight.methods import (
    NM,
    Additive,
    Admm,
    Blocks,
    Channels,
    DictionaryPairs,
    Ecq,
    Gptq,
    GridSpec,
    Magnitude,
    Obq,
    Obs,
    Prune,
    PruneQuantize,
    Rows,
    Rtn,
    Unstructured,
    Vectors,
)
from featherweight.onuse import load_packed
from featherweight.pipeline import Compressed, compress
from featherweight.planning import plan
from featherweight.pull import AdmmTraining, Pull, admm
from featherweight.recipe import Override, Recipe, read_recipe
from featherweight.report import Report
from featherweight.slim import slim
from featherweight.stats import capture
from featherweight.synthesis import Synthetic, synthesize
from featherweight.target import Goal, target_bytes

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - plain order, as sorted() has it
    "ActivationGrid",
    "Additive",
    "Admm",
    "AdmmTraining",
    "Blocks",
    "Channels",
    "Compressed",
    "DictionaryPairs",
    "Ecq",
    "FeatherweightError",
    "Finetune",
    "FormatError",
    "Goal",
    "Gptq",
    "GridSpec",
    "InfeasibleError",
    "Magnitude",
    "NM",
    "Obq",
    "Obs",
    "Override",
    "Prune",
    "PruneQuantize",
    "Pull",
    "Recipe",
    "Report",
    "Rows",
    "Rtn",
    "SolveError",
    "Synthetic",
    "Unstructured",
    "UsageError",
    "Vectors",
    "admm",
    "capture",
    "chained",
    "chains_of",
    "compress",
    "export_checkpoint",
    "export_compressed_tensors",
    "export_int8",
    "export_onnx",
    "export_program",
    "finetune",
    "load",
    "load_chained",
    "load_packed",
    "plan",
    "read_recipe",
    "reuse_memory",
    "scan",
    "simulate",
    "slim",
    "synthesize",
    "target_bytes",
]
