"""HPSv2.1: a checkpoint in open_clip's format gives what open_clip's arithmetic gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from pil_processors import padded_by_pil, to_tensor
from small_checkpoints import State, open_clip_cosines
from transformers import AutoTokenizer

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.rewards import HPSv2
from nextscale.rewards.networks.open_clip import load_open_clip

CONDITIONS = [Condition(i, name) for i, name in enumerate(("star", "orange heart", "neon moon"))]


def read(path: Path) -> State:
    return torch.load(path, weights_only=True)["state_dict"]


def test_the_score_is_open_clip_s(hps_file: Path, clip_folder: Path, photographs: list[Image.Image]):
    scores = HPSv2("a very {label}", hps_file, clip_folder)
    tokenizer = AutoTokenizer.from_pretrained(clip_folder)
    tokens = [tokenizer(f"a very {each.text}")["input_ids"] for each in CONDITIONS]
    assert len({len(each) for each in tokens}) > 1  # so some are padded
    for photograph in photographs:
        image = to_tensor(photograph).expand(3, -1, -1, -1)
        expected = open_clip_cosines(read(hps_file), scores.clip.prepare(image), tokens)
        assert expected.std() > 0.01
        torch.testing.assert_close(scores(image, CONDITIONS), expected, rtol=0, atol=1e-5)
        by_pil = open_clip_cosines(
            read(hps_file), padded_by_pil(photograph, 64).expand(3, -1, -1, -1), tokens
        )
        torch.testing.assert_close(expected, by_pil, rtol=1e-2, atol=2e-3)


def test_a_bare_state_dict_and_half_precision_are_read(hps_file: Path, tmp_path: Path):
    state = {key: value.half() for key, value in read(hps_file).items()}
    torch.save(state, tmp_path / "half.pt")
    model = load_open_clip(tmp_path / "half.pt")
    assert {each.dtype for each in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model.visual_projection.weight, state["visual.proj"].T.float())


def test_sizes_are_read_from_the_tensors(hps_file: Path):
    config = load_open_clip(hps_file).config
    vision, text = config.vision_config, config.text_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (160, 2, 2)
    assert (vision.image_size, vision.patch_size, vision.intermediate_size) == (64, 16, 640)
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads) == (128, 2, 2)
    assert (text.max_position_embeddings, config.projection_dim) == (16, 24)


CHANGES: dict[str, tuple[Callable[[State], object], str]] = {
    "lacks a layer's part": (lambda state: state.pop("transformer.resblocks.1.mlp.c_fc.bias"), "fc1.bias"),
    "lacks the scale": (lambda state: state.pop("logit_scale"), "logit_scale"),
    "lacks what tells a size": (lambda state: state.pop("visual.conv1.weight"), "visual.conv1.weight"),
    "more": (lambda state: state.update(head=torch.zeros(1)), "'head', which a CLIP of open_clip"),
    "more in a layer": (
        lambda state: state.update({"transformer.resblocks.0.ls_1.gamma": torch.zeros(1)}),
        "unknown 'text_model.encoder.layers.0.ls_1.gamma'",
    ),
    "another shape": (
        lambda state: state.update({"visual.ln_post.weight": torch.ones(7)}),
        r"'vision_model.post_layernorm.weight' has shape \(7,\), expected \(160,\)",
    ),
    "another width": (
        lambda state: state.update({"visual.conv1.weight": torch.ones(8, 3, 16, 16)}),
        "multiples",
    ),
    "axes": (lambda state: state.update({"text_projection": torch.ones(8)}), "expected 2 axes"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_of_another_kind_is_told(change: str, hps_file: Path, clip_folder: Path, tmp_path: Path):
    apply, told = CHANGES[change]
    state = read(hps_file)
    apply(state)
    torch.save({"state_dict": state}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=told) as caught:
        HPSv2("a {label}", tmp_path / "other.pt", clip_folder)
    assert "other.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tokenizer_of_another_network_is_told(hps_file: Path, bert_folder: Path):
    with pytest.raises(CheckpointError, match="they do not belong together"):
        HPSv2("a {label}", hps_file, bert_folder)
