"""Colours of all pictures: Okabe and Ito's, which the colour-blind can tell apart.

What belongs to the memory is orange, what a model with a window alone has is light blue.
"""

MEMORY, PAST, OWN = "#E69F00", "#56B4E9", "#009E73"  # the memory, past blocks, a block's own tokens
UNSEEN = "#E4E4E4"  # what a query does not see
ZEROED = "#767676"  # a memory that was set to zero
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
