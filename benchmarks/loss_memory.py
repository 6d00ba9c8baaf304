"""Peak extra memory and time of one contrastive loss, forward and backward, tiled against the plain formula.

    python benchmarks/loss_memory.py [--batch 32768] [--width 512] [--plain-batch 8192]

Each case runs in its own process; "extra" is the peak resident memory above what stood before the call, the gradients included. The
plain formula at the full batch would need several B x B matrices (4.3 GB each at 32,768); it is run at `--plain-batch`, and at the
same batch the two are compared in time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path


def measure(which: str, kind: str, batch: int, width: int, repeats: int) -> dict[str, float]:
    import plain
    import torch

    import intermodal.losses as tiled

    torch.manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(batch, width), dim=-1).requires_grad_() for _ in range(2))
    log_scale, bias = torch.tensor(2.3).requires_grad_(), torch.tensor(-10.0).requires_grad_()
    arguments = (image, text, log_scale) + ((bias,) if kind == "sigmoid" else ())

    def run() -> None:
        for tensor in arguments:
            tensor.grad = None
        if which == "tiled":
            total, count = getattr(tiled, f"{kind}_loss")(*arguments)
            (total / count).backward()
        else:
            getattr(plain, f"{kind}_loss")(*arguments).backward()

    small = [t[:64].detach().requires_grad_() for t in arguments[:2]]  # load the kernels before the memory is read
    getattr(tiled, f"{kind}_loss")(*small, *arguments[2:])[0].backward()
    before = resident_kb()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return {"extra_mb": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, "seconds": statistics.median(times)}


def resident_kb() -> float:
    """Memory of this process that is in use now; the peak so far may be higher and would hide what comes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1024


def in_process(*arguments: object) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--case", *map(str, arguments)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=32768)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--plain-batch", type=int, default=8192)
    parser.add_argument("--case", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        which, kind, *numbers = arguments.case
        print(json.dumps(measure(which, kind, *map(int, numbers))))
        return
    for kind in ("sigmoid", "softmax"):
        full = in_process("tiled", kind, arguments.batch, arguments.width, 1)
        print(
            f"{kind}: tiled, batch {arguments.batch} x {arguments.width}: {full['extra_mb']:.0f} MB extra, {full['seconds']:.1f} s"
        )
        ours, theirs = (in_process(which, kind, arguments.plain_batch, arguments.width, 3) for which in ("tiled", "plain"))
        print(
            f"{kind}: batch {arguments.plain_batch}: tiled {ours['extra_mb']:.0f} MB, {ours['seconds']:.2f} s; "
            f"plain {theirs['extra_mb']:.0f} MB, {theirs['seconds']:.2f} s; "
            f"memory ratio {theirs['extra_mb'] / ours['extra_mb']:.1f}x, speed ratio {theirs['seconds'] / ours['seconds']:.2f}x"
        )


if __name__ == "__main__":
    main()
