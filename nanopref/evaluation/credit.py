"""Credit: how much of what a response is worth is due to each of its tokens.

A policy that is trained with a price β on its KL is a token-level Q-function (Rafailov et al. 2024, "From r to Q*",
section 4): where it is the best there is, with V* as what may still be earned less the price of it,

    β log π*(y_t|x, y_<t)/π_ref(y_t|x, y_<t) = r_t + V*(x, y_<=t) - V*(x, y_<t)

Summed over a response that is its implicit reward. PPO's critic, which learns V of its policy, is the right side by
another road, and GAE's advantage is what the policy would learn from next, before it is whitened.
"""

import codecs
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

from torch import Tensor

from nanopref import models
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import report
from nanopref.feedback import rewards
from nanopref.feedback.rewards import Rewards
from nanopref.learning import advantages as estimate
from nanopref.models.inference import token_logprobs, token_scores
from nanopref.models.language import LM
from nanopref.models.sampling import Answer, pack
from nanopref.running import terminal

TITLES = {
    "log-ratio": "β log π_θ/π_ref",
    "value": "change of the critic's value",  # and at the last token the score, less what was expected
    "advantage": "GAE's advantage",
}
Credit = Callable[[Sequence[Answer]], dict[str, list[list[float]]]]  # by its name in TITLES, of each token


def load(folder: str, policy: LM, tokenizer: Tokenizer, judge: Rewards | None = None) -> Credit:
    """How the run in a folder, whose policy is the one in hand, credits tokens: by its policy, and given a judge of
    whole responses by its critic too. Log-probs are at the run's temperature, --missing-end is taken off the scores,
    and β is the last that the run had.

    UserError where the run does not say its β and reference.
    """
    start, config = rewards.held_against(folder, "--credit")
    reference = rewards.load_policy(start, policy, tokenizer, "--credit")
    critic = models.frozen(models.load_scalar(critic_of(folder))[0], policy.device) if judge else None

    def credit(answers: Sequence[Answer]) -> dict[str, list[list[float]]]:
        encoded, temperature = pack(answers), config.get("temperature", 1.0)
        mask = encoded.collate(range(len(answers))).mask
        logprobs, ref_logprobs = (token_logprobs(m, encoded, temperature=temperature) for m in (policy, reference))
        found = {"log-ratio": config["beta"] * (logprobs - ref_logprobs)}
        if critic:
            values = token_scores(critic, encoded)[:, :-1]
            scores = judge(answers) - config["missing_end"] * Tensor([not answer.ended for answer in answers])
            alone, rewarded = (
                estimate.token_rewards(scores, logprobs, ref_logprobs, mask, beta) for beta in (0.0, config["beta"])
            )
            found["value"], _ = estimate.gae(alone, values, mask, gamma=1.0, lam=0.0)
            found["advantage"], _ = estimate.gae(rewarded, values, mask, gamma=config["gamma"], lam=config["lam"])
        keep = mask.bool()
        return {name: [row[k].tolist() for row, k in zip(x, keep, strict=True)] for name, x in found.items()}

    return credit


def critic_of(folder: str) -> str:
    """Where a run of train_ppo.py has its critic; nothing where it has none, or one that knows --whiten-rewards: by
    what each round was divided nothing says, so its values are in no unit."""
    path = Path(folder) / "critic"
    if not (path / "config.json").is_file() or rewards.held_against(folder, "--credit")[1].get("whiten_rewards"):
        return ""
    return str(path)


def judge_of(folder: str, policy: LM, tokenizer: Tokenizer) -> Rewards:
    """Whom a run of train_ppo.py asked, with its --doubt."""
    _, config = rewards.held_against(folder, "--credit")
    words = config.get("reward") or [str(Path(folder) / "rm")]
    return rewards.load(words, policy, tokenizer, SimpleNamespace(**config))


# ---- to be read ------------------------------------------------------------------------------------------------------


def token_texts(tokens: Sequence[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text; a character that is cut between tokens is of the last of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    last = len(tokens) - 1
    return [decoder.decode(tokenizer.decode_bytes([token]), final=i == last) for i, token in enumerate(tokens)]


# of a terminal's 256 colours: the smallest credit first; all of them light enough for black letters
RED, BLUE = (224, 217, 210, 203), (189, 153, 111, 69)


def shown(texts: Sequence[str], credit: dict[str, Sequence[float]], colour: bool) -> str:
    """Tokens and their credit for the terminal: coloured texts, one below the other, or a table without colours. What
    a terminal would obey is escaped."""
    texts = [terminal.line(text) for text in texts]
    if not colour:
        cells = zip(texts, *credit.values(), strict=True)
        rows = [(f'"{text}"', *(f"{x:+.2f}" for x in numbers)) for text, *numbers in cells]
        together = ("together", *(f"{sum(numbers):+.2f}" for numbers in credit.values()))
        return report.table([*rows, together], ("token", *(TITLES[name] for name in credit)))
    parts = []
    for name, numbers in credit.items():
        most = max(map(abs, numbers)) or 1.0
        steps = [coloured("  ", step / 4, 1.0) for step in range(-4, 5)]
        legend = f"{TITLES[name]}: {-most:+.2f} (underlined) {''.join(steps)} {most:+.2f}, together {sum(numbers):+.2f}"
        text = "".join(coloured(text, number, most) for text, number in zip(texts, numbers, strict=True))
        parts.append(f"{legend}\n{text}")
    return "\n\n".join(parts)


def coloured(text: str, number: float, most: float) -> str:
    """A text in black on a shade of blue, or of red where the number is below 0, underlined for those who see grey."""
    step = round(4 * abs(number) / most)
    if step == 0 or not text:
        return text
    background, line = (BLUE, "") if number > 0 else (RED, ";4")
    return f"\033[38;5;16;48;5;{background[step - 1]}{line}m{text}\033[0m"
