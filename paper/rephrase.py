"""Other words for the same question: does the answer stay, and is it the question that it answers?

    python -m paper.rephrase --data demo/data --crm demo/crm --limit 60 --out eval/words
    python -m paper.rephrase … --base-url http://localhost:8000/v1 --model NAME     # paraphrases

Every question is asked as it is and in the wordings of VARIANTS, which are seeded. A wording that
changes nothing is left out. With the second command a language model paraphrases as well. Of the
boxes b_0 (as asked), b_1 … b_k and their IoUs v_i with the truth:

    IoU          mean of v_1 … v_k            drop         v_0 - IoU
    worst        min of v_0 … v_k             hard pass    all v_i >= 0.5
    as before    mean IoU(b_0, b_i)           consistency  mean IoU of all pairs of boxes
    flips        share of [v_i >= 0.5] != [v_0 >= 0.5]
    refusals     share of 1 … k

A box that is missing has IoU 0 with everything. Consistency alone means nothing: a model that
ignores its question has all of it. So there are three controls: another row's question about this
image, a grey image, and the same question sampled as often as there are wordings, because chance
alone lowers the worst of several. Answers are greedy unless --temperature is given; the third
control then uses it, else 1. Writes table.md, summary.json and answers.jsonl.
"""

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from crm import CRM, load_crm
from data import EMBEDDED, BadRow, Example, Examples, load_samples
from evaluate import ask
from metrics import interval, paired_interval, percent
from paper.umrg_words import Chat
from rewards import Box, box_iou
from runtime.cli import exit_on, flag, parse_args, print0, use_embedded
from runtime.files import write_whole
from runtime.parallel import Ranks

# what a question is asked as, besides its wordings
ASKED = "as asked"
OTHER = "another row's question"
GREY = "a grey image"
FIXED = (ASKED, OTHER, GREY)
# lines of the table that stand for several answers
ALL = "all wordings"
SAMPLED = "the same question, sampled"
MEASURES = {
    "iou": "IoU",
    "worst": "worst",
    "drop": "drop",
    "hard_pass": "hard pass",
    "as_before": "as before",
    "consistency": "consistency",
    "flips": "flips",
    "refused": "refusals",
}


@dataclass
class Config:
    # model
    crm: str | None = flag(None, "Qwen2.5-VL or Qwen3-VL, folder or hub name")
    prompt: str | None = flag(None, "reasoning, direct, a text file with {query}, or the text")
    resize: str | None = flag(None, "aspect, aspect:MAX_PIXELS or square:SIDE")
    coordinates: str | None = flag(None, "see data.COORDINATES", ("pixels", "norm1000"))
    dtype: str = flag(
        "auto", "type that computes; auto: bfloat16 on CUDA", ("auto", "float32", "bfloat16")
    )
    # data
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "questions used (0: all)", low=0)
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
    seed: int = flag(0, "seed of every random choice", low=0)
    # completions
    out: str = flag("eval/words", "folder for table.md, summary.json, answers.jsonl")
    temperature: float = flag(0.0, "of sampling; 0 takes the most likely token", low=0)
    max_new_tokens: int = flag(512, "longest completion in tokens", low=1)
    batch: int = flag(0, "questions encoded at once (0: 64 on CUDA, else 16)", low=0)
    # paraphrases
    base_url: str = flag("", "an OpenAI-compatible endpoint that paraphrases")
    model: str = flag("", "the endpoint's model")
    paraphrases: int = flag(2, "paraphrases per question", low=1)
    tries: int = flag(3, "for a paraphrase that can be used", low=1)
    timeout: float = flag(60.0, "seconds for one reply", above=0)
    retries: int = flag(5, "of a request that fails (429, 5xx, time-out)", low=0)
    cache: str = flag("build/rephrase_cache", "folder of the endpoint's replies")


# ---------------------------------------------------------------- wordings

SHORTHAND = {
    "on the left": "on L",
    "on the right": "on R",
    "left": "L",
    "right": "R",
    "upper lobe": "UL",
    "lower lobe": "LL",
    "with": "w/",
    "without": "w/o",
    "patient": "pt",
    "computed tomography": "CT",
    "magnetic resonance": "MR",
    "chest film": "CXR",
    "ultrasound": "US",
    "history": "hx",
    "please": "pls",
    "and": "&",
    "because": "b/c",
    "treatment": "tx",
    "diagnosis": "dx",
    "fracture": "fx",
    "year-old": "yo",
}
SYNONYMS = {
    "kidney": "renal organ",
    "liver": "hepatic organ",
    "lung": "pulmonary organ",
    "heart": "cardiac organ",
    "tumour": "neoplasm",
    "tumor": "neoplasm",
    "lump": "mass",
    "region": "area",
    "picture": "image",
    "represent": "stand for",
    "corresponds to": "matches",
    "mark": "indicate",
    "show me": "point out to me",
    "look closer at": "examine",
    "large": "sizeable",
    "big": "sizeable",
    "small": "little",
    "round": "circular",
    "bright": "light",
    "dark": "dim",
    "structure": "formation",
    "organ": "body part",
}
PHRASES = (
    "In this image, {}",
    "Quick question from the ward: {}",
    "{} Thank you.",
    "pls help - {}",
)
HISTORY = (
    "The patient is 58 years old and takes vitamin D.",
    "Seen on a Tuesday; no known allergies.",
    "He came by bicycle and works as a teacher.",
    "Her tonsils were taken out in childhood.",
)
STOP_WORDS = (
    "a an the is are was were be of on in at to for this that these those which what where could "
    "can let us me my please and by its it there do does with"
)
Wording = Callable[[str, random.Random], str]  # of a question


def letters(word: str) -> str:
    """Returns a word without its punctuation."""
    return re.sub(r"\W", "", word)


def typos(query: str, rng: random.Random) -> str:
    """Drops one letter, or swaps two, inside two words of five letters or more."""
    words = query.split(" ")
    long = [i for i, word in enumerate(words) if len(letters(word)) >= 5]
    for i in rng.sample(long, min(2, len(long))):
        word = words[i]
        at = rng.randrange(1, len(word) - 2)
        if rng.random() < 0.5:
            words[i] = word[:at] + word[at + 1 :]
        else:
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)


def lower_case(query: str, rng: random.Random) -> str:
    return re.sub(r"[^\w\s-]", "", query).lower()


def exchanged(query: str, table: dict[str, str]) -> str:
    """Replaces words, the longest entry of the table first."""
    entries = sorted(table, key=len, reverse=True)
    pattern = r"\b(" + "|".join(map(re.escape, entries)) + r")\b"
    return re.sub(pattern, lambda found: table[found[0].lower()], query, flags=re.IGNORECASE)


def shorthand(query: str, rng: random.Random) -> str:
    return exchanged(query, SHORTHAND)


def synonyms(query: str, rng: random.Random) -> str:
    return exchanged(query, SYNONYMS)


def in_a_phrase(query: str, rng: random.Random) -> str:
    phrase = rng.choice(PHRASES)
    if phrase.startswith("{"):
        return phrase.format(query)
    return phrase.format(query[:1].lower() + query[1:])


def with_history(query: str, rng: random.Random) -> str:
    return f"{rng.choice(HISTORY)} {query}"


def telegraphic(query: str, rng: random.Random) -> str:
    """Leaves out stop words. A question of nothing else stays as it is."""
    stop_words = STOP_WORDS.split()
    kept = [word for word in query.split() if letters(word).lower() not in stop_words]
    return " ".join(kept) if kept else query


VARIANTS: dict[str, Wording] = {  # a name also seeds the choices of its wording
    "typos": typos,
    "lower case": lower_case,
    "shorthand": shorthand,
    "synonyms": synonyms,
    "frame": in_a_phrase,
    "history": with_history,
    "telegraphic": telegraphic,
}


def wordings(query: str, name: str, seed: int) -> dict[str, str]:
    """Returns {variant: question} for those that change it. The row's id and the seed make the
    choices."""
    found = {}
    for kind, change in VARIANTS.items():
        text = change(query, random.Random(f"{seed} {kind} {name}"))
        if text.strip() and text != query:
            found[kind] = text
    return found


# ---------------------------------------------------------------- paraphrases of a language model


def unusable(text: object, query: str, names: list[str]) -> str:
    """Returns why a paraphrase cannot be used, for the language model to read; "" if it can."""
    if not isinstance(text, str) or not text.strip() or len(text) > 400 or "<" in text:
        return 'Give a JSON object with the string "question", one or two sentences of plain text.'
    said = text.lower()
    asked = query.lower()
    for side in ("left", "right"):
        if (side in asked) != (side in said):
            return "Keep what the question says of left and right."
    for name in names:
        if name.lower() in said and name.lower() not in asked:
            return f'The question must not name the target: it says "{name}".'
    if text.strip() == query.strip():
        return "Use other words."
    return ""


def paraphrases(chat: Chat, example: Example, count: int, tries: int) -> dict[str, str]:
    """Returns up to `count` paraphrases of a language model: {"paraphrase 1": question, …}."""
    named = example.extra.get("names") or []
    names = [example.category, *(name for name in named if isinstance(name, str))]
    names = [name for name in names if name]
    found = {}
    for number in range(1, count + 1):
        text = paraphrase(chat, example.query, number, names, tries)
        if text:
            found[f"paraphrase {number}"] = text
    return found


def paraphrase(chat: Chat, query: str, number: int, names: list[str], tries: int) -> str:
    """Returns one paraphrase; "" after so many tries that gave none."""
    request = (
        f"Paraphrase number {number} of this question about a medical image, same meaning, other "
        f"words, no hint that is not in it: {json.dumps(query)}. Reply with a JSON object: "
        '"question".'
    )
    messages = [{"role": "user", "content": request}]
    for _ in range(tries):
        reply = chat.ask(messages)
        text = reply.get("question") if isinstance(reply, dict) else None
        problem = unusable(text, query, names)
        if not problem:
            return text.strip()
        messages.append({"role": "assistant", "content": json.dumps(reply)})
        messages.append({"role": "user", "content": problem})
    return ""


# ---------------------------------------------------------------- asking


@dataclass(frozen=True)
class Job:
    """A question to put: about which example, as what, and in which words."""

    index: int
    kind: str  # of FIXED, of VARIANTS, or a paraphrase's name
    query: str


class Jobs(Sequence):
    """Examples whose question, and image, may have been exchanged. Each is decoded when it is asked
    for."""

    def __init__(self, examples: Sequence, jobs: list[Job]):
        self.examples = examples
        self.jobs = jobs

    def __len__(self) -> int:
        return len(self.jobs)

    def __getitem__(self, i: int) -> Example:
        job = self.jobs[i]
        example = self.examples[job.index]
        if job.kind == GREY:
            grey = Image.new("RGB", example.image.size, (128, 128, 128))
            return replace(example, query=job.query, image=grey)
        return replace(example, query=job.query)


def other_questions(rows: list[dict], seed: int) -> list[str]:
    """Returns for every row the question of another one: of another category, where there is one,
    and in other words. ValueError where all questions are the same."""
    rng = random.Random(seed)
    chosen = []
    for row in rows:
        apart = [other for other in rows if other["query"] != row["query"]]
        if not apart:
            raise ValueError(
                f"{row['where']}: all {len(rows)} questions are the same, so that no other one can "
                "be asked as a control; raise --limit"
            )
        elsewhere = [other for other in apart if other["category"] != row["category"]]
        chosen.append(rng.choice(elsewhere if elsewhere else apart)["query"])
    return chosen


def all_wordings(cfg: Config, examples: Examples, chat: Chat | None) -> list[dict[str, str]]:
    """Returns {kind: question} for every example, FIXED among them."""
    others = other_questions(examples.rows, cfg.seed)
    found = []
    for i, row in enumerate(examples.rows):
        texts = {ASKED: row["query"], **wordings(row["query"], row["id"], cfg.seed)}
        texts |= {OTHER: others[i], GREY: row["query"]}
        if chat is not None:
            texts |= paraphrases(chat, examples[i], cfg.paraphrases, cfg.tries)
        found.append(texts)
    return found


def wording_kinds(kinds: Iterable[str]) -> list[str]:
    """Returns the wordings among the kinds of questions: neither the question itself nor a
    control."""
    return [kind for kind in kinds if kind not in FIXED]


def answers(
    crm: CRM, examples: Examples, texts: list[dict[str, str]], cfg: Config, ranks: Ranks
) -> list[dict]:
    """Returns a row per example: id, image, supercategory, truth, said {kind: {query, bbox,
    problem}}, and resampled, a list of as many answers to the question itself as it has wordings.
    Boxes are in the image frame.

    texts: {kind: question} of each example, FIXED among them."""
    jobs = []
    for i, of_example in enumerate(texts):
        jobs += [Job(i, kind, query) for kind, query in of_example.items()]
    plain = [Job(i, ASKED, of_example[ASKED]) for i, of_example in enumerate(texts)]
    most = max(len(wording_kinds(of_example)) for of_example in texts)
    rows = [{"said": {}, "resampled": []} for _ in texts]
    for job, p in answered(crm, examples, jobs, 1, cfg.temperature, cfg, ranks):
        if job.kind == ASKED:
            rows[job.index] |= {key: p[key] for key in ("id", "image", "supercategory")}
            rows[job.index]["truth"] = p["truth"]["bbox"]
        rows[job.index]["said"][job.kind] = answer_rows(job, p)[0]
    if most > 0:
        temperature = cfg.temperature or 1.0
        for job, p in answered(crm, examples, plain, most, temperature, cfg, ranks):
            count = len(wording_kinds(texts[job.index]))
            rows[job.index]["resampled"] = answer_rows(job, p)[:count]
    return rows


def answered(
    crm: CRM,
    examples: Examples,
    jobs: list[Job],
    completions: int,
    temperature: float,
    cfg: Config,
    ranks: Ranks,
) -> list[tuple[Job, dict]]:
    """Returns each job with its prediction (metrics.py), in order. Every rank asks its share."""
    own = range(len(jobs))[ranks.rank :: ranks.world]
    kinds = {"": (completions, temperature)}
    asked = ask(crm, Jobs(examples, jobs), own, kinds, cfg.max_new_tokens, cfg.seed, cfg.batch)
    bar = tqdm(asked, total=len(own), disable=not ranks.is_main, ncols=100)
    predictions = ranks.gather([p for _, _, _, p in bar])
    predictions.sort(key=lambda p: p["index"])
    return [(jobs[p["index"]], p) for p in predictions]


def answer_rows(job: Job, p: dict) -> list[dict]:
    """Returns what is kept of a prediction's completions."""
    found = []
    for completion in p["completions"]:
        answer = {key: completion[key] for key in ("bbox", "problem")}
        found.append({"query": job.query, **answer})
    return found


# ---------------------------------------------------------------- measures


def agreement(one: Box | None, other: Box | None) -> float:
    """Returns the IoU of two boxes; 0 where one is missing."""
    if one is None or other is None:
        return 0.0
    return box_iou(one, other)


def measures(truth: Box, first: dict, others: list[dict]) -> dict[str, float | None]:
    """Returns MEASURES of the answers to one question, see the top of this file.

    first: the answer to the question as asked. Without others, those measures that it has alone."""
    ious = [agreement(answer["bbox"], truth) for answer in (first, *others)]
    found: dict[str, float | None] = dict.fromkeys(MEASURES)
    found["worst"] = min(ious)
    found["hard_pass"] = float(min(ious) >= 0.5)
    if not others:
        found["iou"] = ious[0]
        found["refused"] = float(bool(first["problem"]))
        return found
    boxes = [answer["bbox"] for answer in (first, *others)]
    found["iou"] = float(np.mean(ious[1:]))
    found["refused"] = float(np.mean([bool(answer["problem"]) for answer in others]))
    found["drop"] = ious[0] - found["iou"]
    found["flips"] = float(np.mean([(iou >= 0.5) != (ious[0] >= 0.5) for iou in ious[1:]]))
    found["as_before"] = float(np.mean([agreement(boxes[0], box) for box in boxes[1:]]))
    pairs = [agreement(one, other) for one, other in combinations(boxes, 2)]
    found["consistency"] = float(np.mean(pairs))
    return found


def answers_of(row: dict, kind: str) -> list[dict]:
    """Returns the answers that a line of the table is about, besides that to the question as
    asked."""
    said = row["said"]
    if kind == ASKED:
        return []
    if kind == ALL:
        return [said[wording] for wording in wording_kinds(said)]
    if kind == SAMPLED:
        return row["resampled"]
    return [said[kind]] if kind in said else []


def measures_of(row: dict, kind: str) -> dict[str, float | None]:
    """Returns the measures of a row in a line of the table; all None where it has no such
    answer."""
    others = answers_of(row, kind)
    if kind != ASKED and not others:
        return dict.fromkeys(MEASURES)
    return measures(row["truth"], row["said"][ASKED], others)


def summarise(rows: list[dict]) -> dict:
    """Returns {"n", "kinds": {kind: {measure: {mean, low, high, n, images} or None}}, "beyond"}.

    beyond: the paired interval of "as before" over all wordings less that with another row's
    question."""
    spoken = {kind for row in rows for kind in wording_kinds(row["said"])}
    names = [kind for kind in VARIANTS if kind in spoken]
    names += sorted(spoken - VARIANTS.keys())  # paraphrases
    images = [row["image"] for row in rows]
    kinds = {}
    values = {}
    for kind in (ASKED, ALL, *names, OTHER, GREY, SAMPLED):
        values[kind] = [measures_of(row, kind) for row in rows]
        kinds[kind] = {}
        for measure in MEASURES:
            found = interval([of_row[measure] for of_row in values[kind]], images)
            kinds[kind][measure] = None if found is None else asdict(found)
    under_other = [of_row["as_before"] for of_row in values[OTHER]]
    in_other_words = [of_row["as_before"] for of_row in values[ALL]]
    beyond = paired_interval(under_other, in_other_words, images)
    return {
        "n": len(rows),
        "kinds": kinds,
        "beyond": None if beyond is None else asdict(beyond),
    }


def table(summary: dict) -> str:
    """Returns the summary as Markdown, in percent."""
    kinds = summary["kinds"]
    shown = [key for key in MEASURES if any(found[key] for found in kinds.values())]
    lines = [
        f"Percent, mean over {summary['n']} questions [95 % bootstrap interval; – for fewer than "
        "5 images].",
        "",
        "| | n | " + " | ".join(MEASURES[key] for key in shown) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for kind, found in kinds.items():
        if found["iou"] is None:
            continue
        if kind == OTHER:
            lines.append("| *controls* |" + " |" * (len(shown) + 1))
        cells = " | ".join(percent(found[key]) for key in shown)
        lines.append(f"| {kind} | {found['iou']['n']} | {cells} |")
    beyond = summary["beyond"]
    if beyond is not None:
        mean = 100 * beyond["mean"]
        low = 100 * beyond["low"]
        high = 100 * beyond["high"]
        verdict = "Not shown that it listens to the question"
        if low > 0:
            verdict = "It listens to the question"
        lines += [
            "",
            f"{verdict}: in other words its box stays as before by {mean:+.1f} [{low:+.1f}, "
            f"{high:+.1f}] more than under another row's question.",
        ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the run


def main(cfg: Config) -> None:
    ranks = Ranks.start()
    out = Path(cfg.out)
    with exit_on(ValueError, OSError):
        use_embedded(cfg, {"crm": EMBEDDED["crm"], "data": EMBEDDED["data"]})
        if cfg.base_url and (not cfg.model or ranks.world > 1):
            raise ValueError("--base-url needs --model, and one process, without torchrun")
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out}: is a file; give a folder")
        examples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)
        if cfg.limit:
            examples = examples[: cfg.limit]
        examples.check()
        other_questions(examples.rows, cfg.seed)  # an error now, not after minutes of loading
        chat = None
        if cfg.base_url:
            chat = Chat(cfg.base_url, cfg.model, cfg.timeout, cfg.retries, Path(cfg.cache))
        dtype = ranks.dtype(cfg.dtype)
        crm = load_crm(cfg.crm, ranks.device, dtype, cfg.prompt, cfg.resize, cfg.coordinates)
        texts = all_wordings(cfg, examples, chat)
    if chat is not None:
        print0(chat.cost())
    rows = answers(crm, examples, texts, cfg, ranks)
    if ranks.is_main:
        write_results(rows, out)
    ranks.stop()


def write_results(rows: list[dict], out: Path) -> None:
    summary = summarise(rows)
    text = table(summary)
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    write_whole(out / "table.md", text)
    print0(text.rstrip())
    print0(f"tables {out / 'table.md'}, numbers {out / 'summary.json'}")
    print0(f"answers {out / 'answers.jsonl'}")


if __name__ == "__main__":
    with exit_on(BadRow):
        main(parse_args(Config, __doc__))
