"""From one process to many: torchrun's ranks, and how the model is spread over them.

    none   every rank holds the model; gradients are summed by hand after the last backward (the oracle)
    ddp    the same, but DistributedDataParallel sums while the last backward still runs; of a bfloat16 model
           it would add bfloat16 gradients, so those are still summed by hand, in float32
    fsdp   FSDP2: weights, gradients and AdamW's moments are cut over the ranks; a layer is gathered while
           it computes, and the whole model, in its compute type, while the sampler runs. Over several nodes
           they are cut within a node and repeated across (hybrid sharding)

A whole group lives on one rank, what it samples depends on (seed, step, prompt) only, and a loss is a sum
whose weights span the tokens of all ranks. So the numbers depend neither on the kind nor on how many.
"""
import datetime
import gc
import os
import resource
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

KINDS = ("none", "ddp", "fsdp")


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
        cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        torch.backends.cuda.enable_cudnn_sdp(False)     # it plans every new shape anew, and ours are all new
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if cuda:
            torch.cuda.set_device(device)
        sys.excepthook = _say_which_rank
        dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None,
                                timeout=datetime.timedelta(minutes=timeout_minutes))
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def dtype(self, name: str) -> torch.dtype:
        """"auto" is bfloat16 on an accelerator and float32 elsewhere."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(
            name, torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self, crm=None) -> None:
        """DDP is freed before its process group: the other way round can wait for a thread for ever."""
        if dist.is_initialized():
            if crm:
                crm.engine = directly
            gc.collect()
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


def _say_which_rank(kind, error, trace):
    """The end of an uncaught error on one rank of many; torchrun then ends the others."""
    lines = traceback.format_exception(kind, error, trace)
    lost = isinstance(error, dist.DistError) or any(
        s in str(error) for s in ("gloo", "by peer", "Broken pipe", "Timed out"))
    hint = "; another rank is gone or waits elsewhere, its own message says why" if lost else ""
    who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    print("".join(lines) + f"error: {who}: {kind.__name__}{hint}", file=sys.stderr, flush=True)


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: what it took of the accelerator where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            * (1 if sys.platform == "darwin" else 1024) / 1e9)


# ---------------------------------------------------------------- the model over the ranks

def directly(call, *args):
    return call(*args)


def spread(crm, kind: str, ranks: Ranks, offload: bool = False) -> str:
    """Cut or wrap the policy and its reference -> the kind that came of it. What trains has been chosen.

    Afterwards crm.engine(call, *args) runs `call` between the engine's hooks: the model's own forward is not
    what scores an answer."""
    if offload and ranks.world > 1 and kind == "fsdp":
        raise ValueError("--offload goes with one process or --parallel ddp, not fsdp")
    copied = offload or any(p.dtype != torch.float32 for p in crm.model.parameters() if p.requires_grad)
    if kind == "none" or kind == "ddp" and copied or not dist.is_initialized():
        return "none"
    if kind == "fsdp" and crm.lora:
        raise ValueError("--parallel fsdp cuts whole models; LoRA matrices are small: --parallel ddp")
    if kind == "fsdp" and crm.sampler:
        raise ValueError("--cuda-graphs needs weights that stay in place, which --parallel fsdp's do not")
    crm.model.forward = directly
    if kind == "ddp":
        crm.engine = DistributedDataParallel(crm.model, forward_sync_buffers=False)
        return kind
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (ranks.world // local, local) if ranks.world > local else (ranks.world,)
    mesh = init_device_mesh(ranks.device.type, shape, mesh_dim_names=("node", "local")[-len(shape):])
    compute = crm.model.lm_head.weight.dtype
    for model in filter(None, (crm.model, crm.frozen)):
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32)
        for part in (*model.model.visual.blocks, *model.model.language_model.layers, model):
            if model is crm.model:
                part.float()                    # the shards are AdamW's master weights
            fully_shard(part, mesh=mesh, mp_policy=precision)
        model.forward = directly
        model(lambda: None)                     # the first call through the root makes it the root, whole
        model.reshard()
    crm.engine = crm.model
    return kind


@contextmanager
def gathered(crm):
    """Inside, every rank holds all weights of crm.model, so that sampling, and scoring without gradient, need
    no other rank. Entered and left by all ranks together."""
    parts = [part for part in crm.model.modules() if isinstance(part, FSDPModule)]
    engine, crm.engine = crm.engine, directly
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not crm.model, recurse=False)
            part.reshard()
        crm.engine = engine


def deal(indexes: list[int], cost, ranks: Ranks, minibatches: int) -> list[int]:
    """Which places of a step's list of prompts are this rank's. A mini-batch is a run of places, the same on
    any number of ranks; of each, every rank gets equally many, the dearest first to who has least work."""
    P, world = len(indexes), ranks.world
    if world == 1:
        return list(range(P))
    costs = dict(ranks.gather([(p, cost(indexes[p])) for p in range(ranks.rank, P, world)]))
    mine, size = [], P // minibatches
    for first in range(0, P, size):
        hands, work = [[] for _ in range(world)], [0] * world
        for p in sorted(range(first, first + size), key=lambda p: -costs[p]):
            rank = min((r for r in range(world) if len(hands[r]) < size // world), key=lambda r: work[r])
            hands[rank].append(p)
            work[rank] += costs[p]
        mine += sorted(hands[ranks.rank])
    return mine


def passes(crm, ranks: Ranks, work: list):
    """(item, 1.0) for each of this rank's forward and backward passes, then (first item, 0.0) until every
    rank has made as many as the one with the most: DDP and FSDP exchange something in each."""
    spread_out = crm.engine is not directly
    idle = max(ranks.gather([len(work)])) - len(work) if spread_out else 0
    todo = [(item, 1.0) for item in work] + [(work[0], 0.0)] * idle if work else []
    for i, one in enumerate(todo, 1):
        ddp = isinstance(crm.engine, DistributedDataParallel)
        with crm.engine.no_sync() if ddp and i < len(todo) else nullcontext():
            yield one
