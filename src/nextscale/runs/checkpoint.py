"""Checkpoints that are whole or absent, and the newest of a run.

trainer_state.json      step, controllers, schedule, and the optimizer's settings
model.safetensors       the weights; where some are frozen, as under an adapter, the trained ones alone
average.safetensors     their moving average, if one is kept
reference.safetensors   the reference, if it moves
optimizer.safetensors   the optimizer's state of each, as PARAMETER/STATE
random-RANK.safetensors the random states of each process

Tensors and JSON alone: whatever a checkpoint holds, loading it runs nothing.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from nextscale.base.average import Average
from nextscale.base.errors import CheckpointError, first_sentence
from nextscale.base.files import write_text_aside
from nextscale.base.tensors import check_tensors, save_tensors
from nextscale.runs.paths import by_step, step_name
from nextscale.runs.sharding import local_part_of

STATE_FILE = "trainer_state.json"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
AVERAGE_FILE, REFERENCE_FILE = "average.safetensors", "reference.safetensors"
FORMAT_VERSION = 2
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # however the model is spread over processes


def save_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    folder: Path,
    step: int,
    state: dict[str, Any],
    limit: int,
    *,
    average: Average | None = None,
    frozen: str | None = None,
    reference: nn.Module | None = None,
) -> Path:
    """Write a checkpoint aside and rename it when it is whole; then remove all but the newest `limit`.

    Args:
        model: what is trained, as it is wrapped for several processes.
        folder: the run's folder of checkpoints.
        step: the number of steps done.
        state: the trainer's own state; must be JSON.
        average: of what is trained, if one is kept.
        frozen: fingerprint of the parameters that are not trained, if there are any: they are not written.
        reference: the reference, if it moves; the same in all processes.

    Returns:
        the checkpoint's path.

    Raises:
        CheckpointError: a weight is not finite; the earlier checkpoints stay.
    """
    final = folder / step_name(step)
    aside = folder / f".writing-{final.name}"
    weights = _weights(model)
    check_finite(accelerator.unwrap_model(model))
    averaged: dict[str, Tensor] = {}
    if average is not None:
        with average.in_place():  # on a CPU, what `_weights` gives are the model's own tensors
            averaged = {name: each.clone() for name, each in _weights(model).items()}
    # Before its first step an optimizer has no state, and asking for one would make it take a step.
    moments: Any = get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {}
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_tensors(_random_state(), aside / f"random-{accelerator.process_index}.safetensors")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        save_tensors(weights, aside / MODEL_FILE)
        if averaged:
            save_tensors(averaged, aside / AVERAGE_FILE)
        if reference is not None:
            ours = {name: each.detach() for name, each in reference.named_parameters()}
            save_tensors(ours, aside / REFERENCE_FILE)
        save_tensors(_flat(moments.get("state", {})), aside / OPTIMIZER_FILE)
        content = state | {
            "format_version": FORMAT_VERSION,
            "step": step,
            "frozen": frozen,
            "optimizer": moments.get("param_groups", []),
        }
        write_text_aside(aside / STATE_FILE, json.dumps(content, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def load_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    *,
    average: Average | None = None,
    frozen: str | None = None,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore the model, the optimizer and the random states; returns the trainer's own state.

    Args:
        average, frozen, reference: as in `save_checkpoint`.

    Raises:
        CheckpointError: a file of the checkpoint is missing or broken, or was written by an earlier version;
        or the parameters that are not trained are not those of its run.
    """
    if (path / "optimizer.bin").exists():
        raise CheckpointError(
            f"checkpoint '{path}' was written by an earlier version of nextscale, whose files can run code: "
            "finish that run with that version, or begin a new one"
        )
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if state["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format_version {state['format_version']}, expected {FORMAT_VERSION}")
        if state.get("frozen") != frozen:
            raise CheckpointError(
                f"checkpoint '{path}' holds only what its run trained, and the rest of this model is not "
                "that run's: go on with the model that it began with, and the same options of tuning"
            )
        if average is not None:
            _load_weights(model, path / AVERAGE_FILE)
            average.exchange()  # what the model holds now is replaced next
        _load_weights(model, path / MODEL_FILE)
        if reference is not None:
            _load_reference(reference, path / REFERENCE_FILE)
        if groups := state["optimizer"]:
            for group in groups:
                if not all(math.isfinite(group[name]) for name in ("lr", "eps", "weight_decay")):
                    raise ValueError("a setting of the optimizer is not finite")
            moments: Any = {"state": _nested(load_file(path / OPTIMIZER_FILE)), "param_groups": groups}
            set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
        random_file = path / f"random-{accelerator.process_index}.safetensors"
        if random_file.exists():  # not, where the run goes on with more processes than it had
            _set_random_state(load_file(random_file))
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged file, whatever its bytes lead to
        raise CheckpointError(f"checkpoint '{path}' cannot be read: {first_sentence(error)}") from error
    return state


def _is_trained(model: nn.Module) -> Callable[[str], bool]:
    """Whether a tensor of a model's state is in its checkpoints: all of a model that is trained whole, else
    the parameters that are trained."""
    parameters = dict(model.named_parameters())
    if all(each.requires_grad for each in parameters.values()):
        return lambda name: True
    # Wrappers for several processes put their own words before the names.
    trained = {name.removeprefix("module.") for name, each in parameters.items() if each.requires_grad}
    return lambda name: name in trained


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """What is trained of a model, however it is spread over processes, on the CPU."""
    state: Any = get_model_state_dict(model, options=replace(WHOLE, ignore_frozen_params=True))
    is_trained = _is_trained(model)
    return {name: each.contiguous() for name, each in state.items() if is_trained(name)}


def _load_weights(model: nn.Module, file: Path) -> None:
    weights: Any = load_file(file)
    state: Any = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    is_trained = _is_trained(model)
    check_tensors(weights, {name: each for name, each in state.items() if is_trained(name)}, file)
    # `strict` would also ask for what is frozen, which the file has no need to hold. Nothing else may differ.
    left: Any = set_model_state_dict(model, weights, options=replace(WHOLE, strict=False))
    if wrong := [*left.unexpected_keys, *filter(is_trained, left.missing_keys)]:
        raise CheckpointError(f"'{file}' does not fit the model: '{wrong[0]}' is in one of them alone")


@torch.no_grad()
def _load_reference(model: nn.Module, file: Path) -> None:
    weights: dict[str, Tensor] = load_file(file)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    check_tensors(weights, parameters, file)
    for name, each in parameters.items():
        each.copy_(weights[name])


def list_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return [path for path in by_step(folder).values() if (path / STATE_FILE).is_file()]


def find_checkpoint(resume: str, folder: Path) -> Path | None:
    """The checkpoint to resume from; None when `resume` is "auto" and there is none yet.

    Args:
        resume: "auto" for the newest in `folder`, or a checkpoint's path.

    Raises:
        CheckpointError: the path is not a checkpoint.
    """
    if resume == "auto":
        return next(reversed(list_checkpoints(folder)), None)
    path = Path(resume)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(f"'{path}' is no checkpoint: expected 'auto' or a folder with a {STATE_FILE}")
    return path


def check_finite(model: nn.Module) -> None:
    """Check that a model may be written. All processes must call it, and either none raises or all.

    Raises:
        CheckpointError: names the first parameter that holds NaN or infinity.
    """
    parameters = ((name, local_part_of(each)) for name, each in model.named_parameters())
    broken = next((name for name, each in parameters if not each.isfinite().all()), None)
    for name in gather_object([broken]):
        if name:
            raise CheckpointError(
                f"the model was not saved: '{name}' holds NaN or infinity; earlier checkpoints are untouched"
            )


def _flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{parameter}/{name}": torch.as_tensor(value).contiguous()
        for parameter, values in state.items()
        for name, value in values.items()
    }


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, _, name = key.rpartition("/")
        state.setdefault(parameter, {})[name] = value
    return state


def _random_state() -> dict[str, Tensor]:
    """Of torch, numpy and Python. Our own randomness is passed in; a user's reward may draw from these."""
    version, numbers, gauss = random.getstate()
    words: Any = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(numbers),
        "python_gauss": torch.tensor([float("nan") if gauss is None else gauss], dtype=torch.float64),
        "numpy": torch.tensor(words[1].astype(np.int64)),
        "numpy_gauss": torch.tensor([words[2], words[3], words[4]], dtype=torch.float64),
    }
    assert version == 3, version
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return state | {f"cuda_{i}": each for i, each in enumerate(devices)}


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    gauss = state["python_gauss"].item()
    random.setstate((3, tuple(state["python"].tolist()), None if gauss != gauss else gauss))
    position, has_gauss, numpy_gauss = state["numpy_gauss"].tolist()
    words = state["numpy"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(position), int(has_gauss), numpy_gauss))
    devices = [state[name] for name in sorted(state) if name.startswith("cuda_")]
    if torch.cuda.is_available() and len(devices) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(devices)
