"""The shipped models of the miniature world: whole, small, and good enough to learn from."""

import hashlib
import json

import pytest
import torch

from nextscale.base.conditions import Condition
from nextscale.models.zoo import TOY_ASSETS
from nextscale.pipeline import VARPipeline
from nextscale.rewards import Aesthetic, ClipScore
from nextscale.toy import judges
from nextscale.toy.judges import KINDS, OF_PROMPTS, judge_images, load_judge
from nextscale.toy.world import CLASSES, STYLES, Scenes, beauty, render, sample_scenes

pytestmark = pytest.mark.skipif(
    not (TOY_ASSETS / "hashes.json").is_file(),
    reason=f"no models of the miniature world in {TOY_ASSETS}: 'nextscale toy train' makes them",
)
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def pictures() -> tuple[Scenes, torch.Tensor]:
    """Scenes and images that no model was trained on."""
    scenes = sample_scenes(200, torch.Generator().manual_seed(123456789))
    return scenes, render(scenes)


def test_every_weight_file_has_its_hash():
    hashes = json.loads((TOY_ASSETS / "hashes.json").read_text())
    paths = {path.relative_to(TOY_ASSETS).as_posix(): path for path in TOY_ASSETS.rglob("*.safetensors")}
    assert {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()} == hashes
    expected = {"aesthetic_head", "clip/model", "pipeline/transformer", "pipeline/tokenizer"}
    expected |= {"clip_text/model", "pipeline_text/transformer"}
    expected |= {f"judges/{name}" for name in (*KINDS, *OF_PROMPTS, "references")}
    assert {name.removesuffix(".safetensors") for name in paths} == expected


def test_the_assets_are_small_and_have_a_model_card():
    assert sum(path.stat().st_size for path in TOY_ASSETS.rglob("*") if path.is_file()) < MAX_BYTES
    card = (TOY_ASSETS / "README.md").read_text()
    assert len(card) > 500
    for word in ("tokenizer", "transformer", "CLIP", "aesthetic", "judge"):
        assert word.lower() in card.lower()


def test_the_pipeline_loads_and_draws_photos_of_its_classes():
    pipe = VARPipeline.from_pretrained("toy")
    assert tuple(pipe.class_names or ()) == CLASSES
    out = pipe(class_labels=list(range(len(CLASSES))), num_images_per_label=8, guidance_scale=1.5, seed=0)
    assert out.images.shape == (64, 3, 64, 64)
    judged = judge_images(out.images, [each for each in pipe.all_conditions() for _ in range(8)])
    assert all(values.shape == (64,) for values in judged.values())
    assert judged["judge/class_accuracy"].mean() > 0.6
    assert judged["judge/style/photo"].mean() > 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_the_judges_know_what_is_drawn(kind: str, pictures: tuple[Scenes, torch.Tensor]):
    scenes, images = pictures
    truth = scenes.label if kind == "class" else scenes.style
    model = load_judge(kind)
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())
    assert (model(images).argmax(-1) == truth).float().mean() > (0.8 if kind == "class" else 0.95)


def test_clip_tells_the_styles_apart(pictures: tuple[Scenes, torch.Tensor]):
    scenes, images = pictures
    conditions = [Condition(label, CLASSES[label]) for label in scenes.label.tolist()]
    prompts = [f"a {style} of a {{label}}" for style in STYLES]
    scores = torch.stack([ClipScore(prompt, clip="toy")(images, conditions) for prompt in prompts], 1)
    assert (scores.argmax(1) == scenes.style).float().mean() > 0.9


def test_the_aesthetic_head_follows_beauty(pictures: tuple[Scenes, torch.Tensor]):
    scenes, images = pictures
    scores = Aesthetic("toy", clip="toy")(images, [Condition(None, "")] * len(images))
    assert torch.corrcoef(torch.stack([scores, beauty(scenes)]))[0, 1] > 0.5


def test_the_judges_are_loaded_once(monkeypatch: pytest.MonkeyPatch):
    loaded = []
    judges.shipped_judge.cache_clear()
    monkeypatch.setattr(judges, "load_judge", lambda kind: loaded.append(kind) or load_judge(kind))
    for _ in range(2):
        judge_images(torch.rand(2, 3, 64, 64), [Condition(0, "star")] * 2)
    assert loaded == ["class", "style"]
