"""Stories like those of bAbI's first three tasks, scattered in a long text as in BABILong.

The stories come from a simulator: people walk between places, take objects and put them down. People,
places, objects, verbs and the number of facts are those of the bAbI tasks (arXiv 1502.05698). The prompt
is that of BABILong (arXiv 2406.10149): instruction, examples, the form of the answer, then all facts in
order between the sentences of a long text, and the question last.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np

from famx.base.ranges import OneOf, Positive, Share
from famx.base.values import checked
from famx.data.metrics import babilong_accuracy
from famx.data.probes.babi_prompts import ANSWERS, PROMPTS
from famx.data.probes.haystack_probe import HaystackProbe
from famx.data.probes.probe import CONTENT, PLACES, Parts
from famx.data.vocabularies import ByteVocabulary

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
LOCATIONS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("football", "milk", "apple")
MOVES = ("moved to", "went to", "journeyed to", "travelled to", "went back to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "discarded", "left", "put down")
# Number of facts before a question of bAbI 1.2, which asks after an even number of them: of qa1 all
# equally often, of the others at these shares of the questions.
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
FACTS = {
    "qa1": (2, 4, 6, 8, 10),
    "qa2": (2, 6, 8, 10, 12, 14, 16, 18, 22, 26, 30, 40),
    "qa3": (4, 16, 26, 30, 38, 42, 50, 62, 76, 94, 116, 148),
}
RECENT = 5  # the answer rests on one of so many last facts, and perhaps on earlier ones
FEWEST = {"qa1": 1, "qa2": 2, "qa3": 3}  # facts that a question needs


class Fact(NamedTuple):
    """One sentence of a story: somebody moves to a place, or takes or drops an object."""

    person: str
    action: str
    thing: str  # a place or an object


class Question(NamedTuple):
    """A question about a story, and its answer, one word."""

    text: str
    answer: str


@checked
@dataclasses.dataclass(frozen=True)
class BabiProbe(HaystackProbe):
    """A question about where a person or an object is, or where an object was before its present place.

    The story of an index is the same at every length. A right answer names one place, beside those of the
    question, in its first sentence (`famx.data.metrics.babilong_accuracy`). Unlike in bAbI, people act
    only after their place was told; as in bAbI, an object may have been in its present place before, and
    qa3 asks about its present stay there.

    Attributes:
      task: "qa1" (one supporting fact: where a person is), "qa2" (two: where an object is) or "qa3"
        (three: where an object was before its present place).
      instructed: begin with BABILong's instruction, examples and form of the answer. Otherwise the prompt
        is context and question alone, and the answer is one word.
      facts: smallest and largest number of facts of a story, all equally likely; None: as in bAbI
        (`FACTS`).
      between: fractions of the filler between which all facts are placed.
      haystack: "python_docs" or "noise".
    """

    haystack: Literal["noise", "python_docs"] = "python_docs"
    task: Annotated[str, OneOf(tuple(FACTS))] = "qa1"
    instructed: bool = True
    facts: tuple[Positive, Positive] | None = None
    between: tuple[Share, Share] = (0.0, 1.0)

    written_tokens: ClassVar[int] = 20

    def __post_init__(self):
        super().__post_init__()
        if self.facts is not None and not FEWEST[self.task] <= self.facts[0] <= self.facts[1]:
            raise ValueError(
                f"A story of {self.task} has at least {FEWEST[self.task]} facts, but facts is "
                f"{self.facts}; give the smallest and the largest number."
            )
        if self.between[0] > self.between[1]:
            raise ValueError(f"A probe's between is {self.between}; give the lower fraction first.")
        self._encode(self._widest().hidden[0])

    @functools.cached_property
    def min_length(self) -> int:
        if isinstance(self.vocab, ByteVocabulary):
            return super().min_length
        # The longest of the few sentences is known; their bytes would be a bound far too high.
        size = lambda texts: max(len(self._encode(text)) for text in texts)
        parts = self._widest()
        asked = [(q, p) for q in self._all_questions() for p in LOCATIONS]
        return (
            len(self._encode(self._header_of_row(parts)))
            + len(parts.hidden) * size(self.separator + text for text in _all_sentences())
            + size(self._question(question) for question, _ in asked)
            + size(self._answer(question, place) for question, place in asked)
        )

    def at_depth(self, depth, length):
        """All facts of the story are at this depth, one after another."""
        return dataclasses.replace(self, between=(depth, depth))

    def score(self, examples: Sequence[Mapping[str, Any]], predictions: Sequence[str]):
        """`{"accuracy"}` of BABILong; see the class."""
        answers = [example["references"] for example in examples]
        return babilong_accuracy(answers, predictions, [e["question"] for e in examples], LOCATIONS)

    def _parts(self, index):
        rng = self._rng(index, CONTENT)
        number = self._number_of_facts(rng)
        questions: list[Question] = []
        while not questions:
            story = tell(rng, number, objects=self.task != "qa1")
            questions = ask(self.task, story)
        question = questions[rng.integers(len(questions))]
        low, high = self.between
        depths = low + (high - low) * np.sort(self._rng(index, PLACES).random(number))
        return self._write([sentence(rng, fact) for fact in story], depths, question)

    def _number_of_facts(self, rng: np.random.Generator) -> int:
        if self.facts is not None:
            return int(rng.integers(self.facts[0], self.facts[1] + 1))
        facts = FACTS[self.task]
        if self.task == "qa1":
            return facts[rng.integers(len(facts))]
        return 2 * round(float(np.interp(rng.random() * SHARES[-1], SHARES, facts)) / 2)

    def _widest(self):
        number = (FACTS[self.task] if self.facts is None else self.facts)[-1]
        question = Question(max(self._all_questions(), key=len), "bathroom")
        return self._write([max(_all_sentences(), key=len)] * number, np.zeros(number), question)

    def _all_questions(self) -> list[str]:
        if self.task == "qa1":
            return [f"Where is {person}?" for person in PEOPLE]
        if self.task == "qa2":
            return [f"Where is the {thing}?" for thing in OBJECTS]
        pairs = itertools.product(OBJECTS, LOCATIONS)
        return [f"Where was the {thing} before the {place}?" for thing, place in pairs]

    def _write(self, facts, depths, question: Question) -> Parts:
        return Parts(
            header=(PROMPTS[self.task] if self.instructed else "") + "<context>\n",
            hidden=facts,
            depths=depths,
            question=self._question(question.text),
            answer=self._answer(question.text, question.answer),
            references=[question.answer],
        )

    def _question(self, question: str) -> str:
        return f"\n</context>\n\nQuestion: {question}"

    def _answer(self, question: str, place: str) -> str:
        if not self.instructed:
            return f"\nAnswer: {place}"
        words = question.rstrip("?").split()
        asked = [words[3], words[-1]] if self.task == "qa3" else words[-1:]
        return f"\nAnswer: {ANSWERS[self.task].format(*asked, place=place)}"


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
    """All questions of the task that the story answers.

    As in bAbI, the last fact on which the answer rests is one of the story's last `RECENT` ones.
    """
    where, visited, touched = _follow(story)
    recent = lambda number: number >= len(story) - RECENT
    if task == "qa1":
        people = [p for p in PEOPLE if p in where and recent(where[p][1])]
        return [Question(f"Where is {p}?", where[p][0]) for p in people]
    if task == "qa2":
        objects = [o for o in visited if recent(touched[o])]
        return [Question(f"Where is the {o}?", visited[o][-1][0]) for o in objects]
    return [
        Question(f"Where was the {o} before the {places[-1][0]}?", places[-2][0])
        for o, places in visited.items()
        if len(places) > 1 and recent(places[-1][1])
    ]


Stay = tuple[str, int]  # a place, and the number of the fact since which somebody or something is there


def _follow(story: list[Fact]) -> tuple[dict[str, Stay], dict[str, list[Stay]], dict[str, int]]:
    """The place of every person; the places of every object that was taken, each unlike the last; and for
    every such object the number of the last fact about it or its carrier's place."""
    where: dict[str, Stay] = {}
    holder: dict[str, str] = {}
    visited: dict[str, list[Stay]] = {}
    touched: dict[str, int] = {}
    for number, (person, action, thing) in enumerate(story):
        if action == "move":
            where[person] = thing, number
            for carried in (o for o, p in holder.items() if p == person):
                visited[carried].append((thing, number))
                touched[carried] = number
            continue
        touched[thing] = number
        if action == "take":
            holder[thing] = person
            visited.setdefault(thing, [(where[person][0], number)])
        else:
            del holder[thing]
    return where, visited, touched


def _all_sentences() -> list[str]:
    """Every sentence that a story may have."""
    moves = itertools.product(PEOPLE, MOVES, LOCATIONS)
    acts = itertools.product(PEOPLE, (*TAKES, *DROPS), OBJECTS)
    return [
        *(f"{person} {verb} the {place}." for person, verb, place in moves),
        *(f"{p} {verb} the {thing}{end}." for p, verb, thing in acts for end in ("", " there")),
    ]


def sentence(rng: np.random.Generator, fact: Fact) -> str:
    """The fact as a sentence, with a random verb of those that bAbI uses."""
    verbs = {"move": MOVES, "take": TAKES, "drop": DROPS}[fact.action]
    verb = verbs[rng.integers(len(verbs))]
    suffix = " there" if fact.action != "move" and rng.random() < 0.5 else ""
    return f"{fact.person} {verb} the {fact.thing}{suffix}."
