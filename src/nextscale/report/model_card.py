"""Model cards: a README.md, with its pictures beside it, that tells what a model is and how it was trained.

Reads run folders, never models.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from nextscale.base.roles import ROLES
from nextscale.models import hub, zoo
from nextscale.runs.reader import Run, read_object, read_run

TAGS = ["image-generation", "class-conditional", "var", "next-scale-prediction"]
GRPO_TAGS = ["grpo", "reinforcement-learning"]
PAPER = "https://arxiv.org/abs/2505.23331"
MAX_WIDTH = 1600  # of the picture of samples
GAP = 16
SAMPLES, CURVES = "samples.png", "curves.png"


def write_model_card(
    folder: Path,
    run_folder: Path | None = None,
    *,
    base: str | None = None,
    repository: str | None = None,
    is_official: bool = False,
) -> Path:
    """Write `README.md`, and from a run `samples.png` and `curves.png`, into a model's folder.

    Args:
        folder: where the model lies.
        run_folder: the run that trained it, if one did.
        base: the model that this is a copy of; a run names the one that it started from itself.
        repository: "owner/name", where the model is going to be pushed.
        is_official: whether the folder holds the official code's files instead of nextscale's.

    Returns:
        the path of the card.

    Raises:
        ConfigError: `run_folder` is no run folder, or a file in it is broken.
    """
    run = read_run(run_folder) if run_folder else None
    base = run.config.get("model") if run else base
    name = repository.split("/")[-1] if repository else (run.folder if run else folder).resolve().name
    sections = [_front_matter(run, base), f"# {name}", _summary(run, base)]
    sections += [_how_to_load(repository, is_official)]
    if run:
        sections += [_samples(run, folder), _training(run, base), _results(run), _curves(run, folder)]
        sections += [f"## Recipe\n\n```yaml\n{_recipe(run).rstrip()}\n```"]
    sections += [f"## Licence\n\n{_licence_text(base)}"]
    path = folder / "README.md"
    path.write_text("\n\n".join(section for section in sections if section) + "\n", encoding="utf-8")
    return path


def _licence(base: str | None) -> str | None:
    """The identifier of the licence that a model inherits from its base, where it is known."""
    if found := zoo.find_official(base):
        return zoo.OFFICIAL_MODELS[found].licence
    return "apache-2.0" if base in zoo.MODELS else None


def _licence_text(base: str | None) -> str:
    licence = _licence(base)
    inherited = f"{licence}, that of {_base_link(base)}" if base and licence else "That of its base model"
    return f"{inherited}."


def _hub_base(base: str | None) -> str | None:
    """The hub repository of the base model, where it is in one."""
    if found := zoo.find_official(base):
        return zoo.OFFICIAL_MODELS[found].repository
    return base if base and hub.is_repository(base) and not Path(base).exists() else None


def _base_link(base: str) -> str:
    name, repository = zoo.find_official(base) or _public(base), _hub_base(base)
    return f"[{name}]({hub.url(repository)})" if repository else f"`{name}`"


def _front_matter(run: Run | None, base: str | None) -> str:
    """What the hub reads."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=_licence(base),
        library_name="nextscale",
        base_model=_hub_base(base),
        tags=[*TAGS, *(GRPO_TAGS if run else [])],
    )
    return f"---\n{data.to_yaml()}\n---"


def _summary(run: Run | None, base: str | None) -> str:
    start = f"from {_base_link(base)} " if base else ""
    if run is None:
        return f"A next-scale visual autoregressive (VAR) image model{', ' + start.strip() if start else ''}."
    told = f"A next-scale visual autoregressive (VAR) image model, fine-tuned {start}with [GRPO]({PAPER})."
    description = str(run.config.get("description") or "").strip()
    return f"{told}\n\n{description}" if description else told


def _how_to_load(repository: str | None, is_official: bool) -> str:
    where = repository or "path/to/this/folder"
    if is_official:
        call = 'VARPipeline.from_official("var.pth", "vae.pth")'
        note = "These are files for the official code of VAR, which nextscale reads as well:"
    else:
        call, note = f'VARPipeline.from_pretrained("{where}")', ""
    code = f"import nextscale as ns\n\npipe = ns.{call}\nimages = pipe([0, 1], num_images_per_label=4).pil()"
    return "\n\n".join(filter(None, ["## How to load it", note, f"```python\n{code}\n```"]))


def _samples(run: Run, folder: Path) -> str:
    """The first and the last grid of samples, side by side."""
    paths = sorted((run.folder / "samples").glob("step-*.png"))
    if not paths:
        return ""
    grids = [Image.open(path).convert("RGB") for path in dict.fromkeys((paths[0], paths[-1]))]
    width = sum(grid.width for grid in grids) + GAP * (len(grids) - 1)
    both = Image.new("RGB", (width, max(grid.height for grid in grids)), "white")
    left = 0
    for grid in grids:
        both.paste(grid, (left, 0))
        left += grid.width + GAP
    if width > MAX_WIDTH:
        both = both.resize((MAX_WIDTH, round(both.height * MAX_WIDTH / width)))
    both.save(folder / SAMPLES)
    steps = [int(path.stem[5:]) for path in (paths[0], paths[-1])]
    where = (
        f"after {steps[0]} steps (left) and {steps[1]} steps (right)" if len(grids) > 1 else "of this model"
    )
    classes = read_object(run.folder / "samples" / "index.json").get("classes")
    rows = f" Rows: {', '.join(map(str, classes))}." if classes and len(classes) <= 16 else ""
    return f"## Samples\n\nSamples {where}, from the same seeds.{rows}\n\n![Samples {where}]({SAMPLES})"


def _training(run: Run, base: str | None) -> str:
    """Base model, rewards and cost."""
    rewards = run.config.get("rewards")
    rows = []
    for name, each in (rewards if isinstance(rewards, dict) else {}).items():
        told = {key: value for key, value in each.items() if key not in ROLES}
        what = ", ".join(f"{key}: {_public(value)}" for key, value in told.items())
        rows.append((name, what, _role(each)))
    seconds = sum(run.values("step_time"))
    device = f" on {run.environment['device']}" if run.environment.get("device") else ""
    cost = f"{run.num_steps} steps, {seconds / 60:.1f} minutes of training{device}."
    start = f"Base model: {_base_link(base)}. " if base else ""
    return f"## Training\n\n{start}{cost}\n\n{_table(('reward', 'what', 'role'), rows)}"


def _role(reward: dict[str, Any]) -> str:
    """What a reward was for: trained on with a weight, kept to a bound, or only measured."""
    if reward.get("held_out"):
        return "held out"
    for key in ("at_least", "at_most"):
        if (bound := reward.get(key)) is not None:
            return f"{key.replace('_', ' ')} {bound}"
    return f"weight {_number(reward.get('weight', 1.0))}"


def _results(run: Run) -> str:
    """What the evaluations on fixed seeds found before and after; without any, what training saw."""
    keys = ["eval_reward", *(f"eval_rewards/{name}/mean" for name in run.names("eval_rewards/(.+)/mean"))]
    keys += [*(f"eval_judge/{name}" for name in run.names("eval_judge/(.+)")), "eval_diversity"]
    rows = [(key.removeprefix("eval_"), *map(_number, ends)) for key in keys if (ends := run.ends(key))]
    images = f"{num[-1]:.0f} " if (num := run.values("eval_num_images")) else ""
    source = f"On the {images}images of the evaluations, which have the same seeds before and after."
    if not rows and (ends := run.ends("reward")):
        rows, source = [("reward", *map(_number, ends))], "On the images of the first and of the last step."
    if kl := run.values("kl_per_image"):
        rows.append(("KL to the base model, nats an image", "", _number(kl[-1])))
    if not rows:
        return ""
    return f"## Results\n\n{source}\n\n{_table(('', 'before', 'after'), rows)}"


def _curves(run: Run, folder: Path) -> str:
    """Reward and KL over the steps."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    shown = {
        "reward": [("reward", "training", "-"), ("eval_reward", "evaluation", "o-")],
        "KL to the base model, nats an image": [("kl_per_image", "training", "-")],
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
    figure.savefig(folder / CURVES)
    return f"## Curves\n\n![{' and '.join(shown)} over the steps]({CURVES})"


def _recipe(run: Run) -> str:
    return yaml.safe_dump(_public(run.config), sort_keys=False, allow_unicode=True, width=100)


def _public(value: Any) -> Any:
    """A value of a recipe without the folders of the machine that it ran on."""
    if isinstance(value, dict):
        return {key: _public(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_public(each) for each in value]
    return os.path.basename(value.rstrip("/")) if isinstance(value, str) and os.path.isabs(value) else value


def _table(head: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _number(value: float) -> str:
    return f"{value:.4g}"
