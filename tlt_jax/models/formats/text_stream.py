"""Text as it grows: what of a completion can be shown before all of it is there."""

import functools
import re
from collections.abc import Sequence

from tlt_jax.models.formats import tokenizer as model_tokenizer

# What stands for bytes that are no character, or not yet one.
_REPLACEMENT = "\ufffd"
# A token that is one byte, in vocabularies that fall back to bytes.
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class TextStream:
    """Turns tokens into text piece by piece.

    All pieces, put together, are what `Tokenizer.decode` makes of all tokens. A
    character's bytes may span tokens: what the next token may still change is held
    back.
    """

    def __init__(self, tokenizer: model_tokenizer.Tokenizer):
        """Begin a text of this tokenizer's."""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        # So many tokens end with no byte of a character that goes on.
        self._settled = 0
        self._shown = 0

    def feed(self, tokens: Sequence[int]) -> str:
        """Take further tokens; return the text that is settled by them."""
        for token in map(int, tokens):
            self._tokens.append(token)
            # A run of byte tokens is decoded as one: all of it is text, or nothing is.
            # Tokens that are not shown do not end it.
            if not self._goes_on(token):
                self._settled = len(self._tokens)
        text = self._tokenizer.decode(self._tokens[: self._settled])
        return self._piece(text.rstrip(_REPLACEMENT))

    def end(self) -> str:
        """Return what is left: there are no further tokens."""
        return self._piece(self._tokenizer.decode(self._tokens))

    def _goes_on(self, token: int) -> bool:
        name = self._tokenizer.backend.id_to_token(token)
        hidden = name is None or token in self._special
        return hidden or bool(_BYTE_TOKEN.fullmatch(name))

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    def _piece(self, text: str) -> str:
        piece = text[self._shown :]
        self._shown = max(self._shown, len(text))
        return piece
