"""The models that come with the package."""

from pathlib import Path

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline", "toy-text": TOY_ASSETS / "pipeline_text"}
"""Name of an embedded model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip", "toy-text": TOY_ASSETS / "clip_text"}
"""Name of an embedded CLIP to its folder; any other CLIP is named by its hub repository or folder."""


def tokenizer_folder(folder: Path) -> Path:
    """Where a model's tokenizer is: in its folder, but for the embedded models, which all share one."""
    return MODELS["toy"] if folder == MODELS["toy-text"] else folder
