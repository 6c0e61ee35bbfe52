"""The source of one_step.ipynb: a step of GRPO by hand.

    python -m learn.notebook        # runs these cells and writes the notebook

See learn/notebook.py for what "# %%" means.
"""
# A cell imports what it is about.
# ruff: noqa: E402

# %% [markdown]
# # One step of GRPO, by hand
#
# A small vision-language model looks at a medical image, reads a question, writes down what it
# thinks, and points. Nobody shows it the right answer. It tries four times, each attempt is graded,
# and the attempts that were better than the others become more likely. That is GRPO (*group
# relative policy optimization*), and this notebook makes one step of it, slowly, with numbers that
# a pocket calculator can check.
#
# You should know PyTorch, and that a language model gives a probability to every possible next
# token. Everything else is explained. Nothing here is a toy version: each cell calls the functions
# that train the real model, and the last section runs the real training loop and compares its
# numbers with ours.
#
# Four words come up all the time:
#
# | word | meaning |
# |---|---|
# | policy | the model that is trained: a distribution over completions of a prompt |
# | completion | what the model writes after the prompt, token by token |
# | reward | a grade of one completion, a number |
# | group | several completions of the same prompt |

# %%
import sys
from pathlib import Path

here = Path.cwd()
root = here if (here / "train_grpo.py").is_file() else here.parent
sys.path.insert(0, str(root))  # so that the project's files are found

# %%
import math

import torch

from learn import show

torch.set_printoptions(precision=4, sci_mode=False, linewidth=100)

# %% [markdown]
# ## 1. A question about an image
#
# `Config` has every knob of the training script. Ours makes one step with one question and four
# completions. (A real step has many questions, see `recipes/`.) `inner_epochs=2` means that the
# four completions are used for two updates of the weights: the first update shows what GRPO wants,
# and the second one shows how it is held back.

# %%
from crm import load_crm
from data import EMBEDDED, load_samples
from train_grpo import Config

settings = Config(
    crm=str(EMBEDDED["crm"]),
    data=str(EMBEDDED["data"]),
    steps=1,
    prompts=1,
    group=4,
    minibatches=1,
    inner_epochs=2,
    lr=1e-4,
    weight_decay=0,
    sampler_is=0,  # a correction for samplers that round differently, as GPUs do
    eval_every=-1,
    save_every=-1,
)
crm = load_crm(settings.crm)  # the Clinical Reasoning Module: a Qwen2.5-VL, here a tiny one
train = load_samples(settings.data, "train")
print(f"{crm.model.num_parameters():,} weights, {len(train):,} training questions")

# %% [markdown]
# The seed decides which question the step asks and what is sampled. In a real run one takes what
# comes. Here we choose: twelve seeds are tried, and of those whose four completions are all well
# formed we keep the one whose four rewards are easiest to tell apart. (You will soon see every part
# of what the next cell does.)

# %%
from dataclasses import replace

from runtime.run import step_indices
from train_grpo import Setup, roll_out


def smallest_gap(seed):
    """Samples the first step of a run with this seed. Returns the smallest difference between two
    of its rewards, or 0 where a completion is not well formed."""
    cfg = replace(settings, seed=seed)
    (index,) = step_indices(len(train), cfg.prompts, cfg.seed, step=0)
    (rollout,) = roll_out(Setup(cfg, crm, None, {}), train, [(0, index)], step=0)
    if any(of_one["think_format"] + of_one["answer_format"] < 2 for of_one in rollout.terms):
        return 0.0
    return rollout.rewards.sort().values.diff().min().item()


gaps = {seed: smallest_gap(seed) for seed in range(12)}
cfg = replace(settings, seed=max(gaps, key=gaps.get))
print(f"seed {cfg.seed}: neighbouring rewards are at least {gaps[cfg.seed]:.2f} apart")

# %%
from runtime.pictures import overlay

(index,) = step_indices(len(train), cfg.prompts, cfg.seed, step=0)
example = train[index]
print(example.query)
print("the true answer, which the model never sees:", example.category, example.bbox)
overlay(example.image, example.mask, example.bbox, example.points)

# %% [markdown]
# The picture shows the truth: the target's mask, the box around it, and two key points inside. The
# reward will use them. The model gets the image and the question, nothing else.
#
# **Think about it.** The question does not name its target. What has to be *known* to answer it,
# and what has to be *seen*? Which of the two can a grade for the box teach?

# %% [markdown]
# ## 2. What the model reads
#
# A language model reads tokens. The image is resized to multiples of 28 pixels and cut into patches
# of 14 x 14 pixels. The vision tower makes one vector of every 2 x 2 patches, so a token stands for
# 28 x 28 pixels. (A patch has 3 x 14 x 14 numbers, and each is there twice, because the model was
# made for videos as well and reads two frames at a time.)

# %%
prompt = crm.encode_question(example.image, example.query)
print("image, width x height:   ", prompt.sizes.image, "->", prompt.sizes.model)
print("patches x their numbers: ", tuple(prompt.pixel_values.shape))
print("prompt tokens:           ", tuple(prompt.ids.shape))
print("of these of the image:   ", int((prompt.ids == crm.image_id).sum()))
show.image_tokens(example, prompt.sizes)

# %%
with torch.no_grad():
    (features,) = crm.image_features([prompt])
    x, positions = crm.embed(prompt, features)
print("from the vision tower, image tokens x D:  ", tuple(features[0].shape))
print("into the language model, prompt tokens x D:", tuple(x.shape))

# %% [markdown]
# The same prompt as text. Each image token is a placeholder here, whose embedding the vision
# tower's vector replaces.

# %%
import textwrap

text = crm.tokenizer.decode(prompt.ids)
count = text.count("<|image_pad|>")
text = text.replace("<|image_pad|>" * count, f"<|image_pad|>...{count} times...")
print("\n".join(textwrap.fill(line, 100) for line in text.splitlines()))

# %% [markdown]
# **Think about it.** How many image tokens would an image of twice the width and twice the height
# have? Which of the prompt's numbers stay as they are?

# %% [markdown]
# ## 3. Four completions
#
# A completion is drawn token by token from softmax(logits / temperature), at temperature 1. Each of
# the four has random numbers of its own. They all answer the same prompt. Shapes are (G, T): G
# completions, T tokens in the longest.

# %%
from sampling import TRAINING, sample

seeds = [(cfg.seed, TRAINING, 0, 0, index, 0)]  # step 0, place 0 in the step, first attempt
(group,) = sample(crm, [prompt], cfg.group, cfg.max_new_tokens, cfg.temperature, seeds)
print("tokens (G, T):", tuple(group.tokens.shape), "  lengths:", group.lengths.tolist())
for i, text in enumerate(group.texts):
    print()
    print(textwrap.fill(f"{i}: {text}", 100))

# %%
from rewards import parse_answer

answers = [parse_answer(text) for text in group.texts]
titles = [f"completion {i}" for i in range(cfg.group)]
show.completions(example, answers, prompt.sizes, titles)

# %% [markdown]
# Yellow is the box that was written, dots are the two points, and the dashed line is the true box.
#
# **Think about it.** All four come from one distribution. What would the group look like at
# temperature 0, where the most likely token is taken each time? Could anything be learned from it?

# %% [markdown]
# ## 4. Rewards
#
# `rewards.py` grades a completion by several terms, each between 0 and 1. The mode "soft" adds four
# of them: is there a thought, can the answer be read, how good is the box, how good are the points?

# %%
from rewards import MODES, total_reward
from train_grpo import reward_group

terms = reward_group(example, group, crm, None)
rewards = torch.tensor([total_reward(of_one, cfg.mode) for of_one in terms])

print(f"{'completion':16}", *(f"{i:6}" for i in range(cfg.group)))
for name in MODES[cfg.mode]:
    print(f"{name:16}", *(f"{of_one[name]:6.3f}" for of_one in terms))
print(f"{'reward':16}", *(f"{reward:6.3f}" for reward in rewards.tolist()))

# %% [markdown]
# One of these numbers by hand: `box_iou` of the best completion. IoU is the area that both boxes
# share, divided by the area that they cover together. Everything is in pixels of the resized image.

# %%
best = int(rewards.argmax())
show.overlap(answers[best], example, prompt.sizes)

# %%
from data import to_model
from rewards import box_gates, box_iou, box_size, smooth_log

box = answers[best].bbox
true_box = to_model(example.bbox, prompt.sizes)
shared_width = max(0.0, min(box[2], true_box[2]) - max(box[0], true_box[0]))
shared_height = max(0.0, min(box[3], true_box[3]) - max(box[1], true_box[1]))
shared = shared_width * shared_height
covered = math.prod(box_size(box)) + math.prod(box_size(true_box)) - shared
print("the box that was written:", *(f"{edge:.2f}" for edge in box))
print("the true box:            ", *(f"{edge:.2f}" for edge in true_box))
print(f"shared:  {shared_width:.2f} x {shared_height:.2f} = {shared:.2f}")
print(f"covered: both areas less what they share = {covered:.2f}")
print(f"IoU = {shared / covered:.4f}, box_iou says {box_iou(box, true_box):.4f}")

# %%
iou = box_iou(box, true_box)
true_points = to_model(example.points, prompt.sizes)
print(f"smoothed: 0.9 ln(3 IoU + 1) / ln(4) + 0.1 = {smooth_log(iou):.4f}")
v1, v2 = box_gates(box, true_box, true_points)
print(f"gates: true points in the box {v1}, size within a factor of two {v2}")
term = smooth_log(iou) * (0.7 + 0.3 * (v1 + v2) / 2)
print(f"box_iou = smoothed (0.7 + 0.3 (v1 + v2) / 2) = {term:.4f}")
print(f"as in the table: {terms[best]['box_iou']:.4f}")

# %% [markdown]
# The smoothing makes the first bit of overlap worth more than the last one, so that a poor box has
# somewhere to go. Each gate that does not hold takes off a few percent.
#
# **Think about it.** Go through the table row by row. Which term tells the four completions apart
# the most? Which one could be left out here without changing their order? No term looks at whether
# the thought is *true*. Why might thoughts become truer all the same?

# %% [markdown]
# ## 5. Advantages
#
# Is a reward of 2.9 good? That depends on the question: for an easy one it is poor. So a completion
# is compared with the others of its group. Its *advantage* says how many standard deviations it is
# above their mean. No second network has to guess what a good reward is: the group is the measure,
# which is the *group relative* in GRPO.

# %%
from train_grpo import group_advantages

mean = rewards.mean()
std = rewards.std()
by_hand = (rewards - mean) / (std + 1e-6)
print(f"mean {mean:.4f}, standard deviation {std:.4f}")
for i in range(cfg.group):
    line = f"completion {i}: ({rewards[i]:.4f} - {mean:.4f}) / {std:.4f} = {by_hand[i]:+.4f}"
    print(line)

advantages = group_advantages(rewards[None])[0]  # it takes many groups at once: (P, G)
print("group_advantages:", advantages)

# %% [markdown]
# What does a group of equal rewards teach?

# %%
print(group_advantages(torch.tensor([[2.5, 2.5, 2.5, 2.5]])))

# %% [markdown]
# Nothing. Every advantage is 0, and you will see below that what rewards add to the gradient is a
# sum of terms that each have an advantage as a factor. If the model always fails, or always
# succeeds, a question is of no use. GRPO needs differences.
#
# **Think about it.** Multiply all rewards by ten. What happens to the advantages? Three completions
# earn 2.50, and the fourth earns 2.51. What is its advantage? Is that what you want?

# %% [markdown]
# ## 6. Log-probabilities, all in one sequence
#
# To make a completion likelier we need its probability under the model, as something that can be
# differentiated. The probability of a completion is the product of those of its tokens, so its
# logarithm is a sum. The four completions share their prompt, and the prompt with its image is
# often the longer part. So they are put into one sequence, `[prompt | c0 | c1 | c2 | c3]`, and go
# through the model once. The attention mask must then see to it that no completion sees another.

# %%
from scoring import lay_out

L = len(prompt.ids)
lengths = group.lengths.tolist()
S = L + sum(lengths)
(span,) = lay_out([L], [lengths], "cpu")

allowed = torch.zeros(S, S, dtype=torch.bool)
allowed[:L, :L] = torch.ones(L, L).tril().bool()  # the prompt: each token sees what is before it
for own, length in zip(span.tokens, lengths):
    own = own[:length]  # where this completion's tokens are
    allowed[own, :L] = True  # it sees all of the prompt
    allowed[own[:, None], own] = torch.ones(length, length).tril().bool()  # and itself so far

words_before = prompt.image_start
image_tokens = features.shape[1]
words_after = L - words_before - image_tokens
parts = [("start", words_before), ("image", image_tokens), ("question", words_after)]
parts += [(f"c{i}", length) for i, length in enumerate(lengths)]
show.attention_mask(allowed, parts)

# %% [markdown]
# Read it row by row: a row is a token, and its coloured columns are what it may look at. A token of
# the prompt looks at what is before it. A token of a completion looks at the whole prompt and at
# its own completion so far, which is the triangle. White is forbidden.
#
# `score` does this without ever building the mask, and returns the log-probability of each token.

# %%
import scoring
from scoring import make_packs, score

(pack,) = make_packs([group], cfg.pack_tokens)
((logp, entropy),) = score(crm, pack, cfg.temperature)
print("logp (G, T):", tuple(logp.shape), "  tokens in the sequence:", pack.tokens)

tokens = []
for row, length in zip(group.tokens, lengths):
    tokens.append([crm.tokenizer.decode([token]) for token in row[:length].tolist()])
print(f"\nthe first tokens of completion {best}:")
for token, value in list(zip(tokens[best], logp[best].tolist()))[:12]:
    print(f"{token!r:14} log-probability {value:8.4f}   probability {math.exp(value):.4f}")

# %%
alone = torch.zeros_like(logp)
with torch.no_grad():
    for i in range(cfg.group):
        alone[i] = scoring.logp(crm, group, [i])[0]
print(f"scored alone or together, largest difference: {(alone - logp).abs().max():.1e}")
print(f"scored or as sampled, largest difference:     {(group.logp - logp).abs().max():.1e}")
print("log-probability of each completion:", logp.detach().sum(1))

# %% [markdown]
# **Think about it.** Why is the last row of the picture not coloured at c0, c1 and c2? What would
# be wrong with the log-probabilities if it were? How many tokens would four separate sequences
# have?

# %% [markdown]
# ## 7. The loss
#
# What we want is simple: raise the log-probability of each token by its completion's advantage.
# GRPO's loss does this with two safeguards. Here it is for one token:
#
# ```text
# ratio     rho  = pi(token) / pi_old(token)            pi: the policy now, pi_old: when it sampled
# gain      J    = min(rho A, clip(rho, 0.8, 1.2) A)    A: the completion's advantage
# distance  K    = pi_ref/pi - log(pi_ref/pi) - 1       pi_ref: the model that training started from
# loss      L    = sum of w (0.01 K - J)                w: the token's weight
# ```
#
# The clip keeps one update near the policy that sampled. K keeps the whole training near its start:
# it is 0 where both models agree and positive elsewhere, and its mean over sampled tokens is the KL
# divergence between them.
#
# At the first update pi, pi_old and pi_ref are the same model. Let us see what is left then.

# %%
from scoring import all_logp
from train_grpo import grpo_loss, token_weights

parameters = crm.prepare_training(reference=True)  # keeps a frozen copy as the reference model
(old_logp,) = all_logp(crm, [group], cfg.pack_tokens, cfg.temperature)
with crm.reference():
    (ref_logp,) = all_logp(crm, [group], cfg.pack_tokens, cfg.temperature)

mask = torch.arange(logp.shape[1]) < group.lengths[:, None]  # true where a token was written
weights = token_weights(mask, cfg.agg)
print("a token's weight is 1 / (its completion's length x 4 completions):")
for i, length in enumerate(lengths):
    print(f"completion {i}: 1 / ({length} x {cfg.group}) = {weights[i, 0]:.6f}")
print(f"all weights together: {weights.sum():.4f}")

# %%
((logp, _),) = score(crm, pack, cfg.temperature)
loss, stats = grpo_loss(
    logp,
    old_logp,
    ref_logp,
    advantages,
    weights,
    clip_low=cfg.clip_low,
    clip_high=cfg.clip_high,
    dual_clip=cfg.dual_clip,
    kl_coef=cfg.kl_coef,
    kl=cfg.kl,
)
print(f"ratios between {stats['ratio_min']:.6f} and {stats['ratio_max']:.6f}")
print(f"KL {stats['kl']:.6f}, clipped {stats['clip_frac']:.6f}")
print(f"loss {loss.item():+.8f}")

# %% [markdown]
# Every ratio is 1, and the distance from the reference is 0. So the loss is minus the mean of the
# four advantages. They are deviations from their mean, so it is 0 up to rounding, whatever the
# rewards were. **The value of this loss tells nothing. Do not watch it, watch the reward.**
#
# Its gradient is another matter. The ratio is exp(logp - old_logp), and the derivative of exp at 0
# is 1. So the derivative of the loss by a token's logp is -w A:

# %%
(slope,) = torch.autograd.grad(loss, logp, retain_graph=True)
for i in range(cfg.group):
    product = -weights[i, 0] * advantages[i]
    print(
        f"completion {i}: -w A = -{weights[i, 0]:.6f} x {advantages[i]:+.4f} = {product:+.6f}, "
        f"autograd says {slope[i, 0]:+.6f}"
    )

# %% [markdown]
# An optimizer goes against the slope. Where the slope is negative, it raises the log-probability.
#
# **Think about it.** All tokens of a completion have the same slope, from `<think>` to the last
# brace. A good completion may contain a bad sentence. How can GRPO still learn which tokens matter,
# given many groups?

# %% [markdown]
# ## 8. The gradient, and one step of the optimizer
#
# `backward` takes those slopes through the model, to the slope of each of its weights. If the
# gradient is longer than 1, it is shortened to 1. Then AdamW moves the weights.

# %%
from runtime.optim import MAX_GRAD_NORM, Optimizer

optimizer = Optimizer(parameters, cfg.weight_decay)
loss.backward()

squares = {}
for name, parameter in parameters.items():
    part = "vision tower" if "visual" in name else "language model"
    squares[part] = squares.get(part, 0.0) + parameter.grad.square().sum().item()
for part, square in squares.items():
    print(f"length of the gradient, {part}: {square**0.5:.4f}")

grad_norm = optimizer.step(cfg.lr)
scale = min(1.0, MAX_GRAD_NORM / grad_norm)
print(f"of all weights: {grad_norm:.4f}, so it is multiplied by {scale:.4f}")

# %%
moves = []
start = dict(crm.ref_model.named_parameters())
for name, parameter in parameters.items():
    moves.append((parameter.detach() - start[name]).abs().flatten())
moves = torch.cat(moves)
print(f"learning rate {cfg.lr}, largest move {moves.max():.6f}, median {moves.median():.6f}")

# %% [markdown]
# AdamW divides each weight's gradient by the gradient's usual size. At its first step that is the
# gradient itself, so every weight moves by about the learning rate, up or down.
#
# **Think about it.** Had the gradient been ten times as long, how far would the weights have moved
# in this first step? And in which later step would such a gradient do harm, if it were not
# shortened?

# %% [markdown]
# ## 9. The same four completions, scored again
#
# The weights have changed. How likely does the model find the four completions now? Green tokens
# became likelier, red ones less likely. Point at a token to see by how much its log-probability
# changed.

# %%
((logp_2, _),) = score(crm, pack, cfg.temperature)
change = logp_2.detach() - old_logp
titles = []
for i in range(cfg.group):
    titles.append(f"completion {i}: advantage {advantages[i]:+.2f}")
show.coloured(titles, tokens, change)

# %%
mean_change = change.sum(1) / group.lengths
show.changes_and_advantages(advantages, mean_change)

# %%
print("mean change of a token, by completion:", mean_change)
print(f"sum of w A change over all tokens: {(weights * advantages[:, None] * change).sum():+.4f}")

# %% [markdown]
# The last number should be positive: it is what the loss asked for. A single token need not obey,
# and not even a whole completion. The same weights write all four, so where two completions share
# their words, what one pushes up the other may push down. Compare the words that several share with
# those that only one of them has.
#
# **Think about it.** Find a token that became likelier in a completion with a negative advantage.
# How can that be? And find a token that hardly changed although its slope was as large as that of
# its neighbours. (Look at its probability in section 6.)

# %% [markdown]
# ## 10. The second update: ratio, clip and KL
#
# Sampling is slow, so the same completions are used again. But they came from the *old* policy. The
# ratio corrects for that, and clipping says that a token which has moved by a fifth in the
# direction that its advantage asks for has moved enough. The minimum in the formula makes it
# one-sided: a token that moved the *wrong* way keeps its gradient. (The line with `dual_clip` is a
# bound from below: where A < 0, a token never loses more than three times its advantage.)

# %%
rho = (logp_2.detach() - old_logp).exp()
clipped = rho.clamp(1 - cfg.clip_low, 1 + cfg.clip_high)
A = advantages[:, None].expand_as(rho)
gain = torch.minimum(rho * A, clipped * A)
gain = torch.where(A < 0, torch.maximum(gain, cfg.dual_clip * A), gain)
show.gains(rho[mask], A[mask], gain[mask], cfg.clip_low, cfg.clip_high)

# %% [markdown]
# Each dot is a token, and the green band is the clip range. The dots of a completion lie on one
# line. Where it is flat, moving further gains nothing, so the token has no gradient. On the left,
# for tokens of good completions, that is above the band, and on the right below it. On the other
# side the line goes on: those tokens moved the wrong way, and are pulled back.
#
# Now one token by hand: of those that were good, the one that has risen most.

# %%
good = mask & (A > 0)
place = int(torch.where(good, rho, 0.0).argmax())
i, t = divmod(place, rho.shape[1])
x = (ref_logp - logp_2.detach())[i, t]
distance = (x.exp() - x - 1).clamp(max=10)
print(f"completion {i}, token {t}: {tokens[i][t]!r}")
print(f"rho  = exp({logp_2[i, t]:.4f} - ({old_logp[i, t]:.4f})) = {rho[i, t]:.4f}")
print(f"clip = {clipped[i, t]:.4f}")
print(f"J    = min({rho[i, t]:.4f} x {A[i, t]:.4f}, {clipped[i, t]:.4f} x {A[i, t]:.4f})")
print(f"     = {gain[i, t]:.4f}")
print(f"K    = exp({x:.4f}) - ({x:.4f}) - 1 = {distance:.4f}")
print(f"L    = {weights[i, t]:.6f} x (0.01 x {distance:.4f} - {gain[i, t]:.4f})")
print(f"     = {weights[i, t] * (cfg.kl_coef * distance - gain[i, t]):+.6f}")

# %% [markdown]
# All tokens together, by hand and by `grpo_loss`. (K is cut off at 10, so that one token which has
# become very unlikely cannot take over the loss.)

# %%
x = torch.where(mask, ref_logp - logp_2.detach(), 0.0)
distances = (x.exp() - x - 1).clamp(max=10)
print(f"by hand:   {(weights * (cfg.kl_coef * distances - gain)).sum():+.6f}")

loss_2, stats_2 = grpo_loss(
    logp_2,
    old_logp,
    ref_logp,
    advantages,
    weights,
    clip_low=cfg.clip_low,
    clip_high=cfg.clip_high,
    dual_clip=cfg.dual_clip,
    kl_coef=cfg.kl_coef,
    kl=cfg.kl,
)
print(f"grpo_loss: {loss_2.item():+.6f}")
print(f"KL {stats_2['kl']:.6f}, share of clipped tokens {stats_2['clip_frac']:.4f}")
(slope_2,) = torch.autograd.grad(loss_2, logp_2, retain_graph=True)
print(f"slope of the token above: {slope_2[i, t]:+.6f}, before: {slope[i, t]:+.6f}")

loss_2.backward()
grad_norm_2 = optimizer.step(cfg.lr)
print(f"length of the gradient: {grad_norm_2:.4f}, before: {grad_norm:.4f}")

# %% [markdown]
# If the token above was clipped, what is left of its slope comes from the KL, which pulls it back
# towards the reference. Over thousands of steps this is what keeps the model from forgetting how to
# write.
#
# **Think about it.** What would happen at ten times the learning rate: to the ratios, to the share
# of clipped tokens, to the KL? Change `lr` in section 1 and run everything again.

# %% [markdown]
# ## 11. The training loop says the same
#
# This is the step that `train_grpo.py` makes with our settings. It does what we did: sample,
# reward, advantages, log-probabilities, two updates. (In its log a step's loss and gradient are
# means over the step's updates.)

# %%
import io
from contextlib import redirect_stdout
from tempfile import TemporaryDirectory

import train_grpo
from runtime.files import read_jsonl

with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
    train_grpo.main(replace(cfg, out=f"{folder}/run"))
    (row,) = read_jsonl(Path(folder) / "run/metrics.jsonl")

ours = {
    "reward": rewards.mean().item(),
    "loss": (loss.item() + loss_2.item()) / 2,
    "kl": (stats["kl"].item() + stats_2["kl"].item()) / 2,
    "clip_frac": (stats["clip_frac"].item() + stats_2["clip_frac"].item()) / 2,
    "grad_norm": (grad_norm + grad_norm_2) / 2,
}
print(f"{'':12}{'by hand':>12}{'train_grpo.py':>16}")
for name, value in ours.items():
    print(f"{name:12}{value:12.6f}{row[name]:16.6f}")

# %%
print(
    "python train_grpo.py --crm demo/crm --data demo/data --steps 1 --prompts 1 --group 4 \\\n"
    f"    --minibatches 1 --inner-epochs 2 --lr {cfg.lr} --weight-decay 0 --sampler-is 0 \\\n"
    f"    --eval-every -1 --save-every -1 --seed {cfg.seed} --out runs/one_step"
)

# %% [markdown]
# A real run makes this step many times, with many questions in each, so that what is luck in one
# group cancels out and what is better in all of them adds up.
#
# **Think about it.** In one group of four, how much of "better" was luck? What would you change
# first to have less of it: the size of a group, the number of questions, or the learning rate?
#
# From here: fill in the functions yourself (`python -m learn.exercises`), see other algorithms as
# changes of ten lines (`learn/CHANGES.md`), and read what goes wrong and how one notices
# (`learn/SYMPTOMS.md`, `learn/FAILURES.md`). `train_grpo.py` is the loop itself, and after this
# notebook it should read like a summary.

# %% [markdown]
# <details>
# <summary>Answers to the questions, in a few words each</summary>
#
# 1. What the words mean has to be known, and where the thing lies has to be seen. A grade for the
#    box can teach both, but only by way of attempts that happen to be right.
# 2. Four times as many. The question's tokens stay, and so does D.
# 3. Four equal completions with equal rewards, so nothing could be learned.
# 4. A term that is equal in all four changes no difference of rewards. A thought that names the
#    right thing is followed by a better box, so it is found in the better completions.
# 5. They stay as they are, because the deviation grows as well. The fourth has +1.5 and the others
#    -0.5, as if 2.51 were far better than 2.50. Some algorithms do not divide, for this reason
#    (`--norm none`).
# 6. It would be the probability of writing c3 after having read the three others, and that is not
#    how c3 was sampled. The prompt would be there four times instead of once.
# 7. A word that good and bad completions share is pushed up as often as down. Only what is found
#    more often in the good ones adds up.
# 8. Just as far, because AdamW divides by the size. Later its averages of gradients remember such a
#    gradient for many steps.
# 9. Another completion with a positive advantage writes the same word in a similar place, with the
#    same weights. A token of probability 1 cannot become likelier.
# 10. The ratios spread, more tokens are clipped, and the KL grows faster than the rate.
# 11. Most of it. More questions help most: their luck is independent, and a large group about one
#     question says only more about that question. A lower rate also averages, over more steps.
#
# </details>
