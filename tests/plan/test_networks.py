"""The networks beside the model, against published sizes and against real modules."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPModel,
    CLIPTextModelWithProjection,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    YolosConfig,
    YolosForObjectDetection,
)

from nextscale.base.errors import CheckpointError
from nextscale.config import rehearsal
from nextscale.config.recipe import load_recipe
from nextscale.grpo import GRPOConfig
from nextscale.models.switti import SwittiConfig
from nextscale.models.texts import CLIP_L, SWITTI_ENCODERS, Projected, TokensAndPooled
from nextscale.models.vqvae import VQVAEConfig
from nextscale.models.zoo import TOY_ASSETS
from nextscale.plan.counting import count, without_data
from nextscale.plan.networks import find_network, text_networks
from nextscale.plan.planning import describe, make_plan
from nextscale.policy import SamplingConfig
from nextscale.rewards.geneval import DEFAULT_DETECTOR
from nextscale.rewards.networks.backbones import backbone_config
from nextscale.rewards.ocr import DEFAULT_READER, MOST_TOKENS
from nextscale.runs.config import RunConfig


def size_of(network: torch.nn.Module) -> int:
    return sum(each.numel() for each in network.parameters())


def on_meta(build) -> torch.nn.Module:
    with torch.device("meta"):
        return build()


def flops_of(network, num_images=1, image_size=64) -> float:
    with without_data(), torch.no_grad():
        return count(network.run(num_images, image_size)).flops


# Source: the papers' tables, in millions: Mask2Former (arXiv 2112.01527, table 1, Swin-S), TrOCR (2109.10282,
# table 2, base).
@pytest.mark.parametrize(("name", "millions"), [(DEFAULT_DETECTOR, 69), (DEFAULT_READER, 334)])
def test_the_networks_of_text_rewards(name, millions):
    network = find_network(name)
    assert network is not None
    assert size_of(on_meta(network.build)) / 1e6 == pytest.approx(millions, abs=0.5)
    assert find_network("somebody/some-network") is None


def test_the_text_encoders_of_published_models():
    """Of the bigger one OpenCLIP publishes 694.66 million with the projection, which Switti leaves out."""
    towers = text_networks(TokensAndPooled(SWITTI_ENCODERS))
    assert [*towers] == [*SWITTI_ENCODERS]
    clip = on_meta(lambda: CLIPModel(backbone_config(CLIP_L)))
    assert size_of(on_meta(towers[CLIP_L])) == size_of(clip.text_model)
    big = size_of(on_meta(towers[SWITTI_ENCODERS[1]]))
    assert (big + 1280**2) / 1e6 == pytest.approx(694.66, abs=0.005)
    projected = on_meta(text_networks(Projected(CLIP_L, "gelu"))[CLIP_L])
    assert isinstance(projected, CLIPTextModelWithProjection)
    assert size_of(projected) == size_of(clip.text_model) + size_of(clip.text_projection)
    assert text_networks(None) == {} and text_networks(TokensAndPooled(["no/such"])) == {"no/such": None}


def trocr(folder: Path) -> Path:
    width = 16
    vit = ViTConfig(
        hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32,
        patch_size=8,
    )  # fmt: skip
    decoder = TrOCRConfig(
        d_model=width, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, vocab_size=50,
        cross_attention_hidden_size=width,
    )  # fmt: skip
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(vit, decoder)
    VisionEncoderDecoderModel(config).save_pretrained(folder)
    return folder


def yolos(folder: Path) -> Path:
    config = YolosConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=[32, 32],
        num_detection_tokens=4, num_labels=2,
    )  # fmt: skip
    YolosForObjectDetection(config).save_pretrained(folder)
    settings = {"size": {"shortest_edge": 32, "longest_edge": 64}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def test_a_detector_and_a_reader_in_a_folder(tmp_path):
    detector, reader = (
        find_network(str(yolos(tmp_path / "yolos"))),
        find_network(str(trocr(tmp_path / "ocr"))),
    )
    assert detector is not None and reader is not None
    found = size_of(on_meta(detector.build))
    assert found == size_of(YolosForObjectDetection.from_pretrained(tmp_path / "yolos"))
    found = size_of(on_meta(reader.build))
    assert found == size_of(VisionEncoderDecoderModel.from_pretrained(tmp_path / "ocr"))
    # By hand, of the reader: (l, C) by (C, n) is 2 l C n.
    C, patches, tokens = 16, 16, 17  # with the class token
    block = 2 * tokens * (4 * C * C + 2 * C * 32) + 4 * tokens**2 * C
    encoder = 2 * patches * 3 * 8 * 8 * C + 2 * block
    own = 2 * MOST_TOKENS * (4 * C * C + 2 * C * 32) + 4 * MOST_TOKENS**2 * C
    crossed = 2 * MOST_TOKENS * 2 * C * C + 2 * tokens * 2 * C * C + 4 * MOST_TOKENS * tokens * C
    by_hand = encoder + own + crossed + 2 * MOST_TOKENS * C * 50
    assert flops_of(reader) == pytest.approx(by_hand, rel=0.01)
    assert flops_of(reader, 3) == 3 * flops_of(reader)
    assert flops_of(detector, 2) == 2 * flops_of(detector) > 0


def test_a_folder_whose_configuration_is_damaged_is_told(tmp_path):
    for content in ('{"model_type": "cl', "[]"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json' is no configuration of transformers"):
            find_network(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": 3}')
    assert find_network(str(tmp_path)) is None


SWITTI = SwittiConfig(
    depth=2, width=32, num_heads=2, ffn_width=64, context_width=32, pooled_width=32, codebook_size=96,
    codebook_width=8, scale_sizes=(1, 2, 4), text_encoders=("toy-text", "no/such"),
)  # fmt: skip
VQVAE = VQVAEConfig(
    base_channels=32, channel_multipliers=(1, 1), codebook_size=96, codebook_width=8, scale_sizes=(1, 2, 4)
)


def test_a_plan_counts_the_text_encoder_and_both_networks_of_geneval(tmp_path, monkeypatch):
    detector = str(yolos(tmp_path / "yolos"))
    grpo = GRPOConfig(num_groups=2, num_generations=2)

    backbones, guided = {"a": detector, "a, toy": "toy"}, SamplingConfig(guidance_scale=1.5)
    one = make_plan(SWITTI, VQVAE, backbones, grpo, guided, RunConfig(), "h100-80gb")
    tower = TokensAndPooled(["toy-text"]).load(str(TOY_ASSETS / "clip_text"))
    num = size_of(tower)
    assert one.parameters["text of toy-text"] == num and "text of toy-text 113152" in describe(one)
    # On a GPU only while prompts are encoded, which is before there are gradients; the widest of what is made
    # there are the hidden states of the feed-forward layers.
    config = tower.config
    assert one.resident["text encoder"] == 0
    at_work = one.phases["texts"] - 4 * num
    assert at_work >= 4 * config.max_position_embeddings * config.intermediate_size
    assert at_work < 40 * config.max_position_embeddings * config.intermediate_size + 8 * 77
    assert one.needed("texts") == one.phases["texts"] - one.resident["gradients"]
    real = size_of(YolosForObjectDetection.from_pretrained(detector))
    assert one.parameters[detector] == real and one.unknown == ("text of no/such",)
    each_image = [flops_of(find_network(name), image_size=8) for name in (detector, "toy")]
    assert one.flops["reward"] == pytest.approx(4 * sum(each_image), rel=0.001)
    assert one.resident["rewards"] >= 4 * (real + one.parameters["toy"])
    seen = {}
    monkeypatch.setattr(rehearsal, "make_plan", lambda *words: seen.update(trained=words[2]))
    rehearsal.plan_recipe(load_recipe("switti-512-geneval"), "h100-80gb")
    assert seen["trained"] == {"geneval": DEFAULT_DETECTOR, f"geneval, {CLIP_L}": CLIP_L}
