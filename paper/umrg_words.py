"""Questions and traces for paper/make_umrg.py, from a language model or from templates."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.files import write_whole

Box = tuple[float, float, float, float]
Message = dict[str, str]
SIDES_OF_PICTURE = r"(side|part|half|third)? ?of the (image|picture)"
LONGEST_QUESTION = 400  # letters
LONGEST_REPLY = 20_000  # letters of a reply that are looked at


@dataclass
class Facts:
    """What is known of a target without asking anybody. Image frame."""

    size: tuple[int, int]  # width and height of the image
    box: Box
    points: tuple[tuple[float, float], ...]
    area: float  # share of the image
    horizontal: str  # left, centre or right
    vertical: str  # upper, middle or lower
    tone: str  # bright, dark or grey, against what is around it
    shape: str  # elongated or rounded
    digest: str  # of image and mask
    mask: bytes  # PNG


@dataclass
class Item:
    """One image with one mask, and what is known of it."""

    image: Path
    mask: Path
    category: str
    supercategory: str = "Unknown"
    modality: str = "medical"
    patient: str = ""
    facts: Facts | None = None  # stage 1
    query: str = ""  # stage 3
    think: str = ""

    @property
    def id(self) -> str:
        image = self.image.stem
        mask = self.mask.stem
        return mask if mask.startswith(image) else f"{image}_{mask}"


# ---------------------------------------------------------------- what can be used


def problem(answer: Any, item: Item) -> str:
    """Returns why a language model's question and trace cannot be used, for it to read; "" if they
    can."""
    for key in ("question", "think"):
        text = answer.get(key) if isinstance(answer, dict) else None
        if not isinstance(text, str) or not text.strip():
            return 'Give a JSON object with the two strings "question" and "think".'
    question = answer["question"].lower()
    both = question + " " + answer["think"].lower()
    for name in names_of(item.category):
        if re.search(rf"\b{re.escape(name)}(s|es)?\b", question):
            return f'The question must not name the target: it says "{name}".'
    if len(question) > LONGEST_QUESTION or "<" in both:
        return "The question must be one or two sentences of plain text, without tags."
    side = item.facts.horizontal
    other = {"left": "right", "right": "left"}.get(side)
    if other is not None and re.search(rf"\b{other} {SIDES_OF_PICTURE}", both):
        return f"The target lies on the {side} of the picture, not on the {other}."
    return ""


def names_of(category: str) -> list[str]:
    """Returns what names a target: its category, and each of the category's words that says more
    than a side."""
    name = category.lower()
    words = re.findall(r"[a-z]{4,}", name)
    return [name, *(word for word in words if word not in ("left", "right", "upper", "lower"))]


# ---------------------------------------------------------------- templates


def template(item: Item) -> dict[str, str]:
    """Returns question and trace without a language model: place and look only. The same item gets
    the same words."""
    facts = item.facts
    place = facts.vertical
    if facts.horizontal != "centre":
        place = f"{facts.vertical} {facts.horizontal}"
    where = f"in the {place} part of the picture"
    look = f"{facts.shape} {facts.tone}"
    questions = (
        f"What could the {look} structure {where} represent?",
        f"Is there something of note {where}, {facts.tone} against its surroundings?",
        f"Please mark the {facts.shape} area {where} for the report.",
        f"Which structure shows as a {facts.tone}, {facts.shape} shape {where}?",
    )
    number = int(hashlib.sha256(item.id.encode()).hexdigest(), 16)
    think = (
        f"The question is about a {facts.shape} structure {where} of this {item.modality} image. A "
        f"{size_of(facts.area)} {facts.tone} region stands there against its surroundings; it fits "
        f"{item.category}. I mark its extent, and two points well inside it."
    )
    return {"question": questions[number % 4], "think": think}


def size_of(area: float) -> str:
    """Returns a word for a share of the image."""
    if area < 0.02:
        return "small"
    if area > 0.15:
        return "large"
    return "medium-sized"


# ---------------------------------------------------------------- a language model


class Chat:
    """An OpenAI-compatible endpoint with a cache on disk. Its client retries on 429, 5xx and
    time-outs.

    prices: money for a million tokens in, and out. ValueError where the openai package or the key
    is missing."""

    def __init__(
        self,
        base_url: str,
        model: str,
        timeout: float,
        retries: int,
        cache: Path,
        prices: tuple[float, float] = (0.0, 0.0),
    ):
        try:
            from openai import OpenAI
        except ImportError:
            raise ValueError("--base-url needs the openai package: pip install openai") from None
        if "OPENAI_API_KEY" not in os.environ:
            raise ValueError(
                "--base-url: set OPENAI_API_KEY (any text, if the endpoint asks for none)"
            )
        self.client = OpenAI(base_url=base_url, timeout=timeout, max_retries=retries)
        self.model = model
        self.cache = cache
        self.prices = prices
        self.tokens_in = 0
        self.tokens_out = 0
        self.asked = 0
        self.cached = 0
        self.cache.mkdir(parents=True, exist_ok=True)

    def ask(self, messages: Sequence[Message]) -> Any:
        """Returns the JSON object of one reply; None where it is none. ValueError when the endpoint
        gives up."""
        key = hashlib.sha256(json.dumps([self.model, messages]).encode()).hexdigest()
        path = self.cache / f"{key}.json"
        if path.exists():
            self.cached += 1
            return object_in(json.loads(path.read_text(encoding="utf-8"))["text"])
        text = self._reply(messages)
        write_whole(path, json.dumps({"text": text}))
        return object_in(text)

    def _reply(self, messages: Sequence[Message]) -> str:
        import openai

        try:
            reply = self.client.chat.completions.create(model=self.model, messages=messages)
        except openai.OpenAIError as error:
            reason = str(error).splitlines()[0][:200]
            raise ValueError(
                f"--base-url {self.client.base_url}: {reason}; the replies so far are in "
                f"{self.cache}, the same command resumes"
            ) from None
        self.asked += 1
        if reply.usage is not None:
            self.tokens_in += reply.usage.prompt_tokens
            self.tokens_out += reply.usage.completion_tokens
        if not reply.choices:
            return ""
        return reply.choices[0].message.content or ""

    def cost(self) -> str:
        """Returns one line about what was asked, and what it cost."""
        line = (
            f"{self.asked} replies, {self.cached} from the cache, {self.tokens_in:,} tokens in, "
            f"{self.tokens_out:,} out"
        )
        price_in, price_out = self.prices
        if price_in == 0 and price_out == 0:
            return line
        money = (self.tokens_in * price_in + self.tokens_out * price_out) / 1e6
        return f"{line}, {money:.2f} in money"


def object_in(text: str) -> Any:
    """Returns the JSON object within a text; None where there is none."""
    found = re.search(r"\{.*\}", text[:LONGEST_REPLY], re.DOTALL)
    if found is None:
        return None
    try:
        return json.loads(found[0])
    except ValueError:
        return None


def describe(chat: Chat, category: str, modality: str) -> Any:
    """Stage 2: returns what such a target looks like, and how a clinician asks without naming
    it."""
    request = (
        f"A data set shows {category} in {modality} images. Reply with a JSON object: "
        '"description", how it looks there in two sentences, and "formats", a list of five '
        "ways in which a clinician asks about it by function, symptom or look, not by name."
    )
    return chat.ask([{"role": "user", "content": request}])


def request_for(item: Item, description: Any) -> str:
    """Returns what a language model is asked to write about one item."""
    facts = item.facts
    width, height = facts.size
    return (
        f"Target: {item.category}, {item.modality} image of {width}x{height} pixels. "
        f"Background: {json.dumps(description)}. The target is {facts.tone} and {facts.shape}, in "
        f"the {facts.vertical} {facts.horizontal} of the picture, box {list(facts.box)}. Reply "
        'with a JSON object: "question", an implicit question that a clinician might ask and that '
        'never names the target, and "think", two to four sentences that reason from the question '
        "and the picture to the target. Left and right mean those of the picture."
    )


def answer_of(chat: Chat, item: Item, description: Any, tries: int) -> dict[str, str] | None:
    """Returns a language model's question and trace; None after so many replies that cannot be
    used."""
    messages = [{"role": "user", "content": request_for(item, description)}]
    for _ in range(tries):
        answer = chat.ask(messages)
        wrong = problem(answer, item)
        if not wrong:
            return answer
        messages.append({"role": "assistant", "content": json.dumps(answer)})
        messages.append({"role": "user", "content": wrong + " Try again."})
    return None


def write_words(items: list[Item], chat: Chat | None, tries: int) -> Counter[str]:
    """Stage 3: sets the words of every item. Returns how many are by whom.

    A template is used without a language model, and where it gives nothing that can be used."""
    by: Counter[str] = Counter()
    described: dict[tuple[str, str], Any] = {}
    for done, item in enumerate(items, 1):
        answer = None
        if chat is not None:
            kind = item.category, item.modality
            if not described.get(kind):
                described[kind] = describe(chat, *kind)
            answer = answer_of(chat, item, described[kind], tries)
            print(f"\r{done} of {len(items)}: {chat.cost()}", end="", flush=True)
        by["template" if answer is None else "language model"] += 1
        if answer is None:
            answer = template(item)
        item.query = answer["question"].strip()
        item.think = answer["think"].strip()
    if chat is not None:
        print()
    return by
