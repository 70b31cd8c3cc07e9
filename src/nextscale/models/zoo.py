"""Models by name: where their files lie."""

from pathlib import Path

from nextscale.errors import CheckpointError
from nextscale.records import suggest

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline"}
"""Name of a model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip"}
"""Name of an embedded CLIP to its folder; any other name is a hub repository's or a folder's."""

AESTHETIC_HEADS = {"toy": TOY_ASSETS / "aesthetic_head.safetensors"}
"""Name of an embedded aesthetic head to its file."""


def folder_of(name: str | Path) -> Path:
    """The folder of a model given by name or path.

    Raises:
        CheckpointError: it is neither a known name nor a folder.
    """
    if str(name) in MODELS:
        return MODELS[str(name)]
    folder = Path(name)
    if not folder.is_dir():
        raise CheckpointError(
            f"no model '{name}': it is neither a folder nor a known name{suggest(str(name), list(MODELS))}"
        )
    return folder
