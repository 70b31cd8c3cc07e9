"""Write the prompts of the packaged recipes of text-conditional models, all made here by rule.

    python benchmarks/prompts.py

`pictures-*.txt` are scenes for aesthetic rewards; `objects-*.jsonl` ask for objects by GenEval's six tasks
(arXiv 2310.11513), in its columns and with class names of COCO that its detector knows; `toy-text-*.txt` are
those of the miniature world. None was taken from GenEval.
"""

import json
from itertools import combinations, product
from pathlib import Path

import torch

from nextscale.base.seeding import generator_for
from nextscale.config.files import RECIPES
from nextscale.rewards.geneval import COLOURS, RELATIONS
from nextscale.toy.prompts import prompts
from nextscale.toy.world import with_article

SUBJECTS = (
    "an old fisherman",
    "a red fox",
    "a lighthouse",
    "a ceramic teapot",
    "a sleeping cat",
    "a steam train",
    "a bowl of ramen",
    "a bicycle",
    "a snowy owl",
    "a violinist",
    "a wooden boat",
    "a city street",
)
SETTINGS = (
    "at sunrise",
    "in heavy rain",
    "in a quiet forest",
    "on a wooden table",
    "by the sea",
    "under a starry sky",
    "in golden autumn light",
    "in thick fog",
    "in an empty hall",
    "seen from above",
)
OBJECTS = (
    "apple",
    "backpack",
    "banana",
    "bear",
    "bench",
    "bicycle",
    "bird",
    "boat",
    "book",
    "bottle",
    "bowl",
    "bus",
    "cake",
    "car",
    "cat",
    "chair",
    "clock",
    "couch",
    "cow",
    "cup",
    "dog",
    "elephant",
    "fork",
    "giraffe",
    "handbag",
    "horse",
    "kite",
    "laptop",
    "motorcycle",
    "orange",
    "oven",
    "pizza",
    "sheep",
    "sink",
    "skateboard",
    "stop sign",
    "suitcase",
    "surfboard",
    "teddy bear",
    "toaster",
    "train",
    "truck",
    "tv",
    "umbrella",
    "vase",
    "wine glass",
    "zebra",
)
NUMBERS = {2: "two", 3: "three", 4: "four"}
PLURALS = {
    "bus": "buses",
    "couch": "couches",
    "sheep": "sheep",
    "wine glass": "wine glasses",
    "bench": "benches",
}
OF_EACH_TASK = 90
HELD_OUT = 6  # one in so many


def main() -> None:
    for style in ("photo", "painting"):
        middle = "" if style == "photo" else f"-{style}"
        for is_held_out, name in ((False, "train"), (True, "held-out")):
            write(f"toy-text{middle}-{name}.txt", prompts(held_out=is_held_out, style=style))
    scenes = [f"{subject} {setting}" for subject, setting in product(SUBJECTS, SETTINGS)]
    split("pictures", ".txt", shuffled(scenes, "pictures"))
    rows = []
    for task, each in of_tasks().items():
        chosen = shuffled(each, task)[:OF_EACH_TASK]
        rows += [json.dumps({"tag": task, **row}) for row in chosen]
    split("objects", ".jsonl", shuffled(rows, "objects"))


def of_tasks() -> dict[str, list[dict]]:
    """Everything that can be asked for, by task."""
    one = [{"class": name, "count": 1} for name in OBJECTS]
    pairs = list(combinations(one, 2))

    def coloured(each: dict, colour: str) -> dict:
        return each | {"color": colour}

    colours = list(combinations(COLOURS, 2))
    return {
        "single_object": [asked(f"a photo of {a(each)}", each) for each in one],
        "two_object": [asked(f"a photo of {a(x)} and {a(y)}", x, y) for x, y in pairs],
        "counting": [
            asked(f"a photo of {word} {plural(name)}", {"class": name, "count": number},
                  exclude=[{"class": name, "count": number + 1}])
            for name, (number, word) in product(OBJECTS, NUMBERS.items())
        ],
        "colors": [
            asked(f"a photo of {a(each, colour)}", coloured(each, colour))
            for each, colour in product(one, COLOURS) if each["class"] != "orange"
        ],
        "position": [
            asked(f"a photo of {a(x)} {relation} {a(y)}", y, x | {"position": [relation, 0]})
            for (x, y), relation in product(pairs, RELATIONS)
        ],
        "color_attr": [
            asked(f"a photo of {a(x, first)} and {a(y, second)}", coloured(x, first), coloured(y, second))
            for (x, y), (first, second) in product(pairs, colours) if "orange" not in (x["class"], y["class"])
        ],
    }  # fmt: skip


def a(each: dict, colour: str = "") -> str:
    return with_article(f"{colour} {each['class']}".strip())


def plural(name: str) -> str:
    return PLURALS.get(name, f"{name}s")


def asked(prompt: str, *include: dict, exclude: list[dict] | None = None) -> dict:
    return {"prompt": prompt, "include": list(include), "exclude": exclude or []}


def shuffled(rows: list, name: str) -> list:
    order = torch.randperm(len(rows), generator=generator_for("prompts", name)).tolist()
    return [rows[i] for i in order]


def split(name: str, suffix: str, rows: list[str]) -> None:
    """One part to train on, and one that is held out."""
    write(f"{name}-train{suffix}", [row for i, row in enumerate(rows) if i % HELD_OUT])
    write(f"{name}-held-out{suffix}", rows[::HELD_OUT])


def write(name: str, lines: list[str]) -> None:
    path = Path(RECIPES) / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{path}: {len(lines)} prompts")


if __name__ == "__main__":
    main()
