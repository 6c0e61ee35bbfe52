"""The page on which a person accepts or rejects the samples of paper/make_umrg.py, and what came of
it."""

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
<h1>{count} samples</h1><p>Click one, then A accepts and R rejects it and moves to the next.
<button onclick="save()">Save decisions.json</button></p>{sections}
<script>
let at=0;const all=[...document.querySelectorAll("section")];
function mark(no){{const s=all[at];if(!s)return;
s.dataset.no=no?1:"";s.classList.toggle("no",no);at=Math.min(at+1,all.length-1);
all[at].scrollIntoView({{block:"center"}})}}
all.forEach((s,i)=>s.onclick=()=>at=i);
document.onkeydown=e=>{{if(e.key=="a")mark(false);if(e.key=="r")mark(true)}};
function save(){{const d=Object.fromEntries(all.map(s=>[s.dataset.id,s.dataset.no?"reject":"accept"]));
const a=document.createElement("a");a.href=URL.createObjectURL(new Blob([JSON.stringify(d,null,1)]));
a.download="decisions.json";a.click()}}
</script>
"""


def review_page(items: list[Item]) -> str:
    """One self-contained page. Every text is escaped: a category may come from a stranger's file
    name."""
    sections = []
    for item in items:
        f = item.facts
        mask = np.asarray(Image.open(io.BytesIO(f["mask"]))) > 127
        picture = overlay(load_image(item.image), mask, f["box"], f["points"])
        picture.save(buffer := io.BytesIO(), format="JPEG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        words = "".join(
            f"<p><b>{html.escape(k)}</b> {html.escape(v)}</p>"
            for k, v in (
                ("target", f"{item.category}, {item.modality}"),
                ("question", item.query),
                ("trace", item.think),
            )
        )
        sections.append(
            f'<section data-id="{html.escape(item.id, quote=True)}">'
            f'<img alt="" src="data:image/jpeg;base64,{encoded}"><div>{words}</div></section>'
        )
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
        raise ValueError(
            f"--decisions {path}: {len(unknown)} ids are not in this data, the first: {unknown[0]}"
        )
    return [item for item in items if decisions.get(item.id) != "reject"]
