"""--parallel fsdp: FSDP2, weights, gradients and AdamW's moments sharded over the ranks of torchrun.

A layer is gathered while it computes, and the whole model, in its compute type, while the sampler runs. Over several
nodes they are sharded within a node and replicated across (hybrid sharding).
"""

import os
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from runtime.parallel import Ranks


class Root(nn.Module):
    """What FSDP wraps as the whole. Its hooks gather the weights around this forward, which runs any function
    that uses the model: a log-probability of completions is not what the model's own forward computes."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function, *args):
        return function(*args)


def shard(crm, ranks: Ranks, offload: bool = False) -> None:
    """Shard the policy, and its reference model, over the ranks, once it is chosen what trains. The policy's shards are
    float32: they are AdamW's master weights."""
    if ranks.world == 1:
        return
    if offload:
        raise ValueError("--offload works with one process or --parallel ddp, not with fsdp")
    if crm.lora:
        raise ValueError(
            "--parallel fsdp shards whole models; LoRA matrices are small: use --parallel ddp"
        )
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (ranks.world // local, local) if ranks.world > local else (ranks.world,)
    mesh = init_device_mesh(
        ranks.device.type, shape, mesh_dim_names=("node", "local")[-len(shape) :]
    )
    precision = MixedPrecisionPolicy(
        param_dtype=crm.model.lm_head.weight.dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    crm.model.float()

    def sharded(model) -> Root:
        root = Root(model)
        for part in (*model.model.visual.blocks, *model.model.language_model.layers, root):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        root(lambda: None)  # the first call makes it the root, over the parts
        root.reshard()
        return root

    crm.root = sharded(crm.model)
    crm.ref_root = sharded(crm.ref_model) if crm.ref_model else None


@contextmanager
def unsharded(crm):
    """runtime.parallel.unsharded of a sharded model."""
    root = crm.root
    parts = [part for part in root.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    crm.root = None
    try:
        yield
    finally:
        crm.root = root
        for part in parts:
            part.set_reshard_after_forward(part is not root, recurse=False)
            part.reshard()
