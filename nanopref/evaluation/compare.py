"""How good is a policy? Its answers beside the reference's, to the same prompts.

Where the task has a true reward, both are judged by it. The KL is measured on the policy's own responses,
KL(π_θ, π_ref) = E_{y ~ π_θ} log π_θ(y|x) - log π_ref(y|x), in nats per response.
"""

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanopref.data import reviews
from nanopref.data.chat import encode_prompt
from nanopref.data.formats import read_prompts
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation.metrics import win_rate
from nanopref.feedback.rewards import Rewards, true_reward
from nanopref.models.inference import response_logprobs
from nanopref.models.language import LM
from nanopref.models.sampling import pack, respond


def new_prompts(file: str, n: int, seed: int, tokenizer: Tokenizer | None = None) -> list[str]:
    """At most n prompts that no stage trains on: of the file's held-out tenth or, without a file, of the built-in task
    (where one in some hundreds has been trained on, of the many there are)."""
    if file:
        return read_prompts(file, tokenizer)[1][:n]
    rng = random.Random(f"evaluation {seed}")
    return [reviews.sample_prompt(rng) for _ in range(n)]


def setting_of(config: Any) -> dict[str, Any]:
    """What the flags of a script say of how to `compare`."""
    return {
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
        "sample_batch": config.sample_batch,
        "batch_size": 4 * config.micro_batch,
        "true": not config.data,
        "asked": config.reward is not None,
        "temperature": getattr(config, "temperature", 1.0),
    }


def compare(
    policy: LM,
    reference: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    sample_batch: int = 256,
    batch_size: int = 64,
    true: bool = False,
    score: Rewards | None = None,
    asked: bool = True,
    temperature: float = 1.0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Both models answer all prompts -> (the report's figures, one row a prompt with both answers).

    `score` judges, and with `true` the built-in task's reward; who wins is what the score says if it was `asked` for,
    else the true reward. Without either KL and length are what is measured.
    """
    setting = {"max_new_tokens": max_new_tokens, "seed": seed, "batch_size": sample_batch, "temperature": temperature}
    answers = {
        name: respond(model, tokenizer, prompts, stream=f"{name} answers", **setting)
        for name, model in (("policy", policy), ("reference", reference))
    }
    said = pack(answers["policy"])
    log_ratio = response_logprobs(policy, said, "policy's log-probs", batch_size, temperature)
    log_ratio -= response_logprobs(reference, said, "reference's log-probs", batch_size, temperature)
    cut = (
        x != answer.prompt
        for x, answer in zip((encode_prompt(tokenizer, p) for p in prompts), answers["policy"], strict=True)
    )
    report: dict[str, Any] = {
        "prompts": len(prompts),
        "prompts_cut": sum(cut),
        "kl": log_ratio.mean().item(),
        "kl_standard_error": (log_ratio.std(correction=0) / math.sqrt(len(prompts))).item(),
        "response_length": {name: float(np.mean([len(a.tokens) for a in said])) for name, said in answers.items()},
        "ended": {name: float(np.mean([a.ended for a in said])) for name, said in answers.items()},
    }
    rows = [
        {"prompt": prompt, "reference": r.text, "policy": p.text}
        for prompt, r, p in zip(prompts, answers["reference"], answers["policy"], strict=True)
    ]
    judged: dict[str, dict[str, np.ndarray]] = {}  # by whom: what is said of the answers of each model
    if score:
        both = score.each([*answers["policy"], *answers["reference"]])  # at once: some compare the answers to a prompt
        each = dict(zip(answers, both.chunk(2, dim=1), strict=True))
        judged["score"] = {name: score.total(found).numpy() for name, found in each.items()}
        means = {name: score.means(found) for name, found in each.items()}
        report["scores"] = {
            part: {name: means[name][part] for name in means} for part in means["policy"] if part != "score"
        }
    if true:
        judged["true_reward"] = {name: true_reward(said).numpy() for name, said in answers.items()}
    for judge, found in judged.items():
        report[judge] = {name: float(found[name].mean(dtype=np.float64)) for name in ("reference", "policy")}
        report[judge] |= {f"{name}_std": float(found[name].std(dtype=np.float64)) for name in ("reference", "policy")}
        report[judge]["win_rate"], report[judge]["win_rate_95"] = win_rate(found["policy"], found["reference"])
        for i, row in enumerate(rows):
            row |= {f"{name}_{judge}": float(found[name][i]) for name in ("reference", "policy")}
    if judged:
        headline = "score" if score and (asked or not true) else "true_reward"
        report |= {name: report[headline][name] for name in ("win_rate", "win_rate_95")} | {"win_rate_by": headline}
    return report, rows
