"""Every way of sampling and scoring on this machine's device, against transformers' own forward on the CPU in float32.

The oracle goes row by row: the whole sequence, all logits, no packing, no cache. Compared are the log-probabilities of
the same answers, the gradient of all weights, what the sampler says of the tokens it drew, and whether those are the
oracle's. In float32 a way must meet the oracle; in bfloat16 it must come as near as that slow forward in bfloat16.
"""
from dataclasses import replace

import torch

from crm import BANNED, CRM, Group, load_crm
from data import fill_prompt, load_prompt, load_samples

P, G, T = 3, 6, 96
FLOAT32, BFLOAT16 = 1e-4, 2       # largest relative error; largest multiple of the slow forward's relative error
EQUAL = 0.9                         # share of answers that are the oracle's, in float32


def naive_logp(crm: CRM, group: Group, temperature: float) -> torch.Tensor:
    """One answer at a time, the whole sequence, all logits, no packing, no cache. (G, T)"""
    out, p = [], group.prompt
    for tokens, n in zip(group.tokens, group.lengths.tolist()):
        ids = torch.cat([p.ids, tokens[:n]])[None]
        logits = crm.model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=p.pixel_values,
                           image_grid_thw=p.grid_thw, mm_token_type_ids=(ids == crm.image_id).int()).logits[0]
        logits = logits[len(p.ids) - 1:-1].float() / temperature
        logits[:, crm.tokenizer.convert_tokens_to_ids(list(BANNED))] = -torch.inf
        logp = logits.log_softmax(-1).gather(1, tokens[:n, None])[:, 0]
        out.append(torch.nn.functional.pad(logp, (0, group.tokens.shape[1] - n)))
    return torch.stack(out)


def on(device, groups: list[Group], prompts) -> list[Group]:
    return [replace(g, prompt=p, tokens=g.tokens.to(device), lengths=g.lengths.to(device))
            for g, p in zip(groups, prompts)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.detach().float().cpu().flatten() for x in tensors])


def learned(crm: CRM, logps: list[torch.Tensor]) -> torch.Tensor:
    """The gradient of all weights, of a weighted sum of all log-probabilities."""
    crm.model.zero_grad()
    sum((x * torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(x.device)).sum()
        for i, x in enumerate(logps)).backward()
    return flat(p.grad for p in crm.model.parameters())


def parity(path: str, device: torch.device) -> dict[str, dict]:
    """{"bfloat16, rows": {"logp": relative error, …, "passed": bool}, …}"""
    torch.backends.cudnn.allow_tf32 = False             # float32 is to be float32
    samples, template, table = load_samples("demo/data"), load_prompt("reasoning"), {}
    ways = {"rows": {}, "dense": {"attention": "dense"}, "checkpointing": {"checkpointing": True}}
    if device.type == "cuda":
        ways |= {"flex": {"attention": "flex"}, "CUDA graphs": {"cuda_graphs": True}}

    def build(*where, **way):
        crm = load_crm(path, *where, **way)
        return crm, [crm.encode(samples[i].image, fill_prompt(template, samples[i].query)) for i in range(P)]

    def distance(x, truth):
        return ((x - truth).norm() / truth.norm()).item()

    def compare(crm, own) -> dict[str, float]:
        logps = [logp for logp, _ in crm.score([(g, range(G)) for g in on(device, drawn, own)])]
        row = {"logp": distance(flat(logps), truth), "gradient": distance(learned(crm, logps), gradient)}
        for _ in range(3 if crm.sampler else 1):                        # the last one replays its graphs
            groups = crm.sample(own, G, T)
        with torch.no_grad():
            right = [naive_logp(oracle, group, 1.0) for group in on("cpu", groups, prompts)]
        same = [a == b for g, o in zip(groups, drawn) for a, b in zip(g.texts, o.texts)]
        return row | {"sampled": distance(flat(group.logp for group in groups), flat(right)),
                      "equal answers": sum(same) / len(same)}

    oracle, prompts = build("cpu", torch.float32)
    drawn = oracle.sample(prompts, G, T)
    logps = [naive_logp(oracle, group, 1.0) for group in drawn]
    truth, gradient = flat(logps), learned(oracle, logps)
    for dtype in (torch.float32, torch.bfloat16):
        crm, own = build(device, dtype)
        logps = [naive_logp(crm, group, 1.0) for group in on(device, drawn, own)]
        slow = {"logp": distance(flat(logps), truth), "gradient": distance(learned(crm, logps), gradient)}
        slow["sampled"] = slow["logp"]
        table[f"{dtype}, transformers".removeprefix("torch.")] = slow
        for name, way in ways.items():
            try:
                row = compare(*build(device, dtype, **way))
                passed = [row[key] <= (FLOAT32 if dtype == torch.float32 else BFLOAT16 * slow[key]) for key in slow]
                row["passed"] = all(passed) and (dtype != torch.float32 or row["equal answers"] >= EQUAL)
            except RuntimeError as error:                               # all that CUDA and its compilers raise
                row = {"passed": False, "problem": str(error)}
            table[f"{dtype}, {name}".removeprefix("torch.")] = row
    return table
