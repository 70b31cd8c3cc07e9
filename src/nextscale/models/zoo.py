"""Models by name: where their files lie."""

from dataclasses import dataclass
from pathlib import Path

from nextscale.errors import CheckpointError
from nextscale.records import suggest

TOY_ASSETS = Path(__file__).parent.parent / "toy" / "assets"

MODELS = {"toy": TOY_ASSETS / "pipeline"}
"""Name of a model to its folder."""

CLIPS = {"toy": TOY_ASSETS / "clip"}
"""Name of an embedded CLIP to its folder; any other name is a hub repository's or a folder's."""


@dataclass(frozen=True)
class HeadFile:
    """Where the head of an aesthetic predictor lies, and the CLIP whose embeddings it takes.

    Attributes:
        clip: name of the CLIP.
        source: an embedded file, or a URL.
        sha256: of the file, where known.
    """

    clip: str
    source: Path | str
    sha256: str | None = None


_LAION_V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_"
_LAION_V2 = "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"

AESTHETIC_HEADS = {
    "toy": HeadFile("toy", TOY_ASSETS / "aesthetic_head.safetensors"),
    "laion-v1-l14": HeadFile(
        "openai/clip-vit-large-patch14",
        _LAION_V1 + "l_14_linear.pth",
        "2cd4e60f4f24ae3bcd57b847b13c1f3ba27edc28cc1a7f9ce74ee9f421243cba",
    ),
    "laion-v1-b32": HeadFile("openai/clip-vit-base-patch32", _LAION_V1 + "b_32_linear.pth"),
    "laion-v1-b16": HeadFile("openai/clip-vit-base-patch16", _LAION_V1 + "b_16_linear.pth"),
    "laion-v2-l14": HeadFile(
        "openai/clip-vit-large-patch14",
        _LAION_V2 + "sac%2Blogos%2Bava1-l14-linearMSE.pth",
        "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    ),
    "laion-v2-l14-relu": HeadFile("openai/clip-vit-large-patch14", _LAION_V2 + "ava%2Blogos-l14-reluMSE.pth"),
}
"""Aesthetic heads by name. LAION's are Apache-2.0 (v2) and MIT (v1); none comes with the package."""


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
