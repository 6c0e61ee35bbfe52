"""Every way of sampling and scoring on this machine's device, against transformers' own forward on
the CPU in float32.

The oracle goes row by row: the full sequence, all logits, no packing, no cache. Compared are the
log-probabilities of the same completions, the gradient of all weights, what the sampler says of the
tokens it drew, and whether those are the oracle's. In float32 a way must meet the oracle. In
bfloat16 it must come as near as that slow forward in bfloat16. The last row is a model whose keys
are as large in some channels as the released ones' (bench/random_model.py): the sampler must give
its tokens the log-probabilities that the scorer gives them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from bench.random_model import LARGE_KEYS
from crm import CRM, Group, Prompt, load_crm
from data import load_samples
from sampling import sample
from scoring import Pack, score

P = 3  # prompts
G = 6  # completions of each
T = 96  # tokens in the longest
FLOAT32 = 1e-4  # largest relative error
BFLOAT16 = 2  # the same, as a multiple of the slow forward's
EQUAL = 0.9  # share of completions that are the oracle's, in float32
GAP = 0.01  # largest mean |sampled - scored| log-probability with large keys, in nats
Row = dict[str, Any]  # of the table: numbers, "passed", and "problem" where a way fails


@dataclass(frozen=True)
class Way:
    """A way to sample and to score."""

    checkpointing: bool = False
    graphs: bool = False


WAYS = {"packed": Way(), "checkpointing": Way(checkpointing=True)}
CUDA_WAYS = {"CUDA graphs": Way(graphs=True)}


# ---------------------------------------------------------------- the oracle


def naive_logp(crm: CRM, group: Group, temperature: float) -> torch.Tensor:
    """Returns log-probabilities of a group's tokens, (G, T): one completion at a time, the full
    sequence, all logits, no packing, no cache."""
    prompt = group.prompt
    rows = []
    for tokens, length in zip(group.tokens, group.lengths.tolist()):
        ids = torch.cat([prompt.ids, tokens[:length]])[None]
        output = crm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=prompt.pixel_values,
            image_grid_thw=prompt.grid_thw,
            mm_token_type_ids=(ids == crm.image_id).int(),
        )
        logits = output.logits[0, len(prompt.ids) - 1 : -1].float() / temperature
        logp = logits.index_fill(1, crm.banned, -torch.inf).log_softmax(-1)
        own = logp.gather(1, tokens[:length, None])[:, 0]
        rows.append(pad(own, (0, group.tokens.shape[1] - length)))
    return torch.stack(rows)


# ---------------------------------------------------------------- what is compared


def moved(
    groups: Sequence[Group], prompts: Sequence[Prompt], device: str | torch.device
) -> list[Group]:
    """Returns the same completions on a device, of prompts that are there."""
    found = []
    for group, prompt in zip(groups, prompts):
        found.append(replace(group, prompt=prompt, tokens=group.tokens.to(device)))
    return found


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().float().cpu().flatten() for x in tensors])


def distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Returns the relative error."""
    return ((x - truth).norm() / truth.norm()).item()


def gradient_of(crm: CRM, logps: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the gradient of all weights, of a weighted sum of all log-probabilities."""
    crm.model.zero_grad()
    total = 0.0
    for i, logp in enumerate(logps):
        weights = torch.randn(logp.shape, generator=torch.Generator().manual_seed(i))
        total = total + (logp * weights.to(logp.device)).sum()
    total.backward()
    return flat(p.grad for p in crm.model.parameters())


def scored(crm: CRM, groups: Sequence[Group]) -> list[torch.Tensor]:
    """Returns log-probabilities of all completions, (G, T) each, from one packed sequence."""
    pack = Pack(list(groups), [list(range(len(group.tokens))) for group in groups])
    return [logp for logp, _ in score(crm, pack)]


def share_equal(groups: Sequence[Group], others: Sequence[Group]) -> float:
    """Returns the share of completions that are the same texts."""
    same = []
    for group, other in zip(groups, others):
        same += [a == b for a, b in zip(group.texts, other.texts)]
    return sum(same) / len(same)


# ---------------------------------------------------------------- the table


class Oracle:
    """What everything is compared with: completions, their log-probabilities and the gradient."""

    def __init__(self, path: str | Path):
        self.crm, self.prompts = build(path, "cpu", torch.float32)
        self.groups = sample(self.crm, self.prompts, G, T)
        logps = [naive_logp(self.crm, group, 1.0) for group in self.groups]
        self.logp = flat(logps)
        self.gradient = gradient_of(self.crm, logps)

    def errors(self, crm: CRM, logps: Sequence[torch.Tensor]) -> Row:
        """Returns how far log-probabilities of the oracle's completions are from its own."""
        return {
            "logp": distance(flat(logps), self.logp),
            "gradient": distance(gradient_of(crm, logps), self.gradient),
        }

    @torch.no_grad()
    def logp_of(self, groups: Sequence[Group]) -> torch.Tensor:
        """Returns the oracle's log-probabilities of other completions of its prompts, flat."""
        own = moved(groups, self.prompts, "cpu")
        return flat(naive_logp(self.crm, group, 1.0) for group in own)


def build(
    path: str | Path, device: str | torch.device, dtype: torch.dtype, checkpointing: bool = False
) -> tuple[CRM, list[Prompt]]:
    """Returns a CRM all of whose weights train, and its P encoded prompts."""
    crm = load_crm(path, device, dtype, prompt="reasoning")
    crm.prepare_training(checkpointing=checkpointing)
    examples = load_samples("demo/data")
    return crm, [crm.prompt_of(examples[i]) for i in range(P)]


def parity(path: str | Path, device: torch.device) -> dict[str, Row]:
    """Returns {"bfloat16, packed": {"logp": relative error, …, "passed": bool}, …}."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    ways = dict(WAYS)
    if device.type == "cuda":
        ways |= CUDA_WAYS
    oracle = Oracle(path)
    table = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        slow = slow_forward(oracle, path, device, dtype)
        table[f"{name}, transformers"] = slow
        for title, way in ways.items():
            table[f"{name}, {title}"] = checked(oracle, path, device, dtype, way, slow)
    table["bfloat16, large keys"] = large_keys(path, device)
    return table


def slow_forward(oracle: Oracle, path: str | Path, device: torch.device, dtype: torch.dtype) -> Row:
    """Returns how far the oracle's own way is from it on this device and in this type."""
    crm, prompts = build(path, device, dtype)
    groups = moved(oracle.groups, prompts, device)
    row = oracle.errors(crm, [naive_logp(crm, group, 1.0) for group in groups])
    return row | {"sampled": row["logp"]}


def checked(
    oracle: Oracle,
    path: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    way: Way,
    slow: Row,
) -> Row:
    """Returns how far a way is from the oracle, and whether that is near enough. slow: the errors
    of the slow forward in this type."""
    try:
        row = compare(oracle, path, device, dtype, way)
    except RuntimeError as error:  # all that CUDA and its compilers raise
        return {"passed": False, "problem": str(error)}
    if dtype == torch.float32:
        is_near = all(row[key] <= FLOAT32 for key in slow)
        row["passed"] = is_near and row["equal completions"] >= EQUAL
    else:
        row["passed"] = all(row[key] <= BFLOAT16 * slow[key] for key in slow)
    return row


def compare(
    oracle: Oracle, path: str | Path, device: torch.device, dtype: torch.dtype, way: Way
) -> Row:
    crm, prompts = build(path, device, dtype, way.checkpointing)
    row = oracle.errors(crm, scored(crm, moved(oracle.groups, prompts, device)))
    groups = sample(crm, prompts, G, T, graphs=way.graphs)
    row["sampled"] = distance(flat(group.logp for group in groups), oracle.logp_of(groups))
    row["equal completions"] = share_equal(groups, oracle.groups)
    return row


def large_keys(path: str | Path, device: torch.device) -> Row:
    """Returns the mean |sampled - scored| log-probability, in nats, of the model with large keys in
    bfloat16."""
    crm, prompts = build(path, device, torch.bfloat16)
    LARGE_KEYS[crm.model.config.model_type](crm.model)
    groups = sample(crm, prompts, G, T)
    with torch.no_grad():
        logps = scored(crm, groups)
    gap = 0.0
    tokens = 0
    for logp, group in zip(logps, groups):
        gap += float((logp - group.logp).abs().sum())
        tokens += int(group.lengths.sum())
    return {"mean gap": gap / tokens, "passed": gap / tokens < GAP}
