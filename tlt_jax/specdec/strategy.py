"""Speculation strategies: how deep and wide to draft, and how much to verify."""

import dataclasses
from collections.abc import Sequence

PROPOSERS = ("drafter", "ngram", "both")
# Programs beyond these would not be compiled in a day.
_MOST = {"draft_depth": 256, "topk": 1024, "tokens_to_verify": 4096}
_MOST_BUDGET = 1 << 16


@dataclasses.dataclass(frozen=True, order=True)
class Strategy:
    """The static shape of a speculative step; one compiled program per batch bucket.

    Drafting expands `topk` children of each of `topk` live branches, `draft_depth`
    levels deep; the best `tokens_to_verify - 1` of those nodes and the root, the row's
    pending token, are verified in one target pass. With `topk` 1 the tree is a chain.
    Under a budget the nodes of all rows together are limited, too: the best of the
    whole batch are verified.

    Reference: Li et al., EAGLE-2, 2024, section 4; the system's paper, section 5.

    Attributes:
      draft_depth: levels below the root, at least 1.
      topk: children of each live branch, and live branches of each level.
      tokens_to_verify: nodes of a row's tree that are verified at most, root included.
      proposer: `drafter` (learned), `ngram` (suffix matches), `both` in one tree, or
        `package.module:Name`, a class of one's own (`protocols.Proposer`).
      budget: nodes of all rows that are verified; 0: `tokens_to_verify` for each row.
    """

    draft_depth: int
    topk: int
    tokens_to_verify: int
    proposer: str = "drafter"
    budget: int = 0

    def __post_init__(self):
        for name, most in _MOST.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(
                    f"{name}={getattr(self, name)}: at least 1, at most {most}."
                )
        if not 0 <= self.budget <= _MOST_BUDGET:
            raise ValueError(
                f"budget={self.budget}: nodes of all rows, at most {_MOST_BUDGET}; 0: "
                "tokens_to_verify for each row."
            )
        if self.proposer not in PROPOSERS and not self.is_external:
            raise ValueError(
                f"proposer={self.proposer!r}: use one of {', '.join(PROPOSERS)}, or "
                "package.module:Name."
            )
        most = 1 + self.num_candidates
        if self.tokens_to_verify > most:
            raise ValueError(
                f"tokens_to_verify={self.tokens_to_verify} exceeds the tree's {most} "
                f"nodes (draft_depth={self.draft_depth}, topk={self.topk}): lower it "
                "or draft deeper."
            )
        if self.tokens_to_verify <= self.draft_depth:
            raise ValueError(
                f"tokens_to_verify={self.tokens_to_verify} cannot hold a path of "
                f"draft_depth={self.draft_depth} below the root: verify at least "
                f"{self.draft_depth + 1} or draft less deep."
            )

    @property
    def max_accept_length(self) -> int:
        """Tokens that one step yields at most (A): the deepest path and the bonus."""
        return self.draft_depth + 1

    def num_columns(self, num_rows: int) -> int:
        """Return the nodes that one step verifies at most: one a row at the least."""
        most = num_rows * self.tokens_to_verify
        return min(max(self.budget, num_rows), most) if self.budget else most

    def shares(self, num_rows: int) -> bool:
        """Say whether rows have to share: there is not room for all of all trees."""
        return self.num_columns(num_rows) < num_rows * self.tokens_to_verify

    def of_batch(self, num_rows: int) -> "Strategy":
        """Return itself without a budget where the batch is too small for one."""
        if self.shares(num_rows):
            return self
        return dataclasses.replace(self, budget=0)

    @property
    def num_drafted(self) -> int:
        """Nodes that the learned drafter proposes."""
        return self.topk + (self.draft_depth - 1) * self.topk**2

    @property
    def num_candidates(self) -> int:
        """Nodes among which the best are chosen: drafted ones, and `topk` matches."""
        drafted = self.num_drafted if self.drafts or self.is_external else 0
        return drafted + (self.topk * self.draft_depth if self.matches else 0)

    @property
    def drafts(self) -> bool:
        """Whether the learned drafter is asked."""
        return self.proposer in ("drafter", "both")

    @property
    def matches(self) -> bool:
        """Whether texts are searched for suffixes."""
        return self.proposer in ("ngram", "both")

    @property
    def is_external(self) -> bool:
        """Whether a class of one's own is asked."""
        return ":" in self.proposer

    def __str__(self) -> str:
        shape = f"D{self.draft_depth}K{self.topk}V{self.tokens_to_verify}"
        shape += f"N{self.budget}" if self.budget else ""
        return shape if self.proposer == "drafter" else f"{shape}-{self.proposer}"


def parse(text: str) -> Strategy:
    """Read a strategy as `str` writes it: `D6K2V12`, `D6K2V12N64` or `D4K2V8-ngram`.

    Raises:
      ValueError: the text is not of that form, or the strategy cannot be built.
    """
    shape, _, proposer = text.partition("-")
    try:
        depth, rest = shape.removeprefix("D").split("K")
        topk, rest = rest.split("V")
        verify, has_budget, budget = rest.partition("N")
        numbers = int(depth), int(topk), int(verify)
        budget = int(budget) if has_budget else 0
        if has_budget and budget < 1:
            raise ValueError("a budget that is named is one")
    except ValueError:
        raise ValueError(
            f"strategy {text!r} is not of the form D<draft_depth>K<topk>"
            "V<tokens_to_verify>, N<budget> behind it where all rows share, -ngram or "
            "-both where suffix matches are wanted, or -package.module:Name of a "
            "proposer of one's own; for example D6K2V12 or D6K2V12N64."
        ) from None
    return Strategy(*numbers, proposer or "drafter", budget)


@dataclasses.dataclass(frozen=True)
class Arms:
    """Candidate strategies for each number of rows; none beyond the last entry.

    With one candidate an entry they are the paper's table: speculation starts when the
    active batch has fallen to a threshold, and verifies the more the fewer rows there
    are.

    Reference: the system's paper, section 5.

    Attributes:
      entries: (largest number of rows, strategies), rising.
    """

    entries: tuple[tuple[int, tuple[Strategy, ...]], ...]

    def __post_init__(self):
        limits = [limit for limit, _ in self.entries]
        if limits != sorted(set(limits)) or any(limit < 1 for limit in limits):
            raise ValueError(
                f"strategies are given for at most {limits} rows: name each number of "
                "rows once, the smallest first, at least 1."
            )
        for limit, strategies in self.entries:
            if not strategies or len(set(strategies)) < len(strategies):
                names = ",".join(map(str, strategies))
                raise ValueError(
                    f"entry {limit}:{names} names a strategy twice, or none: name each "
                    "candidate once."
                )
            for strategy in strategies:
                if 0 < strategy.budget <= limit:
                    raise ValueError(
                        f"entry {limit}:{strategy} has {strategy.budget} nodes for up "
                        f"to {limit} rows, which is no more than one each: nothing "
                        "that is drafted could be verified. Give more, or fewer rows."
                    )

    def entry_of(self, num_rows: int) -> int | None:
        """Return the index of the entry for `num_rows` rows; None beyond the last."""
        fits = (i for i, (limit, _) in enumerate(self.entries) if num_rows <= limit)
        return next(fits, None)

    def of(self, num_rows: int) -> tuple[Strategy, ...]:
        """List the candidates for `num_rows` rows."""
        index = self.entry_of(num_rows)
        return () if index is None else self.entries[index][1]

    def strategies(self) -> tuple[Strategy, ...]:
        """List all strategies, each once."""
        named = (s for _, strategies in self.entries for s in strategies)
        return tuple(dict.fromkeys(named))

    def cut(self, depth: int) -> "Arms":
        """Return chains, one for each number of rows, no deeper than `depth`."""

        def cut(strategy: Strategy) -> Strategy:
            assert strategy.topk == 1, strategy
            least = min(strategy.draft_depth, depth)
            return dataclasses.replace(
                strategy,
                draft_depth=least,
                tokens_to_verify=min(strategy.tokens_to_verify, least + 1),
            )

        entries = ((limit, tuple(map(cut, named))) for limit, named in self.entries)
        return Arms(tuple(entries))

    def check_single(self) -> None:
        """Refuse entries with several candidates, where nothing chooses.

        Raises:
          ValueError: an entry has several.
        """
        for limit, strategies in self.entries:
            if len(strategies) > 1:
                names = ",".join(map(str, strategies))
                raise ValueError(
                    f"entry {limit}:{names} has {len(strategies)} candidates, and "
                    "nothing chooses between them: name one, or use a tuner that does."
                )

    def first(self, num_rows: int) -> Strategy | None:
        """Return the first candidate, or None: decode plainly."""
        return next(iter(self.of(num_rows)), None)


def parse_arms(entries: Sequence[str]) -> Arms:
    """Read arms such as `("1:D7K1V8,D3K1V4", "4:D3K1V4")`, rows and candidates.

    Raises:
      ValueError: an entry is not of that form, or cannot be built.
    """
    parsed = []
    for entry in entries:
        rows, _, text = entry.partition(":")
        if not rows.isdigit() or not text:
            raise ValueError(
                f"entry {entry!r} is not <largest number of rows>:<strategy>,"
                "<strategy>,...; for example 4:D6K2V12 or 4:D6K2V12,D3K1V4."
            )
        strategies = tuple(parse(name.strip()) for name in text.split(","))
        parsed.append((int(rows), strategies))
    return Arms(tuple(parsed))
