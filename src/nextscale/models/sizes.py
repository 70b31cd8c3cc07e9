"""The sizes of a model by name, without its weights."""

import json
from pathlib import Path
from typing import Any

from nextscale.base.errors import CheckpointError, NextscaleError
from nextscale.base.tensors import read_state_dict
from nextscale.models import hub, zoo
from nextscale.models.official import read_var_config, read_vqvae_config
from nextscale.models.var import VARConfig
from nextscale.models.vqvae import VQVAEConfig

SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


def _official(depth: int, **others: Any) -> VARConfig:
    return VARConfig(depth=depth, width=64 * depth, num_heads=depth, **others)


# Source: VAR (arXiv 2404.02905), and the shapes of the tensors in the published files; the first four draw
# 256 px, var-d36 draws 512 px and shares one AdaLN ("d36-s").
OFFICIAL_SIZES = {
    **{f"var-d{depth}": (_official(depth), VQVAEConfig()) for depth in (16, 20, 24, 30)},
    "var-d36": (
        _official(36, scale_sizes=SCALES_512, shared_adaln=True),
        VQVAEConfig(scale_sizes=SCALES_512),
    ),
}
"""Name of a published model to the sizes of its transformer and its tokenizer."""


def sizes_of(name: str, vae: str | None = None) -> tuple[VARConfig, VQVAEConfig]:
    """The sizes of a model as `VARPipeline.from_pretrained` and `from_official` take it.

    Args:
        name: a published model's name, a folder or hub repository that nextscale wrote, or, with `vae`, the
            official file of a transformer.
        vae: the official file of the tokenizer.

    Raises:
        CheckpointError: no such model, or its sizes cannot be read.
    """
    if name in OFFICIAL_SIZES:
        return OFFICIAL_SIZES[name]
    if vae is not None:
        transformer = read_var_config(read_state_dict(name, "var_wo_ddp"), name)
        state = read_state_dict(vae, "vae_local")
        return transformer, read_vqvae_config(state, vae, transformer.scale_sizes)
    if hub.is_repository(name) and name not in zoo.MODELS and not Path(name).exists():
        folder = hub.download(name, ["config.json"])
    else:
        folder = zoo.folder_of(name)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
        return VARConfig.from_mapping(config["transformer"]), VQVAEConfig.from_mapping(config["tokenizer"])
    except OSError:
        raise CheckpointError(
            f"'{path.parent}' is not a model folder: it has no readable config.json"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, NextscaleError) as error:
        raise CheckpointError(f"'{path}' is not the configuration of a model: {error}") from None
