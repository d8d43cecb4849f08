"""Objectives on rewards [G, K]: what a policy and a reward model are fitted with.

A reward model says r(x, y) itself; a policy says it through r(x, y) = β log π_θ(y|x)/π_ref(y|x) (Rafailov et al. 2023,
eq. 5). So a loss takes `values`, what the model says of each answer (a score, or log π_θ), and `baseline`, what is
taken off (log π_ref; a margin that is asked for; KTO's reference point), and the rewards are β (values - baseline).
G groups, K answers each, the best first; a group that has fewer is 0 where `there` is 0. `said` is the number that
was said of each answer, see `Group.said`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.reference import MARGIN_LOSSES, SMOOTHED
from nanopref.data.groups import Group
from nanopref.running import functions, parallel
from nanopref.running.flags import UserError, is_code, require


class Knobs(NamedTuple):
    """What the losses can be set to; the flags of the same names say what each does."""

    beta: float = 1.0
    label_smoothing: float = 0.0
    rating_temperature: float = 1.0
    good_weight: float = 1.0
    bad_weight: float = 1.0


# ---- losses: (values, baseline, there, said), all [G, K], and knobs -> [G] -------------------------------------------


def margin_losses(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs, *, loss: str) -> Tensor:
    """A function of the margin of pairs, K = 2; see `kernels.reference.MARGIN_LOSSES`.

    On scores, `sigmoid` is Bradley-Terry: -log σ(r_w - r_l - m), Ouyang et al. 2022, eq. 1; Touvron et al. 2023, eq. 2.
    """
    pairs = *values.unbind(1), *baseline.unbind(1)
    return kernels.dpo_loss(*pairs, beta=knobs.beta, label_smoothing=knobs.label_smoothing, loss=loss)[0]


def own_margin_losses(
    values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs, *, function: Callable[..., Tensor]
) -> Tensor:
    """The same of a function of the user's own, f(h, β) or f(h, β, label_smoothing), h being the margin [G] without β,
    as of a row of `kernels.reference.MARGIN_LOSSES`."""
    chosen, rejected = (values - baseline).unbind(1)
    smoothing = (knobs.label_smoothing,) if "label_smoothing" in functions.parameters(function) else ()
    return function(chosen - rejected, knobs.beta, *smoothing)


def plackett_luce(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """-Σ_k log [e^{r_k} / Σ_{j≥k} e^{r_j}]: the best is chosen of all, the next of the rest … (Rafailov et al. 2023,
    appendix A.3). K = 2 is Bradley-Terry, K = 1 says nothing."""
    rewards = _rewards(values, baseline, there, knobs)
    rest = rewards.flip(1).logcumsumexp(1).flip(1)
    return torch.where(there, rest - rewards, 0.0).sum(1)


def infonca(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """-Σ_k p_k log softmax(r)_k with p = softmax(ratings/α) (Chen et al. 2024). A pair, p = (1, 0), is DPO's."""
    rewards = _rewards(values, baseline, there, knobs)
    return -(_targets(said, there, knobs) * rewards.log_softmax(1)).sum(1)


def nca(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """-Σ_k [p_k log σ(r_k) + 1/K log σ(-r_k)], p as above: here rewards do not fall together (Chen et al. 2024)."""
    rewards = knobs.beta * (values - baseline)
    share = there.to(rewards.dtype) / there.sum(1, keepdim=True)
    return -(_targets(said, there, knobs) * F.logsigmoid(rewards) + share * F.logsigmoid(-rewards)).sum(1)


def kto(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """λ_y - v, where v is λ_D σ(r) for a good and λ_U σ(-r) for a bad answer (Ethayarajh et al. 2024, section 4.1). r
    is counted from the reference point z₀, which stands in the baseline."""
    gain, weight = _gain(values, baseline, said, knobs)
    return weight * F.sigmoid(-gain)


def binary(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """-log σ(r) for a good and -log σ(-r) for a bad answer: cross-entropy, σ(r) being the chance that it is good."""
    gain, weight = _gain(values, baseline, said, knobs)
    return -weight * F.logsigmoid(gain)


def regression(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """(r - rating)², a mean over the answers of a group."""
    rewards = knobs.beta * (values - baseline)
    return torch.where(there, (rewards - said) ** 2, 0.0).sum(1) / there.sum(1)


def nothing(values: Tensor, baseline: Tensor, there: Tensor, said: Tensor, knobs: Knobs) -> Tensor:
    """0: where the likelihood term is all there is."""
    return values.new_zeros(len(values))


def _rewards(values: Tensor, baseline: Tensor, there: Tensor, knobs: Knobs) -> Tensor:
    # where no answer is, e to the power of it is 0, without the NaN that -∞ has for a slope
    return (knobs.beta * (values - baseline)).masked_fill(~there, -1e30)


def _targets(said: Tensor, there: Tensor, knobs: Knobs) -> Tensor:
    return (said / knobs.rating_temperature).masked_fill(~there, -torch.inf).softmax(1)


def _gain(values: Tensor, baseline: Tensor, said: Tensor, knobs: Knobs) -> tuple[Tensor, Tensor]:
    """Of labels, K = 1: the reward, turned round for a bad answer [G], and the weight of each [G]."""
    good = said[:, 0] > 0.5
    rewards = knobs.beta * (values - baseline)[:, 0]
    weight = torch.where(good, rewards.new_tensor(knobs.good_weight), rewards.new_tensor(knobs.bad_weight))
    return torch.where(good, rewards, -rewards), weight


# ---- tables ----------------------------------------------------------------------------------------------------------


REWARD = ("beta", "logprobs", "reference")  # flags that say what an implicit reward is
COMPARED = (*REWARD, "likelihood")  # those of losses that know a better answer
LABELLED = (*REWARD, "good_weight", "bad_weight")


class Loss(NamedTuple):
    """What can be descended; the kinds of feedback that it learns from, the most natural first; the flags it obeys."""

    losses: Callable[..., Tensor]
    kinds: tuple[str, ...]
    flags: tuple[str, ...]
    reference_point: bool = False  # whether rewards are counted from KTO's z₀


def _of_margin(name: str) -> Loss:
    smoothing = ("label_smoothing",) if name in SMOOTHED else ()
    return Loss(partial(margin_losses, loss=name), ("pairs",), (*COMPARED, "margin", *smoothing))


LOSSES = {name: _of_margin(name) for name in MARGIN_LOSSES} | {
    "plackett-luce": Loss(plackett_luce, ("rankings", "pairs"), COMPARED),
    "infonca": Loss(infonca, ("ratings", "pairs"), (*COMPARED, "rating_temperature")),
    "nca": Loss(nca, ("ratings", "pairs"), (*COMPARED, "rating_temperature")),
    "regression": Loss(regression, ("ratings",), COMPARED),
    "kto": Loss(kto, ("labels", "pairs"), LABELLED, reference_point=True),
    "binary": Loss(binary, ("labels", "pairs"), LABELLED),
    "nothing": Loss(nothing, ("pairs", "rankings", "ratings", "responses"), ("likelihood",)),
}

LOGPROBS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # log π(y|x) [B] and the tokens of y [B] -> values [B]
    "sum": lambda logprobs, tokens: logprobs,
    "mean": lambda logprobs, tokens: logprobs / tokens,
    # log p/(1-p), p the geometric mean over tokens (Hong et al. 2024, eq. 4); an answer that is certain stays finite
    "log-odds": lambda logprobs, tokens: (m := (logprobs / tokens).clamp(max=-1e-6)) - torch.log(-torch.expm1(m)),
}


class Objective(NamedTuple):
    """A loss, by its row in LOSSES, and the defaults of the flags that make of it what its authors published.

    `formula` is for readers: h is the margin of the rewards of a pair, r an answer's, with the β that belongs to them.
    """

    formula: str
    loss: str
    logprobs: str = "sum"
    reference: str = "model"
    beta: float = 0.1
    task_beta: float = 0.5  # on the built-in task, whose responses are short
    margin: float = 0.0
    likelihood: float = 0.0
    label_smoothing: float = 0.0


OBJECTIVES = {
    "dpo": Objective("-log σ(h); Rafailov et al. 2023", "sigmoid"),
    "cdpo": Objective("-(1-ε) log σ(h) - ε log σ(-h); Mitchell 2023", "sigmoid", label_smoothing=0.1),
    "sigmoid": Objective("dpo, by the name of its function", "sigmoid"),
    "robust": Objective("the same of ε' = -ε/(1-2ε); Chowdhury et al. 2024", "robust", label_smoothing=0.1),
    "ipo": Objective("(h/β - 1/2β)²; Azar et al. 2023", "ipo", task_beta=0.1),
    "ipo-mean": Objective("the same, log-ratios a mean over tokens", "ipo", "mean", task_beta=1.0),
    "hinge": Objective("max(0, 1 - h); Zhao et al. 2023", "hinge"),
    "slic": Objective(
        "hinge without reference, and likelihood; Zhao et al. 2023",
        "hinge",
        reference="none",
        beta=1.0,
        task_beta=1.0,
        likelihood=1.0,
    ),
    "squared-hinge": Objective("max(0, 1 - h)²; Tang et al. 2024", "squared-hinge"),
    "exponential": Objective("e^-h; Tang et al. 2024", "exponential"),
    "discopop": Objective("dpo's and e^-h, blended by σ(h/τ); Lu et al. 2024", "discopop"),
    "simpo": Objective(
        "-log σ(h - γ), mean over tokens, no reference; Meng et al. 2024",
        "sigmoid",
        "mean",
        "none",
        beta=2.0,
        task_beta=2.0,
        margin=1.0,
    ),
    "cpo": Objective(
        "dpo without reference, and likelihood; Xu et al. 2024", "sigmoid", reference="none", likelihood=1.0
    ),
    "orpo": Objective(  # its eq. 6 divided by its λ = 0.1
        "-log σ(h), log-odds, no reference, and likelihood; Hong et al. 2024",
        "sigmoid",
        "log-odds",
        "none",
        beta=1.0,
        task_beta=1.0,
        likelihood=10.0,
    ),
    "rpo": Objective("dpo, and likelihood; Pang et al. 2024", "sigmoid", likelihood=1.0),
    "preferred": Objective("likelihood of y_w alone", "nothing", reference="none", likelihood=1.0),
    "unlikelihood": Objective("-h without reference, and likelihood", "linear", reference="none", likelihood=1.0),
    "plackett-luce": Objective("-Σ log softmax of r over what is left; Rafailov et al. 2023, A.3", "plackett-luce"),
    "infonca": Objective("cross-entropy of softmax(r) to softmax(ratings/α); Chen et al. 2024", "infonca"),
    "nca": Objective("the same by one σ an answer; Chen et al. 2024", "nca"),
    "kto": Objective("λ σ(z₀ - r) if good, λ σ(r - z₀) if bad; Ethayarajh et al. 2024", "kto"),
    "binary": Objective("-log σ(r) if good, -log σ(-r) if bad", "binary"),
    "regression": Objective("(r - rating)²", "regression"),
}
SCORES = {name: OBJECTIVES[name] for name in ("plackett-luce", "regression", "binary", "infonca", "nca")}
SCORES = {"bradley-terry": OBJECTIVES["dpo"]} | SCORES  # of reward models
ANSWERS = {"pairs": 2, "labels": 2, "rankings": 4, "ratings": 4}  # answers to a prompt, where they are sampled
# the same for each --select but all, with the kind of feedback that comes of it
SELECTED = {"best-worst": ("pairs", 4), "doubt": ("pairs", 4), "rso": ("pairs", 8), "best": ("responses", 16)}


def named(name: str) -> Objective:
    """What --loss names: a row of OBJECTIVES, or one like DPO's, whose loss is the user's own FILE.py:FUNCTION."""
    return Objective("a function of h and β of your own", name) if is_code(name) else OBJECTIVES[name]


def loss_of(objective: Objective) -> Loss:
    """What it descends."""
    return _own(objective.loss) if is_code(objective.loss) else LOSSES[objective.loss]


@cache  # a run goes on with the function that it began with, whatever becomes of the file
def _own(name: str) -> Loss:
    function = functions.load("--loss", name)
    smoothing = {"label_smoothing"} & functions.parameters(function)
    return Loss(partial(own_margin_losses, function=function), ("pairs",), (*COMPARED, "margin", *smoothing))


def kinds(objectives: dict[str, Objective]) -> dict[str, tuple[str, ...]]:
    """The kinds of feedback that each learns from."""
    return {name: loss_of(objective).kinds for name, objective in objectives.items()}


def resolve(config: Any, objective: Objective) -> Any:
    """The config with each flag that was not given as the objective has it, and the kind of feedback that it takes.

    Raises UserError for flags that the objective has no use for, and for a function of the user's own that is no loss.
    """
    loss, row = loss_of(objective), objective._asdict()
    for name in dict.fromkeys(name for other in LOSSES.values() for name in other.flags):
        fits = not getattr(config, name, None) or name in loss.flags
        require(fits, f"--loss {config.loss} has no use for --{name.replace('_', '-')}")
    require(not config.judged or not config.data, "--judged belongs to the built-in task: give it or --data")
    read = config.judged or (config.data and not getattr(config, "reward", ""))
    selects = config.select != "all"
    given = config.feedback or config.answers or selects or config.voters
    hint = "--feedback, --answers, --select, --voters are for answers that are sampled, and here a file is read"
    require(not read or not given, hint)
    require(not config.judged or config.votes == "majority", "--judged holds what was made of votes: leave --votes out")
    require(not config.judged or not getattr(config, "reward", ""), "people have --judged already: leave --reward out")
    kind, answers = SELECTED.get(config.select, (loss.kinds[0], None))
    row |= {"beta": objective.beta if config.data else objective.task_beta, "feedback": kind}
    row |= {"answers": answers or ANSWERS[config.feedback or kind], "rating_temperature": 1.0}
    names = row.keys() - {"loss", "formula"}
    config = replace(config, **{name: row[name] for name in names if getattr(config, name, 0) is None})
    learns = f"--loss {config.loss} learns from {' or '.join(loss.kinds)}"
    made = f"--select {config.select} makes {kind}" if selects else f"--feedback {config.feedback}"
    require(config.feedback in loss.kinds and (not selects or config.feedback == kind), f"{made}: {learns}")
    fits = config.answers > 1 or config.feedback == "labels"
    require(fits, f"--answers {config.answers} make no {config.feedback}")
    require(selects or not config.chooser, "--chooser: it is --select that goes by its numbers")
    if is_code(objective.loss):
        _probe(loss, config)
    return config


def _probe(loss: Loss, config: Any) -> None:
    """Raise UserError unless a function of the user's own gives each pair a finite loss with a finite slope, by its
    margin alone: else losses would depend on micro-batches."""
    name, h = f"--loss {config.loss}", torch.linspace(-10, 10, 21, requires_grad=True)  # nats; 0 is where a run begins

    def losses_of(h: Tensor) -> Tensor:
        values = torch.stack([h, torch.zeros_like(h)], 1)
        losses = loss.losses(values, torch.zeros_like(values), None, None, knobs(config, ()))
        shape = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        require(shape == [len(h)], f"{name}: gives {shape} for {len(h)} margins, where it must give a loss each")
        return losses

    try:
        losses = losses_of(h)
        (slopes,) = torch.autograd.grad(losses.sum(), h, allow_unused=True) if losses.requires_grad else (None,)
        alone = losses_of(h[:1])
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the code is not ours
        raise UserError(f"{name}: {functions.in_a_line(error)}; it was asked for margins from -10 to 10") from None
    require(slopes is not None and bool(slopes.any()), f"{name}: its losses have no gradient in the margins")
    for what, found in (("loss", losses), ("slope", slopes)):
        bad = (~found.isfinite()).nonzero().flatten().tolist()
        at = f"gives a {what} of {found[bad[0]]:g} at a margin of {h[bad[0]]:g}" if bad else ""
        require(not bad, f"{name}: {at}, where it must be a finite number")
    same = torch.allclose(alone, losses[:1], rtol=1e-4, atol=1e-6)
    require(same, f"{name}: the loss of a pair must follow from its own margin, and not from other pairs or chance")


def knobs(config: Any, groups: Sequence[Group]) -> Knobs:
    """The settings of a run. Where the weights of labels are not given, the rarer of good and bad weighs as much in all
    as the other (Ethayarajh et al. 2024, section 4.2)."""
    good = sum(group.scores == (1.0,) for group in groups)
    bad = sum(group.scores == (0.0,) for group in groups)
    given = {name: getattr(config, name) for name in Knobs._fields if getattr(config, name, None) is not None}
    balanced = {"good_weight": max(1.0, bad / (good or bad or 1)), "bad_weight": max(1.0, good / (bad or good or 1))}
    return Knobs(**balanced | given)


# ---- figures ---------------------------------------------------------------------------------------------------------


def is_right(gap):
    """1 where the better of two is ahead, 1/2 at a tie: a tensor or an array of differences -> one like it."""
    return (gap > 0) * 1.0 + (gap == 0) * 0.5


def ranked_right(rewards: Tensor, there: Tensor, said: Tensor) -> Tensor:
    """[G, K] -> [G]: the share of a group's pairs of answers, of which more was said of one, in the right order; a tie
    counts half."""
    better = (said[:, :, None] > said[:, None, :]) & there[:, :, None] & there[:, None, :]
    right = is_right(rewards[:, :, None] - rewards[:, None, :])
    share = (right * better).sum((1, 2)) / better.sum((1, 2)).clamp(min=1)
    return torch.where(better.any(2).any(1), share, 0.5)


@torch.no_grad()
def figures(losses: Tensor, rewards: Tensor, there: Tensor, said: Tensor) -> Tensor:
    """Sums over groups [7]: loss, how much is right, the rewards of the best and of the worst answers, how many of
    these there are, and how many groups say what is right. Of labels the good are best, the bad worst, and right is a
    reward above 0 or below; an answer to be imitated is best, and has nothing to be right about."""
    alone, good = there.sum(1) == 1, said[:, 0] > 0.5
    judged = ~alone | (said[:, 0] <= 1)
    right = is_right(torch.where(good, rewards[:, 0], -rewards[:, 0])).where(alone, ranked_right(rewards, there, said))
    best, worst = ~alone | good, ~alone | ~good
    last = rewards.gather(1, there.sum(1, keepdim=True) - 1)[:, 0]
    found = losses, right * judged, rewards[:, 0] * best, last * worst, best, worst, judged
    return torch.stack([x.sum() for x in found])


def averages(sums: Tensor, groups: int) -> dict[str, float]:
    """Of a batch of so many groups, from the `figures` of all its pieces and processes: loss, accuracy, the rewards of
    the chosen and of the rejected answers, and their margin; without those of which the batch holds none."""
    loss, right, best, worst, n_best, n_worst, judged = parallel.sum_processes(sums).tolist()
    found = {"loss": loss / groups} | ({"accuracy": right / judged} if judged else {})
    found |= {"chosen_reward": best / n_best} if n_best else {}
    found |= {"rejected_reward": worst / n_worst} if n_worst else {}
    return found | ({"margin": best / n_best - worst / n_worst} if n_best and n_worst else {})
