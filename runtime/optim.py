"""AdamW on float32 master weights, with gradients summed over ranks.

A bfloat16 weight near 1 cannot move by 1e-6: the update would round away. So where the model
computes in bfloat16, AdamW owns a float32 copy of every trainable parameter, gradients are added up
in float32 as the backward pass makes them, and the model's weights are the copy's rounding. Where
the model is float32, and under FSDP, whose shards are, there is no copy.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from runtime.checkpoint import flush, write_record
from runtime.cli import print0

BUCKET = 2**26  # elements summed over ranks at once
STATE = ("masters", "exp_avg", "exp_avg_sq", "step")  # AdamW's tensors of each parameter
MAX_GRAD_NORM = (
    1.0  # gradients are clipped to this norm, the usual bound in GRPO and in fine-tuning
)

State = dict[str, dict[str, torch.Tensor]]


class Optimizer:
    """AdamW over named parameters.

    parameters: {name: parameter}, those that train. sharded: they are FSDP's, which reduces
    gradients over ranks by itself. offload: the float32 copies and AdamW's moments, 12 bytes per
    weight, live in host memory; gradients stay on the GPU. size: the number of weights that
    train."""

    def __init__(
        self,
        parameters: dict[str, torch.nn.Parameter],
        weight_decay: float = 0.01,
        sharded: bool = False,
        offload: bool = False,
    ):
        self.names = list(parameters)
        self.parameters = list(parameters.values())
        self.sharded = sharded
        self.size = sum(parameter.numel() for parameter in self.parameters)
        home = self.parameters[0].device
        if offload:
            home = torch.device("cpu")
        self.masters = []
        self.sums = [None] * len(self.parameters)  # gradients so far, of those that have a copy
        for index, parameter in enumerate(self.parameters):
            if parameter.dtype == torch.float32 and parameter.device == home:
                self.masters.append(parameter)
            else:
                copy = parameter.detach().to(home, torch.float32)
                self.masters.append(copy.requires_grad_())
                self._add_up_in_float32(parameter, index)
        self.adamw = torch.optim.AdamW(
            self.masters, lr=0.0, weight_decay=weight_decay, fused=offload or home.type == "cuda"
        )

    def _add_up_in_float32(self, parameter: torch.nn.Parameter, index: int) -> None:
        """From now on a backward pass adds the parameter's gradient to self.sums, and leaves
        parameter.grad empty."""

        def add_up(parameter: torch.nn.Parameter) -> None:
            gradient = parameter.grad.float()
            parameter.grad = None
            if self.sums[index] is None:
                self.sums[index] = gradient
            else:
                self.sums[index].add_(gradient)

        parameter.register_post_accumulate_grad_hook(add_up)

    # ------------------------------------------------------------ one update

    @torch.no_grad()
    def step(self, lr: float, max_norm: float = MAX_GRAD_NORM) -> float:
        """Makes one update with the gradients added up since the last one. Returns their norm
        before clipping. Where that is not finite, on any rank, nothing moves."""
        gradients = []
        for parameter, master, total in zip(self.parameters, self.masters, self.sums):
            gradients.append(parameter.grad if parameter is master else total)
        if dist.is_initialized():
            gradients = self._sum_over_ranks(gradients)
        norm = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        norm = norm.item()
        if math.isfinite(norm):
            self._update(gradients, lr, scale=min(1.0, max_norm / (norm + 1e-6)))
        else:
            print0(f"\n{self._what_is_not_finite(gradients)}")
        self.adamw.zero_grad(set_to_none=True)
        self.sums = [None] * len(self.sums)
        return norm

    def _what_is_not_finite(self, gradients: list[torch.Tensor | None]) -> str:
        """Names the first parameter whose gradient is not finite on any rank. All ranks call it."""
        first = len(gradients)
        for index, gradient in enumerate(gradients):
            if gradient is not None and not rows_of(gradient).values.isfinite().all():
                first = index
                break
        if dist.is_initialized():
            of_ranks = [first] * dist.get_world_size()
            dist.all_gather_object(of_ranks, first)
            first = min(of_ranks)
        if first == len(gradients):
            return "the norm of the gradient is not finite, although each gradient is: it overflows"
        return f"the gradient of {self.names[first]} is not finite"

    def _update(self, gradients: list[torch.Tensor | None], lr: float, scale: float) -> None:
        for master, gradient in zip(self.masters, gradients):
            if gradient is None:
                master.grad = None
            else:
                master.grad = gradient.mul_(scale).to(master.device)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self._copy_to_model()

    def _sum_over_ranks(self, gradients: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """The sum, not the mean: a loss's weights span the tokens of all ranks."""
        if self.sharded:  # reduced to the mean in the backward pass
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(dist.get_world_size())
            return gradients
        filled = []
        for gradient, parameter in zip(gradients, self.parameters):
            if gradient is None:  # no gradient on this rank, but perhaps on others
                gradient = torch.zeros_like(parameter, dtype=torch.float32)
            filled.append(gradient)
        for bucket in buckets(filled):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            summed = flat.split([gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, summed):
                gradient.copy_(part.view_as(gradient))
        return filled

    def _copy_to_model(self) -> None:
        for parameter, master in zip(self.parameters, self.masters):
            if parameter is not master:
                parameter.copy_(master)

    # ------------------------------------------------------------ save and load

    def _state(self) -> State:
        """{"masters", "exp_avg", "exp_avg_sq", "step": {name: tensor}}, AdamW's own tensors."""
        state = {quantity: {} for quantity in STATE}
        for name, master in zip(self.names, self.masters):
            if master not in self.adamw.state:  # AdamW makes its state at the first update
                self.adamw.state[master] = {
                    "step": torch.zeros((), device=master.device if master.is_cuda else "cpu"),
                    "exp_avg": torch.zeros_like(master),
                    "exp_avg_sq": torch.zeros_like(master),
                }
            state["masters"][name] = master.detach()
            for quantity in STATE[1:]:
                state[quantity][name] = self.adamw.state[master][quantity]
        return state

    @torch.no_grad()
    def save(self, folder: Path, step: int, rank: int) -> None:
        """Writes optimizer/ and trainer.json into a checkpoint. All ranks call it; it waits for
        none.

        Each quantity is one file per shard, such as exp_avg.00002-of-00004.safetensors: {name: rows
        of the tensor}, with the first row and the number of all rows of each tensor in its
        metadata. A model that is not sharded has one part, which rank 0 writes."""
        part, parts, writes = self._part(rank)
        if rank == 0:
            write_record(folder, step, parts)
        if not writes:
            return
        (folder / "optimizer").mkdir(exist_ok=True)
        for quantity, tensors in self._state().items():
            values = {}
            places = {"format": "pt"}  # metadata must not be empty
            for name, tensor in tensors.items():
                rows = rows_of(tensor)
                is_copy = part > 1 and not isinstance(tensor, DTensor)
                if len(rows.values) > 0 and not is_copy:
                    values[name] = rows.values.contiguous()
                    places[name] = f"{rows.first} {rows.total}"
            file = folder / "optimizer" / f"{quantity}.{part:05d}-of-{parts:05d}.safetensors"
            save_file(values, file, metadata=places)
            flush(file)  # rank 0 cannot do this for the files of another machine

    def _part(self, rank: int) -> tuple[int, int, bool]:
        """(this rank's part, counted from 1; number of parts; whether this rank writes it)."""
        if not self.sharded:
            return 1, 1, rank == 0
        mesh = self.masters[0].device_mesh
        shard = mesh.get_local_rank(mesh.ndim - 1)
        shards = mesh.size(mesh.ndim - 1)
        is_first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0  # other nodes hold the same
        return shard + 1, shards, is_first_copy

    @torch.no_grad()
    def load(self, folder: Path, saved: dict) -> None:
        """Reads what `save` wrote, on any number of ranks, sharded or not.

        folder: the checkpoint. saved: its trainer.json. ValueError where other parameters were
        trained, or where rows are missing. Nothing is unpickled."""
        for quantity, tensors in self._state().items():
            files = sorted((folder / "optimizer").glob(f"{quantity}.*.safetensors"))
            if len(files) != saved["parts"]:
                raise ValueError(
                    f"{folder / 'optimizer'}: {len(files)} files {quantity}.*, not {saved['parts']}"
                )
            read_rows(files, tensors)
        self._copy_to_model()


# ---------------------------------------------------------------- tensors as rows, for files


@dataclass
class Rows:
    """The part of a tensor that this rank holds, as consecutive rows of it. A number is one row."""

    values: torch.Tensor  # (rows, ...), in the tensor's own memory
    first: int  # its first row in the whole tensor
    total: int  # rows of the whole tensor


def rows_of(tensor: torch.Tensor) -> Rows:
    """What this rank holds of a tensor. FSDP cuts one along its rows into equal parts, of which the
    last may be smaller or empty, over the last dimension of its mesh."""
    if not isinstance(tensor, DTensor):
        values = tensor if tensor.ndim > 0 else tensor.view(1)
        return Rows(values, first=0, total=len(values))
    mesh = tensor.device_mesh
    total = tensor.shape[0]
    rows_per_shard = math.ceil(total / mesh.size(mesh.ndim - 1))
    first = min(total, rows_per_shard * mesh.get_local_rank(mesh.ndim - 1))
    return Rows(tensor.to_local(), first, total)


def read_rows(files: list[Path], tensors: dict[str, torch.Tensor]) -> None:
    """Copies into each tensor the rows that this rank holds of it. files: all parts of one
    quantity. ValueError where the files hold other tensors, or not all rows."""
    own = {name: rows_of(tensor) for name, tensor in tensors.items()}
    missing = {name: len(rows.values) for name, rows in own.items()}
    found = set()
    for file in files:
        with safe_open(file, framework="pt") as part:
            places = part.metadata() or {}
            for name in part.keys():  # noqa: SIM118 (part is a file, not a dict)
                saved = part.get_slice(name)
                place = re.fullmatch(r"(\d+) (\d+)", places.get(name, ""))
                if place is None:
                    raise ValueError(
                        f"{file}: {name}: its metadata do not say which rows these are"
                    )
                found.add(name)
                if name in own and int(place[2]) == own[name].total:
                    missing[name] -= copy_overlap(saved, int(place[1]), own[name])
    if found != set(own) or any(missing.values()):
        raise ValueError(
            f"--resume: {files[0].parent} trained other parameters than these flags would"
        )


def copy_overlap(saved: Any, saved_first: int, own: Rows) -> int:
    """Copies the rows of a saved slice that this rank holds, and returns how many they are. 0 where
    the shapes of rows differ. saved: a slice of a safetensors file, whose first row is row
    `saved_first` of the tensor."""
    saved_rows, *row_shape = saved.get_shape()
    if row_shape != list(own.values.shape[1:]):
        return 0
    start = max(saved_first, own.first)
    stop = min(saved_first + saved_rows, own.first + len(own.values))
    if start >= stop:
        return 0
    values = saved[start - saved_first : stop - saved_first]
    own.values[start - own.first : stop - own.first].copy_(values)
    return stop - start


# ---------------------------------------------------------------- gradients in buckets


def buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The gradients in order, cut into lists of at most BUCKET elements, or of one gradient that is
    larger."""
    bucket = []
    size = 0
    for gradient in gradients:
        if bucket and size + gradient.numel() > BUCKET:
            yield bucket
            bucket = []
            size = 0
        bucket.append(gradient)
        size += gradient.numel()
    yield bucket
