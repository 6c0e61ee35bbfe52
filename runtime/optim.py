"""AdamW on float32 master weights, with gradients summed over ranks."""
import math
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, distribute_tensor


class Optimizer:
    """AdamW on float32 master weights, gradients summed over ranks.

    A bfloat16 weight near 1 cannot move by 1e-6: the update would round away. So where the model computes in
    bfloat16, AdamW owns a float32 copy of every trainable parameter, gradients are added up in float32 on it
    as backward makes them, and the model's weights are its rounding. Where the model is float32 (and under
    FSDP, whose shards are) there is no copy. offload: the copies, their gradients and AdamW's moments live in
    host memory, 16 bytes a weight that the GPU then has for other things. kind: what `spread` returned."""

    def __init__(self, parameters: dict[str, torch.nn.Parameter], weight_decay: float = 0.01, kind="none",
                 offload: bool = False):
        self.names, self.models = list(parameters), list(parameters.values())
        self.kind = kind
        self.size = sum(p.numel() for p in self.models)
        home = torch.device("cpu") if offload else self.models[0].device
        self.masters = [p if (p.dtype, p.device) == (torch.float32, home) else
                        p.detach().to(home, torch.float32).requires_grad_() for p in self.models]
        for p, master in self._copies():
            p.register_post_accumulate_grad_hook(lambda p, master=master: self._hand_over(p, master))
        self.adamw = torch.optim.AdamW(self.masters, lr=0.0, weight_decay=weight_decay,
                                       fused=offload or home.type == "cuda")

    def _copies(self):
        return [(p, master) for p, master in zip(self.models, self.masters) if master is not p]

    @staticmethod
    def _hand_over(p, master):
        gradient = p.grad.to(master)            # its type and place
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        p.grad = None

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> float:
        """One update with the gradients added up since the last; their norm before clipping.
        Where that is not finite, on any rank, nothing moves."""
        for model, p in zip(self.models, self.masters):     # a sum, no mean: a loss's weights span all ranks
            if self.kind == "none" and dist.is_initialized():
                total = (torch.zeros_like(p) if p.grad is None else p.grad).to(model.device)
                dist.all_reduce(total)
                p.grad = total.to(p.device)
            elif self.kind != "none" and p.grad is not None:
                p.grad.mul_(dist.get_world_size())
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        for group in self.adamw.param_groups:
            group["lr"] = lr
        if math.isfinite(norm):
            self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        for p, master in self._copies():
            p.copy_(master)
        return norm

    def _state(self) -> dict:
        """{"masters", "exp_avg", "exp_avg_sq", "step": {name: tensor}}, AdamW's own tensors."""
        for p in self.masters:                  # AdamW makes its state at the first update
            if p not in self.adamw.state:
                self.adamw.state[p] = {"step": torch.zeros((), device=p.device if p.is_cuda else "cpu"),
                                       "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        held = [{"masters": p.detach(), **self.adamw.state[p]} for p in self.masters]
        return {key: {name: one[key] for name, one in zip(self.names, held)}
                for key in ("masters", "exp_avg", "exp_avg_sq", "step")}

    def save(self, folder: Path, step: int, rank: int) -> None:
        """trainer.pt by rank 0, with all; under FSDP the tensors go to optimizer/, every rank its part."""
        if self.kind == "fsdp":
            dcp.save(self._state(), checkpoint_id=folder / "optimizer")
        if rank == 0:
            torch.save({"step": step} | ({} if self.kind == "fsdp" else {"optimizer": self._state()}),
                       folder / "trainer.pt")

    @torch.no_grad()
    def load(self, folder: Path, saved: dict) -> None:
        """What `save` wrote, on any number of ranks and of any kind. saved: its trainer.pt."""
        own = self._state()
        if "optimizer" in saved:
            for key, tensors in own.items():
                for name, tensor in tensors.items():
                    full = saved["optimizer"][key][name].to(tensor.device)
                    if isinstance(tensor, DTensor):         # every rank read the whole: nothing to send
                        full = distribute_tensor(full, tensor.device_mesh, tensor.placements,
                                                 src_data_rank=None)
                    tensor.copy_(full)
        else:
            dcp.load(own, checkpoint_id=folder / "optimizer")
        for p, master in self._copies():
            p.copy_(master)
