"""Text in images: whether what an image should say can be read in it.

What it should say stands in the column `says` of the prompts' file, or else in the prompt, in quotes.

Source: normalised edit distance as in AnyText (arXiv 2311.03054), word accuracy as in TextDiffuser
(2305.10855).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from nextscale.base.conditions import Condition
from nextscale.base.errors import CheckpointError, RewardError
from nextscale.models.pretrained import follow, load_frozen, load_tokenizer, loading
from nextscale.rewards.networks.preprocessing import read_preprocessing
from nextscale.rewards.protocol import Reward, RewardConfig

DEFAULT_READER = "microsoft/trocr-base-printed"
Measure = Literal["words", "edit"]
MARKS = '"\u201c\u201d\u201e\u00ab\u00bb'  # straight, curly, low and angle quotation marks
APOSTROPHES = "'\u2018\u2019"
QUOTED = re.compile(
    rf"[{MARKS}]([^{MARKS}]+)[{MARKS}]"
    rf"|(?<!\w)[{APOSTROPHES}]((?:[^{APOSTROPHES}]|(?<=\w)[{APOSTROPHES}](?=\w))+)[{APOSTROPHES}](?!\w)"
)
MOST_TOKENS = 64

Read = Callable[[Tensor], list[str]]


class TextInImage:
    """How much of the text that an image should say is read in it, in [0, 1].

    Args:
        reader: an OCR model of transformers (TrOCR), as a folder, a hub repository or a function of images.
        measure: "words", the share of the words that are read, as often as asked for; or "edit", 1 minus the
            edit distance over the longer text's length.

    Raises:
        CheckpointError: the model cannot be loaded.
    """

    has_gradient = False

    def __init__(self, reader: str | Path | Read = DEFAULT_READER, measure: Measure = "edit") -> None:
        self.read: Read = reader if callable(reader) else Reader(reader)
        self.score = word_accuracy if measure == "words" else edit_similarity

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        wanted = [text_asked_for(condition) for condition in conditions]
        pairs = zip(self.read(images), wanted, strict=True)
        return torch.tensor([self.score(found, text) for found, text in pairs])

    def check_conditions(self, conditions: Sequence[Condition]) -> None:
        for each in conditions:
            text_asked_for(each)


def text_asked_for(condition: Condition) -> str:
    """What an image should say.

    Raises:
        RewardError: the prompt does not tell.
    """
    says = condition.data.get("says")
    if isinstance(says, str | int | float) and _words(str(says)):
        return str(says)
    quoted = " ".join(a or b for a, b in QUOTED.findall(condition.text))
    if not _words(quoted):
        raise RewardError(
            f"the prompt '{condition.text}' does not tell what the image should say: put it in quotes, or in "
            "a column 'says' of the prompts' file"
        )
    return quoted


def word_accuracy(found: str, wanted: str) -> float:
    """Share of the wanted words that were read, ignoring case, marks and order."""
    asked, read = Counter(_words(wanted)), Counter(_words(found))
    return (asked & read).total() / max(asked.total(), 1)


def edit_similarity(found: str, wanted: str) -> float:
    """1 minus the Levenshtein distance over the longer text's length, ignoring case and marks."""
    a, b = " ".join(_words(found)), " ".join(_words(wanted))
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (left != right))
    return 1 - row[-1] / max(len(a), len(b), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


class Reader:
    """Reads the text in images with a TrOCR of transformers, which takes an image for one line of text.

    Args:
        name: folder or hub repository.

    Raises:
        CheckpointError: it cannot be loaded, or is no such model.
    """

    def __init__(self, name: str | Path) -> None:
        with loading("text reader", name):
            config = transformers.AutoConfig.from_pretrained(str(name))
        if config.model_type != "vision-encoder-decoder":
            raise CheckpointError(
                f"text reader '{name}' is a {config.model_type}, expected a vision-encoder-decoder such as "
                "TrOCR"
            )
        self.model = load_frozen(transformers.VisionEncoderDecoderModel, "text reader", name)
        self.prepare = read_preprocessing(name)
        self.tokenizer: Any = load_tokenizer(name)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[str]:
        follow(self.model, images)
        ids = self.model.generate(self.prepare(images), max_new_tokens=MOST_TOKENS, do_sample=False)
        return self.tokenizer.batch_decode(ids, skip_special_tokens=True)


class OcrConfig(RewardConfig):
    """How much of the text that an image should say can be read in it."""

    main_option = "reader"

    kind: Literal["ocr"] = "ocr"
    reader: str = DEFAULT_READER
    """OCR model of transformers, such as a TrOCR: a folder or a hub repository."""
    text_measure: Measure = "edit"
    """What counts: "words", the share of words read, or "edit", 1 minus the normalised edit distance."""

    def make(self) -> Reward:
        return TextInImage(self.reader, self.text_measure)

    @property
    def backbone(self) -> str | None:
        return self.reader
