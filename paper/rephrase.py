"""Other words for the same question: does the answer stay, and is it the question that it answers?

    python -m paper.rephrase --data demo/data --crm demo/crm --limit 60 --out eval/words
    python -m paper.rephrase … --base-url http://localhost:8000/v1 --model NAME      # and a model's
                                                                                     paraphrases

Every question is asked as it is and in the wordings of VARIANTS, seeded; a wording that changes
nothing is left out. Of the boxes b_0 (as asked), b_1 … b_k and their IoUs v_i with the truth:

    IoU: mean of v_1 … v_k          drop: v_0 - IoU                 flips: share of [v_i >= 0.5] !=
                                    [v_0 >= 0.5]
    worst: min of v_0 … v_k         hard pass: all v_i >= 0.5       refusals: of 1 … k
    as before: mean IoU(b_0, b_i)   consistency: mean IoU of all pairs of boxes any sibling, by
                                    luck: IoU with the best of all that the question may mean in its
                                    image (metrics.py: add_siblings), and that over their number; of
                                    the questions that may mean several

A box that is missing has IoU 0 with everything. Consistency alone means nothing: a model that
ignores its question has all of it. So there are three controls: another sample's question about
this image, a grey image, and the same question sampled as often as there are wordings, because
chance alone lowers the worst of several. Answers are greedy unless --temperature is given; the
third control then uses it, else 1. Writes table.md, summary.json and answers.jsonl."""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

from crm import load_crm
from data import load_samples
from extras.intervals import interval, paired_bootstrap, percent
from extras.several import add_siblings
from metrics import ask
from paper.umrg_words import Chat
from rewards import box_iou
from runtime.cli import ModelConfig, exit_on, flag, parse_args, print0
from runtime.files import write_whole
from runtime.parallel import Ranks

FIXED = ASKED, OTHER, GREY = "as asked", "another sample's question", "a grey image"
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
    "iou_any": "IoU, any sibling",
    "iou_luck": "IoU, by luck",
}


@dataclass
class Config(ModelConfig):
    data: str | None = flag(None, "folder or .parquet file, see data.py")
    split: str = flag("test", "split of --data")
    limit: int = flag(0, "questions used (0: all)", low=0)
    out: str = flag("eval/words", "folder for table.md, summary.json, answers.jsonl")
    skip_bad_rows: bool = flag(False, "leave out rows that cannot be used, and count them")
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


# ---------------------------------------------------------------- wordings: (question, random.Random) -> question

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
FRAMES = ("In this image, {}", "Quick question from the ward: {}", "{} Thank you.", "pls help - {}")
HISTORY = (
    "The patient is 58 years old and takes vitamin D.",
    "Seen on a Tuesday; no known allergies.",
    "He came by bicycle and works as a teacher.",
    "Her tonsils were taken out in childhood.",
)
STOP = set(
    "a an the is are was were be of on in at to for this that these those which what where could can let us me "
    "my please and by its it there do does with".split()
)


def typos(query: str, rng: random.Random) -> str:
    """One letter dropped, or two swapped, inside two words of five letters or more."""
    words = query.split(" ")
    long = [i for i, word in enumerate(words) if len(re.sub(r"\W", "", word)) >= 5]
    for i in rng.sample(long, min(2, len(long))):
        word = words[i]
        at = rng.randrange(1, len(words[i]) - 2)
        words[i] = word[:at] + (
            word[at + 1 :] if rng.random() < 0.5 else word[at + 1] + word[at] + word[at + 2 :]
        )
    return " ".join(words)


def by_table(table: dict[str, str]):
    """A wording that replaces whole words, the longest entry first."""
    pattern = re.compile(
        r"\b(" + "|".join(map(re.escape, sorted(table, key=len, reverse=True))) + r")\b", re.I
    )
    return lambda query, rng: pattern.sub(lambda found: table[found[0].lower()], query)


def framed(query: str, rng: random.Random) -> str:
    frame = rng.choice(FRAMES)
    return frame.format(query if frame.startswith("{") else query[:1].lower() + query[1:])


def telegraphic(query: str, rng: random.Random) -> str:
    """Without stop words; the question as it is if nothing else is in it."""
    return (
        " ".join(word for word in query.split() if re.sub(r"\W", "", word).lower() not in STOP)
        or query
    )


VARIANTS = {
    "typos": typos,
    "lower case": lambda query, rng: re.sub(r"[^\w\s-]", "", query).lower(),
    "shorthand": by_table(SHORTHAND),
    "synonyms": by_table(SYNONYMS),
    "frame": framed,
    "history": lambda query, rng: f"{rng.choice(HISTORY)} {query}",
    "telegraphic": telegraphic,
}


def wordings(query: str, name: str, seed: int) -> dict[str, str]:
    """{variant: question} for those that change it; name, of the sample, and seed make the
    choices."""
    found = {
        kind: change(query, random.Random(f"{seed} {kind} {name}"))
        for kind, change in VARIANTS.items()
    }
    return {kind: text for kind, text in found.items() if text.strip() and text != query}


def unusable(text, query: str, names: list[str]) -> str:
    """Why a language model's paraphrase cannot be used, for it to read; "" if it can."""
    if not isinstance(text, str) or not text.strip() or len(text) > 400 or "<" in text:
        return 'Give a JSON object with the string "question", one or two sentences of plain text.'
    said = {side for side in ("left", "right") if side in query.lower()}
    if said != {side for side in ("left", "right") if side in text.lower()}:
        return "Keep what the question says of left and right."
    if named := [
        name for name in names if name.lower() in text.lower() and name.lower() not in query.lower()
    ]:
        return f'The question must not name the target: it says "{named[0]}".'
    return "" if text.strip() != query.strip() else "Use other words."


def paraphrases(chat: Chat, sample, count: int, tries: int) -> dict[str, str]:
    """Up to `count` paraphrases of a language model: {"paraphrase 1": question, …}."""
    names = [sample.category, *(n for n in sample.extra.get("names") or [] if isinstance(n, str))]
    found = {}
    for number in range(1, count + 1):
        messages = [
            {
                "role": "user",
                "content": f"Paraphrase number {number} of this question about a medical image, same meaning, other words, "
                f'no hint that is not in it: {json.dumps(sample.query)}. Reply with a JSON object: "question".',
            }
        ]
        for _ in range(tries):
            reply = chat.ask(messages)
            text = reply.get("question") if isinstance(reply, dict) else None
            if not (wrong := unusable(text, sample.query, [name for name in names if name])):
                found[f"paraphrase {number}"] = text.strip()
                break
            messages += [
                {"role": "assistant", "content": json.dumps(reply)},
                {"role": "user", "content": wrong},
            ]
    return found


# ---------------------------------------------------------------- asking


class Jobs(Sequence):
    """Samples whose question, and image, may have been exchanged: [(index, kind, question)],
    decoded when asked for."""

    def __init__(self, samples, jobs: list[tuple[int, str, str]]):
        self.samples = samples
        self.jobs = jobs

    def __len__(self):
        return len(self.jobs)

    def __getitem__(self, i):
        index, kind, query = self.jobs[i]
        sample = self.samples[index]
        grey = (
            {"image": Image.new("RGB", sample.image.size, (128, 128, 128))} if kind == GREY else {}
        )
        return replace(sample, query=query, **grey)


def strangers(samples, seed: int) -> list[str]:
    """For every sample the question of another one: of another category, where there is one, and in
    other words. ValueError where all questions are the same."""
    rows = samples.rows
    rng = random.Random(seed)
    chosen = []
    for row in rows:
        apart = [other for other in rows if other["query"] != row["query"]]
        if not apart:
            raise ValueError(
                f"{row['where']}: all {len(rows)} questions are the same, so that none of another sample "
                "can be asked as a control; raise --limit"
            )
        chosen.append(
            rng.choice([other for other in apart if other["category"] != row["category"]] or apart)[
                "query"
            ]
        )
    return chosen


def others_in(kinds) -> list[str]:
    """The wordings among the kinds of questions: neither the question itself nor a control."""
    return [kind for kind in kinds if kind not in FIXED]


def answers(crm, samples, texts: list[dict[str, str]], cfg, ranks) -> list[dict]:
    """A row per sample: id, supercategory, truth, siblings, said {kind: {query, bbox, problem}},
    and resampled, as many of these as it has wordings. texts: {kind: question} per sample, FIXED
    included. Boxes in the image frame."""
    jobs = Jobs(
        samples,
        [(i, kind, text) for i, several in enumerate(texts) for kind, text in several.items()],
    )
    most = max(len(others_in(several)) for several in texts)
    plain = Jobs(samples, [(i, ASKED, several[ASKED]) for i, several in enumerate(texts)])
    found = []
    for several, count, temperature in (
        (jobs, 1, cfg.temperature),
        (plain, most, cfg.temperature or 1.0),
    ):
        mine = range(len(several) if count else 0)[ranks.rank :: ranks.world]
        asked = ask(
            crm, several, mine, {"": (count, temperature)}, cfg.max_new_tokens, cfg.seed, cfg.batch
        )
        for _, sample, _, p in tqdm(asked, total=len(mine), disable=ranks.rank > 0, ncols=100):
            index, kind, query = several.jobs[p["index"]]
            said = [
                {"query": query, "bbox": c["bbox"], "problem": c["problem"]}
                for c in p["completions"]
            ]
            found.append((index, kind if several is jobs else "", said, p))
    rows = {}
    found = sorted(ranks.gather(found), key=lambda item: item[0])
    add_siblings([p for _, kind, _, p in found if kind == ASKED])
    for index, kind, said, p in found:
        row = rows.setdefault(
            index,
            {
                "id": p["id"],
                "supercategory": p["supercategory"],
                "truth": p["truth"]["bbox"],
                "siblings": [],
                "said": {},
                "resampled": [],
            },
        )
        row["siblings"] = p["truth"].get("siblings", row["siblings"])
        if kind:
            row["said"][kind] = said[0]
        else:
            row["resampled"] = said[: len(others_in(texts[index]))]
    return list(rows.values())


# ---------------------------------------------------------------- measures


def measures(
    truth, first: dict, others: list[dict], siblings: Sequence = ()
) -> dict[str, float | None]:
    """MEASURES of the answers to one question (see above). Without others: those that the first
    alone has; siblings: the boxes of what else it may mean."""

    def same(one: dict, two: dict) -> float:
        return box_iou(one["bbox"], two["bbox"]) if one["bbox"] and two["bbox"] else 0.0

    v = [same(answer, {"bbox": truth}) for answer in (first, *others)]
    found = {
        "iou": np.mean(v[1:] or v),
        "worst": min(v),
        "hard_pass": min(v) >= 0.5,
        "refused": np.mean([bool(answer["problem"]) for answer in others or [first]]),
    }
    if siblings:
        best = np.mean(
            [
                max(same(answer, {"bbox": box}) for box in (truth, *siblings))
                for answer in others or [first]
            ]
        )
        found |= {"iou_any": best, "iou_luck": best / (1 + len(siblings))}
    if others:
        found |= {
            "drop": v[0] - found["iou"],
            "flips": np.mean([(w >= 0.5) != (v[0] >= 0.5) for w in v[1:]]),
            "as_before": np.mean([same(first, other) for other in others]),
            "consistency": np.mean([same(*pair) for pair in combinations((first, *others), 2)]),
        }
    return {key: float(found[key]) if key in found else None for key in MEASURES}


def summarise(rows: list[dict]) -> dict:
    """{"n", "kinds": {kind: {measure: {mean, low, high, n} or None}}, "beyond": paired interval of
    "as before" over all wordings less that with another sample's question}."""
    spoken = {kind for row in rows for kind in others_in(row["said"])}
    names = [*(kind for kind in VARIANTS if kind in spoken), *sorted(spoken - VARIANTS.keys())]
    chosen = {
        ASKED: lambda row: [],
        ALL: lambda row: [row["said"][kind] for kind in others_in(row["said"])],
        **{
            name: lambda row, name=name: [row["said"][name]] if name in row["said"] else []
            for name in (*names, OTHER, GREY)
        },
        SAMPLED: lambda row: row["resampled"],
    }
    found = {
        kind: [
            measures(row["truth"], row["said"][ASKED], of(row), row["siblings"])
            if kind == ASKED or of(row)
            else None
            for row in rows
        ]
        for kind, of in chosen.items()
    }

    def ends(values) -> dict | None:
        values = [value for value in values if value is not None]
        return interval(values)._asdict() | {"n": len(values)} if values else None

    def column(kind: str, key: str) -> list:
        return [one and one[key] for one in found[kind]]

    beyond = paired_bootstrap(column(OTHER, "as_before"), column(ALL, "as_before"))
    return {
        "n": len(rows),
        "kinds": {kind: {key: ends(column(kind, key)) for key in MEASURES} for kind in found},
        "beyond": beyond and beyond._asdict(),
    }


def table(summary: dict) -> str:
    """The summary as Markdown, in percent."""
    shown = [key for key in MEASURES if any(found[key] for found in summary["kinds"].values())]
    lines = [
        f"Percent, mean over {summary['n']} questions [95 % bootstrap interval; – for fewer than 5].",
        "",
        "| | n | " + " | ".join(MEASURES[key] for key in shown) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for kind, found in summary["kinds"].items():
        if found["iou"]:
            if kind == OTHER:
                lines.append("| *controls* |" + " |" * (len(shown) + 1))
            lines.append(
                f"| {kind} | {found['iou']['n']} | "
                + " | ".join(percent(found[key]) for key in shown)
                + " |"
            )
    if beyond := summary["beyond"]:
        low = 100 * beyond["low"]
        high = 100 * beyond["high"]
        verdict = (
            "It listens to the question" if low > 0 else "Not shown that it listens to the question"
        )
        lines += [
            "",
            f"{verdict}: in other words its box stays as before by {100 * beyond['mean']:+.1f} "
            f"[{low:+.1f}, {high:+.1f}] more than under another sample's question.",
        ]
    return "\n".join(lines) + "\n"


def main(cfg: Config) -> None:
    ranks = Ranks.start()
    out = Path(cfg.out)
    if cfg.base_url and (not cfg.model or ranks.world > 1):
        raise ValueError("--base-url needs --model, and one process, without torchrun")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    samples = load_samples(cfg.data, cfg.split, cfg.skip_bad_rows)[: cfg.limit or None]
    samples.check()
    strange = strangers(samples, cfg.seed)
    endpoint = vars(cfg) | {"cache": Path(cfg.cache), "price_in": 0.0, "price_out": 0.0}
    chat = Chat(SimpleNamespace(**endpoint)) if cfg.base_url else None
    how = {name: getattr(cfg, name) for name in ("resize", "min_pixels", "max_pixels", "prompt")}
    crm = load_crm(
        cfg.crm,
        ranks.device,
        ranks.dtype(cfg.dtype),
        **{name: value for name, value in how.items() if value is not None},
    )
    texts = []
    for row, name, other in zip(samples.rows, samples.ids(), strange):
        texts.append(
            {
                ASKED: row["query"],
                **wordings(row["query"], name, cfg.seed),
                OTHER: other,
                GREY: row["query"],
            }
        )
    if chat:
        for i, several in enumerate(texts):
            several |= paraphrases(chat, samples[i], cfg.paraphrases, cfg.tries)
        print0(chat.cost())
    rows = answers(crm, samples, texts, cfg, ranks)
    if ranks.rank == 0:
        summary = summarise(rows)
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(out / "summary.json", json.dumps(summary, indent=1) + "\n")
        write_whole(out / "table.md", table(summary))
        print0(table(summary).rstrip())
        print0(
            f"tables {out / 'table.md'}, numbers {out / 'summary.json'}, answers {out / 'answers.jsonl'}"
        )
    ranks.stop()


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main(parse_args(Config, __doc__))
