"""A generated data set whose true answer probabilities are known: sentences about urns, dice and wheels.

Every sentence states how often each outcome occurs, such as 3 red, 5 blue and 2 green marbles in a bag. The true
probability of an outcome is its count over the total, and the label is one sample from it. So a model can learn the
rule, and a model that learns the labels by heart is over-confident by an amount that can be measured. The sentences of
`chance_ood` ask questions of another kind, whose answer nothing in the data says.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial

from bayeslora.errors import InputError
from bayeslora.tasks.types import Example, Format, Split, Task

__all__ = ["chance_ood", "chance_task"]

_Kind = Callable[[random.Random], Example]

FORMAT = Format(template="{text}", readout="likelihood")
MAX_ROWS = 100_000

BOXES = ("bag", "urn", "jar", "box", "bowl", "basket")
OBJECTS = ("marbles", "balls", "beads", "stones", "buttons", "tokens")
COLOURS = ("red", "blue", "green", "white", "black", "yellow", "brown", "orange", "pink", "purple")
SIGNS = ("star", "moon", "sun", "heart", "cross", "circle", "square", "leaf", "fish", "bird", "tree", "bell")

URN_TEMPLATES = (
    "{A_box} holds {listed} {objects}. One is drawn. Its colour is",
    "There are {listed} {objects} in {a_box}. One taken at random is",
    "From {a_box} with {listed} {objects} a child picks one blindly. It is",
    "{A_box} was filled with {listed} {objects}. Without looking, someone takes one that is",
    "Inside {a_box}: {listed} {objects}. The colour of one drawn by chance is",
)
DIE_TEMPLATES = (
    "A die shows {placed} of its {total} sides. It is rolled and lands on the",
    "The {total} sides of a die are {listed}. It is thrown. On top is the",
    "Someone rolls a die with {listed} sides. It shows the",
)
WHEEL_TEMPLATES = (
    "A wheel has {listed} fields. It is spun and stops on",
    "The fields of a lucky wheel are {listed}. After a spin it points to",
)

WEATHER_TEMPLATES = (
    "The sky over {city} looked strange at {hour}. Next day the weather was",
    "A letter from {name} in {city} says that the weather there is",
    "On the day {name} flew to {city}, the weather around {hour} turned",
)
TRAIN_TEMPLATES = (
    "The express from {start} to {end} was late again around {hour}, this time because of",
    "Why did {name} wait so long for the train to {end}? The cause was",
)
WISH_TEMPLATES = (
    "At {hour} in {city} {name} could have {listed}, and wanted",
    "Of all things, {name} likes {listed}, but most of all",
)
RACE_TEMPLATES = (
    "{listed} ran a race in {city}. The winner was",
    "In {city} {listed} played chess until {hour}. First came",
)

CITIES = ("Oslo", "Paris", "Rome", "Cairo", "Lima", "Delhi", "Tokyo", "Berlin", "Milan", "Athens", "Dublin", "Prague")
NAMES = ("Anna", "Ben", "Carl", "Emma", "Ivan", "Jane", "Kate", "Leo", "Maria", "Nina", "Oscar", "Paul", "Rosa", "Tom")
WEATHERS = ("sunny", "rainy", "windy", "snowy", "cloudy", "stormy")
CAUSES = ("snow", "wind", "rain", "staff", "signals", "floods")
TREATS = ("tea", "coffee", "juice", "milk", "soup", "bread", "rice", "cheese", "fruit", "eggs")
HOURS = ("dawn", "noon", "midnight", "breakfast", "lunch", "dinner")


def chance_task(train_rows: int = 200, validation_rows: int = 100, test_rows: int = 400, seed: int = 0) -> Task:
    """Generate the task ``chance``: sentences that state odds, with their true ``probs`` and a sampled ``label``."""
    return task_of("chance", (train_rows, validation_rows, test_rows), seed, partial(_split, kinds=_CHANCE))


def chance_ood(rows: int = 300, seed: int = 0) -> Split:
    """Generate the split ``chance/ood``: questions about weather, late trains, people's wishes and races."""
    # As many choices as in the task, but no template, noun or outcome of its. Races are decided evenly: their probs are
    # uniform and their label is sampled. The other rows have neither.
    return _split("chance/ood", rows, seed, set(), kinds=_OOD)


def task_of(
    name: str, sizes: tuple[int, int, int], seed: int, split: Callable[[str, int, int, set[str]], Split]
) -> Task:
    """Return a task of generated splits, none of which repeats a text; equal on every machine for equal arguments."""
    seen: set[str] = set()
    parts = zip(("train", "validation", "test"), sizes, strict=True)
    return Task(name, *(split(f"{name}/{part}", rows, seed, seen) for part, rows in parts))


def stream(name: str, rows: int, seed: int) -> random.Random:
    """Return a split's own random stream, or refuse its size."""
    if not 1 <= rows <= MAX_ROWS:
        raise InputError(f"{name} cannot have {rows} rows: ask for 1 to {MAX_ROWS:,}")
    return random.Random(f"{name} {seed}")


def _split(name: str, rows: int, seed: int, seen: set[str], kinds: Sequence[_Kind]) -> Split:
    """Generate one split without the sentences in ``seen``, and add its own to them."""
    rng = stream(name, rows, seed)
    examples: list[Example] = []
    while len(examples) < rows:
        example = rng.choice(kinds)(rng)
        if example.text not in seen:
            seen.add(example.text)
            examples.append(example)
    return Split(name, tuple(examples), FORMAT)


def _number_of_choices(rng: random.Random) -> int:
    """Draw how many choices a row has."""
    return rng.choice((2, 2, 3, 3, 4))


def _counts(rng: random.Random, choices: int) -> list[int]:
    """Draw a count for each choice: mixed (1 to 9 each), lopsided (up to 19 to 1) or even."""
    shape = rng.random()
    if shape < 0.4:
        return [rng.randint(1, 9) for _ in range(choices)]
    if shape < 0.85:
        counts = [rng.choice((9, 12, 15, 17, 18, 19)), *(rng.choice((1, 1, 2)) for _ in range(choices - 1))]
        rng.shuffle(counts)
        return counts
    return [rng.randint(1, 9)] * choices


def _odds(rng: random.Random, template: str, outcomes: tuple[str, ...], **words: str) -> Example:
    """Draw outcomes and counts, put them into a sentence, and sample the label."""
    stated = rng.sample(outcomes, _number_of_choices(rng))
    counted = list(zip(_counts(rng, len(stated)), stated, strict=True))
    listed = _joined([f"{count} {word}" for count, word in counted])
    placed = _joined([f"a {word} on {count}" for count, word in counted])
    total = sum(count for count, _ in counted)
    sentence = template.format(listed=listed, placed=placed, total=total, **words)
    rng.shuffle(counted)
    counts = [count for count, _ in counted]
    label = rng.choices(range(len(counts)), weights=counts)[0]
    return Example(sentence, tuple(word for _, word in counted), label, tuple(count / total for count in counts))


def _urn(rng: random.Random) -> Example:
    """Draw a sentence about things of several colours in a container."""
    template, box, objects = rng.choice(URN_TEMPLATES), rng.choice(BOXES), rng.choice(OBJECTS)
    a_box = f"{'an' if box == 'urn' else 'a'} {box}"
    return _odds(rng, template, COLOURS, a_box=a_box, A_box=a_box[0].upper() + a_box[1:], objects=objects)


def _die(rng: random.Random) -> Example:
    """Draw a sentence about a die that shows each sign on a number of its sides."""
    return _odds(rng, rng.choice(DIE_TEMPLATES), SIGNS)


def _wheel(rng: random.Random) -> Example:
    """Draw a sentence about a wheel with fields of several colours."""
    return _odds(rng, rng.choice(WHEEL_TEMPLATES), COLOURS)


def _joined(parts: list[str]) -> str:
    """Return ``x, y and z``."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def _weather(rng: random.Random) -> Example:
    """Ask for tomorrow's weather in some city."""
    text = rng.choice(WEATHER_TEMPLATES).format(city=rng.choice(CITIES), name=rng.choice(NAMES), hour=rng.choice(HOURS))
    return Example(text, tuple(rng.sample(WEATHERS, _number_of_choices(rng))))


def _train(rng: random.Random) -> Example:
    """Ask why a train was late."""
    start, end = rng.sample(CITIES, 2)
    template = rng.choice(TRAIN_TEMPLATES)
    text = template.format(start=start, end=end, name=rng.choice(NAMES), hour=rng.choice(HOURS))
    return Example(text, tuple(rng.sample(CAUSES, _number_of_choices(rng))))


def _wish(rng: random.Random) -> Example:
    """Ask which of several things a person prefers."""
    choices = rng.sample(TREATS, _number_of_choices(rng))
    template = rng.choice(WISH_TEMPLATES)
    hour, city, name = rng.choice(HOURS), rng.choice(CITIES), rng.choice(NAMES)
    text = template.format(hour=hour, city=city, name=name, listed=_joined(choices))
    rng.shuffle(choices)
    return Example(text, tuple(choices))


def _race(rng: random.Random) -> Example:
    """Ask who won; the names are exchangeable, so the truth is even and the label sampled."""
    names = rng.sample(NAMES, _number_of_choices(rng))
    template = rng.choice(RACE_TEMPLATES)
    text = template.format(listed=_joined(names), city=rng.choice(CITIES), hour=rng.choice(HOURS))
    rng.shuffle(names)
    return Example(text, tuple(names), rng.randrange(len(names)), (1 / len(names),) * len(names))


_CHANCE: tuple[_Kind, ...] = (_urn, _urn, _die, _wheel)
_OOD: tuple[_Kind, ...] = (_weather, _train, _wish, _race)
