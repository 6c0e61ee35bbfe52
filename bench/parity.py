"""Every way of sampling and scoring on this machine's device, against transformers' own forward on
the CPU in float32.

The oracle goes row by row: the whole sequence, all logits, no packing, no cache. Compared are the
log-probabilities of the same completions, the gradient of all weights, what the sampler says of the
tokens it drew, and whether those are the oracle's. In float32 a way must meet the oracle; in
bfloat16 it must come as near as that slow forward in bfloat16. The last row is a model with key
biases as large as Qwen2.5's (bench/random_model.py): the sampler must give its tokens the
log-probabilities that the scorer gives them."""

from dataclasses import replace

import torch
from torch.nn.functional import pad

from bench.random_model import add_key_biases
from crm import CRM, Group, load_crm
from data import fill_prompt, load_prompt, load_samples
from sampling import sample
from scoring import score

P = 3
G = 6
T = 96
FLOAT32 = 1e-4  # largest relative error
BFLOAT16 = 2  # the same, as a multiple of the slow forward's
EQUAL = 0.9  # share of completions that are the oracle's, in float32
GAP = 0.01  # largest mean |sampled - scored| log-probability with large key biases, in nats


def naive_logp(crm: CRM, group: Group, temperature: float) -> torch.Tensor:
    """One completion at a time, the whole sequence, all logits, no packing, no cache. (G, T)"""
    out = []
    p = group.prompt
    for tokens, n in zip(group.tokens, group.lengths.tolist()):
        ids = torch.cat([p.ids, tokens[:n]])[None]
        logits = crm.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=p.pixel_values,
            image_grid_thw=p.grid_thw,
            mm_token_type_ids=(ids == crm.image_id).int(),
        ).logits[0]
        logits = (logits[len(p.ids) - 1 : -1].float() / temperature).index_fill(
            1, crm.banned, -torch.inf
        )
        logp = logits.log_softmax(-1).gather(1, tokens[:n, None])[:, 0]
        out.append(pad(logp, (0, group.tokens.shape[1] - n)))
    return torch.stack(out)


def moved(device, groups: list[Group], prompts) -> list[Group]:
    """The same completions, on a device, of prompts that are there."""
    return [replace(g, prompt=p, tokens=g.tokens.to(device)) for g, p in zip(groups, prompts)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().float().cpu().flatten() for x in tensors])


def distance(x: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error."""
    return ((x - truth).norm() / truth.norm()).item()


def gradient_of(crm: CRM, logps: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of all weights, of a weighted sum of all log-probabilities."""
    crm.model.zero_grad()
    weights = [
        torch.randn(x.shape, generator=torch.Generator().manual_seed(i))
        for i, x in enumerate(logps)
    ]
    sum((x * w.to(x.device)).sum() for x, w in zip(logps, weights)).backward()
    return flat(p.grad for p in crm.model.parameters())


def scored(crm: CRM, groups: list[Group]) -> list[torch.Tensor]:
    return [logp for logp, _ in score(crm, [(group, list(range(G))) for group in groups])]


def build(path: str, device, dtype, **options):
    """A CRM and its P encoded prompts."""
    crm = load_crm(path, device, dtype, **options)
    samples = load_samples("demo/data")
    template = load_prompt("reasoning")
    return crm, [
        crm.encode(samples[i].image, fill_prompt(template, samples[i].query)) for i in range(P)
    ]


def parity(path: str, device: torch.device) -> dict[str, dict]:
    """{"bfloat16, packed": {"logp": relative error, …, "passed": bool}, …}"""
    torch.backends.cudnn.allow_tf32 = False  # float32 is to be float32
    oracle, prompts = build(path, "cpu", torch.float32)
    drawn = sample(oracle, prompts, G, T)
    logps = [naive_logp(oracle, group, 1.0) for group in drawn]
    truth = flat(logps)
    gradient = gradient_of(oracle, logps)
    # options, CUDA graphs
    ways = {"packed": ({}, False), "checkpointing": ({"checkpointing": True}, False)}
    if device.type == "cuda":
        ways["CUDA graphs"] = {}, True

    def compare(crm, own, graphs: bool) -> dict[str, float]:
        logps = scored(crm, moved(device, drawn, own))
        row = {
            "logp": distance(flat(logps), truth),
            "gradient": distance(gradient_of(crm, logps), gradient),
        }
        groups = sample(crm, own, G, T, graphs=graphs)
        with torch.no_grad():
            right = [naive_logp(oracle, group, 1.0) for group in moved("cpu", groups, prompts)]
        same = [a == b for g, o in zip(groups, drawn) for a, b in zip(g.texts, o.texts)]
        return row | {
            "sampled": distance(flat(group.logp for group in groups), flat(right)),
            "equal completions": sum(same) / len(same),
        }

    table = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        crm, own = build(path, device, dtype)
        logps = [naive_logp(crm, group, 1.0) for group in moved(device, drawn, own)]
        slow = {
            "logp": distance(flat(logps), truth),
            "gradient": distance(gradient_of(crm, logps), gradient),
        }
        slow["sampled"] = slow["logp"]
        table[f"{name}, transformers"] = slow
        for way, (options, graphs) in ways.items():
            try:
                row = compare(*build(path, device, dtype, **options), graphs)
                limits = {
                    key: FLOAT32 if dtype == torch.float32 else BFLOAT16 * slow[key] for key in slow
                }
                row["passed"] = all(row[key] <= limits[key] for key in limits) and (
                    dtype != torch.float32 or row["equal completions"] >= EQUAL
                )
            except RuntimeError as error:  # all that CUDA and its compilers raise
                row = {"passed": False, "problem": str(error)}
            table[f"{name}, {way}"] = row
    table["bfloat16, large key biases"] = biased(path, device)
    return table


def biased(path: str, device: torch.device) -> dict[str, float]:
    """Mean |sampled - scored| log-probability, in nats, of the model with large key biases in
    bfloat16."""
    crm, prompts = build(path, device, torch.bfloat16)
    add_key_biases(crm.model)
    groups = sample(crm, prompts, G, T)
    with torch.no_grad():
        logps = scored(crm, groups)
    gaps = [(logp - group.logp).abs().sum() for logp, group in zip(logps, groups)]
    gap = float(sum(gaps) / sum(int(group.lengths.sum()) for group in groups))
    return {"mean gap": gap, "passed": gap < GAP}
