"""Checkpoints that are whole or absent, and the newest of a run.

trainer_state.json      step, controllers, schedule, and the optimizer's settings
model.safetensors       the weights; where some are frozen, as under an adapter, the trained ones alone
average.safetensors     their moving average, if one is kept
reference.safetensors   the reference, if it moves
optimizer.safetensors   the optimizer's state of each, as PARAMETER/STATE
random-RANK.safetensors the random states of each process
manifest.json           the size and hash of each of these files

Tensors and JSON alone: whatever a checkpoint holds, loading it runs nothing.
"""

import contextlib
import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
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
from nextscale.base.errors import CheckpointError, ConfigError, first_sentence
from nextscale.base.files import REPLACED, discard_folder, put_in_place, read_text, write_text_aside
from nextscale.base.processes import fail_together
from nextscale.base.records import changed_value
from nextscale.base.tensors import check_tensors, save_tensors
from nextscale.runs.manifest import MANIFEST_FILE, find_damage, write_manifest
from nextscale.runs.paths import by_step, step_name
from nextscale.runs.sharding import local_part_of

STATE_FILE = "trainer_state.json"
MODEL_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.safetensors"
AVERAGE_FILE, REFERENCE_FILE = "average.safetensors", "reference.safetensors"
FORMAT_VERSION = 3
WITHOUT_MANIFEST = 2  # the version before, which is read as well: its checkpoints are the same but for that
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
    base: str | None = None,
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
        base: fingerprint of the model that the run began with, if its reference is a copy of that.
        reference: the reference, if it moves; the same in all processes.

    Returns:
        the checkpoint's path.

    Raises:
        CheckpointError: a weight is not finite; the earlier checkpoints stay.
        OSError: it cannot be written, as when the disk is full; likewise.
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
    is_main = accelerator.is_main_process
    with fail_together():
        if is_main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    with fail_together():
        save_tensors(_random_state(), aside / f"random-{accelerator.process_index}.safetensors")
    with fail_together():
        if is_main:
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
                "base": base,
                "optimizer": moments.get("param_groups", []),
            }
            write_text_aside(aside / STATE_FILE, json.dumps(content, indent=2) + "\n")
            write_manifest(aside)
            put_in_place(aside, final)
            tidy_checkpoints(folder, step, limit)
    return final


def load_checkpoint(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: Path,
    *,
    average: Average | None = None,
    frozen: str | None = None,
    base: str | None = None,
    reference: nn.Module | None = None,
) -> dict[str, Any]:
    """Restore the model, the optimizer and the random states; returns the trainer's own state.

    Args:
        average, frozen, base, reference: as in `save_checkpoint`.

    Raises:
        CheckpointError: a file of the checkpoint is missing or broken, or was written by an earlier version;
        or the parameters that are not trained, or the reference, are not those of its run.
    """
    if (path / "optimizer.bin").exists():
        raise CheckpointError(
            f"checkpoint '{path}' was written by an earlier version of nextscale, whose files can run code: "
            "finish that run with that version, or begin a new one"
        )
    try:
        state = json.loads(read_text(path / STATE_FILE))
        if (version := state["format_version"]) not in (WITHOUT_MANIFEST, FORMAT_VERSION):
            raise ValueError(
                f"format_version {version}, expected {FORMAT_VERSION}: was it written by a later one?"
            )
        if state.get("frozen") != frozen:
            raise CheckpointError(
                f"checkpoint '{path}' holds only what its run trained, and the rest of this model is not "
                "that run's: go on with the model that it began with, and the same options of tuning"
            )
        if base is not None and state.get("base") not in (None, base):  # None: of an earlier version
            raise CheckpointError(
                f"checkpoint '{path}' is of a run that began with other weights than this model's, and "
                "measures its KL to them: load the model that it began with anew, and go on with that"
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
    """The checkpoints of a run, oldest first; see `find_checkpoint` for whether one is whole."""
    # A process that was killed while it replaced a checkpoint has left the former one under another name.
    found = by_step(folder, before=REPLACED) | by_step(folder)
    return [found[step] for step in sorted(found) if found[step].is_dir()]


def tidy_checkpoints(folder: Path, step: int, limit: int) -> None:
    """Remove all but the newest `limit` checkpoints up to a whole one, all later ones, and what killed
    processes left.

    Args:
        step: that of the whole one. Later ones go: they are of before the run went back to it.
    """
    kept = folder / step_name(step)
    if (former := folder / f"{REPLACED}{kept.name}").is_dir() and not kept.exists():
        former.rename(kept)
    found = by_step(folder)
    later = [each for number, each in found.items() if number > step]
    for old in [*later, *[each for number, each in found.items() if number <= step][:-limit]]:
        discard_folder(old)
    if kept.is_dir():
        for left in folder.glob(".*step-*"):
            shutil.rmtree(left, ignore_errors=True)


def find_checkpoint(
    accelerator: Accelerator, resume: str, folder: Path, warn: Callable[[str], None]
) -> Path | None:
    """The checkpoint to resume from; None when `resume` is "auto" and there is none yet. All processes call
    it; the main one reads the files.

    Args:
        resume: "auto" for the newest whole one in `folder`, or a checkpoint's path.
        warn: is told of each newer one that is damaged.

    Raises:
        CheckpointError: the path is no checkpoint, or damaged; or all that there are are damaged.
    """
    found: Path | None = None
    with fail_together():
        if accelerator.is_main_process:
            found = _newest_whole(folder, warn) if resume == "auto" else _whole(Path(resume))
    return broadcast_object_list([found])[0]


def check_options(resume: str, folder: Path, options: Mapping[str, Any]) -> None:
    """Check that a run goes on with the options of the checkpoint that it resumes from: what the optimizer
    and its schedule have been through is of those.

    Args:
        resume: as in `find_checkpoint`.
        options: what has to stay, from `fixed_values`.

    Raises:
        ConfigError: names the first that differs, and both values.
    """
    path = next(reversed(list_checkpoints(folder)), None) if resume == "auto" else Path(resume)
    if path is None:
        return
    try:
        earlier = json.loads(read_text(path / STATE_FILE)).get("options")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # damaged, which loading it says
    if not isinstance(earlier, Mapping):
        return  # of an earlier version
    present = json.loads(json.dumps(options))
    if "classes" not in earlier and "prompts" not in earlier:  # an earlier version did not say it of classes
        present.pop("classes", None)
    if changed := changed_value(earlier, present):
        key, was, now = changed
        raise ConfigError(
            f"{key} is {now!r}, but checkpoint '{path}' was written with {was!r}: resume it with that value, "
            "or begin a new run"
        )


def check_resume(resume: str) -> None:
    """Check that there is something to resume, without reading it.

    Raises:
        CheckpointError: `resume` is a path that is no checkpoint.
    """
    if resume != "auto" and not (Path(resume) / STATE_FILE).is_file():
        raise CheckpointError(f"'{resume}' is no checkpoint: expected 'auto' or a folder with a {STATE_FILE}")


def _newest_whole(folder: Path, warn: Callable[[str], None]) -> Path | None:
    damaged: list[tuple[Path, str]] = []
    for path in reversed(list_checkpoints(folder)):
        if (damage := _damage(path)) is None:
            for other, found in damaged:
                warn(f"checkpoint '{other}' cannot be read: {found}; '{path.name}', an earlier one, is taken")
            return path
        damaged.append((path, damage))
    if damaged:
        path, damage = damaged[0]
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read: {damage}; and no earlier one is whole: restore it from a "
            "copy, or begin anew in another --run.output_dir"
        )
    return None


def _whole(path: Path) -> Path:
    check_resume(str(path))
    if damage := _damage(path):
        raise CheckpointError(
            f"checkpoint '{path}' cannot be read: {damage}; go on from another one, or with --run.resume auto"
        )
    return path


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole, or of a version that had no manifest."""
    if not (path / MANIFEST_FILE).exists():
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
            if json.loads(read_text(path / STATE_FILE))["format_version"] < FORMAT_VERSION:
                return None
    return find_damage(path)


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
    num_devices = sum(name.startswith("cuda_") for name in state)
    if torch.cuda.is_available() and num_devices == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state[f"cuda_{i}"] for i in range(num_devices)])
