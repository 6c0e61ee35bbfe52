"""From one process to many: the ranks that torchrun or srun started, and what they tell each other.

    ddp    every rank holds the whole model; gradients are summed, in float32, after the backward
           passes of an update
    fsdp   FSDP2: weights, gradients and AdamW's moments are sharded, see runtime/fsdp.py

A whole group lives on one rank, what it samples depends on (seed, step, prompt) only, and a loss is
a sum whose weights span the tokens of all ranks. So the numbers depend neither on the kind nor on
the number of ranks.
"""

import datetime
import os
import resource
import sys
import time
import traceback
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
import transformers

CPU = torch.device("cpu")

# A rank that waits longer than this for the others ends with an error. The slowest thing that ranks
# do apart, a step's sampling, takes minutes.
TIMEOUT_MINUTES = 30

# What gloo and NCCL say where another rank is gone; some of it comes as a plain RuntimeError.
LOST_RANK = ("gloo", "by peer", "Broken pipe", "Timed out")


@dataclass
class Ranks:
    """This process among all that were started (rank 0 of 1 if it is alone)."""

    rank: int = 0
    world: int = 1
    device: torch.device = CPU

    @classmethod
    def start(cls) -> "Ranks":
        """Joins the other processes. The environment says which one this is: RANK, WORLD_SIZE,
        LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without WORLD_SIZE the
        process is alone."""
        transformers.logging.disable_progress_bar()
        # packs of completions differ in size
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        # cuDNN's attention plans every new shape anew, and ours are all new
        torch.backends.cuda.enable_cudnn_sdp(False)
        # float32 means float32: TF32 has ten bits, and the convolution of the patches would use it
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False

        device = CPU
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if "WORLD_SIZE" not in os.environ:
            return cls(device=device)

        sys.excepthook = _name_the_rank
        timeout = datetime.timedelta(minutes=TIMEOUT_MINUTES)
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device, timeout=timeout)
        else:
            dist.init_process_group("gloo", timeout=timeout)
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and prints."""
        return self.rank == 0

    def dtype(self, name: str) -> torch.dtype:
        """The type that a name stands for: "auto" is bfloat16 on an accelerator and float32
        elsewhere."""
        if name != "auto":
            return getattr(torch, name)
        if self.device.type == "cuda":
            return torch.bfloat16
        return torch.float32

    def clock(self) -> float:
        """Seconds, once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def stop(self) -> None:
        """Leaves the other processes."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Waits until all ranks are here."""
        if self.world > 1:
            dist.barrier()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all ranks, in the order of the ranks, on every rank."""
        if self.world == 1:
            return items
        items_by_rank = [None] * self.world
        dist.all_gather_object(items_by_rank, items)
        return [item for items_of_rank in items_by_rank for item in items_of_rank]

    def share(self, items: list[Any]) -> list[Any]:
        """This rank's equal part of a list, in order."""
        size = len(items) // self.world
        start = self.rank * size
        return items[start : start + size]


def equal_passes(ranks: Ranks, items: list[Any], sharded: bool) -> list[tuple[Any, float]]:
    """Returns (item, 1.0) for each of this rank's forward and backward passes.

    Ranks that share the weights meet in every pass. So there (first item, 0.0) follows, a pass
    without effect, until all ranks have made equally many."""
    passes = [(item, 1.0) for item in items]
    if sharded:
        most = max(ranks.gather([len(items)]))
        missing = most - len(items)
        passes += [(items[0], 0.0)] * missing
    return passes


def peak_memory(device: torch.device) -> float:
    """Peak memory of this process in GB: reserved on the accelerator where there is one, else
    resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def _name_the_rank(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints an uncaught error with the rank that raised it. The launcher then ends the other
    ranks."""
    lost = isinstance(error, dist.DistError) or any(words in str(error) for words in LOST_RANK)
    hint = "; another rank is gone or waits elsewhere, its own message says why" if lost else ""
    report = "".join(traceback.format_exception(kind, error, trace))
    who = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}"
    print(f"{report}error: {who}: {kind.__name__}{hint}", file=sys.stderr, flush=True)
