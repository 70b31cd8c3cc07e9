"""BLIP in its authors' format, loaded into networks of transformers: the same tensors under other names.

Source: github.com/salesforce/BLIP models/vit.py, models/med.py and configs/med_config.json
"""

import math
import re
from pathlib import Path

import transformers
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import count_layers, shape_of
from nextscale.models.pretrained import build_frozen

HEAD_WIDTH = 64  # of both networks, in BLIP's base and large size; the tensors do not show it

# The text encoder's names are those of transformers.
VISION_RENAMES = [
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"\.attn\.qkv\.", ".self_attn.qkv."),
    (r"\.attn\.proj\.", ".self_attn.projection."),
]


def build_vision_encoder(state: dict[str, Tensor], path: Path) -> "transformers.BlipVisionModel":
    """Frozen image encoder; all sizes but the heads' width are read from the tensors.

    Args:
        state: the tensors under `visual_encoder.` in the file.

    Raises:
        CheckpointError: names the first key that is missing, unknown or of the wrong shape.
    """
    width, _, patch_size, _ = shape_of(state, path, "BLIP", "patch_embed.proj.weight", 4)
    _, num_positions, _ = shape_of(state, path, "BLIP", "pos_embed", 3)
    config = transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=shape_of(state, path, "BLIP", "blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=count_layers(state, "blocks."),
        num_attention_heads=_num_heads(width, path),
        image_size=math.isqrt(num_positions - 1) * patch_size,
        patch_size=patch_size,
        layer_norm_eps=1e-6,
    )
    return build_frozen(
        transformers.BlipVisionModel, config, {_rename(key): each for key, each in state.items()}, path
    )


def build_text_encoder(state: dict[str, Tensor], path: Path) -> "transformers.BlipTextModel":
    """Frozen text encoder that attends to an image; all sizes but the heads' width are read from the tensors.

    Args:
        state: the tensors under `text_encoder.` in the file.

    Raises:
        CheckpointError: names the first key that is missing, unknown or of the wrong shape.
    """
    vocab_size, width = shape_of(state, path, "BLIP", "embeddings.word_embeddings.weight", 2)
    first = "encoder.layer.0."
    config = transformers.BlipTextConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        encoder_hidden_size=shape_of(state, path, "BLIP", f"{first}crossattention.self.key.weight", 2)[1],
        intermediate_size=shape_of(state, path, "BLIP", f"{first}intermediate.dense.weight", 2)[0],
        num_hidden_layers=count_layers(state, "encoder.layer."),
        num_attention_heads=_num_heads(width, path),
        max_position_embeddings=shape_of(state, path, "BLIP", "embeddings.position_embeddings.weight", 2)[0],
        is_decoder=True,  # what gives the layers attention to an image; without a causal mask, see forward
    )
    tensors = {key: each for key, each in state.items() if key != "embeddings.position_ids"}  # 0, 1, 2, ...
    return build_frozen(transformers.BlipTextModel, config, tensors, path, add_pooling_layer=False)


def _rename(key: str) -> str:
    for pattern, replacement in VISION_RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _num_heads(width: int, path: Path) -> int:
    if width % HEAD_WIDTH:
        raise CheckpointError(
            f"'{path}' has a width of {width}, expected a multiple of a head's {HEAD_WIDTH}"
        )
    return width // HEAD_WIDTH
