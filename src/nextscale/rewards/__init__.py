"""Rewards: any callable `(images (B, 3, H, W) in [0, 1], conditions) -> (B,) floats`; NaN is "not scored"."""

from nextscale.rewards.aesthetic import Aesthetic
from nextscale.rewards.class_probability import ClassProbability
from nextscale.rewards.clip_class import ClipClass
from nextscale.rewards.clip_score import ClipScore
from nextscale.rewards.diversity import Diversity
from nextscale.rewards.geneval import GenEval
from nextscale.rewards.groups import GroupReward
from nextscale.rewards.hps import HPSv2
from nextscale.rewards.image_reward import ImageReward
from nextscale.rewards.jpeg import JpegCompressibility, JpegIncompressibility
from nextscale.rewards.ocr import TextInImage
from nextscale.rewards.pick_score import PickScore
from nextscale.rewards.pictures import Pictures
from nextscale.rewards.pixels import brightness, colourfulness, sharpness
from nextscale.rewards.protocol import Reward, score
from nextscale.rewards.python import load_function
from nextscale.rewards.remote import Remote
from nextscale.rewards.reward_set import RewardSet
from nextscale.rewards.roles import AtLeast, AtMost
from nextscale.rewards.vlm_judge import VlmJudge

__all__ = [
    "Aesthetic",
    "AtLeast",
    "AtMost",
    "ClassProbability",
    "ClipClass",
    "ClipScore",
    "Diversity",
    "GenEval",
    "GroupReward",
    "HPSv2",
    "ImageReward",
    "JpegCompressibility",
    "JpegIncompressibility",
    "PickScore",
    "Pictures",
    "Remote",
    "Reward",
    "RewardSet",
    "TextInImage",
    "VlmJudge",
    "brightness",
    "colourfulness",
    "load_function",
    "score",
    "sharpness",
]
