"""rows apart: what stands beside the text is computed apart from it.

Learned embeddings, memory and a beginning of text that forward puts in front of the tokens are the same for every text,
and no earlier row sees a token: their rows are computed from weights alone, and the tokens' queries attend to their
keys beside the tokens' own. What fills the text up to a multiple of a number comes behind it: no token sees it, and its
rows are not computed. Either way no value has more rows than there are tokens. Proved op by op, as token locality is.
"""

from __future__ import annotations

from .framework.manager import Pass
from .framework.state import GraphState
from .rows.apart import Apart
from .rows.beside import found_beside
from .rows.meetings import RULES


def rows_apart(state: GraphState) -> int:
    """Compute rows beside the text apart; returns in how many places they were cut off."""
    return sum(Apart(state, beside, RULES).rewrite() for beside in found_beside(state))


PASS = Pass(
    "rows apart",
    rows_apart,
    before="normalized graph",
    after="rows in front of the text that do not depend on it, and those behind it that no token sees, are apart",
    needs=("normalize",),
    place_before=("every position",),
)
