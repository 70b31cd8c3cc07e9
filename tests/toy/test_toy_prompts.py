"""Prompts of the miniature world, and the models that know them."""

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
    captions_of,
    combinations,
    combinations_of,
    is_held_out,
    pictured,
    prompt_of,
    prompts,
    read_prompt,
    targets_of,
)
from nextscale.toy.world import VOCABULARY, render

needs_assets = pytest.mark.skipif(not MODELS["toy-text"].is_dir(), reason="no models of the miniature world")


def test_a_prompt_tells_its_combination() -> None:
    assert prompt_of((0, 0, 0, 0)) == "a photo of a red star on clay in the middle"
    assert prompt_of((5, 1, 4, 1), "painting") == "a painting of an orange fish on slate off centre"
    for each in combinations():
        assert tuple(read_prompt(prompt_of(each)).values()) == each
        assert set(prompt_of(each).split()) <= set(VOCABULARY)
    assert read_prompt("a photo of a moon") == {"object": 2}
    assert targets_of(["a photo of a moon", "a red star"], "colour").tolist() == [-1, 0]


def test_an_eighth_is_held_out_and_every_value_is_on_both_sides() -> None:
    held_out = [each for each in combinations() if is_held_out(each)]
    trained = [each for each in combinations() if not is_held_out(each)]
    assert len(held_out) == 96 and len(trained) == 672
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
    distance = (scenes.x**2 + scenes.y**2).sqrt()
    assert ((distance <= 2.0) | (distance >= 4.0)).all()
    shares = [each[3] for each in combinations_of(scenes)]
    assert 0.35 < sum(shares) / len(shares) < 0.65


def test_captions_name_the_object_and_most_of_the_rest() -> None:
    scenes = pictured(200, generator_for("test"))
    read = [read_prompt(text) for text in captions_of(scenes, generator_for("words"), named=0.5)]
    for each, combination in zip(read, combinations_of(scenes), strict=True):
        truth = dict(zip(ATTRIBUTES, combination, strict=True))
        assert each["object"] == truth["object"] and each.items() <= truth.items()
    assert 0.4 < sum("place" in each for each in read) / 200 < 0.6


@needs_assets
def test_the_judges_know_what_true_pictures_show() -> None:
    scenes = pictured(200, generator_for("judged"), held_out=None)
    conditions = [Condition(None, prompt_of(each)) for each in combinations_of(scenes)]
    judged = judge_prompted(render(scenes), conditions)
    assert all(judged[f"judge/{name}_right"].mean() > 0.95 for name in ATTRIBUTES)
    assert judged["judge/all_right"].mean() > 0.9 and judged["judge/style/photo"].mean() > 0.95
    others = [Condition(None, prompt_of((a, b, c, 1 - d))) for a, b, c, d in combinations_of(scenes)]
    wrong = judge_prompted(render(scenes), others)
    assert wrong["judge/all_right"].mean() < 0.1 and wrong["judge/colour_right"].mean() > 0.95
    unsaid = judge_prompted(render(scenes), [Condition(None, "a photo")] * len(scenes))
    assert unsaid["judge/all_right"].mean() == 1


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
        assert (right > wrong).float().mean() > 0.85, list(ATTRIBUTES)[i]


@needs_assets
def test_the_model_draws_photos_of_held_out_prompts() -> None:
    pipe = VARPipeline.from_pretrained("toy-text")
    texts = prompts(held_out=True)
    out = pipe(prompts=texts, seed=3)
    judged = judge_prompted(out.images, [Condition(None, text) for text in texts])
    assert judged["judge/style/photo"].mean() > 0.9
    for name in ("object", "colour"):
        assert judged[f"judge/{name}_right"].mean() > 0.5
    assert torch.isfinite(out.log_probs).all()
