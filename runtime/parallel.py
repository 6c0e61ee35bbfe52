"""From one process to many: torchrun's ranks, and how the model is spread over them.

    ddp    every rank holds the whole model; gradients are summed, in float32, after the last backward pass
    fsdp   FSDP2: weights, gradients and AdamW's moments are sharded over the ranks, see runtime/fsdp.py

A whole group lives on one rank, what it samples depends on (seed, step, prompt) only, and a loss is a sum whose
weights span the tokens of all ranks. So the numbers depend neither on the kind nor on the number of ranks.
"""

import datetime
import os
import resource
import sys
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import transformers


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
        os.environ.setdefault(
            "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
        )  # packs differ in size
        cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local) if cuda else torch.device("cpu")
        torch.backends.cuda.enable_cudnn_sdp(
            False
        )  # it plans every new shape anew, and ours are all new
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)
        if cuda:
            torch.cuda.set_device(device)
        sys.excepthook = _name_the_rank
        dist.init_process_group(
            "nccl" if cuda else "gloo",
            device_id=device if cuda else None,
            timeout=datetime.timedelta(minutes=timeout_minutes),
        )
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def dtype(self, name: str) -> torch.dtype:
        """ "auto" is bfloat16 on an accelerator and float32 elsewhere."""
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
        return items[self.rank * size :][:size]


def _name_the_rank(kind, error, trace):
    """How an uncaught error on one rank of many is printed; torchrun then ends the others."""
    lost = isinstance(error, dist.DistError) or any(
        words in str(error) for words in ("gloo", "by peer", "Broken pipe", "Timed out")
    )
    hint = "; another rank is gone or waits elsewhere, its own message says why" if lost else ""
    print(
        "".join(traceback.format_exception(kind, error, trace))
        + f"error: rank {os.environ['RANK']} of "
        f"{os.environ['WORLD_SIZE']}: {kind.__name__}{hint}",
        file=sys.stderr,
        flush=True,
    )


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: reserved on the accelerator where there is one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


# ---------------------------------------------------------------- a model that may be sharded, see runtime/fsdp.py


def unsharded(crm):
    """Inside, every rank holds all weights of crm.model, so that sampling, and scoring without gradient, need no other
    rank. All ranks must enter and leave together. Without effect where the model is not sharded."""
    if crm.root is None:
        return nullcontext()
    from runtime import fsdp

    return fsdp.unsharded(crm)


def equal_passes(crm, ranks: Ranks, items: list):
    """(item, 1.0) for each of this rank's forward and backward passes. Sharded ranks meet in every pass, so there
    (first item, 0.0) follows, a pass without effect, until all ranks have made equally many."""
    missing = max(ranks.gather([len(items)])) - len(items) if crm.root else 0
    return [(item, 1.0) for item in items] + [(items[0], 0.0)] * missing
