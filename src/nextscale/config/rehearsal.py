"""What can be said of a recipe before it runs: whether its parts fit together, and what they will need."""

from pathlib import Path

import torch

from nextscale.base.errors import ConfigError
from nextscale.callbacks import best_model
from nextscale.config.build import build_parts, check_fit, make_reward, options_of, read_conditions, resolve
from nextscale.config.recipe import Recipe
from nextscale.config.resume import check_folder
from nextscale.credit import check_compared, find_credit
from nextscale.learner import check_reference
from nextscale.models import hub, zoo
from nextscale.models.folder import build_transformer
from nextscale.models.vqvae import VQVAE
from nextscale.pipeline import VARPipeline
from nextscale.plan.gpus import find_gpu, gpu_at_hand, with_memory
from nextscale.plan.planning import Plan, make_plan
from nextscale.runs.launch import asks_for_fsdp, check_shards, trackers_of
from nextscale.runs.writer import RunFolder


def rehearse(recipe: Recipe, num_processes: int) -> list[str]:
    """Check a recipe without starting it: all of it if its weights are on this machine, else all but them.

    Args:
        recipe: as `resolve` returns it.

    Returns:
        names of the published models whose weights are missing, and so were not loaded.

    Raises:
        NextscaleError: something cannot be loaded, or does not fit together.
    """
    recipe.grpo.check_processes(num_processes)
    check_shards(asks_for_fsdp(recipe.run), num_processes)
    check_reference(recipe.grpo, recipe.run)
    trackers_of(recipe.run.report_to)
    _check_best(recipe)
    networks = [each for config in recipe.rewards.values() for each in config.networks]
    names = [recipe.model, *networks, recipe.run.diversity_clip]
    missing = [name for name in dict.fromkeys(names) if name and _needs_download(name)]
    if not missing:
        parts = build_parts(recipe)
        rewards = parts.rewards
        drawn = parts.conditions or parts.pipe.conditions(
            recipe.grpo.class_labels or range(parts.pipe.num_classes)
        )
        rewards.without_held_out().check_conditions(drawn)
        rewards.check_conditions(parts.eval_conditions or drawn)
        check_compared(recipe.grpo, rewards)
        find_credit(recipe.grpo.credit, rewards)
        folder = RunFolder(Path(recipe.run.output_dir))
        options_of(recipe).check_continuable(folder, rewards.roles(), drawn)
        return []
    check_folder(recipe)
    model = zoo.describe(recipe.model, recipe.vae)
    with torch.device("meta"):
        networks = build_transformer(model.transformer), VQVAE(model.tokenizer)
    pipe = VARPipeline(*networks, model.class_names)
    check_fit(recipe, pipe)
    read_conditions(recipe, pipe)
    for name, config in recipe.rewards.items():
        if not set(config.networks) & set(missing):
            make_reward(name, config)
    return missing


def _check_best(recipe: Recipe) -> None:
    """Check what can be known before an evaluation of the metric that the best model is kept by."""
    best_model(recipe.run)
    metric = recipe.run.save_best
    rewards = [f"eval_rewards/{name}" for name in recipe.rewards]
    measured = [f"{name}/{each}" for name in rewards for each in ("mean", "std", "sem")]
    if metric is None or metric in measured:
        return
    if not metric.startswith("eval_") or metric.startswith("eval_rewards/"):
        names = ", ".join(["eval_reward", *(f"{name}/mean" for name in rewards)])
        raise ConfigError(f"run.save_best '{metric}' is no metric of the evaluations: use one of {names}")


def _needs_download(name: str) -> bool:
    """Whether this is a published model whose weights are not in the hub's cache."""
    if name in zoo.OFFICIAL_MODELS:
        needed = zoo.files_of(zoo.OFFICIAL_MODELS[name]).items()
        return any(hub.find_cached(repository, files) is None for repository, files in needed)
    # Of a network under a reward, whatever is cached will do: not all repositories have a config.json.
    return hub.is_repository(name) and not Path(name).exists() and hub.find_cached(name, []) is None


def _networks(recipe: Recipe, *, held_out: bool) -> dict[str, str | None]:
    """Each network that rewards run; a reward's second one has a name of its own."""
    return {
        f"{name}, {network}" if i else name: network
        for name, config in recipe.rewards.items()
        if config.held_out == held_out
        for i, network in enumerate(config.networks)
    }


def plan_recipe(
    recipe: Recipe, gpu: str | None = None, num_gpus: int = 1, gigabytes: float | None = None
) -> Plan:
    """What a recipe's run will need, computed from the sizes of its networks alone.

    Args:
        gpu: a name in `gpus.GPUS`; by default the GPU at hand (`gpus.gpu_at_hand`).
        gigabytes: memory of a GPU, if not that of its data sheet.

    Raises:
        NextscaleError: an unknown GPU or model, or groups that the GPUs cannot share.
    """
    trained, evaluated = (_networks(recipe, held_out=each) for each in (False, True))
    if recipe.run.diversity_clip:
        evaluated["run.diversity_clip"] = recipe.run.diversity_clip
    model, recipe = zoo.describe(recipe.model, recipe.vae), resolve(recipe)
    sizes = model.transformer, model.tokenizer
    options = recipe.grpo, recipe.sampling, recipe.run
    if gpu is None:
        with torch.device("meta"):
            num_parameters = sum(each.numel() for each in build_transformer(model.transformer).parameters())
        device = with_memory(gpu_at_hand(num_parameters), gigabytes)
    else:
        device = find_gpu(gpu, gigabytes)
    return make_plan(*sizes, trained, *options, device, num_gpus, evaluated, recipe.tuning)
