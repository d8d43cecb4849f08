"""What a round of PPO learns from: answers of the policy as it is now, and of what it was in the last rounds."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanopref.data.groups import Batch, Encoded, micro_batches
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.actor_critic import Learner
from nanopref.models.language import LM
from nanopref.models.sampling import Answer, pack, respond
from nanopref.running import parallel
from nanopref.running.sharding import gather_again


class Rollout(NamedTuple):
    """What a round learns from, its own responses first, then replayed ones; tensors [B, T] as in Batch."""

    answers: list[Answer]
    encoded: Encoded
    batch: Batch
    logprobs: Tensor  # log μ of the policy that drew them, as the sampler knew it
    now: Tensor  # log π_θ before anything is learnt, which of a round's own is the same
    ref_logprobs: Tensor  # log π_ref
    values: Tensor  # V before each token
    sampling_seconds: float


@torch.no_grad()
def roll_out(
    learner: Learner, reference: LM, tokenizer: Tokenizer, queries: list[str], step: int, config: Any
) -> Rollout:
    """The policy answers each query. Of these and the replayed answers, the log-probs as they were sampled, those of
    policy and reference, and the critic's values. The config has SamplingFlags, micro_batch, temperature and seed.

    Each process samples, reads and values its share, and all of them know all of it: so what follows from a round as a
    whole, as whitening, is the same for any number of them."""
    began = time.monotonic()
    answers = respond(
        learner.policy, tokenizer, queries, max_new_tokens=config.max_new_tokens, batch_size=config.sample_batch,
        seed=config.seed, stream=f"round {step}", temperature=config.temperature,
    )  # fmt: skip
    seconds, n = time.monotonic() - began, len(answers)
    answers = answers + [Answer(*answer) for answer in learner.replayed]
    encoded, size = pack(answers), 4 * config.micro_batch
    whole = encoded.collate(range(len(answers))).to(learner.policy.device)
    logprobs, ref_logprobs, values = (torch.zeros_like(whole.mask) for _ in range(3))
    logprobs[whole.mask.bool()] = torch.tensor([p for a in answers for p in a.logprobs], device=logprobs.device)
    now, again = logprobs.clone(), torch.zeros_like(logprobs[n:])
    for at, batch in pieces(encoded, range(len(answers)), size, values.device):
        values[at] = learner.values(batch)
        with parallel.autocast(reference):
            ref_logprobs[at] = reference(batch.inputs, batch.targets, batch.mask, config.temperature)
    for (rows, columns), batch in pieces(encoded, range(n, len(answers)), size, values.device):
        with parallel.autocast(learner.policy):
            again[[row - n for row in rows], columns] = learner.policy(
                batch.inputs, batch.targets, batch.mask, config.temperature
            )
    for x in (values, ref_logprobs, again):
        parallel.sum_processes(x)
    now[n:] = again
    for model in (learner, reference):
        gather_again(model)
    return Rollout(answers, encoded, whole, logprobs, now, ref_logprobs, values, seconds)


def pieces(encoded: Encoded, rows: Sequence[int], size: int, device: torch.device) -> Iterator[tuple[tuple, Batch]]:
    """This process's share of these rows in micro-batches, each with its place in a tensor [B, T] of all rows."""
    for piece in micro_batches(rows, encoded.lengths(), size, share=True):
        batch = encoded.collate(piece).to(device)
        yield (piece, slice(batch.mask.shape[1])), batch
