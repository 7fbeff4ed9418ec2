"""The edges of a graph in any order; is one node reached from another, and in how many steps?"""

import collections
import dataclasses
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le

from famx.base.features import Feature
from famx.base.ranges import Positive
from famx.base.values import checked
from famx.data.sequences.task import SequenceTask

EDGE, REACHED, STEPS = range(3)  # the third number of a position
_FEWEST = 6  # edges
_NODES_PER_EDGE = 0.8  # of a sparse graph


@checked
@dataclasses.dataclass(frozen=True)
class ReachableTask(SequenceTask):
    """The directed edges of a graph, one at each position, shuffled; then questions of two positions.

    The feature `edges` holds two nodes and what the position is: 0 an edge, 1 the question whether the
    second node is reached from the first ("yes" or "no", each half of the time), 2 in how many steps
    ("none" if it is not). Nodes have random numbers.

    Attributes:
      graph: "tree": edges from parents to children; "sparse": random edges, 1.25 for each node.
      nodes: number of numbers that nodes may have; a larger graph is refused.
      most_steps: the largest number of steps that is asked for, and the depth of trees.
      edges: number of edges of the graph; those that fit beyond it, between it and the questions, are of
        other nodes, which no question names. None: the graph has as many as fit.
      questions: number of questions, each of two nodes of its own. More of them teach more per graph.
    """

    graph: Literal["tree", "sparse"] = "tree"
    nodes: Annotated[int, Ge(_FEWEST + 1)] = 128
    most_steps: Annotated[int, Ge(2), Le(9)] = 6  # with 1 a tree reaches every node that is asked for
    edges: Annotated[int, Ge(_FEWEST)] | None = None
    questions: Positive = 1

    words = ("no", "yes", "none", *"123456789")

    @property
    def features(self):
        return (Feature("edges", 3, "int32"),)

    @property
    def min_length(self) -> int:
        return _FEWEST + 2 * self.questions

    def row(self, rng, length):
        count = length - 2 * self.questions
        own = min(count, self.edges or count)
        size = own + 1 if self.graph == "tree" else max(4, round(_NODES_PER_EDGE * own))
        needed = size + (2 if own < count else 0)
        if needed > self.nodes:
            raise ValueError(
                f"A graph of {own} edges has {size} nodes, and needs {needed} numbers, more than the"
                f" {self.nodes} of ReachableTask.nodes: raise it, and the sizes of the model's frontend,"
                " or take a shorter length or fewer ReachableTask.edges."
            )
        make = self._tree if self.graph == "tree" else self._sparse
        edges = make(rng, own, size)
        asked = None
        while asked is None:
            asked = self._questions(rng, edges, size)
            edges = edges if asked else make(rng, own, size)
        names = rng.permutation(self.nodes)
        array = np.zeros((length, 3), np.int32)
        array[:own, :2] = names[rng.permutation(edges)]
        for i in range(own, count):
            array[i, :2] = rng.choice(names[size:], 2, replace=False)
        answer = []
        for i, (start, end, steps) in enumerate(asked):
            here = count + 2 * i
            array[here : here + 2, :2] = names[[start, end]]
            array[here : here + 2, 2] = REACHED, STEPS
            answer += ["no", "none"] if steps is None else ["yes", str(steps)]
        return dict(features={"edges": array}, answer=answer)

    def _tree(self, rng, count: int, size: int) -> np.ndarray:
        """Edges `[count, 2]` of a random tree whose depth is at most `most_steps`; node 0 is its root."""
        depth, edges = [0], []
        for node in range(1, size):
            parent = int(rng.choice([i for i, d in enumerate(depth) if d < self.most_steps]))
            edges.append((parent, node))
            depth.append(depth[parent] + 1)
        return np.array(edges)

    def _sparse(self, rng, count: int, size: int) -> np.ndarray:
        """`count` different random edges between different nodes."""
        every = size * (size - 1)
        chosen = rng.choice(every, count, replace=False)
        first, second = chosen // (size - 1), chosen % (size - 1)
        return np.stack([first, second + (second >= first)], axis=1)

    def _questions(self, rng, edges: np.ndarray, size: int):
        """A tuple `(start, end, steps)` for each question; None: this graph has too few answers."""
        asked = [self._question(rng, edges, size, bool(rng.integers(2))) for _ in range(self.questions)]
        return None if None in asked else asked

    def _question(self, rng, edges: np.ndarray, size: int, yes: bool):
        """`(start, end, steps)`, the steps being None if the answer is no; None: there is none found."""
        for start in rng.permutation(np.unique(edges[:, 0])):
            away = distances(edges, int(start), size)
            if yes:
                possible = [s for s in range(1, self.most_steps + 1) if s in away]
                if possible:
                    steps = int(rng.choice(possible))
                    return int(start), int(rng.choice(np.flatnonzero(away == steps))), steps
            elif (away < 0).any():
                # A node that some edge leads to, so that the question does not answer itself.
                ends = np.intersect1d(np.flatnonzero(away < 0), edges[:, 1])
                if len(ends):
                    return int(start), int(rng.choice(ends)), None
        return None


def distances(edges: np.ndarray, start: int, size: int) -> np.ndarray:
    """Number of steps from `start` to each node, int `[size]`; -1 for those that are not reached."""
    after = collections.defaultdict(list)
    for a, b in edges.tolist():
        after[a].append(b)
    away, waiting = np.full(size, -1), collections.deque([start])
    away[start] = 0
    while waiting:
        node = waiting.popleft()
        for other in after[node]:
            if away[other] < 0:
                away[other] = away[node] + 1
                waiting.append(other)
    return away
