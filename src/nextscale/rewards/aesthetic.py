"""Aesthetic predictors: a small head on a CLIP's image embedding.

Shapes: N embeddings · E width of the embedding

Source: github.com/LAION-AI/aesthetic-predictor (v1, one linear layer) and
github.com/christophschuhmann/improved-aesthetic-predictor (v2, five layers with or without ReLU).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError
from nextscale.base.tensors import read_state_dict
from nextscale.models import zoo
from nextscale.models.pretrained import follow, web_file
from nextscale.rewards.networks.clip import load_clip
from nextscale.rewards.protocol import RewardConfig

DEFAULT_HEAD = "laion-v2-l14"
DEFAULT_CLIP = "openai/clip-vit-large-patch14"  # for a head that is given as a file
LINEAR_LAYERS = (0, 2, 4, 6, 7)  # with dropout between: in eval mode one affine map
RELU_LAYERS = (0, 3, 6, 9, 11)  # with ReLU and dropout between


class AestheticHead(nn.Module):
    """Maps (N, E) image embeddings, which it normalises, to (N,) scores.

    Args:
        weights: (out, in) of each linear layer, the last with out = 1.
        biases: (out,) of each linear layer.
        has_relu: whether there is a ReLU between the layers.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor], *, has_relu: bool) -> None:
        super().__init__()
        self.has_relu = has_relu
        self.weights = nn.ParameterList(nn.Parameter(each.float(), requires_grad=False) for each in weights)
        self.biases = nn.ParameterList(nn.Parameter(each.float(), requires_grad=False) for each in biases)

    @property
    def width(self) -> int:
        """E, the width of the embeddings it takes."""
        return self.weights[0].shape[1]

    def forward(self, embeddings_NE: Tensor) -> Tensor:
        # in float32 under autocast too: bfloat16 has steps of 0.03 where scores are about 5
        with torch.autocast(embeddings_NE.device.type, enabled=False):
            return self._forward(F.normalize(embeddings_NE.float(), dim=-1))

    def _forward(self, x: Tensor) -> Tensor:
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = F.linear(x, weight, bias)
            if self.has_relu and i + 1 < len(self.weights):
                x = x.relu()
        return x.squeeze(-1)


def load_head(path: str | Path) -> AestheticHead:
    """The head of an aesthetic predictor alone; the keys of the file tell which kind it is.

    Args:
        path: a name of the zoo such as "toy" or "laion-v2-l14", downloaded once, or a `.pth` or
            `.safetensors` file with the keys of LAION's v1, v2 or v2 with ReLU.

    Raises:
        CheckpointError: the file cannot be downloaded or read, or is of none of these kinds.
    """
    name, path = path, _find_head(path)
    try:
        state = read_state_dict(path)
    except CheckpointError:
        entry = zoo.AESTHETIC_HEADS.get(str(name))
        if entry is None or not isinstance(entry.source, str) or entry.sha256:
            raise
        path.unlink()  # a download that was broken off, which no hash told of, would stay for good
        raise CheckpointError(
            f"'{path}' was no whole download of {entry.source}, and has been removed: try again"
        ) from None
    kinds = (
        (["weight"], False),
        ([f"layers.{i}.weight" for i in LINEAR_LAYERS], False),
        ([f"layers.{i}.weight" for i in RELU_LAYERS], True),
    )
    for names, has_relu in kinds:
        bias_names = [name.replace("weight", "bias") for name in names]
        if set(state) == {*names, *bias_names}:
            weights, biases = [state[name] for name in names], [state[name] for name in bias_names]
            _check_chain(path, names, weights, biases)
            return AestheticHead(weights, biases, has_relu=has_relu).eval()
    raise CheckpointError(
        f"'{path}' is no aesthetic head: its keys {sorted(state)[:4]} fit none of LAION's kinds"
    )


def _clip_of(head: str | Path) -> str:
    """The CLIP that a head was trained on."""
    entry = zoo.AESTHETIC_HEADS.get(str(head))
    return entry.clip if entry else DEFAULT_CLIP


def _find_head(name: str | Path) -> Path:
    entry = zoo.AESTHETIC_HEADS.get(str(name))
    if entry is None:
        if not Path(name).is_file():
            known = ", ".join(zoo.AESTHETIC_HEADS)
            raise CheckpointError(f"no aesthetic head '{name}': it is neither a file nor one of {known}")
        return Path(name)
    if isinstance(entry.source, Path):
        return entry.source
    return web_file(entry.source, entry.sha256, f"the aesthetic head, in place of '{name}'")


def _check_chain(path: Path, names: list[str], weights: list[Tensor], biases: list[Tensor]) -> None:
    widths = [each.shape[-1] if each.ndim else 0 for each in weights[1:]] + [1]
    for name, weight, bias, out in zip(names, weights, biases, widths, strict=True):
        if weight.ndim != 2 or weight.shape[0] != out or tuple(bias.shape) != (out,):
            found = tuple(weight.shape), tuple(bias.shape)
            raise CheckpointError(
                f"'{path}': '{name}' and its bias have shapes {found}, expected {out} outputs"
            )


class Aesthetic:
    """Predicted human rating of an image, about 1 to 10.

    Args:
        head: a name or a file, as for `load_head`.
        clip: the CLIP whose embeddings the head was trained on; by default that of the named head, or
            ViT-L/14 for a file.

    Raises:
        CheckpointError: head or CLIP cannot be loaded, or their widths differ.
    """

    def __init__(self, head: str | Path = DEFAULT_HEAD, clip: str | Path | None = None) -> None:
        self.head = load_head(head)
        clip = clip or _clip_of(head)
        self.clip = load_clip(clip)
        width = self.clip.model.config.projection_dim
        if self.head.width != width:
            raise CheckpointError(
                f"head '{head}' takes embeddings of width {self.head.width}, CLIP '{clip}' gives {width}"
            )

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        follow(self.head, images)
        return self.head(self.clip.embed_images(images))


class AestheticConfig(RewardConfig):
    """Aesthetic predictor: how people would rate an image, about 1 to 10."""

    main_option = "head"
    reward = Aesthetic

    kind: Literal["aesthetic"] = "aesthetic"
    head: str = DEFAULT_HEAD
    """Head of the predictor: "toy", one of LAION's by name such as "laion-v2-l14", or a file."""
    clip: str | None = None
    """CLIP: "toy", a folder or a hub repository; an aesthetic head comes with its own by default."""

    @property
    def backbone(self) -> str | None:
        return self.clip or _clip_of(self.head)
