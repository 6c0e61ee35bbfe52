"""The slow, obvious versions that the fast code is compared with. Shapes as in scoring.py."""

import torch

from bench.parity import naive_logp
from crm import CRM, Prompt
from scoring import Pack

__all__ = ["dense_score", "gradients_of", "naive_logp", "next_logits"]


def next_logits(
    crm: CRM, prompt: Prompt, ids: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """Logits of the token after ids, (V,), by transformers' own forward over everything. Those of
    banned tokens are -inf."""
    logits = crm.model(
        input_ids=ids[None],
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.grid_thw,
        mm_token_type_ids=(ids[None] == crm.image_id).int(),
    ).logits[0, -1]
    return (logits.float() / temperature).index_fill(0, crm.banned, -torch.inf)


def dense_score(crm: CRM, pack: Pack, temperature: float = 1.0) -> list[torch.Tensor]:
    """scoring.score with one (S, S) mask for all of the packed sequence: token i attends to token j
    of its prompt up to i, and of its own completion up to i."""
    model = crm.model.model.language_model
    embeddings = []
    positions = []
    owners = []
    places = []
    all_features = []
    for p, (group, rows) in enumerate(zip(pack.groups, pack.rows)):
        completions = [group.tokens[row, : group.lengths[row]] for row in rows]
        (features,) = crm.image_features([group.prompt])
        x, position = crm.embed(group.prompt, features, completions)
        embeddings.append(x)
        all_features.append(features)
        positions.append(position)
        owners += [(p, None)] * len(group.prompt.ids)
        last = len(owners) - 1
        for row, tokens in zip(rows, completions):
            places.append([last, *range(len(owners), len(owners) + len(tokens) - 1)])
            owners += [(p, row)] * len(tokens)
    S = len(owners)
    mask = torch.zeros(S, S, dtype=torch.bool)
    for i in range(S):
        for j in range(i + 1):
            mask[i, j] = owners[j] in (owners[i], (owners[i][0], None))
    model.set_attn_implementation("sdpa")
    hidden = model(
        inputs_embeds=torch.cat(embeddings)[None],
        position_ids=torch.cat(positions, 1)[:, None],
        attention_mask=mask[None, None],
        use_cache=False,
        **crm.deepstack(
            [g.prompt for g in pack.groups], all_features, [len(x) for x in embeddings]
        ),
    ).last_hidden_state[0]
    out = []
    places_left = iter(places)
    for group, rows in zip(pack.groups, pack.rows):
        logps = torch.zeros(len(rows), group.tokens.shape[1])
        for i, row in enumerate(rows):
            logits = crm.model.lm_head(hidden[next(places_left)]).float() / temperature
            logits = logits.index_fill(1, crm.banned, -torch.inf)
            n = int(group.lengths[row])
            logps[i, :n] = logits.log_softmax(-1).gather(1, group.tokens[row, :n, None])[:, 0]
        out.append(logps)
    return out


def gradients_of(crm: CRM, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns {name: gradient} of a loss, of the parameters that get one."""
    crm.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in crm.model.named_parameters() if p.grad is not None}
