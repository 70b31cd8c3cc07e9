"""Pictures as the aim: the slope is that of the MMD by its own formula, and whose pictures count."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import ConfigError
from nextscale.base.images import read_image, to_pil
from nextscale.config.recipe import load_recipe
from nextscale.grpo import GRPOConfig
from nextscale.pipeline import VARPipeline
from nextscale.rewards import Pictures
from nextscale.rewards.kinds import read_reward
from nextscale.runs.config import RunConfig
from nextscale.trainer import GRPOTrainer

STAR, HEART = Condition(0, "Star"), Condition(1, "golden heart")


def random_images(num: int, seed: int, size: int = 64) -> Tensor:
    return torch.rand(num, 3, size, size, generator=torch.Generator().manual_seed(seed))


def write(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(to_pil(images)):
        image.save(folder / f"{i}.png")
    return folder


def squared_mmd(x_GE: Tensor, y_PE: Tensor, bandwidth: float) -> Tensor:
    """Unbiased in x, up to what does not depend on x: pair by pair."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(-(a - b).square().sum() / (2 * bandwidth**2))

    num = len(x_GE)
    own = sum(kernel(x_GE[i], x_GE[j]) for i in range(num) for j in range(num) if i != j) / (num * (num - 1))
    across = sum(kernel(x, y) for x in x_GE for y in y_PE) / (num * len(y_PE))
    return torch.as_tensor(own - 2 * across)


def test_scores_and_slope_are_those_of_the_mmd(clip_folder: Path, tmp_path: Path) -> None:
    reward = Pictures(write(tmp_path / "aim", random_images(5, 1)), clip_folder, bandwidth=0.7)
    images, conditions = random_images(4, 2), [STAR] * 4
    pictures_PE = torch.cat(
        [reward.clip.embed_images(read_image(tmp_path / "aim" / f"{i}.png")[None]) for i in range(5)]
    ).detach()
    features = reward.features(images, conditions).detach()
    x_GE = features[:, :-1].clone().requires_grad_()
    (expected_GE,) = torch.autograd.grad(-len(x_GE) / 2 * squared_mmd(x_GE, pictures_PE, 0.7), x_GE)

    # Each image's score, as a function of its own embedding alone.
    for i in range(4):
        own_E = x_GE[i].detach().clone().requires_grad_()
        near = torch.exp(-(pictures_PE - own_E).square().sum(1) / (2 * 0.7**2)).mean()
        rows = [torch.cat([own_E, near[None]]) if j == i else features[j] for j in range(4)]
        score = reward.scores_of_groups(torch.stack(rows)[None])[0, i]
        (found_E,) = torch.autograd.grad(score, own_E)
        # Of vectors of length 1 only the part across them counts: ours takes the distance from the cosine.
        across = torch.eye(len(own_E)) - torch.outer(own_E, own_E).detach()
        torch.testing.assert_close(across @ found_E, across @ expected_GE[i], rtol=1e-3, atol=1e-6)
    scores_G = reward(images, conditions)
    others = (scores_G.mean() - features[:, -1].mean()).item()  # minus what the images have with one another
    assert squared_mmd(x_GE, pictures_PE, 0.7).item() == pytest.approx(
        -others - 2 * features[:, -1].mean().item(), abs=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):  # the kernel is not rounded
        rounded = reward.scores_of_groups(features[None])
    torch.testing.assert_close(rounded[0], scores_G, rtol=0, atol=1e-6)


def test_a_picture_itself_is_nearest_and_copies_are_worst(clip_folder: Path, tmp_path: Path) -> None:
    pictures = random_images(3, 1)
    reward = Pictures(write(tmp_path, pictures), clip_folder, bandwidth=0.05)
    strange = torch.zeros(3, 3, 64, 64)
    near = reward.features(torch.cat([pictures, strange[:1]]), [STAR] * 4)[:, -1]
    assert near[:3].min() > near[3]
    assert reward(pictures, [STAR] * 3).mean() > reward(pictures[:1].expand(3, -1, -1, -1), [STAR] * 3).mean()


def test_each_condition_has_its_own_folder_or_all_have_one(clip_folder: Path, tmp_path: Path) -> None:
    write(tmp_path / "own" / "star" / "more", random_images(2, 1))
    write(tmp_path / "own" / "Golden Heart", random_images(3, 2, size=40))
    reward = Pictures(tmp_path / "own", clip_folder)
    assert [len(reward.pictures_of(each)) for each in (STAR, HEART)] == [2, 3]
    with pytest.raises(ConfigError, match="none with pictures for 'moon': add one, or keep all"):
        reward(random_images(2, 0), [Condition(2, "moon")] * 2)
    reward.check_conditions([STAR, HEART])
    with pytest.raises(ConfigError, match="none with pictures for 'moon': add one, or keep all"):
        reward.check_conditions([STAR, HEART, Condition(2, "moon")])
    assert len(Pictures(write(tmp_path / "all", random_images(2, 1)), clip_folder).pictures_of(HEART)) == 2
    write(tmp_path / "own", random_images(1, 3))
    with pytest.raises(ConfigError, match="both in sub-folders and beside them"):
        Pictures(tmp_path / "own", clip_folder)
    (tmp_path / "none").mkdir()
    for empty in ("none", "nowhere"):
        with pytest.raises(ConfigError, match=rf"'.*{empty}' has no pictures \(PNG, JPEG or WebP\)"):
            Pictures(tmp_path / empty, clip_folder)
    (tmp_path / "all" / "broken.png").write_text("no")
    with pytest.raises(ConfigError, match=r"broken\.png' is no readable image"):
        Pictures(tmp_path / "all", clip_folder).pictures_of(STAR)


def test_the_folder_beside_a_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "aim").mkdir()
    (tmp_path / "mine.yaml").write_text(
        "model: toy\nrewards: {near: {pictures: aim}, far: {pictures: else}}\n"
    )
    rewards = load_recipe(tmp_path / "mine.yaml").rewards
    assert [each.options()["folder"] for each in rewards.values()] == [str(tmp_path / "aim"), "else"]


def test_a_recipe_trains_on_pictures(
    make_pipeline: Callable[..., VARPipeline], clip_folder: Path, tmp_path: Path
) -> None:
    write(tmp_path / "aim", random_images(3, 1))
    Image.new("L", (9, 17), 128).save(tmp_path / "aim" / "grey.webp")
    config = read_reward({"pictures": str(tmp_path / "aim"), "clip": str(clip_folder), "bandwidth": 0.5})
    for width in (0, float("inf")):
        with pytest.raises(ConfigError, match="bandwidth"):
            read_reward({"pictures": "aim", "bandwidth": width})
    reward = config.make()
    assert isinstance(reward, Pictures) and reward.bandwidth == 0.5 and config.backbone == str(clip_folder)
    run = RunConfig(output_dir=str(tmp_path / "run"), max_steps=1, eval_steps=0)
    grpo = GRPOConfig(num_groups=2, num_generations=4, credit="contribution")
    metrics = GRPOTrainer(make_pipeline(), {"aim": reward}, grpo, run=run).step(1)
    assert metrics["rewards/aim/std"] > 0 and metrics["grad_norm"] > 0
