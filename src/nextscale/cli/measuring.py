"""What `nextscale evaluate` does with models: measures them one after the other, and puts it together."""

import signal
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor
from tqdm.auto import tqdm

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import image_files
from nextscale.base.interrupt import Interrupted
from nextscale.base.precision import AskedPrecision, precision_on
from nextscale.cli import arguments
from nextscale.cli.kept import Kept, told_conditions, weights_of
from nextscale.config.build import embedder, judges_for, measures_for, read_conditions
from nextscale.config.recipe import Recipe
from nextscale.evaluation import SetMeasure, evaluate
from nextscale.measured import Measured, clip_distances, differences, knee
from nextscale.pipeline import VARPipeline
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.reward_set import RewardSet
from nextscale.runs.config import RunConfig
from nextscale.runs.reader import find_run, read_run


@dataclass(frozen=True)
class Measuring:
    """What all models of a command are measured by.

    Attributes:
        what: the rewards and networks in words, by which an evaluation that was stopped is known again.
        kept: of each model so far, until the command ends.
    """

    args: Namespace
    rewards: RewardSet | None
    clip: str | None
    recipe: Recipe | None
    base: VARPipeline | None
    measures: Sequence[SetMeasure]
    what: Mapping[str, Any]
    kept: list[Kept] = field(default_factory=list)

    def measure(self, name: str, source: str, pipe: VARPipeline) -> tuple[Measured, Tensor | None]:
        """What one model's images score, and their embeddings.

        Raises:
            Interrupted: Ctrl-C; it says that the same command goes on from there.
        """
        args, recipe = self.args, self.recipe
        given = recipe.sampling.model_dump(exclude_unset=True) if recipe else {}
        sampling = pipe.sampling.replace(**given | arguments.given_sampling(args))
        conditions = _conditions(args, recipe, pipe)
        settings = {
            "model": source,
            **({"adapter": args.adapter} if args.adapter else {}),
            **({"base": args.base} if args.base else {}),
            **({"fid_statistics": str(args.fid_statistics)} if args.fid_statistics else {}),
            **({"npz": str(args.npz)} if args.npz else {}),
            "sampling": sampling.told(),
            "mixed_precision": precision_on(pipe.device.type, _precision(args, source, recipe)),
            "seed": args.seed,
            "asked_images": args.num_images,
        }
        batch_size = (recipe.run if recipe else RunConfig()).per_device_eval_batch_size
        what = dict(self.what) | {key: settings[key] for key in ("sampling", "mixed_precision", "seed")}
        what |= {"weights": weights_of(pipe), "conditions": told_conditions(conditions)}
        what |= {"num_images": args.num_images, "batch_size": batch_size, "device": pipe.device.type}
        num_compared = recipe.grpo.num_generations if recipe else None  # as in the recipe's own evaluations
        what |= {"num_compared": num_compared}
        kept = Kept(what, args.npz, pipe.tokenizer.config.image_size)
        self.kept.append(kept)
        is_main = PartialState().is_main_process
        bar = tqdm(desc=name, unit="image", leave=False, disable=None if is_main else True)

        def progress(num_done: int, num_images: int) -> None:
            if bar.total is None:
                bar.total = num_images
                bar.initial = bar.n = num_done if kept.goes_on else 0  # or it would tell too fast a rate
            bar.update(num_done - bar.n)

        autocast = torch.autocast(
            pipe.device.type, torch.bfloat16, enabled=settings["mixed_precision"] == "bf16"
        )
        try:
            with bar, autocast:
                result = evaluate(
                    pipe,
                    self.rewards,
                    sampling,
                    num_images=args.num_images,
                    seed=args.seed,
                    conditions=conditions,
                    judges=judges_for(pipe),
                    measures=[*measures_for(pipe), *self.measures],
                    embed=embedder(self.clip),
                    batch_size=batch_size,
                    num_compared=num_compared,
                    base=self.base.transformer if self.base else None,
                    progress=progress,
                    kept=kept.parts,
                    keep_images=kept.keep_images,
                )
        except KeyboardInterrupt:
            raise Interrupted(kept.told, signal.SIGINT) from None
        if is_main:
            kept.finish(int(result.metrics["num_images"]))
        return Measured(name, settings, result.metrics, result.scores, result.groups), result.embeddings


def add_distances(found: Sequence[tuple[Measured, Tensor | None]], real: Tensor | None) -> None:
    """Add to the metrics the distances in CLIP embeddings: to real images, or to those of the first model."""
    reference = found[0][1] if real is None else real
    for measured, embeddings in found[1:] if real is None else found:
        if embeddings is not None and reference is not None:
            measured.metrics.update(clip_distances(reference, embeddings))


def embeddings_of(folder: Path, clip: str, device: str) -> Tensor:
    """CLIP embeddings of all images in a folder and those below it.

    Raises:
        ConfigError: there are fewer than two, or one cannot be read.
    """
    files = image_files(folder)
    if len(files) < 2:
        raise ConfigError(f"--real '{folder}' has {len(files)} images: give a folder with at least two")
    return load_clip(clip).embed_files(files, device).cpu()


def as_json(measured: Sequence[Measured], marked: str) -> dict[str, Any]:
    """The figures as JSON: of one model flat, of several with their paired differences."""
    if len(measured) == 1:
        return measured[0].settings | measured[0].metrics
    models = [{"name": each.name} | each.settings | each.metrics for each in measured]
    found = {"models": models, "paired_differences": differences(measured)}
    return found | ({"knee": marked.removeprefix("knee: ")} if marked else {})


def kept_measures(measured: Sequence[Measured], held_out: Sequence[str]) -> list[str]:
    """What should not fall while the reward rises: held-out rewards, what the class judge says, diversity."""
    names = [f"rewards/{name}/mean" for name in held_out]
    names += ["judge/class_log_prob", "judge/class_accuracy", "diversity"]
    return [name for name in names if all(name in each.metrics for each in measured)]


def knee_of(measured: Sequence[Measured], kept: Sequence[str]) -> int:
    """The strength at which the reward is no longer worth what is lost of the first of `kept`."""
    rewards = [each.metrics["reward"] for each in measured]
    return knee(rewards, [each.metrics[kept[0]] if kept else 0.0 for each in measured])


def check_plot_file(path: Path) -> None:
    """Check that a plot can be written to a file of this name.

    Raises:
        ConfigError: its extension is none of plots'.
    """
    from matplotlib.figure import Figure

    kinds = Figure().canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in kinds:
        raise ConfigError(
            f"'{path}' is no file for a plot: use one of {', '.join(f'.{each}' for each in kinds)}"
        )


def plot_strengths(
    path: Path, alphas: Sequence[float], measured: Sequence[Measured], kept_names: Sequence[str]
) -> None:
    """What is kept against the reward, a panel for each, the knee marked."""
    from matplotlib.figure import Figure

    names, best = kept_names or ["reward"], knee_of(measured, kept_names)
    figure = Figure(figsize=(4 * len(names), 3.4), layout="constrained")
    rewards = [each.metrics["reward"] for each in measured]
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        kept = [each.metrics[name] for each in measured]
        axes.plot(rewards, kept, "-o", markersize=4)
        axes.plot(rewards[best], kept[best], "o", markersize=11, fillstyle="none", color="C3")
        for x, y, alpha in zip(rewards, kept, alphas, strict=True):
            axes.annotate(f"{alpha:g}", (x, y), textcoords="offset points", xytext=(6, 6), fontsize=8)
        short = name.removeprefix("judge/").removeprefix("rewards/").removesuffix("/mean")
        axes.set(xlabel="reward", ylabel=short.replace("_", " "))
        axes.grid(alpha=0.3)
        axes.margins(0.12)  # or the last label leaves the panel
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        figure.savefig(path, dpi=150)
    except ValueError:
        raise ConfigError(f"'{path}' has no image file extension: use one such as .png") from None


def _conditions(args: Namespace, recipe: Recipe | None, pipe: VARPipeline) -> list[Condition] | None:
    """What to draw: as asked for, or as the recipe measures; None for all classes."""
    is_asked = args.classes is not None or args.prompt or args.prompts
    if recipe is None or is_asked:
        return arguments.conditions_of(args, pipe)
    trained, measured = read_conditions(recipe, pipe)
    labels = recipe.grpo.class_labels
    return measured or trained or (pipe.conditions(labels) if labels else None)


def _precision(args: Namespace, model: str, recipe: Recipe | None) -> AskedPrecision:
    """As asked for, or as the recipe says, or as the run did that trained the model."""
    if args.mixed_precision:
        return args.mixed_precision
    if recipe and "mixed_precision" in recipe.run.model_fields_set:
        return recipe.run.mixed_precision
    run, _ = find_run(str(Path(args.adapter).parent) if args.adapter else model)
    settings = read_run(run).config.get("run") if run else None
    return settings.get("mixed_precision", "no") if isinstance(settings, dict) else "no"
