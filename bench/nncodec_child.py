"""Run by `bench.nncodec` in an environment that has NNCodec: encode a network at several qp, decode it again.

    python nncodec_child.py ZOO NETWORK FOLDER QP [QP ...]

Writes FOLDER/QP.safetensors with the decoded tensors and prints a JSON line for each qp: bytes of the bitstream and
seconds.
"""

import contextlib
import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
from nncodec.nn import decode, encode  # pyright: ignore - of another environment
from safetensors.numpy import save_file


def main() -> None:
    zoo, network, folder, *qps = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("zoo", zoo)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for qp in qps:
        start = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            # its own defaults; 2.1.3 looks for `ioq` and has no default for it
            settings = {"qp": int(qp), "use_dq": True, "ioq": False, "results": folder, "verbose": False}
            stream = encode(getattr(module, network)(), args=settings)
            seconds = time.perf_counter() - start
            tensors = decode(stream)
        save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, Path(folder) / f"{qp}.safetensors")
        print(json.dumps({"qp": int(qp), "bytes": len(stream), "seconds": round(seconds, 1)}), flush=True)


if __name__ == "__main__":
    main()
