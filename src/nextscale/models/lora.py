"""Low-rank adapters (LoRA) on linear layers, by peft, and their files in peft's own format.

adapter_config.json         which layers, their rank and scale: peft's LoraConfig
adapter_model.safetensors   the adapter's tensors; its metadata also say which base they belong to, and how
                            the adapted model is sampled

Source: LoRA (arXiv 2106.09685); rank-stabilised scale (2312.03732); DoRA (2402.09353).
"""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nextscale.base.errors import CheckpointError, first_sentence
from nextscale.base.files import replacing
from nextscale.base.seeding import derive_seed
from nextscale.base.tensors import save_tensors
from nextscale.policy import SamplingConfig

# peft takes seconds to import: that is done where a model has, or gets, an adapter.

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CONFIG, TENSORS = ADAPTER_FILES
METADATA = "nextscale"
NAME = "default"  # peft's name of an adapter that has none
PREFIX = "base_model.model."  # of every tensor in peft's files: its wrapper's path to the model
SAMPLES = 1024  # values of each tensor that a fingerprint reads
BASE_AS_IT_IS = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin an adapter that leave the base alone. Others, such as pissa and olora, take a part out of it,
which only peft's own loader takes out again."""

Model = TypeVar("Model", bound=nn.Module)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can have an adapter."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def adapter_parameters(layers: Sequence[str], use_dora: bool = False) -> list[str]:
    """Names of the parameters that `add_adapter` adds to these layers."""
    kinds = ["lora_A", "lora_B", *(["lora_magnitude_vector"] if use_dora else [])]
    return [f"{layer}.{kind}.{NAME}.weight" for layer in layers for kind in kinds]


def add_adapter(
    model: nn.Module,
    layers: Sequence[str],
    *,
    r: int,
    alpha: int,
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int = 0,
) -> None:
    """Put an adapter on these linear layers, in place, and freeze all other parameters.

    The model stays of its class, with the adapter's parameters among its own. It computes what it did before,
    for the second factor begins at zero.

    Args:
        seed: of the first factor; the same numbers in every process.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=r, lora_alpha=alpha, target_modules=list(layers), use_rslora=use_rslora, use_dora=use_dora
    )
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(derive_seed("adapter", seed))
        inject_adapter_in_model(config, model)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers that carry an adapter, by name."""
    if not hasattr(model, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The model is its base, to the bit."""
    # Not peft's `enable_adapters`, which also switches requires_grad: a sharded model would remember that.
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merge_adapter(model: nn.Module) -> None:
    """Add the adapter to the weights of its layers, in place, and take it off."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def merged(model: Model) -> Model:
    """The model if it has no adapter; else a copy with the adapter merged."""
    if adapted_layers(model):
        model = copy.deepcopy(model)
        merge_adapter(model)
    return model


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of the base, under the names that they have without an adapter."""
    return {
        name.replace(".base_layer.", "."): each
        for name, each in model.named_parameters()
        if ".lora_" not in name
    }


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells the weights of one model from those of another: a hash over names, shapes and up to 1024
    values of each, at equal distances. Reading every value of a large model would take many seconds."""
    hashed = hashlib.sha256()
    for name, each in sorted(tensors.items()):
        values = each.detach().flatten()
        values = values[:: max(values.numel() // SAMPLES, 1)].float().cpu()
        hashed.update(f"{name} {tuple(each.shape)}".encode())
        hashed.update(values.numpy().tobytes())
    return hashed.hexdigest()


def write_adapter(model: nn.Module, folder: Path, base: str | None, sampling: SamplingConfig) -> None:
    """Write the adapter of a model in peft's format.

    Args:
        base: name or path of the model that the adapter is for; of a path on this machine alone, only the
            folder's name is written.
        sampling: how the adapted model is sampled.
    """
    from peft import get_peft_model_state_dict

    configs: Any = model.peft_config
    config = copy.copy(configs[NAME])
    config.base_model_name_or_path = Path(base).name if base and Path(base).is_absolute() else base
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    state: Any = get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    tensors = {f"{PREFIX}{name}": each.detach().cpu().contiguous() for name, each in state.items()}
    about = {"base": fingerprint(base_parameters(model)), "sampling": sampling.told()}
    with replacing(folder / TENSORS) as aside:
        save_tensors(tensors, aside, {"format": "pt", METADATA: json.dumps(about)})


def read_adapter(model: nn.Module, folder: Path) -> SamplingConfig | None:
    """Add the adapter in a folder to its base, and merge it; returns how the adapted model is sampled, if the
    files say so. Those that others wrote with peft do not.

    Args:
        model: the base, in float32.

    Raises:
        CheckpointError: the files are no LoRA adapter, one of another base, or one that changes more of a
            model than an adapter does.
    """
    from peft import LoraConfig

    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("peft_type")
        if kind != "LORA":
            raise CheckpointError(f"'{folder}' is an adapter of the kind {kind}, expected LORA")
        held = load_file(folder / TENSORS)
        tensors = {name.removeprefix(PREFIX): each for name, each in held.items()}
        if broken := next((name for name, each in tensors.items() if not each.isfinite().all()), None):
            raise CheckpointError(f"'{folder}' cannot be used: its '{broken}' holds NaN or infinity")
        with safe_open(folder / TENSORS, "pt") as file:
            about: dict[str, Any] = dict(json.loads((file.metadata() or {}).get(METADATA, "{}")))
        sampling = SamplingConfig.from_mapping(about["sampling"]) if "sampling" in about else None
        config: Any = LoraConfig.from_pretrained(str(folder))
        _check_plain(config, folder)
        config.init_lora_weights = True  # what follows replaces them
        _inject(config, model, tensors, about, folder)
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file, whatever its bytes lead to
        raise CheckpointError(
            f"'{folder}' is no adapter that can be read ({first_sentence(error)}): expected the folder with "
            f"{CONFIG} and {TENSORS}, as peft and a run's final/adapter have them"
        ) from error
    model.requires_grad_(True)
    return sampling


def _check_plain(config: Any, folder: Path) -> None:
    """Check that an adapter is all there is to it.

    Raises:
        CheckpointError: it holds layers of the model too, or its training began by changing the base.
    """
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name, None):
            raise CheckpointError(
                f"'{folder}' cannot be used: it has {name}, trained layers of the model besides the adapter; "
                "merge it with peft and load the whole model"
            )
    if config.init_lora_weights not in BASE_AS_IT_IS:
        raise CheckpointError(
            f"'{folder}' cannot be used: it began with init_lora_weights {config.init_lora_weights!r}, which "
            "changes the base; convert it to a plain LoRA, as peft's documentation of that option says"
        )


def _inject(
    config: Any, model: nn.Module, tensors: dict[str, Tensor], about: Mapping[str, Any], folder: Path
) -> None:
    """Put the adapter on its base, and merge it.

    Raises:
        CheckpointError: it is one of another base.
    """
    from peft import inject_adapter_in_model, set_peft_model_state_dict

    name = config.base_model_name_or_path
    other = f"'{folder}' is an adapter for other weights than this model's"
    other += f": it was trained on '{name}', or on a model made from that" if name else ""
    if about.get("base", "") not in ("", fingerprint(base_parameters(model))):
        raise CheckpointError(other)
    try:
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(config, model)
        found: Any = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{other} ({first_sentence(error)})") from error
    absent = [each for each in found.missing_keys if ".lora_" in each]
    if found.unexpected_keys or absent:
        raise CheckpointError(f"{other}: '{[*found.unexpected_keys, *absent][0]}' is in one of them alone")
    merge_adapter(model)
