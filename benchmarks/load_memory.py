"""Memory needed to load a model: a random one of VAR-d16's size, in both formats and two dtypes.

    python benchmarks/load_memory.py > benchmarks/load_memory.md

Each measurement runs in its own process, on Linux, and counts memory beyond what the process held after its
imports, as a fraction of the size of the two files: the peak of its resident memory (VmHWM, which includes
mapped pages of the files, though the system may drop these at any time), the peak of its anonymous memory
(RssAnon, sampled every 2 ms), and what stays resident. After loading, every tensor is read once, so that all
pages are counted. The tokenizer stays float32.
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from nextscale.models.var import VAR, VARConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig
from nextscale.pipeline import VARPipeline

DTYPES = ("float32", "bfloat16")
ROW = "| {:12} | {:8} | {:>7} | {:>9} | {:>10} | {:>10} | {:>7} |"


def memory(name: str) -> int:
    """Bytes that a line of /proc/self/status reports."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def measure(path: str, dtype: str) -> None:
    """Load one model and print a row; `path` is a folder of safetensors or of official files."""
    folder = Path(path)
    var, vae = folder / "var.pth", folder / "vae.pth"
    is_official = var.exists()
    files = (var, vae) if is_official else tuple(folder.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)

    peak_anonymous, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_anonymous
        while not is_done.wait(0.002):
            peak_anonymous = max(peak_anonymous, memory("RssAnon"))

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    resident, anonymous, begin = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    if is_official:
        pipe = VARPipeline.from_official(var, vae, dtype=getattr(torch, dtype))
    else:
        pipe = VARPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    for model in (pipe.transformer, pipe.tokenizer):
        for tensor in model.state_dict().values():
            tensor.sum()
    seconds = time.perf_counter() - begin
    is_done.set()
    watcher.join()

    shares = memory("VmHWM") - resident, peak_anonymous - anonymous, memory("VmRSS") - resident
    form = "`.pth`" if is_official else "safetensors"
    told = [f"{max(share, 0) / num_bytes:.2f}" for share in shares]
    print(ROW.format(form, dtype, f"{num_bytes / 1e9:.2f} GB", *told, f"{seconds:.1f} s"))


def main() -> None:
    where = f"torch {torch.__version__}, CPU"
    print(f"Memory to load a model of VAR-d16's sizes, as a share of its files; {where}:\n")
    print(ROW.format("format", "dtype", "files", "peak", "anonymous", "afterwards", "time"))
    print(ROW.format(*7 * ["---"]))
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as name:
        torch.manual_seed(0)
        pipe = VARPipeline(VAR(VARConfig()), VQVAE(VQVAEConfig()))
        folders = (
            pipe.save_official(Path(name) / "official")[0].parent,
            pipe.save_pretrained(Path(name) / "own"),
        )
        del pipe
        for folder in folders:
            for dtype in DTYPES:
                command = [sys.executable, __file__, str(folder), dtype]
                subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    measure(*sys.argv[1:]) if sys.argv[1:] else main()
