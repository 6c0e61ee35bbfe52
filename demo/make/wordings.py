"""Words of the demo data: questions that never name their target, and short reasoning traces.

A question is an opener with a clue put in. The first four clues of a category and the first four
openers make 16 wordings to train on. The last two clues of a category and the last two openers
appear only in the test split. `check()` holds that no question, seen or not, gives its target away,
that questions have 8 to 18 words and traces 15 to 30.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np

# of openers, and of a category's clues: the first 4 are in both splits, the last 2 only in the test
SEEN = 4
UNSEEN = 2
OPENERS = (
    "What could {clue} represent?",
    "Where on this {picture} is {clue}?",
    "Please mark {clue} for the report.",
    "Let us look closer at {clue}.",
    "Show me {clue} on this {picture}.",
    "Which region corresponds to {clue}?",
)
TRACES = (
    "On this {picture} I see {seen} in the {where}. This fits {name}, so I mark it.",
    "The question points to {name}. It shows as {seen}, lying in the {where} of the {picture}.",
    "In the {where} of the {picture} there is {seen}, which is the usual look of {name}.",
    "Looking for {name}: {seen} stands out in the {where} of this {picture}, clear of its "
    "surroundings.",
)
PICTURES = {
    "CT": "CT slice",
    "MR": "MR slice",
    "X-ray": "chest film",
    "Ultrasound": "ultrasound picture",
    "Fundus": "eye photograph",
    "OCT": "OCT scan",
    "Dermoscopy": "skin photograph",
    "Endoscopy": "endoscopy picture",
    "Histopathology": "stained section",
    "Microscopy": "stained smear",
    "Angiography": "angiogram",
}


@dataclass(frozen=True)
class Words:
    """What is said of one category."""

    group: str  # U-MRG super-category
    name: str  # how a trace calls the target
    forbidden: str  # word stems no query may hold
    seen: tuple[str, str]  # what a trace says it looks like
    clues: tuple[str, ...]


WORDS = {
    "liver": Words(
        "Abdomen",
        "the liver",
        "liver hepat",
        ("a large even organ filling its side", "the biggest solid organ"),
        (
            "the largest solid organ, the one that makes bile",
            "the big even organ that stores sugar and clears toxins",
            "the bulky organ that suffers from years of alcohol",
            "the broad organ filling the left part of the belly",
            "the biggest even organ, which produces the bile",
            "the large organ that alcohol harms first",
        ),
    ),
    "spleen": Words(
        "Abdomen",
        "the spleen",
        "spleen splen",
        ("a smooth crescent against the body wall", "a comma-shaped even organ"),
        (
            "the crescent-shaped organ on the right that filters old blood cells",
            "the smooth organ on the right, often torn in falls",
            "the comma-shaped organ that swells in glandular fever",
            "the organ hugging the right body wall beside the stomach",
            "the crescent-shaped organ that removes old blood cells",
            "the smooth organ on the right that swells with fever",
        ),
    ),
    "kidney": Words(
        "Abdomen",
        "the kidney on the {side}",
        "kidney renal neph",
        ("a bright bean beside the spine", "a bean-shaped organ with a dark notch"),
        (
            "the bean-shaped organ on the {side} of the spine",
            "the organ on the {side} that turns blood into urine",
            "the rounded organ on the {side} where stones hurt in the flank",
            "the paired organ on the {side} checked before giving contrast",
            "the bean-shaped organ on the {side} that makes urine",
            "the organ on the {side} behind pain in the flank",
        ),
    ),
    "ventricles": Words(
        "Brain",
        "the lateral ventricles",
        "ventric",
        ("dark fluid-filled spaces beside the midline", "a dark butterfly-shaped space"),
        (
            "the dark spaces in the middle that widen in hydrocephalus",
            "the black butterfly-shaped spaces filled with clear fluid",
            "the paired dark cavities deep within the brain",
            "the dark fluid spaces that a shunt would drain",
            "the dark butterfly-shaped cavities in the middle",
            "the deep black spaces that hold clear fluid",
        ),
    ),
    "hemisphere": Words(
        "Brain",
        "the cerebral hemisphere on the {side}",
        "hemispher cerebr",
        ("one folded half beside the midline", "a brain half with its folded cortex"),
        (
            "the whole folded half on the {side} of the midline cleft",
            "the half on the {side} that steers the opposite arm and leg",
            "the large folded half lying on the {side} of this head",
            "all the brain tissue on the {side} of the midline",
            "the complete half of the brain on the {side}",
            "the folded half on the {side} that moves the opposite arm",
        ),
    ),
    "cerebellum": Words(
        "Brain",
        "the cerebellum",
        "cerebell hindbrain",
        ("a finely striped, leaf-like structure", "tightly packed thin folds below the brain"),
        (
            "the part with fine stripes that keeps our balance",
            "the small folded part that fails in a clumsy, swaying gait",
            "the finely leaved structure below the large brain",
            "the striped lower part behind a drunken walk",
            "the finely striped part that steadies our gait",
            "the small leaved structure that keeps the balance",
        ),
    ),
    "brain stem": Words(
        "Brain",
        "the brain stem",
        "stem pons medulla",
        (
            "a smooth stalk running down to the spinal cord",
            "a thick even column with a bulge in front",
        ),
        (
            "the stalk that links the brain to the spinal cord",
            "the thick column where breathing and heartbeat are controlled",
            "the smooth column through which all long nerve tracts pass",
            "the part whose stroke can leave a patient locked in",
            "the smooth stalk that controls breathing",
            "the column that leads down to the spinal cord",
        ),
    ),
    "corpus callosum": Words(
        "Brain",
        "the corpus callosum",
        "corpus callos commissur",
        ("a bright arch of white matter", "a bright band shaped like a bow"),
        (
            "the bright arch that joins the two halves of the brain",
            "the bright curved band that is cut in severe epilepsy",
            "the bow of white matter above the deep dark space",
            "the bright arched bridge that lets both sides talk",
            "the bright curved bridge between both halves",
            "the bow of white matter that joins the two sides",
        ),
    ),
    "optic disc": Words(
        "Eye",
        "the optic disc",
        "optic disc papilla nerve head",
        ("a bright yellow oval where all vessels meet", "a pale round spot giving off the vessels"),
        (
            "the bright spot where all the vessels come together",
            "the pale yellow oval that is hollowed out in glaucoma",
            "the bright round place that swells when brain pressure rises",
            "the yellow spot where fibres leave the back of the eye",
            "the bright yellow oval where the vessels meet",
            "the pale spot to check when glaucoma is suspected",
        ),
    ),
    "macula": Words(
        "Eye",
        "the macula",
        "macula fovea",
        ("a dark reddish patch without vessels", "a dim spot between the vessel arcades"),
        (
            "the dark patch without vessels that serves reading",
            "the dim area whose loss leaves a hole in central sight",
            "the darker spot between the vessel arches",
            "the dark area used to recognise faces",
            "the dim patch without vessels between the arches",
            "the dark spot we need for reading faces and print",
        ),
    ),
    "retinal fluid": Words(
        "Eye",
        "a pocket of retinal fluid",
        "fluid edema oedema cyst",
        ("a dark pocket between the bright layers", "a black lens-shaped gap in the layers"),
        (
            "the dark pocket that lifts or splits the bright layers",
            "the black gap that would explain blurred, wavy vision",
            "the empty-looking space that an injection should dry up",
            "the dark dome-like gap among the layers",
            "the black pocket between the bright layers",
            "the dark gap behind this wavy vision",
        ),
    ),
    "left ventricle": Words(
        "Heart",
        "the left ventricle",
        "ventric",
        ("a large pool with a thick wall", "the chamber that feeds the body"),
        (
            "the chamber that pumps blood out to the whole body",
            "the pool of blood whose ejection fraction we measure",
            "the main pumping chamber with the thickest wall",
            "the cavity that fails when an old infarct weakens the pump",
            "the pumping chamber that feeds the whole body",
            "the thick-walled cavity whose ejection we measure",
        ),
    ),
    "myocardium": Words(
        "Heart",
        "the left ventricular myocardium",
        "myocard muscle",
        ("a dark ring round a bright pool of blood", "a thick dark ring"),
        (
            "the dark ring that squeezes the round bright pool",
            "the thick ring that thins out after an infarct",
            "the dark wall that goes all around the bright pool",
            "the ring-shaped wall that thickens with high blood pressure",
            "the dark ring around the round bright pool",
            "the thick wall that is scarred by an infarct",
        ),
    ),
    "left atrium": Words(
        "Heart",
        "the left atrium",
        "atrium atria",
        ("a round dark chamber far from the probe", "a dark lower chamber beyond the mitral valve"),
        (
            "the lower right chamber that receives blood from the lungs",
            "the chamber where clots form when the rhythm is irregular",
            "the round cavity below the mitral valve",
            "the lower chamber on the right that widens with mitral leakage",
            "the lower right cavity filled from the lungs",
            "the round chamber behind the mitral valve",
        ),
    ),
    "heart": Words(
        "Heart",
        "the heart",
        "heart cardi",
        ("a large white shadow between the lungs", "a rounded white shadow on the diaphragm"),
        (
            "the large white shadow whose width we compare with the chest",
            "the rounded shadow that widens when the pump fails",
            "the white pear-shaped organ between the two air-filled sides",
            "the big pumping organ resting on the diaphragm",
            "the large rounded shadow resting on the diaphragm",
            "the white organ that widens in pump failure",
        ),
    ),
    "gland": Words(
        "Histology",
        "the large gland",
        "gland crypt acin tubul",
        ("a ring of dark nuclei round a pale lumen", "one layer of purple cells round an opening"),
        (
            "the largest ring of purple cells around a white opening",
            "the big round structure that pours mucus into its hollow",
            "the largest hollow structure lined by one layer of cells",
            "the biggest ring whose shape a pathologist grades for cancer",
            "the big ring of purple cells with a white hollow",
            "the largest structure lined by a layer of cells",
        ),
    ),
    "white blood cell": Words(
        "Histology",
        "a white blood cell",
        "leuk leuc white neutroph lymph",
        ("one large cell with a purple nucleus", "a big cell with a dark purple lobed nucleus"),
        (
            "the single large cell with the dark purple nucleus",
            "the cell that multiplies when the body fights germs",
            "the one cell here that belongs to our defence",
            "the big purple cell among the many pink ones",
            "the large purple cell that fights germs",
            "the one cell with a purple nucleus among pink ones",
        ),
    ),
    "lung": Words(
        "Lung",
        "the lung on the {side}",
        "lung pulmo",
        ("a large dark air-filled field", "a black field crossed by fine vessels"),
        (
            "the dark air-filled field on the {side} of the chest",
            "the organ on the {side} that takes up oxygen",
            "the black field on the {side} that collapses when air leaks out",
            "the large dark area on the {side} that fills with each breath",
            "the dark field on the {side} that takes up oxygen",
            "the air-filled organ on the {side} of the midline",
        ),
    ),
    "aorta": Words(
        "Vessel",
        "the aorta",
        "aort artery",
        ("a round vessel just in front of the spine", "a sharp circle before the vertebra"),
        (
            "the round vessel lying just in front of the spine",
            "the great vessel whose swelling may burst without warning",
            "the sharp circle that carries blood from the pump downwards",
            "the main blood pipe running along the vertebrae",
            "the great round vessel in front of the vertebra",
            "the main vessel that may swell and burst",
        ),
    ),
    "carotid artery": Words(
        "Vessel",
        "the carotid artery",
        "carotid artery",
        ("a long dark tube with bright walls", "a black band between two bright lines"),
        (
            "the long dark tube whose narrowing may cause a stroke",
            "the black band between two bright parallel lines",
            "the dark channel that carries blood up to the brain",
            "the tube whose wall we measure for plaque",
            "the long black channel leading blood to the brain",
            "the dark tube between two bright walls",
        ),
    ),
    "aneurysm": Words(
        "Vessel",
        "an aneurysm",
        "aneurysm",
        ("a round sac on the side of a vessel", "a dark berry-like bulge"),
        (
            "the round sac that bulges from one of the vessels",
            "the dark ball that may burst and bleed",
            "the berry-like bulge that a coil could fill",
            "the balloon-like outpouching behind a thunderclap headache",
            "the dark round bulge on one of the vessels",
            "the berry-like sac that may bleed",
        ),
    ),
    "brain tumour": Words(
        "Neoplasm",
        "a brain tumour",
        "tumour tumor glio cancer metasta neoplas",
        ("a bright ring with a dark centre", "a ring-enhancing mass in pale swelling"),
        (
            "the ring-shaped finding that would explain new seizures",
            "the bright ring with a dark dead centre",
            "the abnormal lump that a surgeon would biopsy",
            "the mass that takes up contrast along its rim",
            "the bright abnormal ring behind these seizures",
            "the lump with a dark centre to biopsy",
        ),
    ),
    "melanoma": Words(
        "Neoplasm",
        "a melanoma",
        "melano cancer tumour mole",
        ("an irregular brown patch of several colours", "an uneven dark lesion with a ragged edge"),
        (
            "the uneven dark patch that has grown over the last months",
            "the brown spot with a ragged edge and several colours",
            "the pigmented area that should be cut out with a margin",
            "the dark irregular spot that worries this patient",
            "the brown irregular patch with a ragged edge",
            "the dark area that has grown and should be cut out",
        ),
    ),
    "breast mass": Words(
        "Neoplasm",
        "a breast mass",
        "mass tumour cancer lump",
        ("a dark irregular nodule casting a shadow", "a black uneven area between bright strands"),
        (
            "the dark irregular area that casts a shadow below it",
            "the black uneven spot that a core needle should sample",
            "the dark finding that matches the hard knot she feels",
            "the irregular dark zone between the bright strands",
            "the irregular black area with a shadow below",
            "the dark spot behind the hard knot she feels",
        ),
    ),
    "lung nodule": Words(
        "Neoplasm",
        "a lung nodule",
        "nodule tumour cancer lung coin",
        ("a bright round spot in the dark field", "a small white ball with spiky edges"),
        (
            "the small white ball in the dark air-filled field",
            "the round bright spot to follow up in this smoker",
            "the isolated round density surrounded by air",
            "the spiky bright dot that calls for a biopsy",
            "the bright round ball surrounded by dark air",
            "the small spiky spot found in this smoker",
        ),
    ),
    "liver tumour": Words(
        "Neoplasm",
        "a liver tumour",
        "tumour tumor metasta cancer liver hepat",
        ("a dark round lesion with a darker core", "a darker lump inside the even organ"),
        (
            "the round patch that differs from the even organ around it",
            "the odd spot that may have spread from the bowel",
            "the abnormal round lesion inside the largest organ",
            "the blotch within the bile-making organ",
            "the abnormal patch within the largest organ",
            "the round spot that may have spread here",
        ),
    ),
    "polyp": Words(
        "Non-neoplasm",
        "a polyp",
        "polyp adenom",
        ("a rounded bump with wet highlights", "a smooth dome rising from the wall"),
        (
            "the rounded bump that rises from the bowel wall",
            "the smooth dome that a snare would take off",
            "the knob-like growth that may bleed into the stool",
            "the raised pink bulge among the folds",
            "the smooth rounded bulge on the bowel wall",
            "the raised bump to take off with a snare",
        ),
    ),
    "haematoma": Words(
        "Non-neoplasm",
        "an intracranial haematoma",
        "haemat hemat bleed blood haemorr hemorr clot",
        ("a bright white collection inside the skull", "a dense white area beside the grey brain"),
        (
            "the bright white area that appeared after the blow",
            "the dense collection a neurosurgeon would drain tonight",
            "the white patch that pushes on the grey brain",
            "the bright abnormal zone in this drowsy patient",
            "the dense white zone seen after the blow",
            "the bright collection that pushes on the brain",
        ),
    ),
    "kidney cyst": Words(
        "Non-neoplasm",
        "a kidney cyst",
        "cyst kidney renal",
        ("a smooth round water-filled ball", "an even round ball on the bright bean"),
        (
            "the smooth round ball of water on the bean-shaped organ",
            "the harmless round bubble growing at the flank",
            "the even sphere that bulges from a urine-making organ",
            "the simple water-filled ball that needs no treatment",
            "the smooth ball of water that bulges at the flank",
            "the harmless sphere on the bean-shaped organ",
        ),
    ),
    "pneumonia": Words(
        "Infection",
        "pneumonia",
        "pneumon infect infiltr consolid",
        ("a cloudy white patch in the dark field", "a hazy white area hiding the ribs' outline"),
        (
            "the cloudy patch that would explain the fever and cough",
            "the hazy white area that antibiotics should clear",
            "the blurred white zone where air should be",
            "the shadow behind the crackles and the green sputum",
            "the hazy patch behind this fever and cough",
            "the cloudy white zone that antibiotics should clear",
        ),
    ),
    "consolidation": Words(
        "Infection",
        "an infectious consolidation",
        "consolid pneumon infect infiltr",
        ("a grey cloud filling the dark air space", "a patchy grey area against black air"),
        (
            "the grey cloud where black air should be",
            "the patchy area that came with fever and breathlessness",
            "the dense cloud left by the virus in this coughing patient",
            "the filled air space that should clear in weeks",
            "the patchy cloud that came with this fever",
            "the dense grey area where air should be",
        ),
    ),
}


Vocabulary = dict[str, Words]  # by category: WORDS, or another data set's


def query(
    category: str, clue: int, opener: int, modality: str, side: str, words: Vocabulary = WORDS
) -> str:
    """Returns the question of a clue and an opener, by their numbers. side: of the image, where the
    category is paired."""
    said = words[category].clues[clue].format(side=side)
    return OPENERS[opener].format(clue=said, picture=PICTURES[modality])


def pick_query(
    rng: np.random.Generator,
    category: str,
    modality: str,
    side: str,
    unseen: bool,
    words: Vocabulary = WORDS,
) -> tuple[str, int]:
    """Returns a random question and the number of its wording, clue * 6 + opener. unseen: of the
    wordings that only the test split has."""
    if unseen:
        clue, opener = rng.integers(UNSEEN, size=2) + SEEN
    else:
        clue, opener = rng.integers(SEEN, size=2)
    text = query(category, clue, opener, modality, side, words)
    return text, int(clue * len(OPENERS) + opener)


def names(category: str, side: str, words: Vocabulary = WORDS) -> list[str]:
    """Returns lower-case words of which one in a trace means that it names the target.

    They are without the article, unless another category's trace has those words, as a liver
    tumour's has "liver"."""
    name = words[category].name.format(side=side)
    bare = name
    if name.startswith(("the ", "a ", "an ")):
        bare = name.split(" ", 1)[1]
    others = [f"{other.name} {' '.join(other.seen)}" for c, other in words.items() if c != category]
    is_said_of_others = bare in " ".join(others)
    return [name if is_said_of_others else bare]


def where(box: tuple[float, float, float, float], size: tuple[int, int]) -> str:
    """Returns words for the place of a box (x1, y1, x2, y2) in an image of size (height, width)."""
    height, width = size
    x = (box[0] + box[2]) / 2 / width
    y = (box[1] + box[3]) / 2 / height
    column = third(x, "left", "right")
    row = third(y, "upper", "lower")
    if row and column:
        return f"{row} {column}"
    if column:
        return f"{column} half"
    if row:
        return f"{row} middle"
    return "centre"


def third(place: float, first: str, last: str) -> str:
    """Returns a word for a place along one side, from 0 to 1; "" in the middle."""
    if place < 0.42:
        return first
    if place > 0.58:
        return last
    return ""


def pick_trace(
    rng: np.random.Generator,
    category: str,
    modality: str,
    side: str,
    box: tuple[float, float, float, float],
    size: tuple[int, int],
    words: Vocabulary = WORDS,
) -> str:
    """Returns a random trace that names its target. box, size: see `where`."""
    own = words[category]
    return TRACES[rng.integers(len(TRACES))].format(
        picture=PICTURES[modality],
        where=where(box, size),
        name=own.name.format(side=side),
        seen=own.seen[rng.integers(2)],
    )


def check(words: Vocabulary = WORDS) -> None:
    """AssertionError unless every wording of every category keeps its secret and its length, and no
    trace has another target's name."""
    for category, own in words.items():
        assert len(own.clues) == SEEN + UNSEEN, category
        check_queries(category, own, words)
        check_traces(category, own, words)


def check_queries(category: str, own: Words, words: Vocabulary) -> None:
    for clue, opener, modality in product(range(SEEN + UNSEEN), range(len(OPENERS)), PICTURES):
        text = query(category, clue, opener, modality, "left", words)
        given_away = [stem for stem in own.forbidden.split() if stem in text.lower()]
        assert not given_away, (category, given_away, text)
        assert 8 <= len(text.split()) <= 18, (category, text)


def check_traces(category: str, own: Words, words: Vocabulary) -> None:
    for trace, seen in product(TRACES, own.seen):
        name = own.name.format(side="left")
        text = trace.format(picture="CT slice", where="upper left", name=name, seen=seen)
        assert 15 <= len(text.split()) <= 30, (category, text)
        named = {other for other in words if is_named(other, text, words, other == category)}
        assert named == {category}, (category, named, text)
    left = names(category, "left", words)[0]
    right = names(category, "right", words)[0]
    assert left == right or "left" in left


def is_named(category: str, text: str, words: Vocabulary, either_side: bool) -> bool:
    """Whether a text names a category's target, that on the left or, if asked for, on either
    side."""
    sides = ("left", "right") if either_side else ("left",)
    known = [name for side in sides for name in names(category, side, words)]
    return any(name in text.lower() for name in known)


if __name__ == "__main__":
    check()
