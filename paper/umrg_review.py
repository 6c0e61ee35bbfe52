"""The page on which a person accepts or rejects the rows of paper/make_umrg.py, and what was
decided."""

import base64
import html
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from asm import overlay
from data import load_image
from paper.umrg_words import Item

PAGE = """<!doctype html><meta charset="utf-8"><title>review</title>
<style>body{{font:15px sans-serif;margin:2em;max-width:60em}}
section{{display:flex;gap:1em;padding:1em;border-top:1px solid #ccc}}
section.no{{opacity:.35}}img{{height:260px}}</style>
<h1>{count} rows</h1><p>Click one, then A accepts and R rejects it and moves to the next.
<button onclick="save()">Save decisions.json</button></p>{sections}
<script>
let at=0;const all=[...document.querySelectorAll("section")];
function mark(no){{const s=all[at];if(!s)return;
s.dataset.no=no?1:"";s.classList.toggle("no",no);at=Math.min(at+1,all.length-1);
all[at].scrollIntoView({{block:"center"}})}}
all.forEach((s,i)=>s.onclick=()=>at=i);
document.onkeydown=e=>{{if(e.key=="a")mark(false);if(e.key=="r")mark(true)}};
function save(){{
const d=Object.fromEntries(all.map(s=>[s.dataset.id,s.dataset.no?"reject":"accept"]));
const a=document.createElement("a");
a.href=URL.createObjectURL(new Blob([JSON.stringify(d,null,1)]));
a.download="decisions.json";a.click()}}
</script>
"""


def review_page(items: list[Item]) -> str:
    """Returns one self-contained page. Every text is escaped, as a category may come from anybody's
    file name."""
    sections = "\n".join(section(item) for item in items)
    return PAGE.format(count=len(items), sections=sections)


def section(item: Item) -> str:
    """Returns the part of the page about one item: its picture and its words."""
    mask = np.asarray(Image.open(io.BytesIO(item.facts.mask))) > 127
    picture = overlay(load_image(item.image), mask, item.facts.box, item.facts.points)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    texts = {
        "target": f"{item.category}, {item.modality}",
        "question": item.query,
        "trace": item.think,
    }
    words = ""
    for title, text in texts.items():
        words += f"<p><b>{title}</b> {html.escape(text)}</p>"
    return (
        f'<section data-id="{html.escape(item.id, quote=True)}">'
        f'<img alt="" src="data:image/jpeg;base64,{encoded}"><div>{words}</div></section>'
    )


def decided(items: list[Item], path: Path) -> list[Item]:
    """Returns the items that were not rejected in a file that the page saved. ValueError where the
    file is something else, and for ids that are not there."""
    try:
        decisions = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--decisions {path}: {error}") from None
    is_object = isinstance(decisions, dict)
    if not is_object or not all(word in ("accept", "reject") for word in decisions.values()):
        raise ValueError(f"--decisions {path}: is not an object of accept and reject by id")
    unknown = sorted(decisions.keys() - {item.id for item in items})
    if unknown:
        raise ValueError(
            f"--decisions {path}: {len(unknown)} ids are not in this data, the first: {unknown[0]}"
        )
    return [item for item in items if decisions.get(item.id) != "reject"]
