"""ImageReward: a checkpoint in its authors' format gives what their arithmetic gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pil_processors import to_tensor
from small_checkpoints import State, image_reward_scores
from transformers import AutoTokenizer

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.rewards import ImageReward

CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "orange heart", "very very neon moons"))]


def read(path: Path) -> State:
    return torch.load(path, weights_only=True)


def test_the_score_is_that_of_its_authors(
    image_reward_file: Path, bert_folder: Path, photographs: list[Image.Image]
):
    reward = ImageReward("a {label}", image_reward_file, bert_folder)
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    tokens = [tokenizer(f"a {each.text}")["input_ids"] for each in CONDITIONS]
    assert len({len(each) for each in tokens}) == 3  # so two are padded
    spreads = []
    for photograph in photographs:
        image = to_tensor(photograph).expand(3, -1, -1, -1)
        expected = image_reward_scores(read(image_reward_file), reward.prepare(image), tokens)
        torch.testing.assert_close(reward(image, CONDITIONS), expected, rtol=0, atol=1e-5)
        spreads.append(expected)
    scores = torch.stack(spreads)
    assert scores.std(0).min() > 0.01 and scores.std(1).min() > 0.01  # image and text both matter


def test_a_long_text_is_cut_after_35_tokens(image_reward_file: Path, bert_folder: Path):
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    reward = ImageReward("{label}", image_reward_file, bert_folder)
    scores = [reward(image, [Condition(None, "star " * count)]) for count in (32, 33, 34, 50)]
    assert scores[0] != scores[1]
    assert scores[1] == scores[2] == scores[3]  # 33 words and what begins and ends a text


def test_blip_s_added_tokens_are_known(image_reward_file: Path, bert_folder: Path):
    tokenizer = ImageReward("a {label}", image_reward_file, bert_folder).tokenizer
    size = len(AutoTokenizer.from_pretrained(bert_folder))
    assert tokenizer("[DEC][ENC]")["input_ids"][1:-1] == [size, size + 1]


TEXT = "blip.text_encoder."
CHANGES: dict[str, tuple[Callable[[State], object], str]] = {
    "lacks a layer's part": (
        lambda state: state.pop(f"{TEXT}encoder.layer.1.crossattention.self.key.bias"),
        "holds no 'encoder.layer.1.crossattention.self.key.bias'",
    ),
    "lacks a block's part": (
        lambda state: state.pop("blip.visual_encoder.blocks.0.attn.qkv.bias"),
        "qkv.bias",
    ),
    "lacks a layer of the head": (
        lambda state: state.pop("mlp.layers.4.weight"),
        "lacks 'layers.4.weight'",
    ),
    "more": (
        lambda state: state.update({"blip.itm_head.weight": torch.zeros(2, 2)}),
        "'blip.itm_head.weight'",
    ),
    "more in a block": (
        lambda state: state.update({"blip.visual_encoder.blocks.0.gamma": torch.zeros(2)}),
        "unknown 'encoder.layers.0.gamma'",
    ),
    "more in the head": (
        lambda state: state.update({"mlp.layers.9.weight": torch.zeros(1, 1)}),
        "mlp.layers.9",
    ),
    "two outputs": (
        lambda state: state.update(
            {"mlp.layers.7.weight": torch.zeros(2, 8), "mlp.layers.7.bias": torch.zeros(2)}
        ),
        "the head has 2 outputs",
    ),
    "another chain": (lambda state: state.update({"mlp.layers.2.weight": torch.zeros(16, 9)}), "layer 2"),
    "another shape": (
        lambda state: state.update({f"{TEXT}embeddings.LayerNorm.weight": torch.zeros(5)}),
        r"shape \(5,\), expected \(128,\)",
    ),
    "another width": (
        lambda state: state.update({f"{TEXT}embeddings.word_embeddings.weight": torch.zeros(18, 100)}),
        "multiple of a head's 64",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_kind_is_told(
    change: str, image_reward_file: Path, bert_folder: Path, tmp_path: Path
):
    apply, told = CHANGES[change]
    state = read(image_reward_file)
    apply(state)
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=told) as caught:
        ImageReward("a {label}", tmp_path / "other.pt", bert_folder)
    assert "other.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_another_network_is_told(image_reward_file: Path, clip_folder: Path):
    with pytest.raises(CheckpointError, match="they do not belong together"):
        ImageReward("a {label}", image_reward_file, clip_folder)
