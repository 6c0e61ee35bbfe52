"""AdamW on float32 master weights, with gradients summed over ranks.

A bfloat16 weight near 1 cannot move by 1e-6: the update would round away. So where the model computes in
bfloat16, AdamW owns a float32 copy of every trainable parameter, gradients are added up in float32 as the
backward pass makes them, and the model's weights are the copy's rounding. Where the model is float32, and under
FSDP, whose shards are, there is no copy.
"""

import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor

BUCKET = 2**26  # elements summed over ranks at once
STATE = ("masters", "exp_avg", "exp_avg_sq", "step")


class Optimizer:
    """parameters: {name: parameter}. sharded: they are FSDP's, which reduces gradients over ranks by itself. offload:
    the float32 copies and AdamW's moments, 12 bytes per weight, live in host memory; gradients stay on the GPU."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        weight_decay: float = 0.01,
        sharded: bool = False,
        offload: bool = False,
    ):
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.sharded, self.size = sharded, sum(p.numel() for p in self.parameters)
        home = torch.device("cpu") if offload else self.parameters[0].device
        self.masters, self.sums = (
            [],
            [None] * len(self.parameters),
        )  # sums: gradients of those with a copy
        for i, p in enumerate(self.parameters):
            if p.dtype == torch.float32 and p.device == home:
                self.masters.append(p)
            else:
                self.masters.append(p.detach().to(home, torch.float32).requires_grad_())
                p.register_post_accumulate_grad_hook(lambda p, i=i: self._add_up(p, i))
        self.adamw = torch.optim.AdamW(
            self.masters, lr=0.0, weight_decay=weight_decay, fused=offload or home.type == "cuda"
        )

    def _add_up(self, p, i: int) -> None:
        gradient, p.grad = p.grad.float(), None
        self.sums[i] = gradient if self.sums[i] is None else self.sums[i].add_(gradient)

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> float:
        """One update with the gradients added up since the last one -> their norm before clipping.
        Where that is not finite, on any rank, nothing moves."""
        gradients = [
            p.grad if p is master else total
            for p, master, total in zip(self.parameters, self.masters, self.sums)
        ]
        if dist.is_initialized():
            gradients = self._sum_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm):
            scale = min(1.0, max_norm / (norm + 1e-6))
            for master, gradient in zip(self.masters, gradients):
                master.grad = None if gradient is None else gradient.mul_(scale).to(master.device)
            for group in self.adamw.param_groups:
                group["lr"] = lr
            self.adamw.step()
            self._copy_to_model()
        self.adamw.zero_grad(set_to_none=True)
        self.sums = [None] * len(self.sums)
        return norm

    def _sum_over_ranks(self, gradients: list) -> list:
        """The sum, not the mean: a loss's weights span the tokens of all ranks."""
        if self.sharded:  # reduced to the mean in the backward pass
            return [g if g is None else g.mul_(dist.get_world_size()) for g in gradients]
        gradients = [
            torch.zeros_like(p, dtype=torch.float32) if g is None else g
            for g, p in zip(gradients, self.parameters)
        ]
        buckets, size = [[]], 0
        for gradient in gradients:
            if size and size + gradient.numel() > BUCKET:
                buckets, size = [*buckets, []], 0
            buckets[-1].append(gradient)
            size += gradient.numel()
        for bucket in buckets:
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, part in zip(
                bucket, flat.split([gradient.numel() for gradient in bucket])
            ):
                gradient.copy_(part.view_as(gradient))
        return gradients

    def _copy_to_model(self) -> None:
        for p, master in zip(self.parameters, self.masters):
            if p is not master:
                p.copy_(master)

    def _state(self) -> dict:
        """{"masters", "exp_avg", "exp_avg_sq", "step": {name: tensor}}, AdamW's own tensors."""
        for p in self.masters:  # AdamW makes its state at the first update
            if p not in self.adamw.state:
                self.adamw.state[p] = {
                    "step": torch.zeros((), device=p.device if p.is_cuda else "cpu"),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        held = {
            name: {"masters": p.detach(), **self.adamw.state[p]}
            for name, p in zip(self.names, self.masters)
        }
        return {key: {name: state[key] for name, state in held.items()} for key in STATE}

    def save(self, folder: Path, step: int, rank: int) -> None:
        """trainer.pt by rank 0, with everything; of a sharded model every rank writes its part to optimizer/."""
        if self.sharded:
            dcp.save(self._state(), checkpoint_id=folder / "optimizer")
        if rank == 0:
            state = {} if self.sharded else {"optimizer": self._state()}
            torch.save({"step": step, **state}, folder / "trainer.pt")

    @torch.no_grad()
    def load(self, folder: Path, saved: dict) -> None:
        """What `save` wrote, on any number of ranks, sharded or not. saved: its trainer.pt.
        ValueError when other parameters were trained."""
        own = self._state()
        if "optimizer" in saved:
            if set(saved["optimizer"]["masters"]) != set(self.names):
                raise ValueError(
                    f"--resume: {folder} trained other parameters than these flags would"
                )
            for key, tensors in own.items():
                for name, tensor in tensors.items():
                    full = saved["optimizer"][key][name].to(tensor.device)
                    if isinstance(tensor, DTensor):  # every rank read the whole: nothing to send
                        full = distribute_tensor(
                            full, tensor.device_mesh, tensor.placements, src_data_rank=None
                        )
                    tensor.copy_(full)
        else:
            dcp.load(own, checkpoint_id=folder / "optimizer")
        self._copy_to_model()
