"""How near images are to the true pictures, and that the measures rank what is known."""

import json
from itertools import product

import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.evaluation import evaluate
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.policy import SamplingConfig
from nextscale.rewards.reward_set import RewardSet
from nextscale.toy.judges import KINDS, judge_images, load_judge
from nextscale.toy.realism import LIMITS, NUM_TRUE, TRUE_STYLES, Realism, pack, read_references, unpack
from nextscale.toy.references import features_of, reconstructions, true_pictures
from nextscale.toy.world import CLASSES

JUDGES = {kind: load_judge(kind) for kind in KINDS}
EVERY = list(range(len(CLASSES)))


def test_the_shipped_features_are_those_of_the_world() -> None:
    references = read_references()
    assert set(references) == set(TRUE_STYLES)
    for style, stored in references.items():
        assert stored.labels.bincount().tolist() == [NUM_TRUE // len(CLASSES)] * len(CLASSES)
        drawn = features_of(JUDGES, true_pictures(style, "reference", 16))
        for kind, each in drawn.items():
            unit = stored.features[kind].amax(0).clamp_min(1e-6) / 15
            assert ((stored.features[kind][:16] - each).abs() <= 0.51 * unit + 1e-4).all()


def test_packing_loses_half_a_unit_at_most() -> None:
    features = torch.rand(50, 8) * torch.arange(8)  # a column of zeros among them
    packed, unit = pack(features)
    assert packed.dtype == torch.uint8 and packed.shape == (50, 4)
    assert ((unpack(packed, unit) - features).abs() <= 0.501 * unit).all()


def test_the_measures_rank_what_is_known() -> None:
    """True paintings, then their reconstructions, then photos of the base model; equally many of each."""
    pipe, number = VARPipeline.from_pretrained("toy"), 128
    paintings = true_pictures("painting", "test", number)
    photos = pipe(EVERY, number // len(CLASSES), guidance_scale=1.5, seed=3).images
    sets = (paintings, reconstructions(pipe.tokenizer, paintings), photos)
    realism = Realism()
    found = [realism.distances(features_of(JUDGES, each), EVERY) for each in sets]
    for kind in KINDS:
        true, reconstructed, photo = (each[f"frechet/painting/{kind}"] for each in found)
        assert true < reconstructed < photo
        true, reconstructed, photo = (each[f"precision/painting/{kind}"] for each in found)
        assert true > reconstructed > photo
    assert found[2]["frechet/photo/style"] < found[2]["frechet/painting/style"]


def test_the_limits_are_in_order() -> None:
    limits = json.loads((TOY_ASSETS / "judges" / LIMITS).read_text())
    assert set(limits) == {"512", str(NUM_TRUE)}
    for style, kind in product(TRUE_STYLES, KINDS):
        key = f"frechet/{style}/{kind}"
        few, many = limits.values()
        for each in (few, many):
            assert 0 < each[f"true/{style}"][key] < each[f"reconstructed/{style}"][key]
        assert few[f"true/{style}"][key] > many[f"true/{style}"][key]  # the bias of a small sample


def test_an_evaluation_compares_with_true_pictures_of_its_classes() -> None:
    pipe, realism = VARPipeline.from_pretrained("toy"), Realism()
    rewards = RewardSet({"bright": lambda images, conditions: images.mean((1, 2, 3))})
    sampling, chosen = SamplingConfig(guidance_scale=1.5), pipe.conditions([2, 5])
    whole, parts = (
        evaluate(
            pipe,
            rewards,
            sampling,
            num_images=16,
            conditions=chosen,
            measures=[realism],
            batch_size=size,
        ).metrics
        for size in (16, 5)
    )
    names = [name for name in whole if name.startswith("judge/")]
    assert len(names) == 3 * len(TRUE_STYLES) * len(KINDS)
    for name in names:
        assert abs(whole[name] - parts[name]) < 0.02 * abs(whole[name]) + 0.07
    assert {labels for labels, *_ in realism.fitted} == {(2, 5)}
    assert isinstance(chosen[0], Condition)


def test_few_images_have_a_distance_alone() -> None:
    found = Realism().distances({kind: torch.rand(3, 192) for kind in KINDS}, [0])
    assert {name.split("/")[0] for name in found} == {"frechet"}
    assert all(0 < value < float("inf") for value in found.values())


def test_the_judges_see_the_same_in_any_precision() -> None:
    """What they are compared with was seen in float32."""
    images, conditions = true_pictures("painting", "test", 8), [Condition(i, CLASSES[i]) for i in EVERY]
    realism = Realism()
    expected = realism.features(images, conditions) | judge_images(images, conditions)
    with torch.autocast("cpu", torch.bfloat16):
        found = realism.features(images, conditions) | judge_images(images, conditions)
    for name, each in expected.items():
        assert torch.equal(found[name], each), name


def test_the_log_probability_is_that_of_the_class_asked_for() -> None:
    images = true_pictures("photo", "test", 8)
    logits = JUDGES["class"](images)
    for shift in (0, 3):
        asked = [(i + shift) % 8 for i in EVERY]
        found = judge_images(images, [Condition(label, CLASSES[label]) for label in asked])
        expected = -torch.nn.functional.cross_entropy(logits, torch.tensor(asked)).item()
        assert found["judge/class_log_prob"].mean().item() == pytest.approx(expected, rel=1e-4)
