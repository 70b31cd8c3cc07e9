"""What happened in a run, in sentences and figures: only what the run has measured."""

import math
from dataclasses import dataclass

import numpy as np

from nextscale.base.numbers import count, duration, number, pair, percent
from nextscale.report.charts import PARTS
from nextscale.runs.hacking import hacking_warning
from nextscale.runs.reader import BASE_MODEL, Run

HACKING = "The trained reward rose while a judge that it never saw fell: a sign of reward hacking."


@dataclass(frozen=True)
class Fact:
    """One thing that happened: a sentence of the summary, a card of the page, or both."""

    sentence: str
    label: str = ""
    value: str = ""
    hint: str = ""


def verdict(run: Run) -> str:
    """The run in one sentence."""
    change, accuracy = _reward_change(run), run.ends("eval_judge/class_accuracy")
    if change is None:
        return "Too little was measured to say what the training did."
    before, after, sd = change
    size, verb = abs(after - before) / sd, "rose" if after > before else "fell"
    if after == before or size < 0.1:
        says = "the reward hardly moved"
    elif math.isnan(size):
        says = f"the reward {verb} from {pair(before, after, ' to ')}"
    else:
        says = f"the reward {verb} by {size:.1f} times its standard deviation at the start"
    if accuracy:
        kept = accuracy[1] / accuracy[0] if accuracy[0] else math.nan
        held = "held" if kept >= 0.95 else "fell a little" if kept >= 0.85 else "fell"
        says += f", and the share of objects that a judge recognises {held} ({percent(accuracy[1])})"
    if all_right := run.ends("eval_judge/all_right"):
        before, after = map(percent, all_right)
        says += f", and the share of images with all that their prompt names went from {before} to {after}"
    return f"In {count(run.num_steps, 'step')} {says}.{_price(run)}"


def _price(run: Run) -> str:
    """What the change cost: how much less images differ, and how far the model has moved."""
    diversity, kl = run.ends("eval_diversity"), run.values("kl_per_image")
    told = []
    if diversity and diversity[0] > 0:
        change = diversity[1] / diversity[0] - 1
        told.append(f"diversity {pair(*diversity, ' to ')} ({change:+.0%})".replace("%", " %"))
    if kl:
        told.append(f"a KL of {number(kl[-1])} nats an image to {run.kl_to} in the last step")
    return f" The price: {' and '.join(told)}." if told else ""


def warnings(run: Run) -> list[str]:
    """What a reader has to know first: the judges' fall, and what the last evaluation warned of."""
    found, reward = [HACKING] if _is_hacking(run) else [], run.ends("eval_reward")
    for name in run.names("eval_warnings/(.+)"):
        scores = run.ends(f"eval_rewards/{name}/mean")
        if run.values(f"eval_warnings/{name}")[-1:] == [1.0] and reward and scores:
            found.append(hacking_warning(name, reward, scores))
    return found


def facts(run: Run) -> list[Fact]:
    """What happened, most important first."""
    found, steps, change = [], count(run.num_steps, "step"), _reward_change(run)
    place = f" on {run.environment['device']}" if run.environment.get("device") else ""
    spent, images = sum(run.values("step_time")), run.num_images
    took = f" ({duration(spent)}{place})" if spent else ""
    source = "evaluation" if run.ends("eval_reward") else "training"
    if change:
        name = "reward" if source == "evaluation" else "training reward"
        moved = round((change[1] - change[0]) / change[2], 1) + 0.0  # and no -0.0
        hint = source + ("" if math.isnan(moved) else f", {moved:+.1f} sd")
        sentence = f"In {steps}{took} the {name} went from {pair(*change[:2], ' to ')}."
        found.append(Fact(sentence, "Reward", pair(*change[:2]), hint))
    else:
        found.append(Fact(f"After {steps}{took} too little was measured to compare rewards."))
    rewards = {name: run.ends(f"eval_rewards/{name}/mean") for name in run.names("eval_rewards/(.+)/mean")}
    if len(told := [f"{name} {pair(*ends, ' to ')}" for name, ends in rewards.items() if ends]) > 1:
        found.append(Fact(f"By reward: {'; '.join(told)}."))
    found += _constraint_facts(run)
    if styles := _moved_styles(run):
        (name, before, after), *others = styles
        told = f"{percent(after)} of the images {name} ({percent(before)} before)"
        told += "".join(f"; {name} {percent(b)} ({percent(a)} before)" for name, a, b in others)
        found.append(Fact(f"The style judge, which no training ever saw, now calls {told}."))
        for name, a, b in styles:
            found.append(Fact("", f"Judged {name}", f"{percent(a)} → {percent(b)}", "of the images"))
    if ends := run.ends("eval_judge/class_accuracy"):
        before, after = map(percent, ends)
        sentence = f"The class judge recognises the object in {after} ({before} before)"
        if sure := run.ends("eval_judge/class_log_prob"):
            sentence += f", with a mean log-probability of {number(sure[1])} ({number(sure[0])} before)"
        found.append(Fact(f"{sentence}.", "Object recognised", f"{before} → {after}", "of the images"))
    found += _attribute_facts(run)
    found += _distance_facts(run)
    if ends := run.ends("eval_diversity"):
        before, after = pair(*ends).split(" → ")
        sentence = f"Diversity is {after} ({before} before)."
        found.append(Fact(sentence, "Diversity", pair(*ends), "evaluation"))
    if kl := run.values("kl_per_image"):
        value = number(kl[-1])
        sentence = f"KL to {run.kl_to}: {value} nats an image, in the last step."
        name = "KL to base" if run.kl_to == BASE_MODEL else "KL to reference"
        found.append(Fact(sentence, name, value, "nats an image, in the last step"))
    if spent:
        found.append(Fact("", "Training time", duration(spent), f"{steps}{place}"))
    if spent and images:
        rate, shares = number(images / spent), time_shares(run)
        most = max(shares, key=shares.__getitem__)
        told = f"{rate} images a second, and {percent(shares[most])} of the time went into the {most}."
        found.append(Fact(told, "Speed", rate, "images a second"))
    return found


def time_shares(run: Run) -> dict[str, float]:
    """The share of the training time that each part of a step took; what is left is the "rest"."""
    spent = {part: sum(run.values(f"time/{part}")) for part in PARTS}
    total = max(sum(run.values("step_time")), sum(spent.values()))
    spent["rest"] = total - sum(spent.values())
    return {part: time / total for part, time in spent.items() if time > 0}


def _reward_change(run: Run) -> tuple[float, float, float] | None:
    """Reward before, after, and its sd before training (NaN where unknown).

    From the evaluations where there are two; else from the first and the last tenth of the training steps.
    """
    prefix = "eval_" if run.ends("eval_reward") else ""
    values, sd = run.values(f"{prefix}reward"), [*run.values(f"{prefix}reward_std"), math.nan][0]
    if len(values) < 2:
        return None
    n = 1 if prefix else max(1, len(values) // 10)
    return float(np.mean(values[:n])), float(np.mean(values[-n:])), sd or math.nan


def _is_hacking(run: Run) -> bool:
    """Whether the reward rose by more than its sd while a judge recognised clearly fewer objects."""
    change, accuracy = _reward_change(run), run.ends("eval_judge/class_accuracy")
    if change is None or accuracy is None:
        return False
    return change[1] - change[0] > change[2] and accuracy[1] < 0.85 * accuracy[0]


def _moved_styles(run: Run) -> list[tuple[str, float, float]]:
    """The style whose share rose most (of several, the commonest), and the one whose share fell most, if one
    did: name, first share, last share."""
    names = run.names(r"eval_judge/style/(.+)")
    styles = [(name, *ends) for name in names if (ends := run.ends(f"eval_judge/style/{name}"))]
    styles.sort(key=lambda style: (style[1] - style[2], -style[2]))
    found = styles if len(styles) < 2 else [styles[0], styles[-1]]
    return [each for i, each in enumerate(found) if i == 0 or each[1] != each[2]]


def _attribute_facts(run: Run) -> list[Fact]:
    """How often images have all that their prompt names, and each part of it."""
    all_right = run.ends("eval_judge/all_right")
    if not all_right:
        return []
    before, after = map(percent, all_right)
    names = [name for name in run.names("eval_judge/(.+)_right") if name != "all"]
    parts = [(name, *map(percent, ends)) for name in names if (ends := run.ends(f"eval_judge/{name}_right"))]
    told = "; ".join(f"{name} {new} ({old} before)" for name, old, new in parts)
    sentence = f"Judges find all that the prompt names in {after} ({before} before): {told}."
    return [Fact(sentence, "All as prompted", f"{before} → {after}", "of the images")]


def _distance_facts(run: Run) -> list[Fact]:
    """How near the images have come to true pictures, by style and judge: first what fell most."""
    names = run.names("eval_judge/frechet/(.+)")
    moved = [(name, *ends) for name in names if (ends := run.ends(f"eval_judge/frechet/{name}"))]
    moved.sort(key=lambda each: each[2] / max(each[1], 1e-9))
    if not moved:
        return []
    images = run.values("eval_num_images")
    hint = f"Fréchet, of {images[-1]:.0f} images" if images else "Fréchet"
    told = "; ".join(f"{_of_style(name)} {pair(before, after, ' to ')}" for name, before, after in moved)
    name, before, after = moved[0]
    sentence = f"Fréchet distance to true pictures: {told}."
    return [Fact(sentence, f"To true pictures: {_of_style(name)}", pair(before, after), hint)]


def _of_style(name: str) -> str:
    """In words, such as "painting (class judge)" of painting/class."""
    style, _, kind = name.rpartition("/")
    return f"{style} ({kind} judge)"


def _constraint_facts(run: Run) -> list[Fact]:
    """Where each constraint's bound is, and where its mean has come to."""
    found = []
    for name in run.names("constraints/(.+)/bound"):
        means = run.values(f"eval_rewards/{name}/mean") or run.values(f"rewards/{name}/mean")
        bounds, multipliers = (run.values(f"constraints/{name}/{key}") for key in ("bound", "multiplier"))
        if means and bounds and multipliers:
            bound, mean = pair(bounds[-1], means[-1]).split(" → ")
            told = f"bound {bound}, multiplier {number(multipliers[-1])}"
            sentence = f"The constraint on {name}: mean {mean}, {told}."
            found.append(Fact(sentence, f"Constraint: {name}", mean, told))
    return found
