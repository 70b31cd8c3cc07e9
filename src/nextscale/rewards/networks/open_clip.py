"""CLIPs in the format of open_clip, loaded into a CLIP of transformers: the same tensors under other names.

Source: github.com/mlfoundations/open_clip src/open_clip/model.py and transformer.py
"""

import math
import re
from pathlib import Path

import transformers
from torch import Tensor

from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import count_layers, read_state_dict, shape_of
from nextscale.models.pretrained import build_frozen

VISION_HEAD_WIDTH = 80  # of ViT-H-14; the tensors do not show it
TEXT_HEAD_WIDTH = 64

# In this order; the first that fits is taken.
RENAMES = [
    (r"visual\.class_embedding", "vision_model.embeddings.class_embedding"),
    (r"visual\.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    (r"visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"visual\.ln_pre\.", "vision_model.pre_layrnorm."),  # so spelt by transformers
    (r"visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"visual\.proj", "visual_projection.weight"),
    (r"visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (r"ln_final\.", "text_model.final_layer_norm."),
    (r"text_projection", "text_projection.weight"),
    (r"logit_scale", "logit_scale"),
]
LAYER_RENAMES = {
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
    ".attn.out_proj.": ".self_attn.out_proj.",
}
TRANSPOSED = ("visual.proj", "text_projection")  # open_clip multiplies from the right


def load_open_clip(path: Path) -> "transformers.CLIPModel":
    """A frozen ViT-H-14 or a smaller one of its kind; all sizes but the heads' widths come from the tensors.

    Args:
        path: a state dict, or a checkpoint that holds it under "state_dict".

    Raises:
        CheckpointError: names the first key that is missing, unknown or of the wrong shape.
    """
    state = read_state_dict(path, "state_dict")
    return build_frozen(transformers.CLIPModel, _config(state, path), _renamed(state, path), path)


def _config(state: dict[str, Tensor], path: Path) -> "transformers.CLIPConfig":
    vision_width, _, patch_size, _ = shape_of(state, path, "CLIP", "visual.conv1.weight", 4)
    num_positions, _ = shape_of(state, path, "CLIP", "visual.positional_embedding", 2)
    vocab_size, text_width = shape_of(state, path, "CLIP", "token_embedding.weight", 2)
    max_text_length, _ = shape_of(state, path, "CLIP", "positional_embedding", 2)
    if vision_width % VISION_HEAD_WIDTH or text_width % TEXT_HEAD_WIDTH:
        raise CheckpointError(
            f"'{path}' has widths {vision_width} and {text_width}, expected multiples of the heads' "
            f"{VISION_HEAD_WIDTH} and {TEXT_HEAD_WIDTH}, as in ViT-H-14"
        )
    return transformers.CLIPConfig(
        vision_config=dict(
            hidden_size=vision_width,
            intermediate_size=shape_of(
                state, path, "CLIP", "visual.transformer.resblocks.0.mlp.c_fc.weight", 2
            )[0],
            num_hidden_layers=count_layers(state, "visual.transformer.resblocks."),
            num_attention_heads=vision_width // VISION_HEAD_WIDTH,
            image_size=math.isqrt(num_positions - 1) * patch_size,
            patch_size=patch_size,
            hidden_act="gelu",  # quick_gelu is OpenAI's own models'
        ),
        text_config=dict(
            hidden_size=text_width,
            intermediate_size=shape_of(state, path, "CLIP", "transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
            num_hidden_layers=count_layers(state, "transformer.resblocks."),
            num_attention_heads=text_width // TEXT_HEAD_WIDTH,
            vocab_size=vocab_size,
            max_position_embeddings=max_text_length,
            hidden_act="gelu",
            # open_clip takes the features of the token with the highest id, which is the end of the text
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
            pad_token_id=0,
        ),
        projection_dim=shape_of(state, path, "CLIP", "text_projection", 2)[1],
    )


def _renamed(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        pattern, start = next((each for each in RENAMES if re.match(each[0], key)), (None, ""))
        if pattern is None:
            raise CheckpointError(f"'{path}' holds '{key}', which a CLIP of open_clip does not have")
        name = re.sub(f"^{pattern}", start, key)
        for old, new in LAYER_RENAMES.items():
            name = name.replace(old, new)
        if ".attn.in_proj_" in name:
            layer, _, kind = name.partition(".attn.in_proj_")
            for part, each in zip("qkv", value.chunk(3), strict=True):
                result[f"{layer}.self_attn.{part}_proj.{kind}"] = each
        else:
            result[name] = value.T if key in TRANSPOSED else value
    return result
