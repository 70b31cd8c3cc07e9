"""CLIP score: how well an image fits a prompt."""

from collections.abc import Sequence
from pathlib import Path
from string import Formatter

from torch import Tensor

from nextscale.errors import ConfigError
from nextscale.records import Condition
from nextscale.rewards.clip import load_clip

DEFAULT_CLIP = "openai/clip-vit-large-patch14"


class ClipScore:
    """Cosine between an image and a prompt, in [-1, 1].

    Args:
        prompt: a template; "{label}" becomes the condition's text, as in "a painting of a {label}".
        clip: "toy", a folder, or a hub repository.

    Raises:
        ConfigError: the template is empty or broken, or has a field other than {label}.
    """

    def __init__(self, prompt: str = "a photo of a {label}", clip: str | Path = DEFAULT_CLIP) -> None:
        try:
            fields = {field for _, field, _, _ in Formatter().parse(prompt) if field is not None}
            if fields <= {"label"}:
                prompt.format(
                    label=""
                )  # so that a format such as {label:d} is found here, not while training
        except (ValueError, LookupError) as error:
            raise ConfigError(f"prompt '{prompt}' is not a template: {error}") from None
        if not prompt or fields - {"label"}:
            raise ConfigError(
                f"prompt '{prompt}' may hold the field {{label}} and no other, and must not be empty"
            )
        self.prompt = prompt
        self.clip = load_clip(clip)

    def __call__(self, images: Tensor, conditions: Sequence[Condition]) -> Tensor:
        image_embeddings = self.clip.embed_images(images)
        texts = [self.prompt.format(label=condition.text) for condition in conditions]
        return (image_embeddings * self.clip.embed_texts(texts)).sum(-1)
