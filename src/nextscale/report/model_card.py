"""Model cards: a README.md that says what a model is and how it was trained, with its pictures beside it.

Reads run folders, never models. The text stands in templates/model_card.md.
"""

import os
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from nextscale.base.files import write_text_aside
from nextscale.base.numbers import count
from nextscale.base.roles import ROLES
from nextscale.models import hub, zoo
from nextscale.policy import SamplingConfig
from nextscale.report.pictures import read_picture
from nextscale.runs.reader import Run, read_run

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
TAGS = ["image-generation", "var", "next-scale-prediction"]
GRPO_TAGS = ["grpo", "reinforcement-learning"]
PAPER = "https://arxiv.org/abs/2505.23331"
MAX_WIDTH = 1600  # of the picture of samples
GAP = 16
SAMPLES, CURVES = "samples.png", "curves.png"


def write_model_card(
    folder: Path,
    run_folder: Path | None = None,
    *,
    sampling: SamplingConfig,
    base: str | None = None,
    repository: str | None = None,
    adapter: str | None = None,
    official: tuple[str, str] | None = None,
    is_prompted: bool = False,
) -> Path:
    """Write `README.md`, and from a run `samples.png` and `curves.png`, into a model's folder.

    Args:
        folder: the model's folder.
        run_folder: the run that trained the model, if one did.
        sampling: how the model is sampled by default.
        base: the model that this is a copy of; a run itself names the model that it started from.
        repository: "owner/name", where the model is going to be pushed.
        adapter: the LoRA adapter that was merged, where it is not the run's.
        official: names of the transformer's and the tokenizer's files, where the folder holds those of the
            official code and not nextscale's.
        is_prompted: whether it is a model of prompts and not of classes.

    Returns:
        the path of the card.

    Raises:
        ConfigError: `run_folder` is not a run folder, or a file in it is broken.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = read_run(run_folder) if run_folder else None
    if run:
        told = run.config.get("model")
        base = told if isinstance(told, str) else None
    is_local = run.environment.get("model_is_local") if run else None
    repository_of_base = _hub_base(base, is_local)
    data = ModelCardData(
        license=_licence(base),
        library_name="nextscale",
        base_model=repository_of_base,
        tags=[*TAGS, "text-to-image" if is_prompted else "class-conditional", *(GRPO_TAGS if run else [])],
    )
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=repository.split("/")[-1] if repository else run.name if run else folder.resolve().name,
        base=_base_link(base, repository_of_base) if base else None,
        adapter=None if run or adapter is None else _public(adapter),
        licence=_licence(base),
        repository=repository,
        official=official,
        is_prompted=is_prompted,
        sampling=sampling.told(),
        run=run,
        **(_told_by(run, folder) if run else {}),
    )
    path = folder / "README.md"
    write_text_aside(path, f"{card}\n")
    return path


def _told_by(run: Run, folder: Path) -> dict[str, Any]:
    """What a run adds to the card of its model; draws the pictures into the model's folder."""
    results_source, results = _results(run)
    return {
        "paper": PAPER,
        "description": str(run.config.get("description") or "").strip(),
        "samples": _draw_samples(run, folder / SAMPLES),
        "samples_file": SAMPLES,
        "row_names": run.row_names(),
        "minutes": sum(run.values("step_time")) / 60,
        "rewards": _rewards(run),
        "results": results,
        "results_source": results_source,
        "curves": _draw_curves(run, folder / CURVES),
        "curves_file": CURVES,
        "recipe": yaml.safe_dump(
            _public(run.config), sort_keys=False, allow_unicode=True, width=100
        ).rstrip(),
    }


def _licence(base: str | None) -> str | None:
    """The identifier of the licence that a model inherits from its base, where it is known."""
    if found := zoo.find_official(base):
        return zoo.OFFICIAL_MODELS[found].licence
    return "apache-2.0" if base in zoo.MODELS else None


def _hub_base(base: str | None, is_local: bool | None) -> str | None:
    """The hub repository of the base model, where it is in one.

    Args:
        is_local: whether it was a path where it was loaded; None if that is not known.
    """
    if found := zoo.find_official(base):
        return zoo.OFFICIAL_MODELS[found].repository
    if not base or not hub.is_repository(base):
        return None
    return None if (Path(base).exists() if is_local is None else is_local) else base


def _base_link(base: str, repository: str | None) -> str:
    name = zoo.find_official(base) or _public(base)
    return f"[{name}]({hub.url(repository)})" if repository else f"`{name}`"


def _draw_samples(run: Run, path: Path) -> str:
    """Draw the first and the last grid of samples side by side; returns what they are, "" without grids."""
    found = run.paths.grids()
    if not found:
        return ""
    steps = list(dict.fromkeys((min(found), max(found))))
    grids = [read_picture(found[step]) for step in steps]
    width = sum(grid.width for grid in grids) + GAP * (len(grids) - 1)
    both = Image.new("RGB", (width, max(grid.height for grid in grids)), "white")
    left = 0
    for grid in grids:
        both.paste(grid, (left, 0))
        left += grid.width + GAP
    if width > MAX_WIDTH:
        both = both.resize((MAX_WIDTH, round(both.height * MAX_WIDTH / width)))
    both.save(path)
    if not steps[1:]:
        return "of this model"
    return f"after {count(steps[0], 'step')} (left) and {count(steps[1], 'step')} (right)"


def _rewards(run: Run) -> list[tuple[str, str, str]]:
    """Each reward's name, options and role."""
    rewards, rows = run.config.get("rewards"), []
    for name, each in (rewards if isinstance(rewards, dict) else {}).items():
        each = each if isinstance(each, dict) else {}
        told = {key: value for key, value in each.items() if key not in ROLES}
        rows.append((name, ", ".join(f"{key}: {_public(value)}" for key, value in told.items()), _role(each)))
    return rows


def _role(reward: dict[str, Any]) -> str:
    """What a reward is for: trained on with a weight, kept to a bound, or only measured."""
    if reward.get("held_out"):
        return "held out"
    for key in ("at_least", "at_most"):
        if (bound := reward.get(key)) is not None:
            return f"{key.replace('_', ' ')} {bound}"
    return f"weight {_number(reward.get('weight', 1.0))}"


def _results(run: Run) -> tuple[str, list[tuple[str, str, str]]]:
    """What the evaluations measured before and after training; without any, what training itself saw.

    Returns:
        on which images, and rows of metric, first and last value.
    """
    keys = ["eval_reward", *(f"eval_rewards/{name}/mean" for name in run.names("eval_rewards/(.+)/mean"))]
    keys += [*(f"eval_judge/{name}" for name in run.names("eval_judge/(.+)")), "eval_diversity"]
    images = f"{num[-1]:.0f} " if (num := run.values("eval_num_images")) else ""
    source = f"On the {images}images of the evaluations, which have the same seeds before and after."
    if not any(run.ends(key) for key in keys):
        keys, source = ["reward"], "On the images of the first and of the last step."
    rows = [
        (key.removeprefix("eval_"), _number(ends[0]), _number(ends[1]))
        for key in keys
        if (ends := run.ends(key))
    ]
    if kl := run.values("kl_per_image"):
        rows.append((f"KL to {run.kl_to}, nats an image, in the last step", "", _number(kl[-1])))
    return source, rows


def _draw_curves(run: Run, path: Path) -> str:
    """Draw reward and KL over the steps; returns what is drawn, "" where neither was measured."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = {
        "reward": [("reward", "training", "-"), ("eval_reward", "evaluation", "o-")],
        f"KL to {run.kl_to}, nats an image": [("kl_per_image", "training", "-")],
    }
    shown = {
        title: found
        for title, lines in shown.items()
        if (found := [line for line in lines if run.values(line[0])])
    }
    if not shown:
        return ""
    figure = Figure(figsize=(4.2 * len(shown), 2.8), layout="constrained", dpi=120)
    for axes, (title, lines) in zip(
        figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True
    ):
        for key, label, style in lines:
            axes.plot(*run.series(key), style, label=label, markersize=4)
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(frameon=False)
    figure.savefig(path)
    return " and ".join(shown)


def _public(value: Any) -> Any:
    """A recipe's value without the folders of the machine that it ran on."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value


def _number(value: float) -> str:
    return f"{value:.4g}"
