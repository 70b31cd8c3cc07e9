"""Compute what the neural rewards cost: parameters and floating-point operations, without weights.

    python benchmarks/reward_cost.py

The networks are built at their published sizes on the meta device, and run on one image and a prompt of ten
tokens. A multiply-add counts as two operations; only matrix products, convolutions and attention are counted.
CLIP's text tower runs once per distinct prompt, and the result is cached.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.blip.modeling_blip_text import BlipTextModel

NUM_TOKENS = 10


def clip(vision: dict[str, int], text: dict[str, int], projection_dim: int) -> CLIPModel:
    def tower(width: int, depth: int, head_width: int, **more: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
        return sizes | {"num_attention_heads": width // head_width} | more

    return CLIPModel(
        CLIPConfig(vision_config=tower(**vision), text_config=tower(**text), projection_dim=projection_dim)
    )


def vit(width: int, depth: int, patch_size: int, head_width: int = 64) -> dict[str, int]:
    return {"width": width, "depth": depth, "head_width": head_width, "patch_size": patch_size}


def words(width: int, depth: int) -> dict[str, int]:
    return {"width": width, "depth": depth, "head_width": 64}


CLIPS: dict[str, Callable[[], CLIPModel]] = {
    "CLIP ViT-B/32": lambda: clip(vit(768, 12, 32), words(512, 12), 512),
    "CLIP ViT-B/16": lambda: clip(vit(768, 12, 16), words(512, 12), 512),
    "CLIP ViT-L/14": lambda: clip(vit(1024, 24, 14), words(768, 12), 768),
    "CLIP ViT-H/14 (PickScore, HPSv2.1)": lambda: clip(vit(1280, 32, 14, 80), words(1024, 24), 1024),
}


def count(network: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> float:
    """GFLOP of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*args, **kwargs)
    return counter.get_total_flops() / 1e9


def num_parameters(*networks: nn.Module) -> float:
    """Number of parameters in millions."""
    return sum(each.numel() for network in networks for each in network.parameters()) / 1e6


def main() -> None:
    print("| network | parameters, M | image, GFLOP | text, GFLOP |\n| --- | --- | --- | --- |")
    with torch.device("meta"):
        image, tokens = torch.zeros(1, 3, 224, 224), torch.zeros(1, NUM_TOKENS, dtype=torch.long)
        for name, make in CLIPS.items():
            model = make()
            seen, read = count(model.vision_model, image), count(model.text_model, tokens)
            print(f"| {name} | {num_parameters(model):.0f} | {seen:.1f} | {read:.2f}, once |")
        eye = BlipVisionModel(
            BlipVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=224,
            )
        )
        reader = BlipTextModel(
            BlipTextConfig(encoder_hidden_size=1024, num_attention_heads=12), add_pooling_layer=False
        )
        patches = torch.zeros(1, 197, 1024)
        seen = count(eye, image)
        read = count(reader, tokens, encoder_hidden_states=patches)
        size = num_parameters(eye, reader)
        print(f"| BLIP-L (ImageReward) | {size:.0f} | {seen:.1f} | {read:.1f}, every image |")
        classifier = ViTForImageClassification(ViTConfig(num_labels=1000))
        seen = count(classifier, image)
        print(f"| ViT-B/16 classifier | {num_parameters(classifier):.0f} | {seen:.1f} | none |")


if __name__ == "__main__":
    main()
