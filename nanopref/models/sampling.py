"""Sampling from a GPT with a KV cache.

Each row of a batch keeps its own place in the cache, so prompts of different lengths need no padding that could be
seen. On a CPU, rows that have finished leave the batch. On a GPU the step from one token to the next is recorded once,
as a CUDA graph, and replayed, because launching its many small kernels one by one takes longer than they do.
"""

import math
from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference import logits as float32_logits
from nanopref.data import chat
from nanopref.data.chat import encode_prompt
from nanopref.data.groups import Encoded, pad
from nanopref.data.tokenizer import Tokenizer
from nanopref.models.cache import KVCache
from nanopref.models.frozen import rounded
from nanopref.models.inference import evaluating
from nanopref.models.language import LM
from nanopref.running import parallel
from nanopref.running.flags import require
from nanopref.running.sharding import sharded, whole

CHUNK = 64  # columns by which a static step's view of the cache grows; each time a CUDA graph is recorded anew


class Answer(NamedTuple):
    """What a policy said to a prompt."""

    prompt: list[int]
    tokens: list[int]  # the one that ends it included where it was reached
    logprobs: list[float]  # of each token, as it was drawn
    text: str
    ended: bool
    asked: str = ""  # the transcript of the conversation, where a chat template wrote the prompt


class Sample(NamedTuple):
    """A response: its tokens, the one that ends it included where it was reached, and the log-prob of each as it was
    drawn."""

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


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """One token [B, 1] from each row of log π [B, V], by inverting the cumulative distribution at `uniform` [B].

    First which of √V spans of the vocabulary, then which token in it, so that only sums of spans and one span a row are
    cumulated, in float64 as `uniform` should be: a token of probability 0 is never hit, and small ones are not lost.
    """
    B, V = logprobs.shape
    width = math.isqrt(V)
    p = F.pad(logprobs.exp(), (0, -V % width)).view(B, -1, width)
    span, rest = _invert(p.sum(-1, dtype=torch.float64), uniform[:, None])
    inside = p.gather(1, span[:, :, None].expand(B, 1, width))[:, 0].double()
    token, _ = _invert(inside, rest)
    return (span * width + token).clamp(max=V - 1)


def _invert(p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which of p [B, n] a number from 0 to 1 [B, 1] falls on, and how far into it, from 0 to 1."""
    cumulative = p.cumsum(-1)
    total = cumulative[:, -1:]
    place = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))  # which rounding may reach
    index = torch.searchsorted(cumulative, place, right=True).clamp(max=p.shape[1] - 1)
    hit, end = p.gather(1, index), cumulative.gather(1, index)
    return index, (1 - (end - place) / hit.clamp(min=1e-300)).clamp(0, 1)


@torch.inference_mode()
def generate(
    model: LM,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    *,
    ends: Collection[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[int, int], None] | None = None,
    static: bool | None = None,
) -> list[Sample]:
    """One response to each of at least one prompts (tokens, at least one in each), all as one batch.

    A response ends with one of the tokens `ends`, after `max_new_tokens`, or where the context is full.
    `on_token(row, token)` is called as tokens appear. `static` (default: on a GPU) keeps every row until all are done
    and waits for nothing, see KVCache.seen. Raises UserError where a prompt leaves no room to respond.
    """
    check_sampling(max_new_tokens, temperature, top_k, top_p)
    longest, device, B = check_room(prompts, model), model.device, len(prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    room = min(longest + max_new_tokens, model.context)
    asked, max_new_tokens = max_new_tokens, min(max_new_tokens, room - min(map(len, prompts)))
    dtype = torch.bfloat16 if torch.is_autocast_enabled(device.type) else torch.float32
    static = device.type == "cuda" if static is None else static
    cache = model.new_cache(B, _whole(room) if static else room, dtype=dtype)
    hidden = read(model, prompts, lengths, cache)
    cache.lengths = lengths

    # all that chance decides, drawn at once and a row after the other: a response depends neither on which others are
    # still going nor on how many are sampled at once
    source = generator.device if generator else device
    uniform = torch.rand(B, asked, generator=generator, device=source, dtype=torch.float64).t().to(device)
    tokens = torch.zeros(B, max_new_tokens, dtype=torch.long, device=device)
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    counts = torch.zeros(B, dtype=torch.long, device=device)
    alive = torch.arange(B, device=device)  # the prompt that each row of the batch answers
    going = torch.ones(B, dtype=torch.bool, device=device)
    place = torch.zeros(1, dtype=torch.long, device=device)
    unembedding = model.unembedding.to(dtype)
    unembedding = unembedding if device.type == "cuda" else unembedding.float()  # as it is multiplied there

    def step() -> None:
        """Draw a token for each row, note it, and put it through the model. Changes tensors in place only."""
        with torch.autocast(device.type, enabled=False):
            logits = float32_logits(hidden.to(dtype).to(unembedding.dtype), unembedding)
        distribution = token_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
        token = draw(distribution, uniform[place, alive])
        tokens[alive, place] = token[:, 0]
        logprobs[alive, place] = distribution.gather(1, token)[:, 0]
        counts[alive] += going
        for end in ends:
            going.logical_and_(token[:, 0] != end)
        going.logical_and_(cache.lengths + 1 < model.context)
        cache.lengths *= going  # a row that is done but still here must not outgrow the cache
        hidden.copy_(model.hidden(token, cache)[:, 0])
        place.add_(1)

    advance = step
    for i in range(max_new_tokens):
        if static:
            before, cache.seen = cache.seen, min(_whole(longest + i + 1), _whole(room))
            # (not where processes hold shares, whose gathering no graph may hold)
            if device.type == "cuda" and not sharded(model) and (i == 2 or (i > 2 and cache.seen != before)):
                advance = record(step)  # after two ordinary steps, in which libraries set themselves up
        advance()
        if on_token:
            for row in (counts > i).nonzero()[:, 0].tolist():
                on_token(row, int(tokens[row, i]))
        if static and i % 16 != 15 and not on_token:
            continue  # asking whether all rows are done would wait for the GPU
        remaining = int(going.sum())
        if remaining == 0:
            break
        if not static and remaining < len(alive) / 2:  # moving the cache pays only where it drops a good part of it
            cache.keep(going)
            alive, hidden, going = alive[going], hidden[going], going[going]
    return [
        Sample(row[:n], logprob[:n])
        for row, logprob, n in zip(tokens.tolist(), logprobs.tolist(), counts.tolist(), strict=True)
    ]


def read(model: LM, prompts: Sequence[list[int]], lengths: Tensor, cache: KVCache) -> Tensor:
    """Keys and values of prompts, of `lengths` [B], go into the cache; the last hidden state of each: [B, D].

    Prompts that differ much in length are not padded to one another, which could be most of the work. What padding
    writes behind a shorter prompt is overwritten by its response.
    """
    pieces: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if not pieces or len(prompts[i]) > 2 * len(prompts[pieces[-1][0]]) + 16:
            pieces.append([])
        pieces[-1].append(i)
    pieces, found = [sorted(piece) for piece in pieces], []
    for piece in pieces:
        tokens = pad([prompts[i] for i in piece]).to(model.device)
        part = cache if len(pieces) == 1 else model.new_cache(*tokens.shape, dtype=cache.keys.dtype)
        hidden = model.hidden(tokens, part)
        found.append(hidden[torch.arange(len(piece), device=model.device), lengths[piece] - 1])
        if part is not cache:
            cache.keys[:, piece, :, : tokens.shape[1]] = part.keys
            cache.values[:, piece, :, : tokens.shape[1]] = part.values
    return torch.cat(found)[torch.tensor(list(chain(*pieces)), device=model.device).argsort()]


def _whole(columns: int) -> int:
    """Rounded up to whole chunks of the cache."""
    return -(-columns // CHUNK) * CHUNK


def record(step: Callable[[], None]) -> Callable[[], None]:
    """What `step` asks of the GPU, as a CUDA graph that is replayed at each call; `step` itself is not carried out."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def check_room(prompts: Sequence[list[int]], model: LM) -> int:
    """The length of the longest prompt; UserError where it leaves no room to respond."""
    longest, context = max(map(len, prompts)), model.context
    message = f"a prompt of {longest} tokens leaves no room to respond in a context of {context}"
    require(longest < context, message)
    return longest


def check_sampling(max_new_tokens: int, temperature: float, top_k: int, top_p: float) -> None:
    """Raise UserError for settings that no distribution has."""
    require(max_new_tokens >= 1, f"--max-new-tokens must be at least 1, not {max_new_tokens}")
    usual = temperature == 0 or 1e-6 <= temperature < math.inf  # below, logits overflow float32
    require(usual, f"--temperature must be 0 (greedy) or at least 1e-6, not {temperature}")
    require(top_k >= 0, f"--top-k must be 0 (all tokens) or above, not {top_k}")
    require(0 < top_p <= 1, f"--top-p must be above 0 and at most 1, not {top_p}")


def room_for_prompt(model: LM, max_new_tokens: int) -> int:
    """How many tokens of a prompt are kept: all that leaves `max_new_tokens`, and at least half the context."""
    return max(model.context - max_new_tokens, model.context // 2)


def respond(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    seed: int,
    stream: str,
    batch_size: int = 256,
    temperature: float = 1.0,
) -> list[Answer]:
    """An answer to each prompt, `batch_size` at once, with a progress bar; dropout is off.

    `stream` names the random stream: the same seed and stream give the same answers. A prompt that is longer than
    `room_for_prompt` is shortened, see `encode_prompt`. Each process samples the answers to its share of the prompts,
    and all of them know all answers.
    """
    room = room_for_prompt(model, max_new_tokens)
    encoded = [encode_prompt(tokenizer, prompt, room) for prompt in prompts]
    ends = chat.ends(tokenizer)
    generator = parallel.generator(seed, stream)  # of the CPU, whose draws go on from batch to batch
    mine, size = parallel.share(len(prompts)), max(1, min(batch_size, -(-len(prompts) // parallel.world_size())))
    setting, found = {"ends": ends, "temperature": temperature, "generator": generator}, []
    for i in range(0, mine.start, size):  # what is drawn for the prompts before
        torch.rand(min(size, mine.start - i), max_new_tokens, generator=generator, dtype=torch.float64)
    with (
        evaluating(model),
        parallel.autocast(model),
        whole(model),
        rounded(model),
        parallel.progress("sampling", len(prompts), "response") as bar,
    ):
        for part in (encoded[i : min(i + size, mine.stop)] for i in mine[::size]):
            found += generate(model, part, max_new_tokens, **setting)
            bar.update(len(part) * parallel.world_size())
    samples = [sample for part in parallel.gathered(lambda: found) for sample in part]
    return [as_answer(x, sample, tokenizer, asked) for x, sample, asked in zip(encoded, samples, prompts, strict=True)]


def as_answer(prompt: list[int], sample: Sample, tokenizer: Tokenizer, asked: str = "") -> Answer:
    """A response with its text."""
    ended = sample.tokens[-1] in chat.ends(tokenizer)
    return Answer(prompt, *sample, response_text(sample.tokens, tokenizer), ended, chat.asked(tokenizer, asked))


def pack(answers: Sequence[Answer]) -> Encoded:
    """Answers as groups of one."""
    return Encoded.pack([[(answer.prompt, answer.tokens)] for answer in answers])


def response_text(response: list[int], tokenizer: Tokenizer) -> str:
    """The text of a response, without the token that ends it."""
    frame = chat.ends(tokenizer).union(tokenizer.begin)
    return tokenizer.decode([t for t in response if t not in frame])
