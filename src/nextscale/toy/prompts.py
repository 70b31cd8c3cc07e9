"""Prompts of the miniature world: what they name, which are held out, and true pictures of them.

A prompt names an object, its colour, the ground and the place, such as "a photo of a red star on clay in the
middle": 1,152 combinations. One in eight is held out: no model is trained on a prompt or a picture of it.

Shapes: N pictures or prompts
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from nextscale.toy.scenes import CLASSES, MAX_OFFSET, PALETTE, SIZE, STYLES, Scenes, sample_scenes
from nextscale.toy.world import GROUND_NAMES, VOCABULARY, with_article

PLACES = ("in the middle", "on the left", "on the right")
WORDS = (*VOCABULARY, "left", "right")
"""All words of prompts: the captions of the miniature's other pictures know no sides."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": CLASSES,
    "colour": tuple(PALETTE),
    "ground": GROUND_NAMES,
    "place": PLACES,
}
"""Name of an attribute to what it may be."""

NAMED: dict[str, tuple[str, ...]] = {**ATTRIBUTES, "style": STYLES}
"""The same, and the style: all that a prompt may name."""

ASIDE = 7.0
"""Offset of an object on the left or right, in pixels; it varies by 1, and that in the middle by 2. No object
is between two places."""

Combination = tuple[int, ...]
"""For each attribute the index of what it is."""


def combinations() -> list[Combination]:
    """All of them."""
    return list(product(*(range(len(values)) for values in ATTRIBUTES.values())))


def is_held_out(combination: Combination) -> bool:
    """Whether no training prompt or picture has this combination. Each value is held out with each of most
    others, and never with all."""
    label, colour, ground, place = combination
    return (label + 3 * colour + 5 * ground + 3 * place) % 8 == 0


def prompt_of(combination: Combination, style: str = "photo") -> str:
    """Such as "a photo of a red star on clay in the middle"."""
    label, colour, ground, place = (
        values[index] for values, index in zip(ATTRIBUTES.values(), combination, strict=True)
    )
    return f"a {style} of {with_article(f'{colour} {label}')} on {ground} {place}"


def read_prompt(text: str) -> dict[str, int]:
    """What a prompt names, each as the index of its value in `NAMED`."""
    words = text.lower().split()
    found = {}
    for name, values in NAMED.items():
        named = [i for i, value in enumerate(values) if all(word in words for word in value.split())]
        if named:
            found[name] = named[0]
    return found


def prompts(*, held_out: bool, style: str = "photo") -> list[str]:
    """The prompts of one side of the split."""
    return [prompt_of(each, style) for each in combinations() if is_held_out(each) == held_out]


def pictured(
    num: int, generator: torch.Generator, *, held_out: bool | None = False, style: str = "photo"
) -> Scenes:
    """Scenes whose objects are clearly in the middle, on the left or on the right, equally often.

    They are of the smaller sizes, which stay in the picture there.

    Args:
        held_out: whether they are of held-out combinations, or of all others; None for any.
    """
    styles = torch.full((16 * num + 64,), STYLES.index(style))
    scenes = sample_scenes(len(styles), generator, styles=styles)
    place = torch.randint(len(PLACES), (len(scenes),), generator=generator)
    aside, spread = torch.tensor([0.0, -ASIDE, ASIDE])[place], torch.tensor([2.0, 1.0, 1.0])[place]
    scenes = replace(
        scenes,
        x=aside + spread * scenes.x / MAX_OFFSET,
        y=2 * scenes.y / MAX_OFFSET,
        size=(scenes.size + SIZE[0]) / 2,
    )
    if held_out is not None:
        sides = torch.tensor([is_held_out(each) for each in combinations_of(scenes)])
        scenes = scenes[sides == held_out]
    assert len(scenes) >= num, "an eighth of all is held out"
    return scenes[:num]


def places_of(scenes: Scenes) -> Tensor:
    """(N,) index into PLACES, of scenes as `pictured` makes them."""
    is_left, is_right = scenes.x < -ASIDE / 2, scenes.x > ASIDE / 2
    return is_left * PLACES.index("on the left") + is_right * PLACES.index("on the right")


def combinations_of(scenes: Scenes) -> list[Combination]:
    """What the scenes show."""
    values = scenes.label, scenes.colour, scenes.ground, places_of(scenes)
    return list(zip(*(each.tolist() for each in values), strict=True))


def captions_of(
    scenes: Scenes,
    generator: torch.Generator,
    named: float = 0.85,
    place_named: float | None = None,
    wrong: float = 0.0,
    no_style: float = 0.0,
    wrong_style: float = 0.0,
) -> list[str]:
    """A caption a scene: the object, and each of the other attributes with this probability.

    Args:
        place_named: that of the place; by default the same.
        wrong: share of the captions whose object is drawn anew, and may be the same again; of colour, and of
            ground, twice as many are. Such as captions from the web are.
        no_style, wrong_style: shares of the captions that name no style, and that name another one.
    """
    texts = []
    shares = torch.tensor([named, named, named if place_named is None else place_named])
    is_named_N3 = torch.rand(len(scenes), 3, generator=generator) < shares
    for style, combination, (colour, ground, place) in zip(
        scenes.style.tolist(), combinations_of(scenes), is_named_N3.tolist(), strict=True
    ):
        if wrong:
            rates, (u, v) = (wrong, 2 * wrong, 2 * wrong, 0.0), torch.rand(2, 4, generator=generator).tolist()
            combination = tuple(
                int(v[i] * len(values)) if u[i] < rates[i] else combination[i]
                for i, values in enumerate(ATTRIBUTES.values())
            )
        values = [each[i] for each, i in zip(ATTRIBUTES.values(), combination, strict=True)]
        thing = with_article(f"{values[1]} {values[0]}" if colour else values[0])
        on = f" on {values[2]}" if ground else ""
        at = f" {values[3]}" if place else ""
        named_style, (u, v) = STYLES[style], torch.rand(2, generator=generator).tolist()
        if no_style <= u < no_style + wrong_style:
            others = [each for each in STYLES if each != named_style]
            named_style = others[int(v * len(others))]
        begins = "" if u < no_style else f"a {named_style} of "
        texts.append(f"{begins}{thing}{on}{at}")
    return texts


def targets_of(texts: Sequence[str], name: str) -> Tensor:
    """(N,) index of what each prompt says of an attribute or of the style; -1 where it says nothing."""
    return torch.tensor([read_prompt(text).get(name, -1) for text in texts])
