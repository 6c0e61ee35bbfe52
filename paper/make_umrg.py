"""Build a U-MRG data set out of anybody's images and masks, in the stages of arXiv 2508.08177.

    python -m paper.make_umrg --images scans --masks masks --out mine                  # words from templates
    python -m paper.make_umrg --images scans --masks masks --table meta.csv --out mine \\
        --base-url http://localhost:8000/v1 --model qwen3 --review review.html        # words from a language model
    python -m paper.make_umrg … --out mine --decisions decisions.json                  # without what you rejected

  1  images and masks are checked; what is dropped is counted, with the reason, in report.json
  2  for each category and modality: a description, and formats for questions
  3  for each sample: an implicit question that never names the target, and a reasoning trace
  4  --review writes one HTML file to accept or reject samples; --decisions reads back what it saves
  5  train.parquet and test.parquet in the U-MRG schema (data.py); a patient, or an image, is in one of them only

Without --table, a mask belongs to the image whose file name (without its ending) it has, or begins with: x.png and
x_left_kidney.png; what follows is the category (a count of three or more digits at its end is left out). With it, a CSV: image, mask, category, and if known supercategory,
modality, patient. Words come from any OpenAI-compatible endpoint (pip install openai; the key is OPENAI_API_KEY);
every answer is kept in --cache, so an interrupted run asks nothing twice.
"""
import argparse
import base64
import csv
import hashlib
import html
import io
import json
import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scipy import ndimage

from asm import overlay
from data import box_from_mask, keypoints_from_mask, load_image, load_mask
from runtime.cli import exit_on

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
COLUMNS = ("image", "mask", "category", "supercategory", "modality", "patient")


@dataclass
class Item:
    """One image with one mask, and what is known of it."""
    image: Path
    mask: Path
    category: str
    supercategory: str = "Unknown"
    modality: str = "medical"
    patient: str = ""
    facts: dict = field(default_factory=dict)       # stage 1
    query: str = ""                                 # stage 3
    think: str = ""

    @property
    def id(self) -> str:
        return self.mask.stem if self.mask.stem.startswith(self.image.stem) else f"{self.image.stem}_{self.mask.stem}"


# ---------------------------------------------------------------- 1: which images, which masks, are they usable

def find(images: Path, masks: Path, table: Path | None) -> list[Item]:
    """All pairs. ValueError names what is missing."""
    for flag, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise ValueError(f"{flag} {folder}: no such folder")
    if table:
        with open(table, newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file)
            if missing := {"image", "mask", "category"} - set(rows.fieldnames or ()):
                raise ValueError(f"--table {table}: column {', '.join(sorted(missing))} is missing")
            rows = [{key: (row.get(key) or "").strip() for key in COLUMNS} for row in rows]
        for number, row in enumerate(rows, 2):
            if gap := [key for key in ("image", "mask", "category") if not row[key]]:
                raise ValueError(f"--table {table}, line {number}: no {gap[0]}")
        items = [Item(images / row["image"], masks / row["mask"], **{key: row[key] for key in COLUMNS[2:] if row[key]})
                 for row in rows]
        return items
    stems, items = {p.stem: p for p in sorted(images.iterdir()) if p.suffix.lower() in PICTURES}, []
    for mask in sorted(p for p in masks.iterdir() if p.suffix.lower() in PICTURES):
        names = [stem for stem in stems if mask.stem == stem or mask.stem.startswith(stem + "_")]
        if names:
            stem = max(names, key=len)
            category = re.sub(r"_\d{3,}$", "", mask.stem[len(stem) + 1:])    # x_liver_000.png: a count, not a name
            items.append(Item(stems[stem], mask, category.replace("_", " ") or "target"))
    if not items:
        raise ValueError(f"--masks {masks}: no mask there has the name of an image in {images}; name it so, or "
                         "give --table")
    return items


def clean(items: list[Item], args) -> tuple[list[Item], list[dict]]:
    """The usable ones with their facts, and what was dropped: [{mask, reason}]."""
    kept, dropped, seen = [], [], set()
    for item in items:
        try:
            item.facts = derive(item, args)
            if item.facts["hash"] in seen:
                raise ValueError("the same image and mask were there before")
        except ValueError as error:
            dropped.append({"mask": item.mask.name, "reason": str(error)})
            continue
        seen.add(item.facts["hash"])
        kept.append(item)
    return kept, dropped


def derive(item: Item, args) -> dict:
    """Size, box, points, place and look of the target, image frame. ValueError says why it cannot be used."""
    if not item.mask.is_file():
        raise ValueError("no such mask")
    try:
        image = load_image(item.image)
    except ValueError as error:
        raise ValueError(f"the image {error}") from None
    mask = load_mask(item.mask)
    if mask.shape != image.size[::-1]:
        raise ValueError(f"the mask is {mask.shape[1]}x{mask.shape[0]}, the image {image.width}x{image.height}")
    if args.largest:
        pieces, count = ndimage.label(mask)
        if count > 1:
            mask = pieces == np.bincount(pieces.ravel())[1:].argmax() + 1
    share = mask.mean()
    if not args.min_area <= share <= args.max_area:
        raise ValueError(f"the mask covers {100 * share:.2f} % of the image, outside --min-area and --max-area"
                         if share else "the mask is empty")
    grey, (W, H) = np.asarray(image.convert("L"), dtype=float), image.size
    around = ndimage.binary_dilation(mask, iterations=max(2, min(W, H) // 40)) & ~mask
    x1, y1, x2, y2 = box = box_from_mask(mask)
    difference = grey[mask].mean() - grey[around].mean() if around.any() else 0.0
    return {"size": [W, H], "box": box, "points": keypoints_from_mask(mask), "area": round(float(share), 5),
            "horizontal": ("left", "centre", "right")[int(3 * (x1 + x2) / 2 / (W + 1))],
            "vertical": ("upper", "middle", "lower")[int(3 * (y1 + y2) / 2 / (H + 1))],
            "tone": "bright" if difference > 12 else "dark" if difference < -12 else "grey",
            "shape": "elongated" if max(x2 - x1, y2 - y1) > 2 * min(x2 - x1, y2 - y1) else "rounded",
            "hash": hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest(), "mask": png(mask)}


def png(pixels) -> bytes:
    Image.fromarray(pixels.astype(np.uint8) * 255 if pixels.dtype == bool else pixels).save(
        buffer := io.BytesIO(), format="PNG", optimize=True)
    return buffer.getvalue()


# ---------------------------------------------------------------- 2, 3: words

def problem(answer, item: Item) -> str:
    """Why a language model's question and trace cannot be used, for it to read; "" if they can."""
    if not isinstance(answer, dict) or not all(isinstance(answer.get(key), str) and answer[key].strip()
                                               for key in ("question", "think")):
        return 'Give a JSON object with the two strings "question" and "think".'
    question, both = answer["question"].lower(), f"{answer['question']} {answer['think']}".lower()
    names = [item.category.lower(), *(w for w in re.findall(r"[a-z]{4,}", item.category.lower())
                                      if w not in ("left", "right", "upper", "lower"))]
    if named := [name for name in names if re.search(rf"\b{re.escape(name)}(s|es)?\b", question)]:
        return f'The question must not name the target: it says "{named[0]}".'
    if len(question) > 400 or "<" in both:
        return "The question must be one or two sentences of plain text, without tags."
    wrong = {"left": "right", "right": "left"}.get(item.facts["horizontal"])
    if wrong and re.search(rf"\b{wrong} (side|part|half|third)? ?of the (image|picture)", both):
        return f"The target lies on the {item.facts['horizontal']} of the picture, not on the {wrong}."
    return ""


def template(item: Item) -> dict:
    """Question and trace without a language model: place and look only. The same item gets the same words."""
    f, pick = item.facts, int(hashlib.sha256(item.id.encode()).hexdigest(), 16)
    place = f["vertical"] + " " + f["horizontal"] if f["horizontal"] != "centre" else f["vertical"]
    where = f"in the {place} part of the picture"
    question = (f"What could the {f['shape']} {f['tone']} structure {where} represent?",
                f"Is there something of note {where}, {f['tone']} against its surroundings?",
                f"Please mark the {f['shape']} area {where} for the report.",
                f"Which structure shows as a {f['tone']}, {f['shape']} shape {where}?")[pick % 4]
    size = "small" if f["area"] < 0.02 else "large" if f["area"] > 0.15 else "medium-sized"
    think = (f"The question is about a {f['shape']} structure {where} of this {item.modality} image. A {size} "
             f"{f['tone']} region stands there against its surroundings; it fits {item.category}. I mark its "
             "extent, and two points well inside it.")
    return {"question": question, "think": think}


class Chat:
    """An OpenAI-compatible endpoint with a cache on disk. Retries on 429, 5xx and time-outs are the client's."""

    def __init__(self, args):
        try:
            from openai import OpenAI
        except ImportError:
            raise ValueError("--base-url needs the openai package: pip install openai") from None
        if "OPENAI_API_KEY" not in os.environ:
            raise ValueError("--base-url: set OPENAI_API_KEY (any text, if the endpoint asks for none)")
        self.client = OpenAI(base_url=args.base_url, timeout=args.timeout, max_retries=args.retries)
        self.model, self.cache, self.prices = args.model, args.cache, (args.price_in, args.price_out)
        self.tokens, self.asked, self.cached = [0, 0], 0, 0
        self.cache.mkdir(parents=True, exist_ok=True)

    def ask(self, messages: list[dict]):
        """The parsed JSON object of one answer; None where it is none. ValueError when the endpoint gives up."""
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
                raise ValueError(f"--base-url {self.client.base_url}: {str(error).splitlines()[0][:200]}; what was "
                                 f"answered so far is in {self.cache}, the same command goes on") from None
            text = (reply.choices[0].message.content if reply.choices else None) or ""
            usage = reply.usage and [reply.usage.prompt_tokens, reply.usage.completion_tokens]
            self.tokens = [a + b for a, b in zip(self.tokens, usage or (0, 0))]
            self.asked += 1
            aside = path.with_suffix(".tmp")
            aside.write_text(json.dumps({"text": text}))
            aside.replace(path)
        found = re.search(r"\{.*\}", text[:20_000], re.DOTALL)
        try:
            return json.loads(found[0]) if found else None
        except ValueError:
            return None

    def cost(self) -> str:
        money = sum(n * price / 1e6 for n, price in zip(self.tokens, self.prices))
        return (f"{self.asked} answers, {self.cached} from the cache, {self.tokens[0]:,} tokens in, "
                f"{self.tokens[1]:,} out" + (f", {money:.2f} in money" if any(self.prices) else ""))


def describe(chat: Chat, category: str, modality: str):
    """Stage 2: what such a target looks like, and how a clinician asks without naming it."""
    return chat.ask([{"role": "user", "content":
                      f"A data set shows {category} in {modality} images. Reply with a JSON object: \"description\", how it "
                      "looks there in two sentences, and \"formats\", a list of five ways in which a clinician asks "
                      "about it by function, symptom or look, never by name."}])


def write_words(items: list[Item], chat: Chat | None, tries: int) -> Counter:
    """Stage 3, in place -> how many were written by whom. After `tries` unusable answers the template steps in."""
    by, described = Counter(), {}
    for done, item in enumerate(items, 1):
        answer, f = None, item.facts
        if chat:
            kind = item.category, item.modality
            described[kind] = described.get(kind) or describe(chat, *kind)
            messages = [{"role": "user", "content":
                         f"Target: {item.category}, {item.modality} image of {f['size'][0]}x{f['size'][1]} pixels. Background: "
                         f"{json.dumps(described[kind])}. The target is {f['tone']} and {f['shape']}, in the {f['vertical']} "
                         f"{f['horizontal']} of the picture, box {list(f['box'])}. Reply with a JSON object: \"question\", "
                         "an implicit question that a clinician might ask and that never names the target, and "
                         "\"think\", two to four sentences that reason from the question and the picture to the "
                         "target. Left and right mean those of the picture."}]
            for _ in range(tries):
                answer = chat.ask(messages)
                if not (wrong := problem(answer, item)):
                    break
                messages += [{"role": "assistant", "content": json.dumps(answer)},
                             {"role": "user", "content": wrong + " Try again."}]
                answer = None
            print(f"\r{done} of {len(items)}: {chat.cost()}", end="", flush=True)
        by["language model" if answer else "template"] += 1
        answer = answer or template(item)
        item.query, item.think = answer["question"].strip(), answer["think"].strip()
    if chat:
        print()
    return by


# ---------------------------------------------------------------- 4: a person looks

PAGE = """<!doctype html><meta charset="utf-8"><title>review</title>
<style>body{{font:15px sans-serif;margin:2em;max-width:60em}}section{{display:flex;gap:1em;padding:1em;border-top:1px
solid #ccc}}section.no{{opacity:.35}}img{{height:260px}}</style>
<h1>{count} samples</h1><p>Click one, then A accepts and R rejects it and goes on to the next.
<button onclick="save()">Save decisions.json</button></p>{sections}
<script>
let at=0;const all=[...document.querySelectorAll("section")];
function mark(no){{const s=all[at];if(!s)return;s.dataset.no=no?1:"";s.classList.toggle("no",no);at=Math.min(at+1,all.length-1);
all[at].scrollIntoView({{block:"center"}})}}
all.forEach((s,i)=>s.onclick=()=>at=i);
document.onkeydown=e=>{{if(e.key=="a")mark(false);if(e.key=="r")mark(true)}};
function save(){{const d=Object.fromEntries(all.map(s=>[s.dataset.id,s.dataset.no?"reject":"accept"]));
const a=document.createElement("a");a.href=URL.createObjectURL(new Blob([JSON.stringify(d,null,1)]));
a.download="decisions.json";a.click()}}
</script>
"""


def review_page(items: list[Item]) -> str:
    """One self-contained page. Every text is escaped: a category may come from a stranger's file name."""
    sections = []
    for item in items:
        f = item.facts
        mask = np.asarray(Image.open(io.BytesIO(f["mask"]))) > 127
        overlay(load_image(item.image), mask, f["box"], f["points"]).save(buffer := io.BytesIO(), format="JPEG")
        words = "".join(f"<p><b>{html.escape(k)}</b> {html.escape(v)}</p>" for k, v in (
            ("target", f"{item.category}, {item.modality}"), ("question", item.query), ("trace", item.think)))
        sections.append(f'<section data-id="{html.escape(item.id, quote=True)}"><img alt="" src="data:image/jpeg;base64,'
                        f'{base64.b64encode(buffer.getvalue()).decode()}"><div>{words}</div></section>')
    return PAGE.format(count=len(items), sections="\n".join(sections))


def decided(items: list[Item], path: Path) -> list[Item]:
    """Those that were not rejected. ValueError for ids that are not there."""
    try:
        decisions = json.loads(path.read_text(encoding="utf-8"))
        known = {item.id for item in items}
        if not isinstance(decisions, dict) or set(decisions.values()) - {"accept", "reject"}:
            raise ValueError("is not an object of accept and reject by id")
    except (OSError, ValueError) as error:
        raise ValueError(f"--decisions {path}: {error}") from None
    if unknown := sorted(decisions.keys() - known):
        raise ValueError(f"--decisions {path}: {len(unknown)} ids are not in this data, the first: {unknown[0]}")
    return [item for item in items if decisions.get(item.id) != "reject"]


# ---------------------------------------------------------------- 5: the data set

def split_of(item: Item, test_share: float) -> str:
    """By patient, or by image: a function of the name, so that it stays the same when data are added."""
    key = item.patient or item.image.name
    return "test" if int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10_000 < 10_000 * test_share else "train"


def row(item: Item, index: int) -> dict:
    f = item.facts
    extra = {"id": item.id, "supercategory": item.supercategory, "category": item.category, "index": index,
             "modality": item.modality, "patient": item.patient, "think": item.think}
    truth = json.dumps({"bbox_2d": f["box"], "point_2d": f["points"]})
    return {"data_source": "umrg", "prompt": [{"role": "user", "content": item.query}],
            "images": [{"bytes": png(np.asarray(load_image(item.image))), "path": item.image.name}],
            "masks": [{"bytes": f["mask"], "path": item.mask.name}],
            "reward_model": {"style": "rule", "ground_truth": truth}, "extra_info": extra}


def write_splits(items: list[Item], out: Path, test_share: float) -> Counter:
    """train.parquet and test.parquet, both written aside first."""
    out.mkdir(parents=True, exist_ok=True)
    counts, written = Counter(), []
    for split in ("train", "test"):
        rows = [row(item, i) for i, item in enumerate(items) if split_of(item, test_share) == split]
        counts[split] = len(rows)
        if rows:
            aside = out / f"{split}.parquet.tmp"
            pq.write_table(pa.Table.from_pylist(rows), aside, compression="zstd", row_group_size=64)
            written.append(aside)
    for aside in written:
        aside.replace(aside.with_suffix(""))
    return counts


def main(args) -> None:
    found = find(args.images, args.masks, args.table)
    if repeated := [name for name, n in Counter(item.id for item in found).items() if n > 1]:
        raise ValueError(f"--masks {args.masks}: {len(repeated)} names come twice, the first: {repeated[0]}")
    chat = Chat(args) if args.base_url else None
    items, dropped = clean(found, args)
    for reason, count in Counter(d["reason"] for d in dropped).most_common(10):
        print(f"dropped {count}: {reason}")
    if not items:
        raise ValueError(f"--masks {args.masks}: nothing usable among {len(dropped)}")
    by = write_words(items, chat, args.tries)
    if args.decisions:
        before, items = len(items), decided(items, args.decisions)
        print(f"{before - len(items)} of {before} rejected by {args.decisions}")
    counts = write_splits(items, args.out, args.test_share)
    report = {"found": len(found), "dropped": dropped, "words": dict(by), **counts,
              "categories": dict(Counter(item.category for item in items))}
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    if args.review:
        args.review.write_text(review_page(items), encoding="utf-8")
        print(f"to look through: {args.review}")
    print(f"{counts['train']} train and {counts['test']} test samples in {args.out}, words by "
          + ", ".join(f"{who} {n}" for who, n in by.items()) + f"; {len(dropped)} dropped, see {args.out / 'report.json'}")


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m paper.make_umrg", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--masks", type=Path, required=True)
    parser.add_argument("--table", type=Path, help=f"CSV with {', '.join(COLUMNS)}")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--min-area", type=float, default=0.0005, help="smallest share of the image")
    parser.add_argument("--max-area", type=float, default=0.9, help="largest share of the image")
    parser.add_argument("--largest", action="store_true", help="of a mask in pieces, keep the largest only")
    parser.add_argument("--test-share", type=float, default=0.2)
    parser.add_argument("--base-url", help="an OpenAI-compatible endpoint; none: words from templates")
    parser.add_argument("--model", help="the endpoint's model")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for one answer")
    parser.add_argument("--retries", type=int, default=5, help="of a request that fails (429, 5xx, time-out)")
    parser.add_argument("--tries", type=int, default=3, help="for an answer that can be used")
    parser.add_argument("--cache", type=Path, default=Path("build/umrg_cache"))
    parser.add_argument("--price-in", type=float, default=0.0, help="money for a million tokens in")
    parser.add_argument("--price-out", type=float, default=0.0, help="and out")
    parser.add_argument("--review", type=Path, help="write this HTML file")
    parser.add_argument("--decisions", type=Path, help="the file that the review page saved")
    args = parser.parse_args(argv)
    if args.base_url and not args.model:
        parser.error("--base-url needs --model")
    return args


if __name__ == "__main__":
    with exit_on(ValueError, OSError):
        main(parse())
