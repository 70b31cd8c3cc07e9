"""Prompts of the miniature world, and the models that know them."""

from collections import Counter
from functools import partial

import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.base.seeding import generator_for
from nextscale.config.files import RECIPES
from nextscale.models.embedded import MODELS
from nextscale.pipeline import VARPipeline
from nextscale.prompts import read_prompts
from nextscale.rewards import ClipScore
from nextscale.toy.judges import judge_prompted
from nextscale.toy.prompts import (
    ATTRIBUTES,
    NAMED,
    WORDS,
    captions_of,
    combinations,
    combinations_of,
    is_held_out,
    pictured,
    places_of,
    prompt_of,
    prompts,
    read_prompt,
    targets_of,
)
from nextscale.toy.world import STYLES, render

needs_assets = pytest.mark.skipif(not MODELS["toy-text"].is_dir(), reason="no models of the miniature world")


def test_a_prompt_tells_its_combination() -> None:
    assert prompt_of((0, 0, 0, 0)) == "a photo of a red star on clay in the middle"
    assert prompt_of((5, 1, 4, 1), "painting") == "a painting of an orange fish on slate on the left"
    for each in combinations():
        assert tuple(read_prompt(prompt_of(each)).values()) == (*each, STYLES.index("photo"))
        assert set(prompt_of(each).split()) <= set(WORDS)
    assert read_prompt("a photo of a moon") == {"object": 2, "style": STYLES.index("photo")}
    assert targets_of(["a photo of a moon", "a red star"], "colour").tolist() == [-1, 0]
    assert targets_of(["a painting of a moon", "a moon"], "style").tolist() == [STYLES.index("painting"), -1]


def test_an_eighth_is_held_out_and_every_value_is_on_both_sides() -> None:
    held_out = [each for each in combinations() if is_held_out(each)]
    trained = [each for each in combinations() if not is_held_out(each)]
    assert len(held_out) == 144 and len(trained) == 1008
    for i, values in enumerate(ATTRIBUTES.values()):
        for side in (held_out, trained):
            assert {each[i] for each in side} == set(range(len(values)))


def test_the_packaged_prompts_are_these() -> None:
    for style, middle in (("photo", ""), ("painting", "-painting")):
        for side, name in ((False, "train"), (True, "held-out")):
            found = read_prompts(RECIPES / f"toy-text{middle}-{name}.txt")
            assert [each.text for each in found] == prompts(held_out=side, style=style)


def test_pictures_of_prompts_are_of_one_side_and_clearly_placed() -> None:
    scenes = pictured(200, generator_for("test"), held_out=False)
    assert not any(is_held_out(each) for each in combinations_of(scenes))
    assert all(
        is_held_out(each) for each in combinations_of(pictured(50, generator_for("test"), held_out=True))
    )
    assert ((scenes.x.abs() <= 2) | (scenes.x.abs() >= 6)).all()
    assert (scenes.x.abs() + scenes.size <= 32).all()  # all of it is in the picture
    sides = places_of(scenes)
    assert (scenes.x[sides == 1] < 0).all() and (scenes.x[sides == 2] > 0).all()
    assert all(0.25 < (sides == place).float().mean() < 0.42 for place in range(3))


def test_captions_name_the_object_and_most_of_the_rest() -> None:
    scenes = pictured(200, generator_for("test"))
    read = [read_prompt(text) for text in captions_of(scenes, generator_for("words"), named=0.5)]
    for each, combination in zip(read, combinations_of(scenes), strict=True):
        truth = dict(zip(NAMED, (*combination, STYLES.index("photo")), strict=True))
        assert each["object"] == truth["object"] and each.items() <= truth.items()
    assert 0.4 < sum("place" in each for each in read) / 200 < 0.6


def test_some_captions_are_wrong_or_do_not_know_the_style() -> None:
    scenes = pictured(400, generator_for("test"))
    combinations = combinations_of(scenes)
    draw = partial(captions_of, scenes, named=1.0)
    wrong = [read_prompt(text) for text in draw(generator_for("words"), wrong=0.1)]
    for i, (name, most) in enumerate({"object": 0.1, "colour": 0.2, "ground": 0.2, "place": 0.0}.items()):
        share = sum(each[name] != true[i] for each, true in zip(wrong, combinations, strict=True)) / 400
        assert 0.5 * most <= share <= 1.3 * most, name  # some are right by chance
    texts = draw(generator_for("words"), no_style=0.2, wrong_style=0.3)
    begins = Counter(text.split(" of ")[0] if " of " in text else "" for text in texts)
    assert set(begins) == {"", *(f"a {style}" for style in STYLES)}
    assert 0.15 < begins[""] / 400 < 0.25 and 0.42 < begins["a photo"] / 400 < 0.58
    plain = draw(generator_for("words"))
    ends = [text.split(" of ")[-1] for text in plain]
    assert [text.split(" of ")[-1] for text in texts] == ends  # no attribute is another one


@needs_assets
def test_the_judges_know_what_true_pictures_show() -> None:
    scenes = pictured(200, generator_for("judged"), held_out=None)
    conditions = [Condition(None, prompt_of(each)) for each in combinations_of(scenes)]
    judged = judge_prompted(render(scenes), conditions)
    assert all(judged[f"judge/{name}_right"].mean() > 0.95 for name in NAMED)
    assert judged["judge/all_right"].mean() > 0.9 and judged["judge/style/photo"].mean() > 0.95
    others = [Condition(None, prompt_of((a, b, c, (d + 1) % 3))) for a, b, c, d in combinations_of(scenes)]
    wrong = judge_prompted(render(scenes), others)
    assert wrong["judge/all_right"].mean() < 0.1 and wrong["judge/colour_right"].mean() > 0.95
    unsaid = judge_prompted(render(scenes), [Condition(None, "anything")] * len(scenes))
    assert unsaid["judge/all_right"].mean() == 1
    painted = [Condition(None, prompt_of(each, "painting")) for each in combinations_of(scenes)]
    other = judge_prompted(render(scenes), painted)  # no prompt for another style is met by a photo
    assert other["judge/style_right"].mean() < 0.05 and other["judge/all_right"].mean() < 0.05
    assert torch.equal(other["judge/ground_right"], judged["judge/ground_right"])


@needs_assets
def test_the_clip_of_prompts_sees_what_is_wrong() -> None:
    scenes = pictured(200, generator_for("judged"), held_out=True)
    images, reward = render(scenes), ClipScore("{text}", clip="toy-text")
    right = reward(images, [Condition(None, prompt_of(each)) for each in combinations_of(scenes)])
    for i, values in enumerate(ATTRIBUTES.values()):
        changed = [
            (*each[:i], (each[i] + 1) % len(values), *each[i + 1 :]) for each in combinations_of(scenes)
        ]
        wrong = reward(images, [Condition(None, prompt_of(each)) for each in changed])
        assert (right > wrong).float().mean() > 0.95, list(ATTRIBUTES)[i]


@needs_assets
def test_the_model_draws_photos_of_held_out_prompts() -> None:
    pipe = VARPipeline.from_pretrained("toy-text")
    texts = prompts(held_out=True)
    out = pipe(prompts=texts, seed=3)
    judged = judge_prompted(out.images, [Condition(None, text) for text in texts])
    assert judged["judge/style/photo"].mean() > 0.9
    for name, least in {"object": 0.9, "colour": 0.6, "ground": 0.6, "place": 0.9}.items():
        assert judged[f"judge/{name}_right"].mean() > least, name
    assert torch.isfinite(out.log_probs).all()
