"""Notices a policy whose responses do not end."""

from __future__ import annotations

from dataclasses import dataclass

ADVICE = (
    "check that the supervised stage's responses end within max_response_tokens, so that EOS is "
    "learnt (longer ones are cut without it), and that the chat template ends a turn with the "
    "tokenizer's EOS; or raise chat.max_response_tokens in the supervised stage"
)


@dataclass
class TruncationWatch:
    """Speaks when a whole rollout was cut off, and again when nearly every one keeps being.

    Attributes:
        patience: rollouts in a row with a share of at least `nearly_all`.
    """

    patience: int = 20
    nearly_all: float = 0.95
    said: bool = False
    in_a_row: int = 0

    def notice(self, share: float, limit: int) -> str | None:
        """One line after a rollout of which `share` was cut at `limit` tokens, or nothing."""
        self.in_a_row = self.in_a_row + 1 if share >= self.nearly_all else 0
        if self.in_a_row == self.patience:
            self.said = True
            return (
                f"for {self.patience} updates at least {self.nearly_all:.0%} of the responses "
                f"have been cut at {limit} tokens, without EOS: {ADVICE}"
            )
        if share == 1 and not self.said:
            self.said = True
            return f"no response of this rollout ended within {limit} tokens: {ADVICE}"
        return None
