"""The networks under the rewards, by their sizes alone."""

import json
from pathlib import Path

import transformers

from nextscale.base.errors import CheckpointError
from nextscale.base.files import read_text
from nextscale.models.embedded import CLIPS


def _tower(width: int, depth: int, num_heads: int, hidden: int | None = None) -> dict[str, int]:
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": num_heads}
    return {**sizes, "intermediate_size": hidden or 4 * width}


_TEXT_B, _TEXT_L, _TEXT_H = _tower(512, 12, 8), _tower(768, 12, 12), _tower(1024, 24, 16)
_CLIP_B16 = ({**_tower(768, 12, 12), "patch_size": 16}, _TEXT_B, 512)
_CLIP_B32 = ({**_tower(768, 12, 12), "patch_size": 32}, _TEXT_B, 512)
_CLIP_L14 = ({**_tower(1024, 24, 16), "patch_size": 14}, _TEXT_L, 768)
_CLIP_H14 = ({**_tower(1280, 32, 16), "patch_size": 14}, _TEXT_H, 1024)
_CLIP_BIGG = ({**_tower(1664, 48, 16, 8192), "patch_size": 14}, _tower(1280, 32, 20), 1280)

# Source: the config.json of each repository; of HPSv2, its README (OpenCLIP's ViT-H-14).
KNOWN_CLIPS = {
    "openai/clip-vit-base-patch16": _CLIP_B16,
    "openai/clip-vit-base-patch32": _CLIP_B32,
    "openai/clip-vit-large-patch14": _CLIP_L14,
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": _CLIP_H14,
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": _CLIP_BIGG,
    "yuvalkirstain/PickScore_v1": _CLIP_H14,
    "xswu/HPSv2": _CLIP_H14,
}
"""Hub repository to the sizes of its image tower (224 px), its text tower and its embedding."""


def backbone_config(name: str) -> "transformers.CLIPConfig | None":
    """Sizes of a CLIP, given as "toy", a folder or a hub repository; None if they are not known here."""
    if name in KNOWN_CLIPS:
        vision, text, width = KNOWN_CLIPS[name]
        return transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=width)
    folder = CLIPS.get(name, Path(name))
    return transformers.CLIPConfig.from_pretrained(folder) if model_type(folder) == "clip" else None


def model_type(folder: Path) -> str | None:
    """What transformers calls the model in a folder; None where there is none.

    Raises:
        CheckpointError: its config.json is damaged.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        kind = json.loads(read_text(path)).get("model_type")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"'{path}' is no configuration of transformers: is it whole?") from None
    return kind if isinstance(kind, str) else None
