"""The models that come with the package."""

from pathlib import Path

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline"}
"""Name of an embedded model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip"}
"""Name of an embedded CLIP to its folder; any other CLIP is named by its hub repository or folder."""
