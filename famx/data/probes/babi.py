"""Stories like those of bAbI's first three tasks, scattered in a long text as in BABILong.

The stories come from a simulator: people walk between places, take objects and put them down. People,
places, objects and verbs are those of the bAbI tasks (arXiv 1502.05698). The layout is that of BABILong
(arXiv 2406.10149): all facts in order between the sentences of a long text, and the question last.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from famx.data.probes.checks import check_choice, check_fraction
from famx.data.probes.haystack_probe import HaystackProbe
from famx.data.probes.probe import CONTENT, PLACES, Parts

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
LOCATIONS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("football", "milk", "apple")
MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "discarded", "left", "put down")
FACTS = {"qa1": (2, 10), "qa2": (4, 16), "qa3": (6, 24)}  # smallest and largest number in a story


class Fact(NamedTuple):
    """One sentence of a story: somebody moves to a place, or takes or drops an object."""

    person: str
    action: str
    thing: str  # a place or an object


class Question(NamedTuple):
    """A question about a story, and its answer, one word."""

    text: str
    answer: str


@dataclasses.dataclass(frozen=True)
class BabiProbe(HaystackProbe):
    """A question about where a person or an object is, or where an object was before its present place.

    The story of an index is the same at every length. The answer is a place; a right output contains
    it and no other place.

    Attributes:
      task: "qa1" (one supporting fact: where a person is), "qa2" (two: where an object is) or "qa3"
        (three: where an object was before its present place).
      facts: smallest and largest number of facts of a story; None takes those of `FACTS`.
      between: fractions of the filler between which all facts are placed.
      haystack: "python_docs" or "noise".
    """

    haystack: str = "python_docs"
    task: str = "qa1"
    facts: tuple[int, int] | None = None
    between: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        super().__post_init__()
        check_choice("task", self.task, tuple(FACTS))
        fewest, most = self._facts
        if not FACTS[self.task][0] <= fewest <= most:
            raise ValueError(
                f"A story of {self.task} has at least {FACTS[self.task][0]} facts, but facts is "
                f"{(fewest, most)}; give the smallest and the largest number."
            )
        for value in self.between:
            check_fraction("between", value)
        if self.between[0] > self.between[1]:
            raise ValueError(f"A probe's between is {self.between}; give the lower fraction first.")
        self._encode(self._widest().hidden[0])

    @property
    def _facts(self) -> tuple[int, int]:
        return FACTS[self.task] if self.facts is None else self.facts

    def _parts(self, index):
        rng = self._rng(index, CONTENT)
        fewest, most = self._facts
        number = int(rng.integers(fewest, most + 1))
        questions: list[Question] = []
        while not questions:
            story = tell(rng, number, objects=self.task != "qa1")
            questions = ask(self.task, story)
        text, answer = questions[rng.integers(len(questions))]
        low, high = self.between
        depths = low + (high - low) * np.sort(self._rng(index, PLACES).random(number))
        return self._write([sentence(rng, fact) for fact in story], depths, text, answer)

    def _widest(self):
        texts = [f"Sandra {verb} the bathroom." for verb in MOVES]
        texts += [f"Sandra {verb} the football there." for verb in (*TAKES, *DROPS)]
        number = self._facts[1]
        question = {"qa1": "Where is Sandra?", "qa2": "Where is the football?"}.get(
            self.task, "Where was the football before the bathroom?"
        )
        return self._write([max(texts, key=len)] * number, np.zeros(number), question, "bathroom")

    def _write(self, facts, depths, question, answer) -> Parts:
        return Parts(
            header="",
            hidden=facts,
            depths=depths,
            question=f"\nQuestion: {question}\nAnswer:",
            answer=f" {answer}",
            references=[answer],
        )


def tell(rng: np.random.Generator, number: int, objects: bool) -> list[Fact]:
    """Tell a story of `number` facts, in which people act only after their place was told.

    An object is first wherever somebody takes it; later it is where it was dropped, or with the person
    who has it. With `objects`, half of the facts are about objects, as far as possible.
    """
    where: dict[str, str] = {}  # place of each person, and of each object that was dropped
    holder: dict[str, str] = {}  # person who has an object
    story = []
    while len(story) < number:
        person = PEOPLE[rng.integers(len(PEOPLE))]
        place = where.get(person)
        held = [o for o in OBJECTS if holder.get(o) == person]
        free = [o for o in OBJECTS if o not in holder and where.get(o, place) == place]
        if objects and place and (held or free) and rng.random() < 0.5:
            candidates = [*(("drop", o) for o in held), *(("take", o) for o in free)]
            action, thing = candidates[rng.integers(len(candidates))]
            if action == "take":
                holder[thing] = person
            else:
                where[thing] = where[holder.pop(thing)]
        else:
            action = "move"
            others = [other for other in LOCATIONS if other != place]
            thing = where[person] = others[rng.integers(len(others))]
        story.append(Fact(person, action, thing))
    return story


def ask(task: str, story: list[Fact]) -> list[Question]:
    """All questions of the task that the story answers unambiguously."""
    where, visited = _follow(story)
    if task == "qa1":
        return [Question(f"Where is {p}?", where[p]) for p in PEOPLE if p in where]
    if task == "qa2":
        return [Question(f"Where is the {o}?", places[-1]) for o, places in visited.items()]
    return [
        Question(f"Where was the {o} before the {places[-1]}?", places[-2])
        for o, places in visited.items()
        if places.index(places[-1]) == len(places) - 1 > 0  # it has been there only once
    ]


def _follow(story: list[Fact]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The place of every person, and the successive places of every object that was taken."""
    where: dict[str, str] = {}
    holder: dict[str, str] = {}
    visited: dict[str, list[str]] = {}
    for person, action, thing in story:
        if action == "move":
            where[person] = thing
            for carried in (o for o, p in holder.items() if p == person):
                visited[carried].append(thing)
        elif action == "take":
            holder[thing] = person
            visited.setdefault(thing, [where[person]])
        else:
            del holder[thing]
    return where, visited


def sentence(rng: np.random.Generator, fact: Fact) -> str:
    """The fact as a sentence, with a random verb of those that bAbI uses."""
    verbs = {"move": MOVES, "take": TAKES, "drop": DROPS}[fact.action]
    verb = verbs[rng.integers(len(verbs))]
    suffix = " there" if fact.action != "move" and rng.random() < 0.5 else ""
    return f"{fact.person} {verb} the {fact.thing}{suffix}."
