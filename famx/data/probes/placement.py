"""Where a short stretch of tokens may begin so that no block boundary cuts it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockPlaces:
    """The places where `size` tokens lie within one block of `block_size` (None: everywhere).

    `size` must not exceed `block_size`.
    """

    size: int
    block_size: int | None

    def later(self, start: int) -> int:
        """The first such place from `start` on."""
        if self.block_size is None or start % self.block_size + self.size <= self.block_size:
            return start
        return (start // self.block_size + 1) * self.block_size

    def earlier(self, start: int) -> int:
        """The last such place up to `start`."""
        if self.block_size is None:
            return start
        block_start = start // self.block_size * self.block_size
        return min(start, block_start + self.block_size - self.size)

    def nearest(self, start: int, low: int, high: int) -> int:
        """The place nearest to `start`, between the two such places `low` and `high`."""
        start = min(max(start, low), high)
        back, forward = self.earlier(start), self.later(start)
        return back if start - back <= forward - start else forward
