"""FSDP2: a model whose parameters are spread over all processes, by torch's own `fully_shard`.

The same code runs on GPUs and, with gloo, on CPUs. Accelerate's FSDP2 exists on accelerators alone, and names
a model's layers as Hugging Face's models do; its launcher's settings are read all the same
(`runs/launch.py`).
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nextscale.models.protocol import NextScaleModel


class Sharded:
    """A model's copy with its parameters spread over all processes; they are gathered part by part as it
    runs. The model itself is emptied, for memory's sake, until `restore`.

    Args:
        original: the model, with the same parameters in all processes.
        reshard_after_forward: let go of gathered parameters between the forward and the backward pass, which
            gathers them anew: less memory, half as much again to send.

    Attributes:
        model: the copy, to be run by all processes, equally often except within `whole`.
    """

    def __init__(self, original: NextScaleModel, *, reshard_after_forward: bool = True) -> None:
        self.original, self.reshard_after_forward = original, reshard_after_forward
        held = [*original.parameters(), *original.buffers()]
        self.model = copy.deepcopy(original, {id(each): each for each in held})  # of the same tensors
        for name, each in list(original.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            emptied = nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
            original.get_submodule(parent).register_parameter(leaf, emptied)
            del each
        del held
        # It warns of outputs that may be changed in place; nothing changes those of a part.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        for part in self.model.parts():
            fully_shard(part, reshard_after_forward=reshard_after_forward)
        # What is in no part is gathered for the whole of a pass.
        fully_shard(self.model, reshard_after_forward=False)
        for name in ("features", "features_of_branches"):  # which a reference runs alone
            register_fsdp_forward_method(self.model, name)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold all parameters in all processes until the end of the block.

        To sample, which runs the model once for every scale of every batch: they are gathered once for all of
        these, and each process may run it as often as it needs.
        """
        parts = [each for each in self.model.modules() if isinstance(each, FSDPModule)]
        for part in parts:
            part.unshard()
            part.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            for part in parts:
                reshards = self.reshard_after_forward and part is not self.model
                part.set_reshard_after_forward(reshards, recurse=False)
                part.reshard()

    def gathered(self) -> NextScaleModel:
        """A copy of the model on the CPU, whole in the first process, and without weights in the others. All
        call it."""
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        model = copy.deepcopy(self.original)  # which is empty
        if state:
            model.load_state_dict(state, assign=True)
        return model

    def restore(self) -> NextScaleModel:
        """The original model, filled with the whole parameters, in all processes."""
        state = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        self.original.load_state_dict(state, assign=True)
        return self.original


def whole_of(value: Tensor) -> Tensor:
    """The whole of a tensor that may be spread over all processes, which then must all ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def local_part_of(value: Tensor) -> Tensor:
    """What this process holds of a tensor that may be spread over all processes."""
    return value.to_local() if isinstance(value, DTensor) else value
