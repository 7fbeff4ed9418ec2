"""Variable tracking: RULER's chains of assignments in a haystack (arXiv 2404.06654)."""

import dataclasses
import functools
import string
from typing import ClassVar

import numpy as np

from famx.base.ranges import Positive
from famx.base.values import checked
from famx.data.probes.haystack_probe import HaystackProbe
from famx.data.probes.passkey_text import REPEATED_FILLER
from famx.data.probes.probe import CONTENT, PLACES, Parts

HEADER = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: "
    "According to the chain(s) of variable assignment in the text above, {number} variables are assigned "
    "the value {value}, they are: "
)
LETTERS = np.array([*string.ascii_uppercase])


@checked
@dataclasses.dataclass(frozen=True)
class VariableProbe(HaystackProbe):
    """`VAR A = 12345`, later `VAR B = VAR A`, etc.: which variables have the value 12345?

    The texts are RULER's, and so is the metric (`string_match_all`). The statements of a chain are in
    order; several chains are interleaved at random. The question asks for the variables with the first
    chain's value; the references are its variables in the order of the chain.

    Attributes:
      num_chains: number of chains, each with a different value.
      num_hops: number of assignments from one variable to the next in each chain.
      demonstration: begin with a solved example with short names and about 500 tokens, as in RULER.
    """

    written_tokens: ClassVar[int] = 30

    num_chains: Positive = 1
    num_hops: Positive = 4
    demonstration: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.num_chains * (self.num_hops + 1) > 1000:
            raise ValueError(
                f"{self.num_chains} chains of {self.num_hops} hops need more than 1000 variables; use "
                "fewer chains or hops."
            )
        self._encode(self._widest().hidden[0])

    def _parts(self, index):
        shown, names, values = self._content(self._rng(index, CONTENT))
        place = self._rng(index, PLACES)
        depths = np.sort(place.random((self.num_chains, self.num_hops + 1)), axis=1).ravel()
        order = np.argsort(depths, kind="stable")
        return self._write(shown, names, values, order, depths[order])

    def _widest(self):
        # All names and values have one length each.
        shown, names, values = self._content(np.random.default_rng(0))
        number = self.num_chains * (self.num_hops + 1)
        return self._write(shown, names, values, range(number), np.zeros(number))

    def _write(self, shown, names, values, order, depths) -> Parts:
        statements = _statements(names, values)
        if self.haystack == "python_docs":
            statements = [text.strip() + "." for text in statements]
        return Parts(
            header=shown + HEADER,
            hidden=[statements[i] for i in order],
            depths=depths,
            question=QUESTION.format(value=values[0], number=self.num_hops + 1),
            answer=" ".join(names[0]),  # RULER's question ends with a space
            references=names[0],
        )

    def _content(self, rng: np.random.Generator) -> tuple[str, list[list[str]], list[str]]:
        """The demonstration, the variables of each chain in order, and the value of each chain."""
        names, few = self._names(rng, 5), self._names(rng, 3)
        drawn = 10_000 + rng.choice(90_000, 2 * self.num_chains, replace=False)
        values, others = np.split(drawn.astype(str), 2)
        shown = self._demonstration(rng, few, others.tolist()) if self.demonstration else ""
        return shown, names, values.tolist()

    def _names(self, rng: np.random.Generator, letters: int) -> list[list[str]]:
        """Different names of `letters` letters for the variables of each chain."""
        count = self.num_hops + 1
        numbers = rng.choice(26**letters, self.num_chains * count, replace=False)
        spelled = LETTERS[numbers[:, None] // 26 ** np.arange(letters) % 26]
        names = ["".join(word) for word in spelled]
        return [names[i : i + count] for i in range(0, len(names), count)]

    def _demonstration(
        self, rng: np.random.Generator, names: list[list[str]], values: list[str]
    ) -> str:
        """A solved example in noise, whatever the haystack; two spaces precede RULER's solution."""
        lines = [REPEATED_FILLER] * self._noise_of_demonstration
        statements = _statements(names, values)
        places = np.sort(rng.integers(len(lines), size=len(statements)))
        for number, (place, text) in enumerate(zip(places.tolist(), statements)):
            lines.insert(place + number, text)
        question = QUESTION.format(value=values[0], number=self.num_hops + 1)
        return HEADER + "\n".join(lines) + question + " " + " ".join(names[0]) + "\n\n"

    @functools.cached_property
    def _noise_of_demonstration(self) -> int:
        """Number of lines of noise with which a demonstration has 500 tokens; RULER has 5 at least."""
        names = [["A" * 3] * (self.num_hops + 1)] * self.num_chains
        text = HEADER + "\n".join(_statements(names, ["12345"] * self.num_chains)) + QUESTION
        line = len(self._encode("\n" + REPEATED_FILLER))
        return max((500 - len(self._encode(text))) // line, 5)


def _statements(names: list[list[str]], values: list[str]) -> list[str]:
    """The assignments of all chains, chain by chain."""
    texts = []
    for chain, value in zip(names, values):
        texts.append(f"VAR {chain[0]} = {value}")
        # RULER's assignments of variables end with a space.
        texts += [f"VAR {new} = VAR {old} " for old, new in zip(chain, chain[1:])]
    return texts
