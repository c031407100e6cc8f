"""The scoreboard on as many pictures as one likes: every classifier on the same prefix, and what may be said of the first two."""

import html
from dataclasses import dataclass

from diffclass.evaluation import scoreboard
from diffclass.evaluation.scoreboard import Comparison, Number

ALL = "all classifiers"
SERIES = ("clean", "honest", "honest, worst of 10")
STEP = 8  # pictures


@dataclass(frozen=True)
class Board:
    """One state: for each of `SERIES` the rows, label and number, in the same order, the best first; and what to say of them."""

    series: dict[str, list[tuple[str, Number]]]
    note: str


class ScoreboardScene:
    """Records of one world at its L-inf budget, by the honest protocol.

    most        pictures that the classifier with most of them was asked about
    groups      what to show -> names
    """

    def __init__(self, world: str = "digits"):
        self.found = {title: scoreboard.outcomes(world, title) for title in SERIES[:2]}
        honest = self.found["honest"]
        self.titles = {row.name: row.title for row in scoreboard.standings(world)}
        self.most = max(len(outcome.hits) for outcome in honest.values())
        self._known: dict[tuple[str, str, int], Number] = {}
        silent = tuple(name for name, outcome in honest.items() if outcome.draws == 1)
        self.groups = {
            ALL: tuple(honest),
            "answers without noise": silent,
            "answers with noise": tuple(name for name in honest if name not in silent),
        }

    def at(self, n: int, group: str = ALL, by: str = "honest") -> Board:
        """At most n pictures, some classifiers, sorted by one of `SERIES`.

        Meaning     a classifier that was asked about fewer is shown on all that it has, and its label says how many
        """
        names = self.groups[group]
        ranked = sorted(names, key=lambda name: -self._number(by, name, n).value)
        series = {
            title: [(self._label(name, n), self._number(title, name, n)) for name in ranked]
            for title in SERIES
        }
        return Board(series, self._note(ranked, n, by))

    def _number(self, title: str, name: str, n: int) -> Number:
        column, _, worst = title.partition(", ")
        outcome = self.found[column][name]
        key = (title, name, min(n, len(outcome.hits)))
        if key not in self._known:
            self._known[key] = outcome.number(key[2], worst=bool(worst))
        return self._known[key]

    def _label(self, name: str, n: int) -> str:
        own = len(self.found["honest"][name].hits)
        return self.titles[name] if own >= n else f"{self.titles[name]} (only {own})"

    def _note(self, ranked: list[str], n: int, by: str) -> str:
        """The first two rows on the pictures that both have, as HTML."""
        if len(ranked) < 2:
            return ""
        column, _, worst = by.partition(", ")
        both = [self.found[column][name].first(n) for name in ranked[:2]]
        return _verdict(scoreboard.compare(*both, worst=bool(worst)), self.titles, by)


def _verdict(pair: Comparison, titles: dict[str, str], by: str) -> str:
    ends = f"{100 * pair.difference:+.1f} [{100 * pair.low:+.1f}, {100 * pair.high:+.1f}] points"
    verdict = "a real difference" if pair.real else "no difference that so few pictures can show"
    first, second = (html.escape(titles[name]) for name in (pair.first, pair.second))
    unequal = f" Unequal: {html.escape(pair.remark)}." if pair.remark else ""
    return (
        f"{by}, the first two rows on the {pair.n} pictures that both have: <b>{first}</b> less <b>{second}</b>, {ends}: "
        f"{verdict}.{unequal}"
    )
