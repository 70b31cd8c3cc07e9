"""FID and Inception Score of all images of an evaluation: as ADM's evaluation suite measures them, and so the
authors of VAR.

Shapes: B N images · D width of a feature · K classes of the network
"""

import io
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from tokenize import TokenError
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.distances import Gaussian, frechet_distance
from nextscale.base.errors import CheckpointError, ConfigError, first_sentence
from nextscale.base.images import to_bytes
from nextscale.base.seeding import mixed_order
from nextscale.base.tensors import read_state_dict
from nextscale.models.pretrained import follow, web_file

OFFICIAL_IMAGES = 50_000
"""Images that published values are of: 50 of each of ImageNet's classes."""
SPLIT = 5_000
"""Images of one part of an Inception Score, which is the mean over parts."""
WEIGHTS_SHA256 = "6726825d"  # how it begins; torch-fidelity has it in the file's name
UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, BadZipFile, zlib.error, TokenError)
"""What numpy and zipfile raise about a damaged file."""


class Network(Protocol):
    """What sees images as features, and says of which class they are.

    Attributes:
        head: (K, D), the last layer without its bias.
    """

    head: Tensor

    def __call__(self, images: Tensor) -> Tensor:
        """(B, D) float32 features of (B, 3, H, W) uint8 images."""
        ...


class Inception:
    """The Inception network of 2015, as torch-fidelity carried it over from TensorFlow.

    Args:
        weights: file of its weights; by default torch-fidelity's, downloaded once.

    Raises:
        ConfigError: torch-fidelity is not installed.
        CheckpointError: the weights cannot be had, or are not this network's.
    """

    def __init__(self, weights: str | Path | None = None) -> None:
        try:
            import torch_fidelity.feature_extractor_inceptionv3 as published  # pyright: ignore
        except (ImportError, RuntimeError) as error:  # torchvision raises either
            raise ConfigError(
                f"FID needs torch-fidelity, which cannot be imported ({first_sentence(error)}): "
                "pip install 'nextscale[eval]'"
            ) from None
        if weights is None:
            weights = web_file(published.URL_INCEPTION_V3, WEIGHTS_SHA256, "--fid-weights")
        # It unpickles whatever it is given, so it is given what holds nothing but tensors.
        torch.save(read_state_dict(weights), checked := io.BytesIO())
        checked.seek(0)
        try:
            self.network = published.FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=checked
            )
        except RuntimeError as error:
            raise CheckpointError(
                f"'{weights}' does not hold the weights of torch-fidelity's Inception network "
                f"({' '.join(str(error).split())[:200]})"
            ) from None
        self.head: Tensor = self.network.fc.weight

    def __call__(self, images: Tensor) -> Tensor:
        follow(self.network, images)
        return self.network(images)[0]


class Fidelity:
    """`fid` and `inception_score`, the latter where the network has a head.

    Args:
        reference: what the network sees in true images.
        network: of both.
    """

    def __init__(self, reference: Gaussian, network: Network) -> None:
        self.reference, self.network = reference, network

    def features(self, images: Tensor, conditions: Sequence[Condition]) -> dict[str, Tensor]:
        """(B, D) features of the images as a file would hold them, in float32 whatever precision they were
        drawn in."""
        with torch.autocast(images.device.type, enabled=False):
            return {"inception": self.network(to_bytes(images))}

    def measure(self, features: Mapping[str, Tensor], conditions: Sequence[Condition]) -> dict[str, float]:
        """Both, of all images."""
        features_ND = features["inception"]
        return {
            "fid": frechet_distance(Gaussian.fit(features_ND), self.reference),
            "inception_score": inception_score(features_ND, self.network.head.cpu()),
        }


def inception_score(features_ND: Tensor, head_KD: Tensor) -> float:
    """exp of the mean KL from what the classifier says of an image to what it says on average; the mean over
    parts of 5,000 images, or of nearly so many where that is no divisor, each with images of all classes.

    Source: Salimans et al., arXiv 1606.03498; in parts and without the classifier's bias, as ADM's evaluator
    (github.com/openai/guided-diffusion, evaluations) has it.
    """
    mixed_ND = features_ND[mixed_order(len(features_ND))]
    scores = []
    for part_ND in mixed_ND.tensor_split(max(round(len(mixed_ND) / SPLIT), 1)):
        log_probs_NK = (part_ND @ head_KD.T).double().log_softmax(1)
        log_mean_K = log_probs_NK.exp().mean(0).log()
        scores.append((log_probs_NK.exp() * (log_probs_NK - log_mean_K)).sum(1).mean().exp())
    return torch.stack(scores).mean().item()


def read_statistics(path: Path, width: int = 2048) -> Gaussian:
    """The Gaussian of a reference set: `mu` and `sigma` of a file such as VIRTUAL_imagenet256_labeled.npz.

    Args:
        width: D, of the network's features.

    Raises:
        ConfigError: there is no such file, or it is not one of these.
    """
    expected = "expected the statistics of true images, such as VIRTUAL_imagenet256_labeled.npz of ADM"
    if not path.is_file():
        raise ConfigError(f"no file '{path}': {expected}")
    try:
        content: Any = np.load(path, allow_pickle=False)
        names = list(getattr(content, "files", []))
        found = [content[name] for name in ("mu", "sigma") if name in names]
    except UNREADABLE:
        raise ConfigError(f"'{path}' is no readable .npz file: {expected}") from None
    if len(found) < 2:
        raise ConfigError(
            f"'{path}' has no mu and sigma (it holds {', '.join(names) or 'one array'}): {expected}"
        )
    shapes = [each.shape for each in found]
    if shapes != [(width,), (width, width)] or any(each.dtype.kind != "f" for each in found):
        raise ConfigError(
            f"'{path}' has a mu of shape {shapes[0]} and a sigma of {shapes[1]}, expected numbers of shape "
            f"({width},) and ({width}, {width}): they are of another network"
        )
    if not all(np.isfinite(each).all() for each in found):
        raise ConfigError(f"'{path}' has a mu or sigma that is infinite or NaN: {expected}")
    mean, covariance = (torch.from_numpy(each).double() for each in found)
    return Gaussian(mean, covariance)
