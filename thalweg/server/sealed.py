"""Reasoning that a client keeps without reading it: what it is sent as a signature or as encrypted content.

Clients that hide reasoning, or do not store it, send this text back with the next turn, and the turn's prompt is the
same again. It is no secret and needs no protection: a client may send any reasoning it likes.
"""

from __future__ import annotations

import base64
import binascii
from hashlib import blake2b

_SEALED = "thalweg-reasoning-1."
_SIGNED = "thalweg-signature-1."


def seal(reasoning: str) -> str:
    """An opaque text that holds the reasoning."""
    return _SEALED + base64.b64encode(reasoning.encode()).decode("ascii")


def unseal(text: str) -> str | None:
    """The reasoning in a text of `seal`; None for any other text, such as another server's."""
    if not text.startswith(_SEALED):
        return None
    try:
        return base64.b64decode(text[len(_SEALED) :], validate=True).decode()
    except (binascii.Error, ValueError):
        return None


def sign(reasoning: str) -> str:
    """A short text that goes with reasoning which the client has in full; nothing here checks it."""
    return _SIGNED + blake2b(reasoning.encode(), digest_size=16).hexdigest()
