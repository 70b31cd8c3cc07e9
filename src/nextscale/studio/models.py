"""The models that the studio offers, and images drawn from two of them with the same seed."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einops import rearrange
from PIL import Image
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import to_pil
from nextscale.config.build import is_miniature, is_prompted_miniature, load_pipeline, reads_miniature
from nextscale.models import hub, zoo
from nextscale.models.embedded import CLIPS, MODELS
from nextscale.models.folder import FolderConfig
from nextscale.models.zoo import OFFICIAL_MODELS
from nextscale.pipeline import VARPipeline
from nextscale.rewards.clip_score import ClipScore
from nextscale.rewards.networks.backbones import KNOWN_CLIPS
from nextscale.runs.paths import RunPaths
from nextscale.tuning import interpolated

MAX_KEPT = 3  # pipelines in memory
MAX_IMAGES = 64  # of one request


class Models:
    """The models that can be chosen: the miniatures, the published ones, those given, and the final models of
    the runs in a folder; and the CLIPs. Loads each model once, and keeps the last few.

    Args:
        runs: folder of runs; nothing outside it is offered but what `given` and `clips` name.
        given: models to offer besides.
        device: to run on.
        clips: CLIPs to offer besides the miniatures' and those on the hub.
    """

    def __init__(
        self, runs: Path, given: Sequence[str] = (), device: str = "cpu", clips: Sequence[str] = ()
    ) -> None:
        self.runs, self.given, self.device, self.given_clips = runs, list(given), device, list(clips)
        self._kept: dict[str, VARPipeline] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """Of all models that can be chosen now, those at hand first."""
        runs = [f"runs: {name}" for name in self.run_names(finished=True)]
        return list(dict.fromkeys(["toy", *self.given, *runs, *MODELS, *OFFICIAL_MODELS]))

    def tunable(self) -> list[str]:
        """Of the models that can be fine-tuned from the page."""
        return list(dict.fromkeys(["toy", *self.given, *MODELS]))

    def clips(self) -> list[str]:
        """Of CLIPs to choose from; any other of the hub can be named."""
        return list(dict.fromkeys([*CLIPS, *self.given_clips, *KNOWN_CLIPS]))

    def clip(self, name: str) -> str:
        """The CLIP of this name, which may come from a page: no folder is opened but those of the studio.

        Raises:
            ConfigError: it is neither the miniature's nor on the hub nor in a folder that the studio was
                started with.
        """
        name = (name or "").strip()  # an emptied field gives none
        is_on_hub = hub.is_repository(name) and ".." not in name and not os.path.exists(name)
        if name in CLIPS or is_on_hub or self._is_inside(name):
            return name
        raise ConfigError(
            f"there is no CLIP '{name}' to choose here: name {' or '.join(CLIPS)}, a repository of the hub, "
            "or a folder that the studio was started with"
        )

    def _is_inside(self, name: str) -> bool:
        """Whether a path leads into one of the studio's folders, links followed."""
        folders = [self.runs, *(Path(each) for each in [*self.given, *self.given_clips])]
        with contextlib.suppress(OSError, ValueError):  # what no path can be is in no folder
            path = Path(name).resolve()
            return any(path.is_relative_to(each.resolve()) for each in folders if each.is_dir())
        return False

    def run_names(self, *, finished: bool = False) -> list[str]:
        """The runs in the folder, the newest first.

        Args:
            finished: only those with a final model.
        """
        found = [each for each in self.runs.glob("*/metrics.jsonl") if each.stat().st_size]
        found.sort(key=lambda each: each.stat().st_mtime, reverse=True)
        paths = [RunPaths(each.parent) for each in found]
        is_shown = [not finished or (each.final / "config.json").is_file() for each in paths]
        return [each.path.name for each, shown in zip(paths, is_shown, strict=True) if shown]

    def run(self, name: str) -> RunPaths:
        """The run of this name.

        Raises:
            ConfigError: there is none in the folder.
        """
        if name not in self.run_names():
            raise ConfigError(f"there is no run '{name}' in '{self.runs}': choose another")
        return RunPaths(self.runs / name)

    def load(self, name: str) -> VARPipeline:
        """The model of this name.

        Raises:
            ConfigError: it is none of those that can be chosen.
            CheckpointError: it cannot be loaded.
        """
        source = self._source(name)
        with self._lock:
            if name not in self._kept:
                self._kept[name] = load_pipeline(source, device=self.device)
            self._kept[name] = self._kept.pop(name)  # the newest last
            while len(self._kept) > MAX_KEPT:
                del self._kept[next(iter(self._kept))]
            return self._kept[name]

    def describe(self, name: str) -> FolderConfig:
        """Its sizes, without its weights.

        Raises:
            ConfigError: it cannot be chosen.
            CheckpointError: it cannot be read.
        """
        return zoo.describe(self._source(name))

    def is_prompted(self, name: str) -> bool:
        """Whether a model draws by prompts."""
        return not getattr(self.describe(name).transformer, "num_classes", 0)

    def reads_miniature(self, name: str) -> bool:
        """Whether a model draws the miniature world by prompts."""
        found = self.describe(name)
        return reads_miniature(found.transformer, found.tokenizer)

    def _source(self, name: str) -> str:
        """What a model that can be chosen is loaded by."""
        if name not in self.names():
            raise ConfigError(f"there is no model '{name}' to choose here: take one from the list")
        return str(self.run(name.removeprefix("runs: ")).final) if name.startswith("runs: ") else name

    def between(self, base: str, tuned: str, alpha: float) -> VARPipeline:
        """The tuned model, or one between it and the base; sampled as the tuned one is."""
        pipe = self.load(tuned)
        if alpha == 1:
            return pipe
        model = interpolated(self.load(base).transformer, pipe.transformer, alpha)
        return VARPipeline(model, pipe.tokenizer, pipe.class_names, pipe.sampling)


@dataclass(frozen=True)
class Frame:
    """What the page shows at one moment of drawing.

    Attributes:
        picture: images drawn so far, in a grid with a row for each class or prompt.
        scale: the number of scales that they are decoded from, of `num_scales`.
    """

    picture: Image.Image
    scale: int
    num_scales: int


def words_of(pipe: VARPipeline, text: str) -> list[str]:
    """What a field of the page asks for: classes with commas or lines between, or a prompt a line."""
    # Not `splitlines`: that cuts at U+2028 and its like, which a prompt may hold.
    lines = text.replace("\r\n", "\n").split("\n")
    parts = [part for line in lines for part in line.split(",")] if pipe.num_classes else lines
    return [each.strip() for each in parts if each.strip()]


def conditions_of(pipe: VARPipeline, words: Sequence[str]) -> list[Condition]:
    """The conditions of these classes or prompts.

    Raises:
        ConfigError: there are none, or the model has no such class.
    """
    return pipe.conditions(words) if pipe.num_classes else pipe.prompted(words)


def draw(
    pipe: VARPipeline, wanted: Sequence[Any], num_images: int, options: dict[str, Any]
) -> Iterator[Frame | Tensor]:
    """Draw images, and yield what they are after every scale; last the images, (B, 3, H, W).

    Args:
        wanted: classes by number or name, or prompts, as the model takes them.
        options: seed, and guidance_scale, temperature, top_k and top_p, as `VARPipeline` takes them.

    Raises:
        ConfigError: too many images, nothing to draw, or a value that cannot be used.
    """
    kind = "classes" if pipe.num_classes else "prompts"
    if len(wanted) * num_images > MAX_IMAGES:
        raise ConfigError(
            f"{len(wanted)} {kind} of {num_images} images are {len(wanted) * num_images}: draw at most "
            f"{MAX_IMAGES} at once"
        )
    asked: dict[str, Any] = {"class_labels" if pipe.num_classes else "prompts": wanted}
    num_scales = pipe.transformer.schedule.num_scales
    done: queue.Queue[Any] = queue.Queue()

    def on_scale(pipe: VARPipeline, scale: int, f_hat: Tensor) -> None:
        images = pipe.tokenizer.latent_to_images(f_hat)
        done.put(Frame(grid_of(images, len(wanted)), scale + 1, num_scales))

    def work() -> None:
        try:
            drawn = {"num_images_per_label": num_images, "batch_size": MAX_IMAGES, **asked, **options}
            out = pipe(callback_on_scale_end=on_scale, **drawn)
            done.put(out.images)
        except Exception as error:  # for the page's thread to raise
            done.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        found = done.get()
        if isinstance(found, Exception):
            raise found
        yield found
        if isinstance(found, Tensor):
            return


def grid_of(images: Tensor, num_rows: int) -> Image.Image:
    """Images in a grid, enlarged to be seen if they are small."""
    grid = to_pil(rearrange(images, "(rows columns) c h w -> 1 c (rows h) (columns w)", rows=num_rows))[0]
    factor = max(1, 512 // max(grid.size))
    return grid.resize((grid.width * factor, grid.height * factor), Image.Resampling.NEAREST)


def clip_for(models: Models, pipe: VARPipeline, clip: str | None) -> str:
    """The CLIP to score with: as asked for, or the miniature's for its images.

    Raises:
        ConfigError: none is named, and the model is not of the miniature world; or it cannot be chosen.
    """
    if clip and clip.strip():
        return models.clip(clip)
    if is_prompted_miniature(pipe):
        return "toy-text"
    if is_miniature(pipe):
        return "toy"
    raise ConfigError("say which CLIP to score with, such as openai/clip-vit-large-patch14")


def score(prompt: str, clip: str, images: Tensor, conditions: Sequence[Condition]) -> list[float]:
    """CLIP scores of images for a prompt, in which {label} or {text} stands for what an image is to show.

    Raises:
        ConfigError: no prompt, or one with another field.
    """
    if not prompt.strip():
        raise ConfigError("write a prompt to score with, such as: a painting of a {label}")
    scores = ClipScore(prompt.strip(), clip=clip)(images, list(conditions))
    return [float(each) for each in scores]
