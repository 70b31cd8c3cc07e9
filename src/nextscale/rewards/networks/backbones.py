"""The networks under the rewards, by their sizes alone."""

import json
from pathlib import Path

from transformers import CLIPConfig

from nextscale.models.embedded import CLIPS

_VIT_B = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VIT_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_VIT_H = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
_TEXT_B = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_TEXT_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}

_CLIP_B16 = ({**_VIT_B, "patch_size": 16}, _TEXT_B, 512)
_CLIP_B32 = ({**_VIT_B, "patch_size": 32}, _TEXT_B, 512)
_CLIP_L14 = ({**_VIT_L, "patch_size": 14}, _TEXT_L, 768)
_CLIP_H14 = ({**_VIT_H, "patch_size": 14}, _TEXT_H, 1024)

# Source: the config.json of each repository; of HPSv2, its README (OpenCLIP's ViT-H-14).
KNOWN_CLIPS = {
    "openai/clip-vit-base-patch16": _CLIP_B16,
    "openai/clip-vit-base-patch32": _CLIP_B32,
    "openai/clip-vit-large-patch14": _CLIP_L14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H14,
    "yuvalkirstain/PickScore_v1": _CLIP_H14,
    "xswu/HPSv2": _CLIP_H14,
}
"""Hub repository to the sizes of its image tower (224 px), its text tower and its embedding."""


def backbone_config(name: str) -> CLIPConfig | None:
    """Sizes of a CLIP, given as "toy", a folder or a hub repository; None if they are not known here."""
    if name in KNOWN_CLIPS:
        vision, text, width = KNOWN_CLIPS[name]
        return CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    path = CLIPS.get(name, Path(name)) / "config.json"
    if not path.is_file() or json.loads(path.read_text()).get("model_type") != "clip":
        return None
    return CLIPConfig.from_pretrained(path.parent)
