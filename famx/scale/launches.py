"""What the host launches for a GPU program: CUDA graphs and single kernels, loop by loop.

XLA compiles a GPU program to a sequence of thunks and records runs of them as CUDA graphs, which it
launches as a whole. The sequence is in the compiler's dump; JAX has no access to it.
"""

import dataclasses
import re
from collections.abc import Iterator

from famx.scale.costs import Region

_THUNK = re.compile(r"( *)\d+: k(\w+)")
# Heading of a condition, a body or a branch. An empty condition ends without a line break.
_SECTION = re.compile(r"(?: *No thunks\.)?( *)(\w+):$")
_NOTHING = ("Sequential", "WaitForStreams", "Done")  # endings of the kinds that launch nothing themselves


@dataclasses.dataclass
class Launches:
    """Launches of one run of a loop's body or of the program, without conditions and the loops inside.

    Attributes:
      graphs: launches of CUDA graphs.
      single: launches of kernels and copies outside of graphs.
      inner: the loops and conditionals inside, in the order of the program.
    """

    graphs: int = 0
    single: int = 0
    inner: list["Launches"] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Thunk:
    kind: str
    indent: int
    sections: dict[str, list["_Thunk"]] = dataclasses.field(default_factory=dict)
    section: str = ""

    def add(self, thunk: "_Thunk") -> None:
        self.sections.setdefault(self.section, []).append(thunk)


def parse(text: str) -> Launches:
    """Parses XLA's dump `thunk_sequence_after_thunk_passes.txt`."""
    root = _Thunk("Program", -1)
    stack = [root]
    for line in text.splitlines():
        if match := _THUNK.match(line):
            thunk = _Thunk(match[2], len(match[1]))
            while stack[-1].indent >= thunk.indent:
                stack.pop()
            stack[-1].add(thunk)
            stack.append(thunk)
        elif match := _SECTION.match(line):
            # The heading of a condition is not indented; the others are more than their thunk.
            while match[2] != "condition" and stack[-1].indent >= len(match[1]):
                stack.pop()
            stack[-1].section = match[2]
    return _launches(root.sections.get("", []))


def _launches(thunks: list[_Thunk], in_graph: bool = False) -> Launches:
    total = Launches()

    def add(thunk):
        if thunk.kind == "While":
            total.inner.append(_launches(thunk.sections.get("body", []), in_graph))
        elif thunk.kind == "Conditional":
            branches = [_launches(branch, in_graph) for branch in thunk.sections.values()]
            total.inner.append(max(branches, key=lambda b: b.graphs + b.single, default=Launches()))
        elif thunk.kind == "CommandBuffer":
            total.graphs += not in_graph
            total.inner += _launches(thunk.sections.get("", []), True).inner
        elif thunk.kind.endswith(_NOTHING):
            for part in thunk.sections.get("", []):
                add(part)
        else:
            total.single += not in_graph

    for thunk in thunks:
        add(thunk)
    return total


def by_region(
    region: Region, launches: Launches | None
) -> Iterator[tuple[int, tuple, Region, Launches | None]]:
    """Yields what `Region.walk` does, and the launches of each region.

    They are None if the loops of the two are not the same: XLA may change them after the optimised
    program is written.
    """
    yield from _pairs(region, launches, 1, ())


def _pairs(region, launches, runs, path):
    runs, path = runs * (region.trips if region.trips is not None else 1), (*path, region.name)
    yield runs, path, region, launches
    same = launches is not None and len(launches.inner) == len(region.inner)
    for i, inner in enumerate(region.inner):
        yield from _pairs(inner, launches.inner[i] if same else None, runs, path)
