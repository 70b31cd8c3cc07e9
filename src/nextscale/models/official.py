"""Published files of all families: sizes read from the tensors, every key and shape checked.

Source: github.com/FoundationVision/VAR, daixiangzi/VAR-CLIP, yandex-research/switti. The checkpoints of the
trainers of VAR and VAR-CLIP nest the two state dicts under `trainer.var_wo_ddp` and `trainer.vae_local`;
Switti's files are a `model.safetensors` with a `config.json` beside it, which says what the tensors do not.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from nextscale.base.checks import shown
from nextscale.base.errors import CheckpointError, ConfigError, NextscaleError
from nextscale.base.files import write_text_aside
from nextscale.base.records import changed_value
from nextscale.base.tensors import (
    StateDict,
    build_strictly,
    count_layers,
    read_state_dict,
    shape_of,
    write_tensors,
)
from nextscale.models.protocol import NextScaleModel
from nextscale.models.switti import Switti, SwittiConfig
from nextscale.models.texts import SWITTI_ENCODERS
from nextscale.models.var import VAR, VARConfig
from nextscale.models.var_clip import VARClip, VARClipConfig
from nextscale.models.vqvae import VQVAE, VQVAEConfig, check_same_grids

Sizes = TypeVar("Sizes", VARConfig, VARClipConfig, SwittiConfig, VQVAEConfig)

SWITTI_CONFIG = "config.json"
SWITTI_TENSORS = "model.safetensors"
SWITTI_ALWAYS = ("rope", "use_swiglu_ffn", "use_crop_cond")
"""Options that all published Switti models have on; without one, a model has other tensors."""
KEEP_FLOAT32 = VAR.FLOAT32_TENSORS | VARClip.FLOAT32_TENSORS | Switti.FLOAT32_TENSORS

Get = Callable[[str, int], tuple[int, ...]]
"""Shape of the tensor with this key and so many axes."""


def read_var_config(state: StateDict, path: str | Path) -> VARConfig:
    """The sizes of a VAR transformer, read from its tensors.

    Args:
        path: file that the tensors come from, for the error message.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape.
    """
    get = partial(shape_of, state, path, "VAR transformer")
    common = _var_sizes(get, state, path)
    return _checked(path, VARConfig, lambda: common() | {"num_classes": get("class_emb.weight", 2)[0] - 1})


def read_var_clip_config(state: StateDict, path: str | Path) -> VARClipConfig:
    """The sizes of a VAR-CLIP transformer, as `read_var_config` reads a VAR's."""
    get = partial(shape_of, state, path, "VAR-CLIP transformer")
    common = _var_sizes(get, state, path)
    return _checked(path, VARClipConfig, lambda: common() | {"text_width": get("cond_proj.weight", 2)[1]})


def read_switti_config(state: StateDict, path: str | Path, settings: Mapping[str, Any]) -> SwittiConfig:
    """The sizes of a Switti transformer, read from its tensors.

    Args:
        path: file that the tensors come from, for the error message.
        settings: content of its config.json.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape, or the
            settings are those of another model.
    """
    get = partial(shape_of, state, path, "Switti transformer")
    depth = count_layers(state, "blocks.")
    width, codebook_width = get("word_embed.weight", 2)
    sizes = _scale_sizes(get, state, path)
    if settings.get("depth", depth) != depth:
        raise CheckpointError(
            f"'{path}' has {depth} blocks and its configuration says {settings['depth']}: they do not belong "
            "together"
        )
    encoders = settings.get("text_encoders")
    for name in SWITTI_ALWAYS:
        if not settings.get(name, True):
            raise CheckpointError(
                f"'{path}' was trained with {name} off, which no published Switti was: it cannot be loaded"
            )
    return _checked(path, SwittiConfig, lambda: dict(
        depth=depth,
        width=width,
        num_heads=width // 64,
        ffn_width=get("blocks.0.ffn.up_proj.weight", 2)[0],
        context_width=get("blocks.0.cross_attn.to_kv.weight", 2)[1],
        pooled_width=get("text_pooler.weight", 2)[1],
        codebook_size=get("head.weight", 2)[0],
        codebook_width=codebook_width,
        scale_sizes=sizes,
        is_causal=settings["use_ar"],
        rope_theta=settings.get("rope_theta", 10000.0),
        rope_size=settings.get("rope_size", 128.0),
        **({"text_encoders": encoders} if encoders else {}),
    ))  # fmt: skip


def read_vqvae_config(state: StateDict, path: str | Path, scale_sizes: tuple[int, ...]) -> VQVAEConfig:
    """The sizes of a VQVAE, read from its tensors.

    Args:
        path: file that the tensors come from, for the error message.
        scale_sizes: those of the transformer; the tensors of a VQVAE do not determine them.

    Raises:
        CheckpointError: a tensor that determines a size is missing or has an impossible shape.
    """
    get = partial(shape_of, state, path, "VQVAE")
    base = get("encoder.conv_in.weight", 4)[0]
    levels = count_layers(state, "encoder.down.")
    codebook_size, codebook_width = get("quantize.embedding.weight", 2)
    return _checked(path, VQVAEConfig, lambda: dict(
        codebook_size=codebook_size,
        codebook_width=codebook_width,
        base_channels=base,
        channel_multipliers=tuple(
            get(f"encoder.down.{i}.block.0.conv1.weight", 4)[0] // base for i in range(levels)
        ),
        num_res_blocks=count_layers(state, "encoder.down.0.block."),
        scale_sizes=scale_sizes,
    ))  # fmt: skip


TEXT_SIDE = ("text_encoder", "text_activation")
"""What the tensors of a VAR-CLIP do not say, by the names that its configuration has."""


def load_official(
    model: str | Path,
    vae: str | Path,
    dtype: torch.dtype = torch.float32,
    config: str | Path | Mapping[str, Any] | None = None,
) -> tuple[NextScaleModel, VQVAE]:
    """The two networks of published files, their family and sizes read from the tensors.

    Args:
        model: file of the transformer, or a folder with `model.safetensors`.
        vae: the same of the tokenizer.
        dtype: of the transformer; the tokenizer is float32.
        config: of a Switti: its config.json, or the content; by default the file beside the transformer's. Of
            a VAR-CLIP: what its tensors do not say, of `TEXT_SIDE`.

    Raises:
        CheckpointError: a file cannot be used, or the two do not belong together.
    """
    model, vae = _tensors_in(model), _tensors_in(vae)
    state = read_state_dict(model, "var_wo_ddp", dtype, KEEP_FLOAT32)
    sizes, make = _family(state, model, config)
    vae_state = read_state_dict(vae, "vae_local")
    vae_config = read_vqvae_config(vae_state, vae, sizes.scale_sizes)
    try:
        check_same_grids(sizes, vae_config)
    except NextscaleError as error:
        raise CheckpointError(f"'{model}' and '{vae}' do not belong together: {error}") from None
    transformer = build_strictly(lambda: make(sizes), state, model)
    if make is Switti:
        vae_state = _of_scales(vae_state, vae_config)
    return transformer, build_strictly(lambda: VQVAE(vae_config), vae_state, vae)


def _family(
    state: StateDict, path: Path, config: str | Path | Mapping[str, Any] | None
) -> tuple[Any, Callable[[Any], NextScaleModel]]:
    """The sizes of the model that these tensors are of, and what builds it. What it does not need of them is
    taken out."""
    if "text_pooler.weight" in state:
        sizes = read_switti_config(state, path, _settings(path, config))
        for key in Switti.NOT_NEEDED & state.keys():
            del state[key]
        return sizes, Switti
    if "cond_proj.weight" in state:
        sizes = read_var_clip_config(state, path)
        return sizes.replace(**_text_side(config)), VARClip
    if config is not None:
        raise CheckpointError(f"config has no effect on '{path}', whose tensors tell all: leave it out")
    return read_var_config(state, path), VAR


def _text_side(config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """What the tensors of a VAR-CLIP do not say."""
    if config is None:
        return {}
    if not isinstance(config, Mapping) or config.keys() - TEXT_SIDE:
        raise CheckpointError(
            f"config of a VAR-CLIP is a dict of {' and '.join(TEXT_SIDE)}, got {shown(config)}; its tensors "
            "tell the rest"
        )
    return dict(config)


def _settings(path: Path, config: str | Path | Mapping[str, Any] | None) -> dict[str, Any]:
    """What the tensors of a Switti do not say."""
    if isinstance(config, Mapping):
        settings: Any = dict(config)
        told = "its configuration"
    else:
        file = path.parent / SWITTI_CONFIG if config is None else Path(config)
        told = f"'{file}'"
        if not file.is_file():
            raise CheckpointError(
                f"'{path}' is a Switti, whose tensors do not tell whether it is causal: there is no file "
                f"{told}; put its config.json there, or give the path (in Python, config=...)"
            )
        try:
            settings = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            raise CheckpointError(f"{told} is not JSON: expected the config.json of a Switti") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("use_ar"), bool):
        raise CheckpointError(f"{told} has no 'use_ar': expected the config.json of a Switti")
    return settings


def _tensors_in(path: str | Path) -> Path:
    path = Path(path)
    return path / SWITTI_TENSORS if (path / SWITTI_TENSORS).is_file() else path


def _of_scales(state: StateDict, config: VQVAEConfig) -> StateDict:
    """The tensors of a Switti's tokenizer, which is the same for all numbers of scales. Statistics of its
    training, which nothing reads, have a row for each of ten."""
    key, num_scales = "quantize.ema_vocab_hit_SV", len(config.scale_sizes)
    found = state.get(key)
    if found is not None and found.ndim == 2 and len(found) != num_scales:
        return state | {key: found.new_zeros(num_scales, found.shape[1])}
    return state


def official_files(transformer: NextScaleModel) -> tuple[str, str]:
    """Names of the files of the transformer and of the tokenizer that `save_official` writes."""
    if isinstance(transformer, Switti):
        return f"transformer/{SWITTI_TENSORS}", f"tokenizer/{SWITTI_TENSORS}"
    return "var.pth", "vae.pth"


def save_official(
    transformer: NextScaleModel, tokenizer: VQVAE, folder: str | Path, dtype: torch.dtype | str | None = None
) -> tuple[Path, Path]:
    """Write the two state dicts as the official code of the family loads them; returns their paths.

    `var.pth` and `vae.pth`; of a Switti, `transformer/model.safetensors` with its `config.json`, and
    `tokenizer/model.safetensors`.

    Args:
        dtype: of the stored floating-point tensors; by default each tensor's own.

    Raises:
        ConfigError: there is no such dtype, or the format cannot hold the model.
    """
    of_transformer, of_tokenizer = (Path(folder) / name for name in official_files(transformer))
    more: StateDict = {}
    for name in TEXT_SIDE if isinstance(transformer, VARClip) else ():
        published, ours = VARClipConfig.model_fields[name].default, getattr(transformer.config, name)
        if ours != published:
            raise ConfigError(
                f"the published format of VAR-CLIP cannot hold this model, whose {name} is {ours} and would "
                f"be read as {published}: write it with save_pretrained (on the command line --format "
                "nextscale)"
            )
    if isinstance(transformer, Switti):
        settings = switti_settings(transformer.config)
        again = read_switti_config(transformer.state_dict(), of_transformer, settings)
        if changed := changed_value(again.model_dump(), transformer.config.model_dump()):
            name, read, ours = changed
            raise ConfigError(
                f"the published format of Switti cannot hold this model, whose {name} is {ours} and would be "
                f"read as {read}: write it with save_pretrained (on the command line --format nextscale)"
            )
        of_transformer.parent.mkdir(parents=True, exist_ok=True)
        write_text_aside(of_transformer.with_name(SWITTI_CONFIG), json.dumps(settings, indent=2) + "\n")
        scale_L = transformer.schedule.scale_of_token()
        hides = torch.lt if transformer.config.is_causal else torch.ne
        bias_LL = torch.zeros(len(scale_L), len(scale_L))
        bias_LL.masked_fill_(hides(scale_L[:, None], scale_L[None]), float("-inf"))
        more = {"attn_bias_for_masking": bias_LL[None, None]}
    for path in (of_transformer, of_tokenizer):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(transformer, of_transformer, dtype, transformer.FLOAT32_TENSORS, more)
    write_tensors(tokenizer, of_tokenizer, dtype)
    return of_transformer, of_tokenizer


def switti_settings(config: SwittiConfig) -> dict[str, Any]:
    """What the config.json of a published Switti says, and its text encoders, if they are other ones."""
    settings = {"depth": config.depth, **dict.fromkeys(SWITTI_ALWAYS, True), "use_ar": config.is_causal}
    settings |= {"rope_size": config.rope_size, "rope_theta": config.rope_theta}
    if config.text_encoders != SWITTI_ENCODERS:
        settings["text_encoders"] = list(config.text_encoders)
    reso = 16 * config.scale_sizes[-1]
    return settings if reso == 512 else settings | {"reso": reso}


def _var_sizes(get: Get, state: StateDict, path: str | Path) -> Callable[[], dict[str, Any]]:
    """What all transformers of VAR's structure have; looked up when called, but for the scales."""
    width, codebook_width = get("word_embed.weight", 2)
    sizes = _scale_sizes(get, state, path)
    return lambda: dict(
        depth=count_layers(state, "blocks."),
        width=width,
        num_heads=get("blocks.0.attn.scale_mul_1H11", 4)[1],
        mlp_ratio=get("blocks.0.ffn.fc1.weight", 2)[0] / width,
        codebook_size=get("head.weight", 2)[0],
        codebook_width=codebook_width,
        scale_sizes=sizes,
        shared_adaln="shared_ada_lin.1.weight" in state,
    )


def _scale_sizes(get: Get, state: StateDict, path: str | Path) -> tuple[int, ...]:
    get("lvl_1L", 2)
    counts = Counter(state["lvl_1L"].flatten().tolist())
    if sorted(counts) != list(range(len(counts))) or any(math.isqrt(n) ** 2 != n for n in counts.values()):
        raise CheckpointError(f"'{path}': 'lvl_1L' does not describe square scales, found {dict(counts)}")
    return tuple(math.isqrt(length) for _, length in sorted(counts.items()))


def _checked(path: str | Path, record: type[Sizes], values: Callable[[], dict]) -> Sizes:
    """A record of sizes; an impossible one is the file's fault, not the user's."""
    try:
        return record(**values())
    except CheckpointError:
        raise
    except NextscaleError as error:
        raise CheckpointError(f"'{path}' has sizes that no model can have: {error}") from None
