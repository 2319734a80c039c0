"""`.half()`, the plainest compression: what every table holds its lines against.

    python -m bench.halves ../shared/zoo.py resnet20_cifar10 cifar10_test half.safetensors

prints the accuracy of the network with these values.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from featherweight.data import batches
from featherweight.metrics import accuracy
from featherweight.userland import call, make_model


def half(zoo: Path, network: str, test: str, file: Path) -> dict[str, Any]:
    """Bytes and accuracy of a safetensors file of fp16 values, read in a fresh process."""
    real = {n: t for n, t in make_model(f"{zoo}:{network}").state_dict().items() if t.is_floating_point()}
    save_file({n: t.half() for n, t in real.items()}, file)
    command = [sys.executable, "-m", "bench.halves", str(zoo), network, test, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    fp32 = 4 * sum(t.numel() for t in real.values())
    return {"fp32_bytes": fp32, "file_bytes": file.stat().st_size, "after": round(float(done.stdout), 2)}


def main() -> None:
    zoo, network, test, file = sys.argv[1:]
    net = make_model(f"{zoo}:{network}")
    net.load_state_dict({n: t.float() for n, t in load_file(file).items()}, strict=False)
    print(accuracy(net, batches(call(f"{zoo}:{test}"), 256))["top1"])


if __name__ == "__main__":
    main()
