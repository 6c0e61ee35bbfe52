"""Questions and reasoning traces for paper/make_umrg.py: from a language model, or from
templates."""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from runtime.files import write_whole


@dataclass
class Item:
    """One image with one mask, and what is known of it."""

    image: Path
    mask: Path
    category: str
    supercategory: str = "Unknown"
    modality: str = "medical"
    patient: str = ""
    facts: dict = field(default_factory=dict)  # stage 1
    query: str = ""  # stage 3
    think: str = ""

    @property
    def id(self) -> str:
        image = self.image.stem
        mask = self.mask.stem
        return mask if mask.startswith(image) else f"{image}_{mask}"


def problem(answer, item: Item) -> str:
    """Why a language model's question and trace cannot be used, for it to read; "" if they can."""
    if not isinstance(answer, dict) or not all(
        isinstance(answer.get(key), str) and answer[key].strip() for key in ("question", "think")
    ):
        return 'Give a JSON object with the two strings "question" and "think".'
    question = answer["question"].lower()
    both = f"{answer['question']} {answer['think']}".lower()
    names = [
        item.category.lower(),
        *(
            w
            for w in re.findall(r"[a-z]{4,}", item.category.lower())
            if w not in ("left", "right", "upper", "lower")
        ),
    ]
    if named := [name for name in names if re.search(rf"\b{re.escape(name)}(s|es)?\b", question)]:
        return f'The question must not name the target: it says "{named[0]}".'
    if len(question) > 400 or "<" in both:
        return "The question must be one or two sentences of plain text, without tags."
    wrong = {"left": "right", "right": "left"}.get(item.facts["horizontal"])
    if wrong and re.search(rf"\b{wrong} (side|part|half|third)? ?of the (image|picture)", both):
        return (
            f"The target lies on the {item.facts['horizontal']} of the picture, not on the {wrong}."
        )
    return ""


def template(item: Item) -> dict:
    """Question and trace without a language model: place and look only. The same item gets the same
    words."""
    f = item.facts
    pick = int(hashlib.sha256(item.id.encode()).hexdigest(), 16)
    place = f["vertical"] + " " + f["horizontal"] if f["horizontal"] != "centre" else f["vertical"]
    where = f"in the {place} part of the picture"
    question = (
        f"What could the {f['shape']} {f['tone']} structure {where} represent?",
        f"Is there something of note {where}, {f['tone']} against its surroundings?",
        f"Please mark the {f['shape']} area {where} for the report.",
        f"Which structure shows as a {f['tone']}, {f['shape']} shape {where}?",
    )[pick % 4]
    size = "small" if f["area"] < 0.02 else "large" if f["area"] > 0.15 else "medium-sized"
    think = (
        f"The question is about a {f['shape']} structure {where} of this {item.modality} image. A "
        f"{size} {f['tone']} region stands there against its surroundings; it fits {item.category}. "
        "I mark its extent, and two points well inside it."
    )
    return {"question": question, "think": think}


class Chat:
    """An OpenAI-compatible endpoint with a cache on disk. Its client retries on 429, 5xx and
    time-outs."""

    def __init__(self, args):
        try:
            from openai import OpenAI
        except ImportError:
            raise ValueError("--base-url needs the openai package: pip install openai") from None
        if "OPENAI_API_KEY" not in os.environ:
            raise ValueError(
                "--base-url: set OPENAI_API_KEY (any text, if the endpoint asks for none)"
            )
        self.client = OpenAI(base_url=args.base_url, timeout=args.timeout, max_retries=args.retries)
        self.model = args.model
        self.cache = args.cache
        self.prices = (args.price_in, args.price_out)
        self.tokens = [0, 0]
        self.asked = 0
        self.cached = 0
        self.cache.mkdir(parents=True, exist_ok=True)

    def ask(self, messages: list[dict]):
        """The JSON object of one reply; None where it is none. ValueError when the endpoint gives
        up."""
        import openai

        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        if path.exists():
            self.cached += 1
            text = json.loads(path.read_text())["text"]
        else:
            try:
                reply = self.client.chat.completions.create(model=self.model, messages=messages)
            except openai.OpenAIError as error:
                reason = str(error).splitlines()[0][:200]
                raise ValueError(
                    f"--base-url {self.client.base_url}: {reason}; the replies so far are in "
                    f"{self.cache}, the same command resumes"
                ) from None
            text = (reply.choices[0].message.content if reply.choices else None) or ""
            usage = reply.usage and [reply.usage.prompt_tokens, reply.usage.completion_tokens]
            self.tokens = [a + b for a, b in zip(self.tokens, usage or (0, 0))]
            self.asked += 1
            write_whole(path, json.dumps({"text": text}))
        found = re.search(r"\{.*\}", text[:20_000], re.DOTALL)
        try:
            return json.loads(found[0]) if found else None
        except ValueError:
            return None

    def cost(self) -> str:
        money = sum(n * price / 1e6 for n, price in zip(self.tokens, self.prices))
        return (
            f"{self.asked} replies, {self.cached} from the cache, {self.tokens[0]:,} tokens in, "
            f"{self.tokens[1]:,} out" + (f", {money:.2f} in money" if any(self.prices) else "")
        )


def describe(chat: Chat, category: str, modality: str):
    """Stage 2: what such a target looks like, and how a clinician asks without naming it."""
    return chat.ask(
        [
            {
                "role": "user",
                "content": f"A data set shows {category} in {modality} images. Reply with a JSON object: "
                '"description", how it looks there in two sentences, and "formats", a list of five '
                "ways in which a clinician asks about it by function, symptom or look, not by name.",
            }
        ]
    )


def request(item: Item, description) -> str:
    """What a language model is asked to write for one sample."""
    f = item.facts
    return (
        f"Target: {item.category}, {item.modality} image of {f['size'][0]}x{f['size'][1]} pixels. "
        f"Background: {json.dumps(description)}. The target is {f['tone']} and {f['shape']}, in the "
        f"{f['vertical']} {f['horizontal']} of the picture, box {list(f['box'])}. Reply with a JSON "
        'object: "question", an implicit question that a clinician might ask and that never names the '
        'target, and "think", two to four sentences that reason from the question and the picture to '
        "the target. Left and right mean those of the picture."
    )


def write_words(items: list[Item], chat: Chat | None, tries: int) -> Counter:
    """Stage 3, in place -> how many by whom. After `tries` unusable replies a template is used."""
    by = Counter()
    described = {}
    for done, item in enumerate(items, 1):
        answer = None
        if chat:
            kind = item.category, item.modality
            described[kind] = described.get(kind) or describe(chat, *kind)
            messages = [{"role": "user", "content": request(item, described[kind])}]
            for _ in range(tries):
                answer = chat.ask(messages)
                if not (wrong := problem(answer, item)):
                    break
                messages += [
                    {"role": "assistant", "content": json.dumps(answer)},
                    {"role": "user", "content": wrong + " Try again."},
                ]
                answer = None
            print(f"\r{done} of {len(items)}: {chat.cost()}", end="", flush=True)
        by["language model" if answer else "template"] += 1
        answer = answer or template(item)
        item.query = answer["question"].strip()
        item.think = answer["think"].strip()
    if chat:
        print()
    return by
