"""What people's votes say of the people: do they agree with one another, with themselves, or with the left side?"""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np

from nanopref.data.votes import DECIDED, SAID, Vote, first_and_again, standing
from nanopref.evaluation import report
from nanopref.evaluation.metrics import wilson
from nanopref.evaluation.tournament import PRIOR
from nanopref.feedback.ballots import Pair
from nanopref.feedback.bradley_terry import davidson
from nanopref.running.files import write_atomic
from nanopref.running.flags import require
from nanopref.running.parallel import say


def coincidences(units: Sequence[Sequence[int]], kinds: int) -> np.ndarray:
    """How often value c meets value d in each unit [U, C, C]: every ordered pair of its m values counts 1/(m - 1)."""
    found = np.zeros((len(units), kinds, kinds))
    for u, values in enumerate(units):
        for c, d in permutations(values, 2):
            found[u, c, d] += 1 / (len(values) - 1)
    return found


def krippendorff_alpha(met: np.ndarray) -> np.ndarray:
    """Krippendorff's α of names (Content Analysis, 2004, section 11.3.4) from sums of coincidences [..., C, C]: 1 where
    all agree, 0 where it is as by chance, NaN where nobody could have differed."""
    count = met.sum(-1)
    n = count.sum(-1)
    differ, by_chance = n - np.trace(met, axis1=-2, axis2=-1), n**2 - (count**2).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(by_chance > 0, 1 - (n - 1) * differ / by_chance, np.nan)


def drawn_anew(n: int, draws: int = 2000, seed: int = 0) -> np.ndarray:
    """How often each of n pairs is drawn, when n of them are [draws, n]: votes on the same one are not independent."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws)


def interval(found: np.ndarray) -> tuple[float, float]:
    return tuple(np.nanpercentile(found, [2.5, 97.5]).tolist())


def share(said: Sequence[tuple[str, bool]]) -> dict[str, Any]:
    """Of how many votes, (pair, yes or no), what share is yes, with a 95% interval: Wilson's, or where a pair has
    several that of pairs drawn anew. No share of none."""
    by_pair = defaultdict(list)
    for id, yes in said:
        by_pair[id].append(yes)
    rate, n = (float(np.mean([yes for _, yes in said])), len(said)) if said else (None, 0)
    within = wilson(rate, n) if said else None
    if len(by_pair) < n:
        yes, of = (np.array([f(votes) for votes in by_pair.values()]) for f in (sum, len))
        counts = drawn_anew(len(by_pair))
        within = interval((counts @ yes) / (counts @ of))
    return {"share": rate, "of": n, "share_95": within}


def measure(votes: Sequence[Vote]) -> dict[str, Any]:
    """All but the ranking, of the lines of a file of votes."""
    first, again = first_and_again(standing(votes))
    said = [vote for vote in first if vote.winner in SAID]
    decided = [vote for vote in said if vote.winner in DECIDED]
    people, by_pair = defaultdict(list), defaultdict(list)

    def left(votes: Sequence[Vote]) -> dict[str, Any]:
        return share([(vote.id, vote.winner == vote.shown_left) for vote in votes if vote.winner in DECIDED])

    for vote in first:
        people[vote.annotator].append(vote)
    for vote in said:
        by_pair[vote.id].append(SAID.index(vote.winner))
    several = [values for values in by_pair.values() if len(values) > 1]
    found: dict[str, Any] = {
        "pairs": len(by_pair),
        "annotators": {
            name: {
                "votes": sum(vote.winner in SAID for vote in theirs),
                **{what: sum(vote.winner == what for vote in theirs) for what in ("tie", "bad", "skip")},
                "seconds": float(np.median([vote.seconds for vote in theirs])),
                "left": left(theirs)["share"],
            }
            for name, theirs in people.items()
        },
        "agreement": share([(id, c == d) for id, values in by_pair.items() for c, d in combinations(values, 2)]),
        "self_agreement": share([(a.id, a.winner == b.winner) for a, b in again if {a.winner, b.winner} <= {*SAID}]),
        "left": left(said),
        "longer": share([(vote.id, _longer(vote) == vote.winner) for vote in decided if len(vote.a) != len(vote.b)]),
    }
    if several:
        met = coincidences(several, len(SAID))
        alpha, draws = krippendorff_alpha(met.sum(0)), np.tensordot(drawn_anew(len(met)), met, 1)
        known = not np.isnan(alpha)
        found["alpha"] = {"alpha": float(alpha), "alpha_95": interval(krippendorff_alpha(draws))} if known else None
    return found


def _longer(vote: Vote) -> str:
    return "a" if len(vote.a) > len(vote.b) else "b"


def ranking(pairs: Sequence[Pair], votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """The models that wrote the answers, the best first, by Davidson's model; nothing where only one did. A pair that
    is as good or as bad on both sides is a tie. Raises ValueError where the votes do not tell."""
    wrote = {pair.id: pair.models for pair in pairs if pair.models}
    names = sorted({name for models in wrote.values() for name in models})
    outcomes: dict[str, list[tuple[int, int]]] = {"won": [], "tied": []}
    games: Counter[str] = Counter()
    for vote in first_and_again(standing(votes))[0]:
        if vote.winner in SAID and vote.id in wrote:
            a, b = (names.index(name) for name in wrote[vote.id])
            games.update(wrote[vote.id])
            won = vote.winner in DECIDED
            outcomes["won" if won else "tied"].append((b, a) if vote.winner == "b" else (a, b))
    if not games:
        return []
    winners, losers = np.array(outcomes["won"], dtype=int).reshape(-1, 2).T
    rewards, errors, _ = davidson(winners, losers, outcomes["tied"], len(names), regulariser=PRIOR)
    rows = [
        {"model": name, "votes": games[name], "reward": float(r), "standard_error": float(e)}
        for name, r, e in zip(names, rewards, errors, strict=True)
    ]
    return sorted(rows, key=lambda row: -row["reward"])


def conclude(folder: Path, pairs: Sequence[Pair], votes: Sequence[Vote]) -> None:
    """Print what the votes in a folder say, and write it to its report.json. Raises UserError where there are none."""
    require(bool(standing(votes)), f"--report {folder}: no vote is there; python -m nanopref.people asks for some")
    found = measure(votes)
    rows = [
        (
            name if name.isprintable() else ascii(name),
            *(str(row[what]) for what in ("votes", "tie", "bad", "skip")),
            f"{row['seconds']:.1f}",
            "–" if row["left"] is None else f"{row['left']:.0%}",
        )
        for name, row in found["annotators"].items()
    ]
    say(report.table(rows, ("who", "votes", "ties", "both bad", "skipped", "seconds a vote", "for the left")))
    shares = {
        "people agree with one another": "agreement", "people agree with themselves, sides swapped": "self_agreement",
        "the left one is better": "left", "the longer one is better": "longer",
    }  # fmt: skip
    rows = []
    for words, name in shares.items():
        rate, of, within = found[name].values()
        known = (f"{rate:.1%}", f"{within[0]:.1%} to {within[1]:.1%}") if of else ("unknown", "")
        rows.append((words, *known, f"{of}"))
    if alpha := found.get("alpha"):
        low, high = alpha["alpha_95"]
        rows.insert(1, ("  Krippendorff's α", f"{alpha['alpha']:.2f}", f"{low:.2f} to {high:.2f}", ""))
    say("\n" + report.table(rows, (f"of {found['pairs']} pairs", "", "95%", "out of")))
    if "alpha" not in found:
        say(
            "\nnobody shares a pair with anybody, so how far people agree is not known: --votes 2 asks two of each pair"
        )
    try:
        if ranked := ranking(pairs, votes):
            found["ranking"] = ranked
            rows = [
                (row["model"], str(row["votes"]), f"{row['reward']:+.2f}", f"± {1.96 * row['standard_error']:.2f}")
                for row in ranked
            ]
            say("\n" + report.table(rows, ("model", "votes", "log-odds", "95%")))
    except ValueError as error:
        say(f"\nno ranking: {error}")
    write_atomic(folder / "report.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    say(f"\nthis is also in {folder / 'report.json'}")
