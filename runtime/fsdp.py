"""--parallel fsdp: FSDP2, weights, gradients and AdamW's moments sharded over the ranks.

A layer is gathered while it computes, and the whole model, in its compute type, while the sampler
runs. Over several nodes a model is sharded within a node and replicated across nodes (hybrid
sharding).
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.parallel import Ranks


class Root(nn.Module):
    """What FSDP wraps as the whole. Its hooks gather the weights around this forward, which runs
    any function that uses the model: a log-probability of completions is not what the model's own
    forward computes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable, *args: Any) -> Any:
        return function(*args)


class Sharded:
    """A model whose weights are spread over the ranks. All ranks make it, and use it, together.

    model: each of its parameters becomes a shard, in place. Where any of them trains, all shards
    are float32, because they are AdamW's master weights. Choose what trains before. parts: the
    layers, each of which is gathered and freed as one. compute_dtype: the type to which weights are
    gathered."""

    def __init__(
        self, model: nn.Module, parts: Sequence[nn.Module], ranks: Ranks, compute_dtype: torch.dtype
    ):
        if any(parameter.requires_grad for parameter in model.parameters()):
            model.float()
        mesh = node_mesh(ranks)
        # gradients of bfloat16 computation are added up in float32
        precision = MixedPrecisionPolicy(
            param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        root = Root(model)
        for part in (*parts, root):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        root(lambda: None)  # the first call makes it the root, over the parts
        root.reshard()
        self.root = root
        self.modules = [module for module in root.modules() if isinstance(module, FSDPModule)]
        self.is_gathered = False

    def run(self, function: Callable, *args: Any) -> Any:
        """function(*args), which uses the weights. All ranks must call this together, unless they
        are gathered."""
        if self.is_gathered:
            return function(*args)
        return self.root(function, *args)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every rank holds all weights, so that sampling, and scoring without gradient,
        need no other rank. All ranks must enter and leave together. Without effect where the
        weights are gathered already."""
        if self.is_gathered:
            yield
            return
        for module in self.modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        self.is_gathered = True
        try:
            yield
        finally:
            self.is_gathered = False
            for module in self.modules:
                module.set_reshard_after_forward(module is not self.root, recurse=False)
                module.reshard()
            # FSDP keeps a record of the order of forward passes, and the next backward pass gathers
            # layers ahead by it. The passes made in here belong to no backward pass, and ranks may
            # have made different ones: one rank would then wait for layers that the others never
            # send.
            self.root.reset_iter_state()


def node_mesh(ranks: Ranks) -> DeviceMesh:
    """The ranks of a node share a model. Over several nodes the mesh has two dimensions, "node" and
    "local"."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    if ranks.world == local:
        return init_device_mesh(ranks.device.type, (local,), mesh_dim_names=("local",))
    return init_device_mesh(
        ranks.device.type, (ranks.world // local, local), mesh_dim_names=("node", "local")
    )
