"""Rewards: any callable `(images (B, 3, H, W) in [0, 1], conditions) -> (B,) floats`; NaN is "not scored"."""

from nextscale.rewards.aesthetic import Aesthetic
from nextscale.rewards.base import Reward, WeightedSum, score
from nextscale.rewards.clip_score import ClipScore
from nextscale.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from nextscale.rewards.pixels import brightness, colourfulness, sharpness
from nextscale.rewards.remote import Remote
from nextscale.rewards.user import load_function
from nextscale.rewards.vlm_judge import VlmJudge

__all__ = [
    "Aesthetic",
    "ClipScore",
    "JpegCompressibility",
    "JpegIncompressibility",
    "Remote",
    "Reward",
    "VlmJudge",
    "WeightedSum",
    "brightness",
    "colourfulness",
    "load_function",
    "score",
    "sharpness",
]
