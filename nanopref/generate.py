"""Sampling from a GPT with a KV cache: `python -m nanopref.generate --model out/dpo --prompt "Last night I saw"`.

Each row of a batch keeps its own place in the cache, so prompts of different lengths need no padding that could be
seen, and rows that have finished leave the batch.
"""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from nanopref import run
from nanopref.data import encode_prompt
from nanopref.model import GPT, KVCache, load_pretrained
from nanopref.run import UserError, progress
from nanopref.tokenizer import Tokenizer


class Sample(NamedTuple):
    """A response: its tokens, end-of-text included where it was reached, and the log-prob of each as it was drawn."""

    tokens: list[int]
    logprobs: list[float]


def token_distribution(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """log π [B, V] from logits [B, V] as it is sampled from: after temperature, then top-k, then top-p, renormalised.

    Temperature 0 puts everything on the most likely token. top_k 0 and top_p 1 leave all tokens in. Top-p keeps the
    smallest set of most likely tokens whose mass reaches p (Holtzman et al. 2020, eq. 2).
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    logprobs = (logits / temperature).log_softmax(-1)
    if 0 < top_k < logits.shape[-1]:
        kept, index = logprobs.topk(top_k)
        logprobs = torch.full_like(logprobs, -torch.inf).scatter(-1, index, kept.log_softmax(-1))
    if top_p < 1:
        ordered, index = logprobs.sort(descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()  # mass of the tokens more likely than this one
        out = torch.zeros_like(ordered, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logprobs = logprobs.masked_fill(out, -torch.inf).log_softmax(-1)
    return logprobs


def draw(logprobs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One token [B, 1] from each row of log π [B, V], by inverting the cumulative distribution.

    One uniform number a row is drawn, where torch.multinomial draws one for each of the V tokens. In float64 a token of
    probability 0 is never hit and small ones are not lost in the sum.
    """
    cumulative = logprobs.double().exp().cumsum(-1)
    shape = (len(logprobs), 1)
    uniform = torch.rand(shape, generator=generator, device=logprobs.device, dtype=torch.float64)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=logprobs.shape[1] - 1)


@torch.inference_mode()
def generate(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    end_of_text: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """One response to each of at least one prompts (tokens, at least one in each), all as one batch.

    A response ends with end-of-text, after `max_new_tokens`, or where the context is full. `on_token(row, token)` is
    called as tokens appear. Raises UserError where a prompt leaves no room to respond.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    longest = check_room(prompts, model)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        tokens[i, : len(prompt)] = torch.tensor(prompt)
    dtype = torch.bfloat16 if torch.is_autocast_enabled(model.device.type) else torch.float32
    room = min(longest + max_new_tokens, model.config.block_size)
    cache = KVCache(model.config, len(prompts), room, device=model.device, dtype=dtype)
    hidden = model.hidden(tokens.to(model.device), cache)
    hidden = hidden[torch.arange(len(prompts), device=model.device), lengths - 1]
    cache.lengths = lengths  # what the padding wrote behind a shorter prompt is overwritten by its response

    alive = torch.arange(len(prompts), device=model.device)  # the prompt that each row of the batch answers
    going = torch.ones_like(alive, dtype=torch.bool)
    samples = [Sample([], []) for _ in prompts]
    for _ in range(max_new_tokens):
        logits = F.linear(hidden, model.unembedding)
        logprobs = token_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        token = draw(logprobs, generator)
        for row, on, drawn, logprob in zip(
            *(x.tolist() for x in (alive, going, token[:, 0], logprobs.gather(1, token)[:, 0])), strict=True
        ):
            if on:
                samples[row].tokens.append(drawn)
                samples[row].logprobs.append(logprob)
                if on_token:
                    on_token(row, drawn)
        going &= (token[:, 0] != end_of_text) & (cache.lengths + 1 < model.config.block_size)
        remaining = int(going.sum())
        if remaining == 0:
            break
        if remaining < len(alive) / 2:  # moving the cache pays only where it drops a good part of the batch
            cache.keep(going)
            alive, token, going = alive[going], token[going], going[going]
        cache.lengths = cache.lengths * going  # a row that is done but still here must not outgrow the cache
        hidden = model.hidden(token, cache)[:, 0]
    return samples


def check_room(prompts: Sequence[list[int]], model: GPT) -> int:
    """The length of the longest prompt; UserError where it leaves no room to respond."""
    longest, context = max(map(len, prompts)), model.config.block_size
    if longest >= context:
        raise UserError(f"a prompt of {longest} tokens leaves no room to respond in a context of {context}")
    return longest


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for settings that no distribution has."""
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    if temperature != 0 and not 1e-6 <= temperature < float("inf"):  # below, logits overflow float32
        raise UserError(f"--temperature must be 0 (greedy) or at least 1e-6, not {temperature}")
    if top_k < 0:
        raise UserError(f"--top-k must be 0 (all tokens) or above, not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"--top-p must be above 0 and at most 1, not {top_p}")


def generate_all(
    model: GPT,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    batch_size: int = 256,
    description: str = "sampling",
    **kwargs,
) -> list[Sample]:
    """`generate` over any number of prompts, a batch at a time, with a progress bar."""
    samples = []
    with progress(description, len(prompts)) as bar:
        for i in range(0, len(prompts), batch_size):
            samples += generate(model, prompts[i : i + batch_size], max_new_tokens, **kwargs)
            bar.update(min(batch_size, len(prompts) - i))
    return samples


def response_text(response: list[int], tokenizer: Tokenizer) -> str:
    """The text of a response, without the end-of-text that closes it."""
    return tokenizer.decode([t for t in response if t != tokenizer.end_of_text])


@dataclass
class Config:
    """Let a trained model finish a prompt, printing as it samples."""

    prompt: str
    """what the response should follow"""
    model: str = "out/dpo"
    """a run folder, a Hugging Face GPT-2 folder, or a name on the hub"""
    max_new_tokens: int = 200
    """stop here if the response has not ended by itself"""
    temperature: float = 1.0
    """below 1 more cautious, above 1 wilder, 0 always the most likely token"""
    top_k: int = 0
    """sample from the k most likely tokens only (0: all)"""
    top_p: float = 1.0
    """sample from the most likely tokens that hold this much probability"""
    seed: int = 0
    """another seed, another response"""
    device: str = "auto"
    """auto, cpu or cuda"""


def main(config: Config) -> None:
    run.check_seed(config.seed)
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    device = run.start(config.device, config.seed)
    model, tokenizer = load_pretrained(config.model)
    prompt = encode_prompt(tokenizer, config.prompt)
    check_room([prompt], model)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def show(_row: int, token: int) -> None:
        if token != tokenizer.end_of_text:
            print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    print(config.prompt, end="", flush=True)
    with run.autocast(device):
        generate(
            model.to(device).eval(),
            [prompt],
            config.max_new_tokens,
            end_of_text=tokenizer.end_of_text,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=run.generator(config.seed, "generate", device),
            on_token=show,
        )
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    run.main(main, tyro.cli(Config, description=__doc__))
