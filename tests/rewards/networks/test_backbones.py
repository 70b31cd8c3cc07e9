"""The sizes of known CLIPs, against the figures that OpenCLIP publishes for the same architectures."""

import pytest
import torch
from transformers import CLIPModel

from nextscale.models.embedded import CLIPS
from nextscale.plan.counting import count, without_data
from nextscale.rewards.networks.backbones import KNOWN_CLIPS, backbone_config
from nextscale.rewards.networks.clip import load_clip

# Source: github.com/mlfoundations/open_clip, docs/model_profile.csv: parameters in millions, GFLOP an image.
PUBLISHED = {
    "openai/clip-vit-base-patch32": (151.28, 8.82),
    "openai/clip-vit-base-patch16": (149.62, 35.13),
    "openai/clip-vit-large-patch14": (427.62, 162.03),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": (986.11, 334.59),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_clips(name):
    config = backbone_config(name)
    with torch.device("meta"):
        model = CLIPModel(config)
    with without_data(), torch.no_grad():
        tower, pixels = CLIPModel(config).vision_model, torch.zeros(1, 3, 224, 224)
        flops = count(lambda: tower(pixel_values=pixels)).flops
    parameters, gflop = PUBLISHED[name]
    assert sum(each.numel() for each in model.parameters()) / 1e6 == pytest.approx(parameters, abs=0.01)
    assert flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_what_is_known_and_what_is_not(tmp_path):
    assert set(PUBLISHED) <= set(KNOWN_CLIPS)
    assert backbone_config("somebody/some-clip") is None
    assert backbone_config(str(tmp_path)) is None


@pytest.mark.skipif(not CLIPS["toy"].is_dir(), reason=f"no CLIP of the miniature world in {CLIPS['toy']}")
def test_the_embedded_clip_tells_its_sizes():
    config = backbone_config("toy")
    with torch.device("meta"):
        model = CLIPModel(config)
    real = load_clip("toy").model
    assert {name: each.shape for name, each in model.named_parameters()} == {
        name: each.shape for name, each in real.named_parameters()
    }
