"""Facts to hide in text and to ask for: `The value of KEY is: "VALUE".`, keys and values of two common words each.

Each word is one token of the embedded tokenizer. One key in eight is never trained on by the embedded model.
"""

from __future__ import annotations

import numpy as np

HELD_OUT_SHARE = 8  # one key in so many


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# One token after a space.
WORDS = _words(
    """
    address argument arguments attribute block breakpoint buffer bytes call case class code codec command config
    connection context copy count data default digits directory element encoding error errors event exception file
    filename files flags format frame function handle handler header host import index input instance integer key
    line lineno lines link list local lock log logger loop match member message method methods module month name
    names namespace number object objects offset operand option order other output package param parameter parser
    part path prefix process protocol range read request result root round select server sign signal size socket
    source start state stream string target test text thread time timeout token tuple type types user values
    version warnings week write year
    """
)

# One token also at the start of a value, after the quotation mark.
FIRST_WORDS = _words(
    """
    address buffer call class code config context data default encoding error errors file format frame header host
    import index input instance key line lineno lines link list local lock log loop match member message method
    module month name other param part path process read root round select server sign size socket source start
    state string text thread time token tuple type user version write year
    """
)


def held_out(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Which keys, as indices into WORDS, are kept from training."""
    return (3 * first + second) % HELD_OUT_SHARE == 0


def needle_line(key: str, value: str) -> str:
    return f'The value of {key} is: "{value}".\n'


def question_for(key: str) -> str:
    return f"What is the value of {key}?"
