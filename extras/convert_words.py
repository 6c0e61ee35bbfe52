"""Which label of SLAKE's masks an English or Chinese text names; used by extras/convert.py."""

import re
from collections import defaultdict

ALIASES = dict(
    entry.strip().split(": ")
    for entry in """
    humerus head: humeral head, 肱骨头; larynx: 喉; femoral head: 股骨头; brain stem: brainstem, 脑干; duodenum: 十二指肠;
    tooth: teeth, 牙齿, 牙; liver: 肝脏, 肝; trachea: windpipe, 气管; eye: eyeball, 眼球, 眼睛, 眼; brain edema: 脑水肿;
    rectum: 直肠; esophagus: oesophagus, 食管, 食道; ear: 耳朵, 耳; bladder: 膀胱; kidney: 肾脏, 肾; spinal cord: 脊髓;
    brain non-enhancing tumor: non-enhancing tumor, 脑非增强肿瘤, 脑部非增强肿瘤, 非增强肿瘤; kidney cancer: 肾癌;
    temporal lobe: 颞叶; stomach: 胃; liver cancer: 肝癌; heart: 心脏; mandible: 下颌骨; small bowel: small intestine, 小肠;
    brain enhancing tumor: enhancing tumor, 脑增强肿瘤, 脑部增强肿瘤, 增强肿瘤; lung: 肺部, 肺; spleen: 脾脏, 脾;
    colon: 结肠; lung cancer: 肺癌; parotid: parotid gland, 腮腺""".split(";")
)
SIDES = {"左": "left", "右": "right"}


def split_side(label: str) -> tuple[str, str]:
    """ "Left Lung" -> ("left", "lung"); "Liver" -> ("", "liver")."""
    side, _, organ = label.lower().partition(" ")
    return (side, organ) if side in ("left", "right") and organ else ("", label.lower())


def words(organ: str) -> list[str]:
    """An organ's names, English before Chinese."""
    return [organ, *filter(None, ALIASES.get(organ, "").split(", "))]


def where_is(label: str, language: str = "en", rest: str = "") -> str:
    """A question that names a label, a side as the patient's."""
    side, organ = split_side(label)
    if language == "zh":
        organ = next((word for word in words(organ) if not word.isascii()), organ)
        return {"left": "患者左侧的", "right": "患者右侧的", "": ""}[side] + f"{organ}在哪里？"
    named = f"patient's {side} {organ}" if side else organ
    return f"Where is the {named}{rest}?"


def mentions(labels: list[str]):
    """A function from a text to the labels that each mention in it may mean: both sides where it says none."""
    sides, organs = defaultdict(dict), {}
    for label in labels:
        side, organ = split_side(label)
        sides[organ][side] = label
        organs |= {word: organ for word in words(organ)}
    longest = "|".join(map(re.escape, sorted(organs, key=len, reverse=True)))
    # a Chinese organ within the name of a disease (肺炎) is no mention of it
    pattern = re.compile(
        rf"(?:\b(left and right|right and left|left|right) |(左右|左|右)[侧边]?的?)?"
        rf"(?<![a-z-])({longest})(?:e?s)?(?![a-z炎癌病瘤结])",
        re.IGNORECASE,
    )

    def find(text: str) -> list[set[str]]:
        found = []
        for english, chinese, word in pattern.findall(text):
            own = sides[organs[word.lower()]]
            side = SIDES.get(chinese, english.lower())
            found.append({own[side]} if side in own else set(own.values()))
        return found

    return find


def target(found: list[set[str]], present: set[str]) -> tuple[str, str]:
    """(label, "") if all mentions fit one and the same label of a mask, else ("", why not)."""
    fit = [labels & present for labels in found]
    if not found or not all(fit):
        return "", "its target is not in the mask" if found else "it names no label"
    label, *others = set.union(*fit)
    return ("", "it fits several labels") if others else (label, "")
