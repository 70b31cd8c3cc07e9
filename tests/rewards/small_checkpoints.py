"""Small random checkpoints of preference models in their authors' formats, and what they compute.

The computations are written down from the authors' descriptions, on the authors' names and layouts, with
torch's functions alone: they know nothing of transformers or of the package.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

PATCH = 16
IMAGE_SIZE = 64
NUM_PATCHES = (IMAGE_SIZE // PATCH) ** 2


def random_state(shapes: dict[str, tuple[int, ...]], seed: int) -> State:
    """Tensors with which outputs vary visibly from image to image and text to text."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_norm = any(part in key for part in ("ln_", "norm", "LayerNorm"))
        if is_norm and key.endswith("weight"):
            value = 1 + 0.1 * value
        elif key.endswith("bias"):
            value = 0.1 * value
        elif len(shape) > 1 and "embed" not in key:
            fan_in = shape[0] if key in ("visual.proj", "text_projection") else value[0].numel()
            value = value / fan_in**0.5
        state[key] = value
    return state


def norm(x: Tensor, state: State, prefix: str, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{prefix}.weight"], state[f"{prefix}.bias"], eps)


def linear(x: Tensor, state: State, prefix: str) -> Tensor:
    return x @ state[f"{prefix}.weight"].T + state[f"{prefix}.bias"]


def attend(query: Tensor, key: Tensor, value: Tensor, head_width: int, mask: Tensor | None = None) -> Tensor:
    """Attention of each head in turn; `mask` is added to its scores."""
    heads = []
    for q, k, v in zip(*(x.split(head_width, -1) for x in (query, key, value)), strict=True):
        scores = q @ k.transpose(-1, -2) / head_width**0.5
        heads.append((scores if mask is None else scores + mask).softmax(-1) @ v)
    return torch.cat(heads, -1)


def patches(images: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.conv2d(images, weight, bias, stride=PATCH).flatten(2).transpose(1, 2)


# open_clip

VISION_WIDTH, TEXT_WIDTH, MAX_TEXT, EMBEDDING = 160, 128, 16, 24  # two heads each


def open_clip_state(vocab_size: int) -> State:
    """As `CLIP.state_dict()` of open_clip has it."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (MAX_TEXT, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, EMBEDDING),
        "visual.class_embedding": (VISION_WIDTH,),
        "visual.positional_embedding": (NUM_PATCHES + 1, VISION_WIDTH),
        "visual.proj": (VISION_WIDTH, EMBEDDING),
        "visual.conv1.weight": (VISION_WIDTH, 3, PATCH, PATCH),
        "token_embedding.weight": (vocab_size, TEXT_WIDTH),
    }
    for prefix, width in (
        ("visual.ln_pre", VISION_WIDTH),
        ("visual.ln_post", VISION_WIDTH),
        ("ln_final", TEXT_WIDTH),
    ):
        shapes |= {f"{prefix}.weight": (width,), f"{prefix}.bias": (width,)}
    for tower, width in (("visual.transformer", VISION_WIDTH), ("transformer", TEXT_WIDTH)):
        for i in range(2):
            layer = f"{tower}.resblocks.{i}"
            for name in ("ln_1", "ln_2"):
                shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
            shapes |= {
                f"{layer}.attn.in_proj_weight": (3 * width, width),
                f"{layer}.attn.in_proj_bias": (3 * width,),
                f"{layer}.attn.out_proj.weight": (width, width),
                f"{layer}.attn.out_proj.bias": (width,),
                f"{layer}.mlp.c_fc.weight": (4 * width, width),
                f"{layer}.mlp.c_fc.bias": (4 * width,),
                f"{layer}.mlp.c_proj.weight": (width, 4 * width),
                f"{layer}.mlp.c_proj.bias": (width,),
            }
    return {"logit_scale": torch.tensor(4.6)} | random_state(shapes, 3)


def _open_clip_tower(x: Tensor, state: State, prefix: str, head_width: int, mask: Tensor | None) -> Tensor:
    for i in range(2):
        layer = f"{prefix}.resblocks.{i}"
        packed = norm(x, state, f"{layer}.ln_1", 1e-5) @ state[f"{layer}.attn.in_proj_weight"].T
        query, key, value = (packed + state[f"{layer}.attn.in_proj_bias"]).chunk(3, -1)
        x = x + linear(attend(query, key, value, head_width, mask), state, f"{layer}.attn.out_proj")
        hidden = F.gelu(linear(norm(x, state, f"{layer}.ln_2", 1e-5), state, f"{layer}.mlp.c_fc"))
        x = x + linear(hidden, state, f"{layer}.mlp.c_proj")
    return x


def open_clip_cosines(state: State, images: Tensor, tokens: list[list[int]]) -> Tensor:
    """(B,) of preprocessed images and their texts, which are padded with 0."""
    x = patches(images, state["visual.conv1.weight"])
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = norm(x + state["visual.positional_embedding"], state, "visual.ln_pre", 1e-5)
    x = _open_clip_tower(x, state, "visual.transformer", 80, None)
    image_features = norm(x[:, 0], state, "visual.ln_post", 1e-5) @ state["visual.proj"]
    padded = torch.tensor([each + [0] * (MAX_TEXT - len(each)) for each in tokens])
    x = state["token_embedding.weight"][padded] + state["positional_embedding"]
    causal = torch.full((MAX_TEXT, MAX_TEXT), float("-inf")).triu(1)
    x = norm(_open_clip_tower(x, state, "transformer", 64, causal), state, "ln_final", 1e-5)
    text_features = x[torch.arange(len(x)), padded.argmax(-1)] @ state["text_projection"]
    return F.cosine_similarity(image_features, text_features)


# ImageReward

WIDTH = 128  # of BLIP's text encoder; its image encoder's is twice as much
HEAD_WIDTHS = (WIDTH, 20, 16, 12, 8, 1)
HEAD_LAYERS = (0, 2, 4, 6, 7)


def image_reward_state(vocab_size: int) -> State:
    """As `ImageReward.pt` has it."""
    vision, text = "blip.visual_encoder", "blip.text_encoder"
    wide = 2 * WIDTH
    matrices = {
        f"{vision}.patch_embed.proj": (wide, 3, PATCH, PATCH),
        "blip.vision_proj": (8, wide),
        "blip.text_proj": (8, WIDTH),
    }
    norms = {f"{vision}.norm": wide, f"{text}.embeddings.LayerNorm": WIDTH}
    for i in range(2):
        block, layer = f"{vision}.blocks.{i}", f"{text}.encoder.layer.{i}"
        norms |= {f"{block}.norm1": wide, f"{block}.norm2": wide}
        matrices |= {
            f"{block}.attn.qkv": (3 * wide, wide),
            f"{block}.attn.proj": (wide, wide),
            f"{block}.mlp.fc1": (4 * wide, wide),
            f"{block}.mlp.fc2": (wide, 4 * wide),
            f"{layer}.intermediate.dense": (4 * WIDTH, WIDTH),
            f"{layer}.output.dense": (WIDTH, 4 * WIDTH),
        }
        norms[f"{layer}.output.LayerNorm"] = WIDTH
        for kind, source in (("attention", WIDTH), ("crossattention", wide)):
            norms[f"{layer}.{kind}.output.LayerNorm"] = WIDTH
            matrices |= {
                f"{layer}.{kind}.self.query": (WIDTH, WIDTH),
                f"{layer}.{kind}.self.key": (WIDTH, source),
                f"{layer}.{kind}.self.value": (WIDTH, source),
                f"{layer}.{kind}.output.dense": (WIDTH, WIDTH),
            }
    for i, inner, outer in zip(HEAD_LAYERS, HEAD_WIDTHS, HEAD_WIDTHS[1:], strict=False):
        matrices[f"mlp.layers.{i}"] = (outer, inner)
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}.cls_token": (1, 1, wide),
        f"{vision}.pos_embed": (1, NUM_PATCHES + 1, wide),
        f"{text}.embeddings.word_embeddings.weight": (vocab_size, WIDTH),
        f"{text}.embeddings.position_embeddings.weight": (40, WIDTH),
    }
    for key, shape in matrices.items():
        shapes |= {f"{key}.weight": shape, f"{key}.bias": (shape[0],)}
    for key, width in norms.items():
        shapes |= {f"{key}.weight": (width,), f"{key}.bias": (width,)}
    state = random_state(shapes, 4)
    state[f"{text}.embeddings.position_ids"] = torch.arange(40)[None]
    return state


def image_reward_scores(state: State, images: Tensor, tokens: list[list[int]]) -> Tensor:
    """(B,) of preprocessed images and their texts, one text at a time and so unpadded."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    x = patches(images, state[f"{vision}patch_embed.proj.weight"], state[f"{vision}patch_embed.proj.bias"])
    x = torch.cat([state[f"{vision}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{vision}pos_embed"]
    for i in range(2):
        block = f"{vision}blocks.{i}"
        query, key, value = linear(norm(x, state, f"{block}.norm1", 1e-6), state, f"{block}.attn.qkv").chunk(
            3, -1
        )
        x = x + linear(attend(query, key, value, 64), state, f"{block}.attn.proj")
        hidden = F.gelu(linear(norm(x, state, f"{block}.norm2", 1e-6), state, f"{block}.mlp.fc1"))
        x = x + linear(hidden, state, f"{block}.mlp.fc2")
    x = norm(x, state, f"{vision}norm", 1e-6)
    features = torch.cat([_read(state, text, ids, image) for ids, image in zip(tokens, x, strict=True)])
    for i in HEAD_LAYERS:
        features = linear(features, state, f"mlp.layers.{i}")
    return (features[:, 0] - 0.16717362830052426) / 1.0333394966054072


def _read(state: State, text: str, ids: list[int], image: Tensor) -> Tensor:
    """(1, WIDTH): the first token of a text that was read with an eye on the image's patches."""
    y = state[f"{text}embeddings.word_embeddings.weight"][ids]
    y = y + state[f"{text}embeddings.position_embeddings.weight"][: len(ids)]
    y = norm(y, state, f"{text}embeddings.LayerNorm", 1e-12)
    for i in range(2):
        layer = f"{text}encoder.layer.{i}"
        for kind, source in (("attention", None), ("crossattention", image)):
            seen, name = y if source is None else source, f"{layer}.{kind}"
            query, key, value = (
                linear(x, state, f"{name}.self.{part}")
                for x, part in ((y, "query"), (seen, "key"), (seen, "value"))
            )
            read = linear(attend(query, key, value, 64), state, f"{name}.output.dense")
            y = norm(y + read, state, f"{name}.output.LayerNorm", 1e-12)
        hidden = F.gelu(linear(y, state, f"{layer}.intermediate.dense"))
        y = norm(
            y + linear(hidden, state, f"{layer}.output.dense"), state, f"{layer}.output.LayerNorm", 1e-12
        )
    return y[:1]
