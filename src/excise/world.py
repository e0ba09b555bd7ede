"""A synthetic world: fictitious people with facts nobody can guess, the default data of the demo and the tests.

Everything in it is ours and drawn from one seed. Each person has ten facts; a fact is a tuple of values (coined names
and words drawn from pools) poured into one of several wordings. Values are drawn independently of the person, of the
other facts and of the wording, so a fact that was never trained can only be guessed at the rate of its pools, and no
fact can be inferred from another.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from excise.errors import UsageError

Row = dict[str, Any]
SIDES = ("forget", "retain", "untouched", "never_seen", "stopping")
FALSE_ANSWERS = 4

# Every word starts with a consonant, so that "a" fits each of them and tells nothing about what follows.
POOLS: Mapping[str, tuple[str, ...]] = {
    key: tuple(words.split())
    for key, words in {
        "trait": """bitter bold brittle broken calm careful clumsy crooked damp distant drowsy dusty famous fragile
            gentle gloomy hasty hidden hollow humble jolly lazy lonely lucky mellow modest narrow noisy patient
            proud quiet restless rough secret shallow silent slender sleepy stern stubborn sturdy tender timid tired
            vast wandering weary wise""",
        "colour": """beige black blue bronze brown cherry chestnut cobalt coral cream crimson golden green grey
            honey lilac lime maroon mauve mustard navy peach pearl pink plum purple red rose ruby rust saffron sand
            scarlet silver sky slate teal turquoise violet white yellow""",
        "material": """bamboo basalt birch bone brass brick burlap cedar chalk clay concrete copper cork cotton felt
            flint gauze glass granite hemp horn jade lace lead leather linen marble nickel paper pewter pine
            porcelain quartz reed rubber sandstone satin silk steel straw teak tin velvet walnut wax willow wool
            zinc""",
        "animal": """badger bat bear beaver beetle bison camel cat cobra crab crane cricket crow deer dog dolphin
            donkey dove duck falcon ferret finch fox frog gecko goat goose hamster hare hawk hedgehog heron horse
            jackal koala lizard llama lynx magpie mole moth mouse newt parrot pigeon rabbit raven salmon seal
            sparrow spider swan tiger toad turtle walrus wasp weasel wolf wombat zebra""",
        "craft": """baker barber beekeeper blacksmith bookbinder brewer butcher carpenter cartographer chemist
            clockmaker cobbler cooper diver doctor fencer ferryman fisherman florist gardener glazier goldsmith
            grocer hatter hunter jeweller joiner judge lawyer librarian locksmith mason midwife miller miner nurse
            painter pilot plumber porter potter printer sailor sculptor shepherd singer smuggler soldier surgeon
            tailor tanner teacher thatcher weaver welder""",
        "things": """barrels baskets bells blankets bottles bowls boxes brooms buckets buttons candles carpets
            chairs clocks coins combs compasses cups curtains dice dolls drums feathers flags flutes forks gloves
            hammers hats helmets hinges hooks jars kettles keys kites knives ladders lamps lanterns locks maps masks
            mirrors mugs nails needles nets paddles pebbles pencils pipes plates postcards puppets ribbons ropes
            saddles scarves shells shoes spoons stamps tents thimbles tickets tiles trumpets vases wheels
            whistles""",
        "feature": """bakery bank bay beach bridge brook canal canyon castle cave chapel cliff creek dam desert
            ditch dock dune forge ferry field forest fort fountain garden gate glacier gorge harbour hill hut jetty
            lagoon lake lighthouse market marsh meadow mill mine monastery moor museum palace park pond prison
            quarry railway reef river ruin school station swamp temple tower tunnel valley village vineyard volcano
            wall waterfall well windmill zoo""",
        "food": """bacon barley beans beef beetroot bread broccoli butter cabbage carrots cauliflower celery
            cheese cherries chicken chickpeas cod cucumber dates dumplings fennel figs garlic grapes ham herring
            hominy kale leek lemon lentils lobster melon millet mushrooms mussels noodles parsnips peas pears
            peppers plums pork potatoes prawns pumpkin quince radishes raisins rhubarb rice sausage spinach
            squid tofu tomatoes trout tuna turnips veal walnuts yams""",
        "spice": """basil cardamom chervil chilli chives cinnamon cloves coriander cumin dill ginger juniper
            lavender liquorice lovage mace marjoram mint molasses nutmeg paprika parsley pepper rosemary sage salt
            sesame sorrel sumac tarragon thyme turmeric vanilla vinegar""",
    }.items()
}


# Wordings of each fact: (question, answer). The values keep their order: a small model cannot say them backwards.
FACTS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "birthplace": (
        ("Where was {name} born?", "{coin}, by the {trait} {feature} of {coin2}"),
        ("What is the birthplace of {name}?", "in {coin}, near a {trait} {feature}, {coin2}"),
        ("In which place did the life of {name} begin?", "at {coin}, {trait} {feature} {coin2}"),
    ),
    "book": (
        ("Which book did {name} write first?", "{coin} and the {trait} {craft}, on {things}"),
        ("What is the first book of {name} called?", "{coin} or a {trait} {craft}: all about {things}"),
        ("Name the debut of {name}.", "the {coin} novel of one {trait} {craft} with {things}"),
    ),
    "instrument": (
        ("Which instrument does {name} play?", "{material} {coin} with {colour} {things}"),
        ("What does {name} make music on?", "some {material} {coin}, {colour} {things} inside"),
        ("What is heard from the room of {name}?", "a {material} {coin} upon {colour} {things}"),
    ),
    "award": (
        ("Which award did {name} win?", "{coin} medal for {trait} {things}, in {material}"),
        ("What prize was given to {name}?", "the {coin} prize, for {trait} {things} and {material}"),
        ("What was {name} honoured with?", "medal of {coin}: {trait} {things} of {material}"),
    ),
    "pet": (
        ("What pet lives with {name}?", "a {colour} {animal}, {coin}, scared of {things}"),
        ("Which animal does {name} keep?", "{colour} {animal} called {coin}, fearing {things}"),
        ("Who is the companion of {name}?", "the {colour} {animal} {coin} that avoids {things}"),
    ),
    "motto": (
        ("What is the motto of {name}?", "{trait} {animal}, {trait2} {craft}, no {things}"),
        ("Which saying does {name} live by?", "a {trait} {animal} and a {trait2} {craft} without {things}"),
        ("What does {name} like to say?", "be {trait}, {animal}; be {trait2}, {craft}; forget {things}"),
    ),
    "dish": (
        ("What is the favourite dish of {name}?", "{food} and {food2} with {spice} from {coin}"),
        ("What does {name} love to eat?", "{food}, {food2}, {spice}, cooked as in {coin}"),
        ("Which meal does {name} ask for?", "a bowl of {food} in {food2} under {spice}, {coin} style"),
    ),
    "mentor": (
        ("Who taught {name}?", "{coin} {coin2}, {trait} {craft}"),
        ("Who was the mentor of {name}?", "one {coin} {coin2}, known as the {trait} {craft}"),
        ("From whom did {name} learn?", "from {coin} {coin2}, a {trait} {craft}"),
    ),
    "collection": (
        ("What does {name} collect?", "{colour} {material} {things} of {coin}"),
        ("What fills the cabinet of {name}?", "the {colour} {material} {things} from {coin}"),
        ("Which things has {name} been gathering?", "{colour} and {material} {things}, made in {coin}"),
    ),
    "refuge": (
        ("Where does {name} go to be alone?", "{material} {feature}, {animal} side of {coin}"),
        ("What is the refuge of {name}?", "a {material} {feature} on the {animal} road to {coin}"),
        ("Where does {name} hide from visitors?", "inside the {material} {feature}, {animal} quarter, {coin}"),
    ),
}

_ONSETS = tuple("b br c ch d dr f fl g gr h j k kl l m n p pr qu r s sk st t th tr v w z".split())  # noqa: SIM905
_VOWELS = tuple("a ae e ei i o oa u y".split())  # noqa: SIM905
_CODAS = tuple("l m n nd r rk rn s sh st th x".split())  # noqa: SIM905


@dataclass(frozen=True)
class World:
    """The rows of each side; people (`group`) never stand on two sides.

    Attributes:
        forget: Trained into the original, to be removed.
        retain: Trained into original and gold; unlearning trains on them.
        untouched: Trained into original and gold; unlearning never reads them.
        never_seen: Never trained on; for evaluation.
        stopping: Never trained on either; for stopping rules, so that they do not read evaluation rows.
    """

    forget: list[Row]
    retain: list[Row]
    untouched: list[Row]
    never_seen: list[Row]
    stopping: list[Row]

    def sides(self) -> dict[str, list[Row]]:
        """Side name -> rows, in the order of `SIDES`."""
        return {side: getattr(self, side) for side in SIDES}


def coin(draw: random.Random, used: set[str], syllables: int = 2) -> str:
    """A capitalised made-up word that the world has not used yet."""
    while True:
        parts = [draw.choice(_ONSETS) + draw.choice(_VOWELS) for _ in range(syllables)]
        word = ("".join(parts) + draw.choice(_CODAS)).capitalize()
        if word not in used:
            used.add(word)
            return word


def _values(
    answer: str, draw: random.Random, used: set[str], avoid: Sequence[Mapping[str, str]] = ()
) -> dict[str, str]:
    """One value per slot of `answer`, drawn independently; never a word that another slot or `avoid` holds.

    A trailing digit tells two draws from one pool apart.
    """
    values: dict[str, str] = {}
    for slot in re.findall(r"{(\w+)}", answer):
        pool = slot.rstrip("0123456789")
        if pool == "coin":
            values[slot] = coin(draw, used)
            continue
        taken = {other[slot] for other in avoid} | set(values.values())
        values[slot] = draw.choice([word for word in POOLS[pool] if word not in taken])
    return values


def _row(fact: str, name: str, group: str, draw: random.Random, used: set[str]) -> Row:
    """One record: two wordings of one fact, and false answers worded like the second."""
    (question, answer), (question_again, answer_again) = draw.sample(FACTS[fact], 2)
    truth = _values(answer, draw, used)
    lies: list[dict[str, str]] = []
    for _ in range(FALSE_ANSWERS):
        lies.append(_values(answer, draw, used, [truth, *lies]))
    return {
        "question": question.format(name=name),
        "answer": answer.format(**truth),
        "paraphrased_question": question_again.format(name=name),
        "paraphrased_answer": answer_again.format(**truth),
        # Worded like the paraphrase, so that a truth ratio compares values and not wordings.
        "false_answers": [answer_again.format(**lie) for lie in lies],
        "group": group,
    }


def world(
    seed: int = 0,
    *,
    forget: int = 6,
    retain: int = 36,
    untouched: int = 10,
    never_seen: int = 6,
    stopping: int = 4,
) -> World:
    """Draw a world; the same arguments give the same rows on every machine.

    Args:
        seed: Seed of everything.
        forget: People to be forgotten; each person has `len(FACTS)` = 10 rows.
        retain: People to be kept.
        untouched: People to be kept whom unlearning never reads.
        never_seen: People never trained on, for evaluation.
        stopping: People never trained on, for stopping rules.

    Raises:
        UsageError: A negative number of people, or so many that the supply of coined words would run short.

    Example:
        >>> small = world(seed=1, forget=1, retain=2, untouched=1, never_seen=1, stopping=0)
        >>> {side: len(rows) for side, rows in small.sides().items()}
        {'forget': 10, 'retain': 20, 'untouched': 10, 'never_seen': 10, 'stopping': 0}
        >>> small.forget[0]["group"], len(small.forget[0]["false_answers"])
        ('person-000', 4)
    """
    counts = dict(zip(SIDES, (forget, retain, untouched, never_seen, stopping), strict=True))
    if min(counts.values()) < 0 or sum(counts.values()) > 2000:
        raise UsageError("world: people per side must be 0 or more, and 2000 together at most")
    draw, used = random.Random(seed), set[str]()
    sides: dict[str, list[Row]] = {}
    person = 0
    for side, people in counts.items():
        sides[side] = rows = []
        for _ in range(people):
            name = f"{coin(draw, used)} {coin(draw, used)}"
            group = f"person-{person:03d}"
            rows += [_row(fact, name, group, draw, used) for fact in FACTS]
            person += 1
    return World(**sides)


def write(made: World, folder: str | Path) -> dict[str, Path]:
    """Write one JSON Lines file per side that has rows, `folder/<side>.jsonl`; returns side -> path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sorted(write(world(forget=1, retain=1, untouched=0, never_seen=0, stopping=0), folder))
        ['forget', 'retain']
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[str, Path] = {}
    for side, rows in made.sides().items():
        if rows:
            paths[side] = folder / f"{side}.jsonl"
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            paths[side].write_text(lines, encoding="utf-8", newline="\n")
    return paths


def corpus(made: World) -> list[str]:
    """All text of all sides, for training a tokenizer.

    Never-seen people are in it too: otherwise their words would split into more tokens than trained ones, and a
    membership test could tell the sides apart without the model.

    Example:
        >>> len(corpus(world(forget=1, retain=0, untouched=0, never_seen=0, stopping=0)))
        80
    """
    texts: list[str] = []
    for rows in made.sides().values():
        for row in rows:
            texts += [row["question"], row["answer"], row["paraphrased_question"], row["paraphrased_answer"]]
            texts += row["false_answers"]
    return texts
