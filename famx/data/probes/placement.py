"""Places where a short run of tokens is not cut by a block boundary."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class BlockPlaces:
    """Starts that qualify: `size` tokens from there on are within one block of `block_size` tokens.

    `size` must not exceed `block_size`; if `block_size` is None, every start qualifies.
    """

    size: int
    block_size: int | None

    def later(self, start: int) -> int:
        """The first qualifying start that is not before `start`."""
        if self.block_size is None or start % self.block_size + self.size <= self.block_size:
            return start
        return (start // self.block_size + 1) * self.block_size

    def earlier(self, start: int) -> int:
        """The last qualifying start that is not after `start`."""
        if self.block_size is None:
            return start
        block_start = start // self.block_size * self.block_size
        return min(start, block_start + self.block_size - self.size)

    def nearest(self, start: int, low: int, high: int) -> int:
        """The qualifying start nearest to `start` between `low` and `high`, which must qualify too."""
        start = min(max(start, low), high)
        back, forward = self.earlier(start), self.later(start)
        return back if start - back <= forward - start else forward
