"""One run = one folder: its configuration, metrics, sample grids, checkpoints and final model."""

import json
import shutil
from pathlib import Path

from einops import rearrange
from torch import Tensor

from nextscale.base.errors import ConfigError
from nextscale.base.images import to_pil


class RunFolder:
    """Where a run writes.

    Args:
        path: the folder.
        is_main: whether this process is the one that writes.
    """

    def __init__(self, path: Path, is_main: bool = True) -> None:
        self.path = path
        self.is_main = is_main
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.metrics = path / "metrics.jsonl"

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """An earlier run is never mixed with a new one.

        Raises:
            ConfigError: the folder is a file, or holds a run and neither `resume` nor `overwrite` is set.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"'{self.path}' is not a folder: choose another --run.output_dir")
        if self.metrics.exists() and not resume and not overwrite:
            raise ConfigError(
                f"'{self.path}' already holds a run: continue it with --run.resume auto, replace it with "
                "--run.overwrite true, or choose another --run.output_dir"
            )

    def open(self, config_yaml: str, *, resume: bool, overwrite: bool) -> None:
        """Make the folder and write `config.yaml`; raises as `check` does."""
        self.check(resume=resume, overwrite=overwrite)
        if not self.is_main:
            return
        if overwrite and not resume and self.metrics.exists():
            for name in ("checkpoints", "final", "samples", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            for name in ("metrics.jsonl", "report.html"):
                (self.path / name).unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.yaml").write_text(config_yaml)

    def write_environment(self, content: dict[str, object]) -> None:
        """`environment.json`: device, threads, versions."""
        if self.is_main:
            (self.path / "environment.json").write_text(json.dumps(content, indent=2) + "\n")

    def keep_steps(self, last: int) -> None:
        """Drop the metrics after step `last`, which a resumed run will write again, and any cut last line."""
        if not self.is_main or not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= last:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # cut short by an interruption; nothing whole follows
        self.metrics.write_text("".join(kept) if last else "")

    def append_metrics(self, metrics: dict[str, float]) -> None:
        """One line of metrics.jsonl."""
        if self.is_main:
            with self.metrics.open("a") as file:
                file.write(json.dumps(metrics) + "\n")

    def save_grid(self, step: int, images: Tensor, row_names: list[str]) -> None:
        """`samples/step-NNNNNN.png`: (rows, columns, 3, H, W) in [0, 1] as one picture."""
        if not self.is_main:
            return
        folder = self.path / "samples"
        folder.mkdir(exist_ok=True)
        grid = rearrange(images, "rows columns c h w -> 1 c (rows h) (columns w)")
        to_pil(grid)[0].save(folder / f"step-{step:06d}.png")
        index = {"classes": row_names, "num_columns": images.shape[1]}
        (folder / "index.json").write_text(json.dumps(index) + "\n")


def find_run(source: str) -> tuple[Path | None, str]:
    """The run that trained a model, and the model, where `source` names a run's folder or its final model.

    Returns:
        (None, source) where it names neither.
    """
    path = Path(source)
    for run in (path, path.parent):
        is_named = path == run or path.name == "final"
        if is_named and (run / "metrics.jsonl").is_file() and (run / "final" / "config.json").is_file():
            return run, str(run / "final")
    return None, source
