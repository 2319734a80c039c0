"""The shape of the package: imports point one way, files stay small, the import is light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "featherweight"
LAYERS = [  # a module imports only from its own line or the lines above
    {"errors"},
    {"_memory", "_pack", "_linalg", "knapsack"},
    {"coding"},
    {"weights"},
    {"layers", "data", "standin"},
    {"calls"},
    {"stats", "activations"},
    {"slim", "stages"},
    {"latency", "counting"},
    {"methods"},
    {"artifact"},
    {"onuse", "chains", "lossless", "norms"},
    {"repair", "recipe", "target", "database", "sequential"},
    {"solve", "sensitivity"},
    {"sharing"},
    {"packing", "finetune"},
    {"pull"},
    {"candidates", "coupling", "moments", "synthesis"},
    {"search", "joint"},
    {"scores"},
    {"allocator"},
    {"allocate"},
    {"metrics", "report", "userland"},
    {"picture", "proof", "inputs"},
    {"export"},
    {"settle"},
    {"pipeline", "planning"},
    {"export"},
    {"race", "page"},
    {"demo", "options", "console"},
    {"commands"},
    {"cli"},
    {"__main__", "__init__"},
]


def level(module: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if module in names)


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("featherweight."):
                other = node.module.split(".")[1]
                assert level(other) <= level(own), f"{path.name} imports featherweight.{other}"


def test_files_stay_small():
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 450, path.name


def test_import_is_light_and_has_no_side_effects():
    code = (
        "import torch, sys; threads = torch.get_num_threads(); import featherweight;"
        "assert torch.get_num_threads() == threads; assert not torch.cuda.is_initialized();"
        "assert not {'sklearn', 'matplotlib', 'pandas'} & set(sys.modules), 'heavy imports'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
