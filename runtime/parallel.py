"""From one process to many: torchrun's ranks, and how the model is spread over them.

    ddp    every rank holds the whole model; gradients are summed, in float32, after the last backward pass
    fsdp   FSDP2: weights, gradients and AdamW's moments are sharded over the ranks. A layer is gathered while
           it computes, and the whole model, in its compute type, while the sampler runs. Over several nodes
           they are sharded within a node and replicated across (hybrid sharding)

A whole group lives on one rank, what it samples depends on (seed, step, prompt) only, and a loss is a sum whose
weights span the tokens of all ranks. So the numbers depend neither on the kind nor on the number of ranks.
"""
import datetime
import os
import resource
import sys
import time
import traceback
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard


@dataclass
class Ranks:
    """This process among all that torchrun started (rank 0 of 1 without torchrun)."""
    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @classmethod
    def start(cls, timeout_minutes: float = 30) -> "Ranks":
        """timeout_minutes: how long a rank waits for the others before it ends with an error."""
        transformers.logging.disable_progress_bar()
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")    # packs differ in size
        cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans every new shape anew, and ours are all new
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if cuda:
            torch.cuda.set_device(device)
        sys.excepthook = _name_the_rank
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(minutes=timeout_minutes))
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def dtype(self, name: str) -> torch.dtype:
        """"auto" is bfloat16 on an accelerator and float32 elsewhere."""
        auto = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return auto if name == "auto" else getattr(torch, name)

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def gather(self, items: list) -> list:
        """The items of all ranks, in the order of the ranks, on every rank."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def share(self, items: list) -> list:
        """This rank's equal part of a list, in order."""
        size = len(items) // self.world
        return items[self.rank * size:][:size]


def _name_the_rank(kind, error, trace):
    """How an uncaught error on one rank of many is printed; torchrun then ends the others."""
    lost = isinstance(error, dist.DistError) or any(
        words in str(error) for words in ("gloo", "by peer", "Broken pipe", "Timed out"))
    hint = "; another rank is gone or waits elsewhere, its own message says why" if lost else ""
    print("".join(traceback.format_exception(kind, error, trace)) + f"error: rank {os.environ['RANK']} of "
          f"{os.environ['WORLD_SIZE']}: {kind.__name__}{hint}", file=sys.stderr, flush=True)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: reserved on the accelerator where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---------------------------------------------------------------- FSDP

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
        raise ValueError("--parallel fsdp shards whole models; LoRA matrices are small: use --parallel ddp")
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (ranks.world // local, local) if ranks.world > local else (ranks.world,)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("node", "local")[-len(shape):])
    precision = MixedPrecisionPolicy(param_dtype=crm.model.lm_head.weight.dtype, reduce_dtype=torch.float32,
                                     cast_forward_inputs=False)
    crm.model.float()

    def sharded(model) -> Root:
        root = Root(model)
        for part in (*model.model.visual.blocks, *model.model.language_model.layers, root):
            fully_shard(part, mesh=mesh, mp_policy=precision)
        root(lambda: None)                      # the first call makes it the root, over the parts
        root.reshard()
        return root

    crm.root = sharded(crm.model)
    crm.ref_root = sharded(crm.ref_model) if crm.ref_model else None


@contextmanager
def unsharded(crm):
    """Inside, every rank holds all weights of crm.model, so that sampling, and scoring without gradient, need no other
    rank. All ranks must enter and leave together. Without effect where the model is not sharded."""
    root = crm.root
    parts = [part for part in root.modules() if isinstance(part, FSDPModule)] if root else []
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


def equal_passes(crm, ranks: Ranks, items: list):
    """(item, 1.0) for each of this rank's forward and backward passes. Sharded ranks meet in every pass, so there
    (first item, 0.0) follows, a pass without effect, until all ranks have made equally many."""
    missing = max(ranks.gather([len(items)])) - len(items) if crm.root else 0
    return [(item, 1.0) for item in items] + [(items[0], 0.0)] * missing
