"""Every way of sampling and scoring on this machine's device, against transformers' own forward on the CPU in float32.

The oracle goes row by row: the whole sequence, all logits, no packing, no cache. Compared are the log-probabilities of
the same completions, the gradient of all weights, what the sampler says of the tokens it drew, and whether those are the
oracle's. In float32 a way must meet the oracle; in bfloat16 it must come as near as that slow forward in bfloat16.
A last row has the large key biases of real Qwen2.5 weights, where bfloat16 attention scores would part sampler and scorer.
"""
from dataclasses import replace

import torch

from crm import CRM, Group, load_crm
from data import fill_prompt, load_prompt, load_samples
from sampling import sample
from scoring import logp, score

P, G, T = 3, 6, 96
FLOAT32, BFLOAT16 = 1e-4, 2         # largest relative error; largest multiple of the slow forward's relative error
EQUAL = 0.9                         # share of completions that are the oracle's, in float32
BIASED_GAP = 0.015                  # largest mean gap between sampled and scored log-probabilities, biased, in bfloat16


def naive_logp(crm: CRM, group: Group, temperature: float) -> torch.Tensor:
    """One completion at a time, the whole sequence, all logits, no packing, no cache. (G, T)"""
    out, p = [], group.prompt
    for tokens, n in zip(group.tokens, group.lengths.tolist()):
        ids = torch.cat([p.ids, tokens[:n]])[None]
        logits = crm.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=p.pixel_values,
                           image_grid_thw=p.grid_thw, mm_token_type_ids=(ids == crm.image_id).int()).logits[0]
        logits = (logits[len(p.ids) - 1:-1].float() / temperature).index_fill(1, crm.banned, -torch.inf)
        row = logits.log_softmax(-1).gather(1, tokens[:n, None])[:, 0]
        out.append(torch.nn.functional.pad(row, (0, group.tokens.shape[1] - n)))
    return torch.stack(out)


def on(device, groups: list[Group], prompts) -> list[Group]:
    return [replace(g, prompt=p, tokens=g.tokens.to(device)) for g, p in zip(groups, prompts)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().float().cpu().flatten() for x in tensors])


def gradient_of(crm: CRM, logps: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of all weights, of a weighted sum of all log-probabilities."""
    crm.model.zero_grad()
    sum((x * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x.device)).sum()
        for i, x in enumerate(logps)).backward()
    return flat(p.grad for p in crm.model.parameters())


def bias_keys(crm: CRM) -> None:
    """Key biases of 100 in four channels per head of the first and the last layer, as large as real Qwen2.5's."""
    layers = crm.model.model.language_model.layers
    for attention in (layers[0].self_attn, layers[-1].self_attn):
        for projection, bias in ((attention.k_proj, 100.0), (attention.q_proj, 5.0)):
            projection.bias.data.unflatten(0, (-1, attention.head_dim))[:, :4] += bias


def parity(path: str, device: torch.device) -> dict[str, dict]:
    """{"bfloat16, packed": {"logp": relative error, …, "passed": bool}, …}"""
    torch.backends.cudnn.allow_tf32 = False             # float32 is to be float32
    samples, template, table = load_samples("demo/data"), load_prompt("reasoning"), {}
    ways = {"packed": {}, "checkpointing": {"checkpointing": True}}

    def build(*where, **way):
        crm = load_crm(path, *where, **way)
        return crm, [crm.encode(samples[i].image, fill_prompt(template, samples[i].query)) for i in range(P)]

    def distance(x, truth):
        return ((x - truth).norm() / truth.norm()).item()

    def compare(crm, own, graphs) -> dict[str, float]:
        logps = [logp for logp, _ in score(crm, [(g, list(range(G))) for g in on(device, drawn, own)])]
        row = {"logp": distance(flat(logps), truth), "gradient": distance(gradient_of(crm, logps), gradient)}
        groups = sample(crm, own, G, T, graphs=graphs)
        with torch.no_grad():
            right = [naive_logp(oracle, group, 1.0) for group in on("cpu", groups, prompts)]
        same = [a == b for g, o in zip(groups, drawn) for a, b in zip(g.texts, o.texts)]
        return row | {"sampled": distance(flat(group.logp for group in groups), flat(right)),
                      "equal completions": sum(same) / len(same)}

    oracle, prompts = build("cpu", torch.float32)
    drawn = sample(oracle, prompts, G, T)
    logps = [naive_logp(oracle, group, 1.0) for group in drawn]
    truth, gradient = flat(logps), gradient_of(oracle, logps)
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        crm, own = build(device, dtype)
        logps = [naive_logp(crm, group, 1.0) for group in on(device, drawn, own)]
        slow = {"logp": distance(flat(logps), truth), "gradient": distance(gradient_of(crm, logps), gradient)}
        slow["sampled"] = slow["logp"]
        table[f"{kind}, transformers"] = slow
        for name in [*ways, "CUDA graphs"] if device.type == "cuda" else ways:
            try:
                row = compare(*build(device, dtype, **ways.get(name, {})), graphs=name == "CUDA graphs")
                passed = [row[key] <= (FLOAT32 if dtype == torch.float32 else BFLOAT16 * slow[key]) for key in slow]
                row["passed"] = all(passed) and (dtype != torch.float32 or row["equal completions"] >= EQUAL)
            except RuntimeError as error:                               # all that CUDA and its compilers raise
                row = {"passed": False, "problem": str(error)}
            table[f"{kind}, {name}"] = row
    crm, own = build(device, torch.bfloat16)
    bias_keys(crm)
    groups = sample(crm, own, G, T)
    with torch.no_grad():
        gaps = sum((logp(crm, group, range(G)) - group.logp).abs().sum().item() for group in groups)
    gap = gaps / sum(int(group.lengths.sum()) for group in groups)
    table["bfloat16, large key biases"] = {"mean gap": gap, "passed": gap < BIASED_GAP}
    return table
