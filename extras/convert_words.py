"""Which label of SLAKE's masks an English or Chinese text names, and questions that name one.

extras/convert.py uses it. "Label" is a name in SLAKE's mask.txt, such as "Left Lung"; "organ" is a
label without its side, in lower case, such as "lung".
"""

import re
from collections import defaultdict
from collections.abc import Callable, Collection

# other names of an organ, the English ones first
ALIASES = {
    "bladder": ("膀胱",),
    "brain edema": ("脑水肿",),
    "brain enhancing tumor": ("enhancing tumor", "脑增强肿瘤", "脑部增强肿瘤", "增强肿瘤"),
    "brain non-enhancing tumor": (
        "non-enhancing tumor",
        "脑非增强肿瘤",
        "脑部非增强肿瘤",
        "非增强肿瘤",
    ),
    "brain stem": ("brainstem", "脑干"),
    "colon": ("结肠",),
    "duodenum": ("十二指肠",),
    "ear": ("耳朵", "耳"),
    "esophagus": ("oesophagus", "食管", "食道"),
    "eye": ("eyeball", "眼球", "眼睛", "眼"),
    "femoral head": ("股骨头",),
    "heart": ("心脏",),
    "humerus head": ("humeral head", "肱骨头"),
    "kidney": ("肾脏", "肾"),
    "kidney cancer": ("肾癌",),
    "larynx": ("喉",),
    "liver": ("肝脏", "肝"),
    "liver cancer": ("肝癌",),
    "lung": ("肺部", "肺"),
    "lung cancer": ("肺癌",),
    "mandible": ("下颌骨",),
    "parotid": ("parotid gland", "腮腺"),
    "rectum": ("直肠",),
    "small bowel": ("small intestine", "小肠"),
    "spinal cord": ("脊髓",),
    "spleen": ("脾脏", "脾"),
    "stomach": ("胃",),
    "temporal lobe": ("颞叶",),
    "tooth": ("teeth", "牙齿", "牙"),
    "trachea": ("windpipe", "气管"),
}
SIDES = {"左": "left", "右": "right"}
CHINESE_SIDES = {"left": "患者左侧的", "right": "患者右侧的", "": ""}


def split_side(label: str) -> tuple[str, str]:
    """Returns the side and the organ: "Left Lung" -> ("left", "lung"); "Liver" -> ("", "liver")."""
    side, _, organ = label.lower().partition(" ")
    if side in ("left", "right") and organ:
        return side, organ
    return "", label.lower()


def names_of(organ: str) -> list[str]:
    """Returns the names of an organ, English before Chinese."""
    return [organ, *ALIASES.get(organ, ())]


def where_is(label: str, language: str = "en", rest: str = "") -> str:
    """Returns a question that names a label. A side in it is the patient's.

    rest: more words of an English question, before the question mark."""
    side, organ = split_side(label)
    if language == "zh":
        chinese = [name for name in names_of(organ) if not name.isascii()]
        name = chinese[0] if chinese else organ
        return f"{CHINESE_SIDES[side]}{name}在哪里？"
    if side:
        return f"Where is the patient's {side} {organ}{rest}?"
    return f"Where is the {organ}{rest}?"


def mentions(labels: Collection[str]) -> Callable[[str], list[set[str]]]:
    """Returns a function that finds what a text mentions.

    It returns one set for each mention, in the order of the text: the labels that the mention may
    mean. These are both sides of an organ where the text does not say which."""
    labels_of: dict[str, dict[str, str]] = defaultdict(dict)  # organ: {side: label}
    organ_of: dict[str, str] = {}  # name: organ
    for label in labels:
        side, organ = split_side(label)
        labels_of[organ][side] = label
        for name in names_of(organ):
            organ_of[name] = organ
    longest_first = sorted(organ_of, key=len, reverse=True)
    any_name = "|".join(re.escape(name) for name in longest_first)
    english_side = r"\b(left and right|right and left|left|right) "
    chinese_side = r"(左右|左|右)[侧边]?的?"
    # a Chinese organ within the name of a disease (肺炎) is no mention of it
    pattern = re.compile(
        rf"(?:{english_side}|{chinese_side})?"
        rf"(?<![a-z-])({any_name})(?:e?s)?(?![a-z炎癌病瘤结])",
        re.IGNORECASE,
    )

    def find(text: str) -> list[set[str]]:
        found = []
        for english, chinese, name in pattern.findall(text):
            by_side = labels_of[organ_of[name.lower()]]
            side = SIDES.get(chinese, english.lower())
            if side in by_side:
                found.append({by_side[side]})
            else:
                found.append(set(by_side.values()))
        return found

    return find


def target(found: list[set[str]], present: Collection[str]) -> tuple[str, str]:
    """Returns (label, "") where all mentions fit one and the same label of a mask.

    Otherwise it returns ("", why not). found: what `mentions` finds in a text; present: the labels
    of the mask."""
    if not found:
        return "", "it names no label"
    fitting = set()
    for labels in found:
        in_mask = labels & set(present)
        if not in_mask:
            return "", "its target is not in the mask"
        fitting |= in_mask
    if len(fitting) > 1:
        return "", "it fits several labels"
    return fitting.pop(), ""
