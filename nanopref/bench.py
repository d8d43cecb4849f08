"""Whole DPO steps and whole rollouts beside what others do with the same model and data: `python -m nanopref.bench`

    step        train_dpo.py, started as its users start it, and TRL's DPOTrainer
    parts       what the parts of that step cost, and what compiling them or sharing the prompt could save
    rollouts    sampling here and transformers' generate, and the time that reading the memory alone would take

Weights and text are random, so nothing is downloaded. Results go to <out>/<card or cpu>-<measurement>.json, every
figure with its unit in its name. Times are medians of steps or repeats, after some that do not count.
"""

import importlib.util
import itertools
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import kernels.bench
from nanopref import models
from nanopref.data.groups import USUAL, Encoded, Group, encode, split, write_groups
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation.report import table
from nanopref.experiments.beside_trl import in_a_new_process, own_run, trl_run
from nanopref.models.frozen import rounded
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.language import LM
from nanopref.models.llama import LlamaConfig
from nanopref.models.sampling import generate
from nanopref.running import flags, optim, parallel
from nanopref.running.files import write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import say, version

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
WARM_UP = 3  # steps that do not count: in them kernels are compiled and allocators filled
REPEATS = 5
LENGTHS = ("equal", "ragged")
# Dense bfloat16 TFLOP/s by NVIDIA's data sheets, which print twice that, "with sparsity", for H100 and H200
DATA_SHEET = {"NVIDIA H200": 989.5, "NVIDIA H100 80GB HBM3": 989.5, "NVIDIA H100 PCIe": 756.5, "NVIDIA A100": 312.0}


@dataclass
class Config:
    """Time whole DPO steps and whole rollouts beside TRL's and transformers', on the same model and data.

    Example: python -m nanopref.bench --only rollouts --preset gpt2-medium
    """

    only: str = flag("all", "one of the measurements, or all", among=("all", "step", "parts", "rollouts"))
    preset: str = flag("gpt2" if CUDA else "tiny", "the model's size", among=tuple(models.PRESETS))
    vocab_size: int = flag(50257 if CUDA else 4096, "its vocabulary", least=300, most=54000)
    tokens: int = flag(1024 if CUDA else 128, "prompt and answer together, half each; also the context", least=32)
    batch_size: int = flag(64 if CUDA else 16, "pairs a step", least=1)
    micro_batch: int = flag(16 if CUDA else 4, "pairs in memory at once, of which a whole number is a step", least=1)
    steps: int = flag(15 if CUDA else 10, f"DPO steps, of which the first {WARM_UP} do not count", above=WARM_UP)
    prompts: int = flag(256 if CUDA else 32, "of the rollouts, one batch, each an eighth of --tokens long", least=1)
    new_tokens: int = flag(256 if CUDA else 32, "sampled behind each, at most the rest of --tokens", least=1)
    out: str = flag("kernels/results", "folder for the results")


# ---- what is measured on ---------------------------------------------------------------------------------------------


def synthetic_tokenizer(vocab_size: int) -> Tokenizer:
    """A byte-level BPE with a token for each of its characters, so that a text has as many tokens as one wants.

    The 256 bytes, then the characters from U+0800 on, which have three bytes, each behind the two that it begins with.
    None of these tokens begins in the middle of a character, so nothing is joined across characters.
    """
    ranks = {bytes([byte]): byte for byte in range(256)}
    for code in range(0x0800, 0xD800):
        character = chr(code).encode()
        for token in (character[:2], character):
            if len(ranks) < vocab_size - 1:
                ranks.setdefault(token, len(ranks))
    return Tokenizer(ranks)


def random_pairs(tokenizer: Tokenizer, n: int, tokens: int, ragged: bool) -> list[Group]:
    """`n` pairs to train on and what `split` holds out beside them.

    Prompts, and answers with their end-of-text, have tokens/2 tokens; ragged ones from an eighth of that to that.
    """
    rng = random.Random(0)
    letters = [token.decode() for token in tokenizer.ranks if len(token) == 3 and token.decode().isalpha()]

    def text(end: int) -> str:
        length = rng.randint(tokens // 16, tokens // 2) if ragged else tokens // 2
        return "".join(rng.choices(letters, k=length - end))

    total = next(m for m in itertools.count(n) if m - max(1, round(m / 10)) == n)
    return [Group(text(0), (text(1), text(1))) for _ in range(total)]


# ---- what must be done, and how fast this machine could do it --------------------------------------------------------


def in_blocks(c: GPTConfig | LlamaConfig) -> int:
    """Weights of the blocks' matrices."""
    if isinstance(c, GPTConfig):
        return 12 * c.n_layer * c.n_embd**2
    return c.n_layer * c.n_embd * (2 * (c.n_head + c.n_kv_head) * c.head_dim + 3 * c.n_inner)


def dpo_flops(c: GPTConfig | LlamaConfig, pairs: Encoded) -> int:
    """Floating-point operations of DPO on these pairs: a forward pass, and twice that for the backward pass.

    Forward: 2 for each weight that a token is multiplied by (Kaplan et al. 2020, §2.1), those of the blocks for each
    input, V·D in the unembedding for each token of an answer, since a prompt's need no log-probs; and 4·L·D for each
    token that an input attends to (PaLM, Chowdhery et al. 2022, appendix B, where all T are: causal is half of that).
    The reference, which is evaluated once before, and what is computed a second time to save memory are not counted.
    """
    forward = 0
    for tokens, answer in zip(pairs.row_lengths.tolist(), pairs.response_lengths.tolist(), strict=True):
        T = tokens - 1  # the last token is no input
        forward += 2 * T * in_blocks(c) + 2 * answer * c.vocab_size * c.n_embd
        forward += 4 * c.n_layer * c.n_head * c.head_dim * T * (T + 1) // 2
    return 3 * forward


def rollout_bytes(c: GPTConfig | LlamaConfig, rows: int, prompt: int, new: int, itemsize: int) -> int:
    """Bytes that must be read to sample `new` tokens behind each of `rows` prompts of `prompt` tokens.

    Each of `new` passes reads the matrices, the blocks' and V·D numbers; each but the first, with the prompts,
    also reads the keys and values of every token before, 2·L·D numbers each.
    """
    weights = in_blocks(c) + c.vocab_size * c.n_embd
    cached = sum(prompt + i for i in range(new - 1))
    return itemsize * (new * weights + rows * cached * 2 * c.n_layer * c.n_kv_head * c.head_dim)


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call, until the GPU has done its work."""
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def seconds(call: Callable[[], object]) -> float:
    """The median of some calls, after one that does not count."""
    return median([timed(call) for _ in range(1 + REPEATS)][1:])


def limits() -> dict[str, float]:
    """What this machine does in the precision of training: a large matmul; a large copy, read + written."""
    if CUDA:
        found = kernels.bench.limits()
        torch.cuda.empty_cache()  # the processes that are measured need that memory
        return {"matmul_TFLOP_per_second": found["bfloat16"], "copy_GB_per_second": found["copy"]}
    a, b = torch.randn(2, 1024, 1024)
    source, target = torch.ones(2, 2**25)  # not zeros, which would share one page
    return {
        "matmul_TFLOP_per_second": 2 * 1024**3 / seconds(lambda: a @ b) / 1e12,
        "copy_GB_per_second": 2 * 4 * 2**25 / seconds(lambda: target.copy_(source)) / 1e9,
    }


# ---- the DPO step ----------------------------------------------------------------------------------------------------


def own_steps(config: Config, folder: Path, pairs: Path) -> dict:
    """Of train_dpo.py what `own_run` gives."""
    setting = {"init": folder / "model", "data": pairs, "eval_every": config.steps, "batch_size": config.batch_size}
    setting |= {"micro_batch": config.micro_batch * max(1, config.tokens // USUAL)}
    return own_run(folder / "run", device="cuda" if CUDA else "cpu", **setting)


def step(config: Config, folder: Path, limit: dict) -> Iterator[dict]:
    """Tokens a second (prompts' and answers', not padding) and memory of DPO: ours, TRL's, TRL's by its defaults."""
    gpt, tokenizer = models.load(folder / "model")
    sheet = next((rate for name, rate in DATA_SHEET.items() if card().startswith(name)), None)
    for kind in LENGTHS:
        path = folder / f"{kind}.jsonl"
        made = random_pairs(tokenizer, config.steps * config.batch_size, config.tokens, kind == "ragged")
        path.write_text(write_groups(made), encoding="utf-8")
        pairs, _ = encode(split(made)[0], tokenizer, config.tokens)
        tokens = int(pairs.row_lengths.sum())
        for who, checkpointing in (("train_dpo.py", None), ("TRL", False), ("TRL, checkpointing (its default)", True)):
            row = {"lengths": kind, "who": who}
            if checkpointing is None:
                found = own_steps(config, folder, path)
            else:
                try:
                    require(importlib.util.find_spec("trl") is not None, "trl is not installed")
                    settings = {"gradient_checkpointing": checkpointing, "bf16": CUDA, "max_length": config.tokens}
                    settings |= {"per_device_train_batch_size": config.micro_batch}
                    settings |= {"gradient_accumulation_steps": config.batch_size // config.micro_batch}
                    given = str(folder / "model"), split(made)[0], (), str(folder / "trl")
                    found = in_a_new_process(trl_run, *given, **settings)
                    require(found["tokens"] == tokens, f"TRL saw {found['tokens']} tokens of {tokens}: other data")
                except Exception as error:  # another library's failure must not end the run
                    yield row | {"not_measured": reason(error)}
                    continue
            rate = median(found["rates"][WARM_UP:])
            work = dpo_flops(gpt.config, pairs) / tokens * rate / 1e12
            row |= {"tokens_per_second": rate, "milliseconds": 1e3 * tokens / config.steps / rate}
            row |= {"TFLOP_per_second": work, "share_of_matmul": work / limit["matmul_TFLOP_per_second"]}
            row |= {"MFU": work / sheet} if sheet else {}
            yield row | {name: found[name] for name in found.keys() & {"peak_memory_MiB"}}


# ---- its parts -------------------------------------------------------------------------------------------------------


def shared_prompt(prompt: int, answer: int) -> Callable[..., Tensor]:
    """Attention in rows of a prompt and two answers to it that do not see each other: prompt + 2·answer tokens."""

    def sees(_b, _h, q, k):
        return (k <= q) & ((k < prompt) | (q < prompt + answer) | (k >= prompt + answer))

    T = prompt + 2 * answer
    mask = create_block_mask(sees, None, None, T, T, device="cuda" if CUDA else "cpu")
    attend = torch.compile(flex_attention) if CUDA else flex_attention
    return lambda q, k, v, **_: attend(q, k, v, block_mask=mask)


def parts(config: Config, folder: Path, limit: dict) -> Iterator[dict]:
    """Milliseconds of forward + backward of a micro-batch, and of what follows the last of them."""
    device = torch.device("cuda" if CUDA else "cpu")
    gpt = models.load(folder / "model")[0].to(device)
    B, T, P = config.micro_batch, config.tokens - 1, config.tokens // 2  # the last token is no input
    wide = GPT(replace(gpt.config, block_size=2 * T - P)).to(device)  # its positions serve for timing only
    tokens, shared = (torch.randint(config.vocab_size, s, device=device) for s in ((2 * B, T), (B, 2 * T - P)))
    mask = (torch.arange(T, device=device) >= P).expand(2 * B, T).float()
    optimizer = optim.adamw(gpt, 1e-6)

    def trunk(gpt: LM, tokens: Tensor) -> None:
        with parallel.autocast(gpt):
            hidden = gpt.hidden(tokens)
        hidden.float().sum().backward()

    def trunk_and_head() -> None:
        with parallel.autocast(gpt):
            logprobs = gpt(tokens, tokens, mask)
        logprobs.sum().backward()

    def row(part: str, how: str, call: Callable[[], object]) -> dict:
        return {"part": part, "how": how, "milliseconds": 1e3 * seconds(call)}

    for how in ("eager", "compiled blocks"):
        if how == "compiled blocks":
            if not CUDA:
                say("  compiled blocks, shared prompts: not measured, since they are meant for a GPU")
                break
            for block in (*gpt.h, *wide.h):
                block.compile(dynamic=False)
        yield row("trunk", how, lambda: trunk(gpt, tokens))
        yield row("trunk and head", how, trunk_and_head)
        if CUDA:
            with mock.patch.object(F, "scaled_dot_product_attention", shared_prompt(P, T - P)):
                yield row("trunk, prompts shared", how, lambda: trunk(wide, shared))
    yield row("gradient clipping", "eager", lambda: torch.nn.utils.clip_grad_norm_(gpt.parameters(), 1.0).item())
    yield row("optimiser step", "fused", optimizer.step)


# ---- rollouts --------------------------------------------------------------------------------------------------------


def rollouts(config: Config, folder: Path, limit: dict) -> Iterator[dict]:
    """Tokens sampled a second: ours, transformers' with either cache, and what reading the memory would allow."""
    device = torch.device("cuda" if CUDA else "cpu")
    gpt = models.load(folder / "model")[0].to(device).eval()
    dtype = parallel.precision(gpt)
    prompts = torch.randint(config.vocab_size - 1, (config.prompts, config.tokens // 8), device=device)
    total = config.prompts * config.new_tokens

    def own() -> None:
        with parallel.autocast(gpt), rounded(gpt):
            samples = generate(gpt, prompts.tolist(), config.new_tokens, ends=())
        assert sum(len(sample.tokens) for sample in samples) == total

    def theirs(cache: str) -> None:
        options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_new_tokens": config.new_tokens}
        options |= {"max_new_tokens": config.new_tokens, "pad_token_id": config.vocab_size - 1}
        mask = torch.ones_like(prompts)
        cache = None if cache == "dynamic" else cache  # dynamic is the default, by a name only some releases know
        answers = other.generate(prompts, attention_mask=mask, cache_implementation=cache, **options)
        assert answers[:, prompts.shape[1] :].numel() == total

    ways: dict[str, Callable[[], None]] = {"nanopref": own}
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForCausalLM

        other = AutoModelForCausalLM.from_pretrained(folder / "model").to(device, dtype).eval()
        ways |= {f"transformers, {cache} cache": lambda cache=cache: theirs(cache) for cache in ("dynamic", "static")}
    else:
        yield {"who": "transformers", "not_measured": "it is not installed"}
    needed = rollout_bytes(gpt.config, *prompts.shape, config.new_tokens, dtype.itemsize)
    bound = needed / 1e9 / limit["copy_GB_per_second"]
    yield {"who": f"reading {needed:,} bytes", "tokens_per_second": total / bound, "seconds": bound}
    times: dict[str, list[float]] = {}
    for who, call in ways.items():
        try:
            call()  # which does not count
            times[who] = []
        except Exception as error:  # as of a cache that cannot be compiled, which must not end the run
            if who == "nanopref":
                raise
            yield {"who": who, "not_measured": reason(error)}
    for _, who in itertools.product(range(REPEATS), times):  # in turns: a machine may become slower
        times[who].append(timed(ways[who]))
    for who, found in times.items():
        took = median(found)
        yield {"who": who, "tokens_per_second": total / took, "seconds": took, "share_of_bound": bound / took}


# ---- the command -----------------------------------------------------------------------------------------------------


def card() -> str:
    return torch.cuda.get_device_name() if CUDA else "cpu"


def reason(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def cell(value: object) -> str:
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}") if isinstance(value, float) else str(value)


def show(rows: Sequence[dict]) -> str:
    """Rows as a table, with a column for every name that one of them has."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(cell(row.get(name, "")) for name in names) for row in rows]
    return table(cells, tuple(name.replace("_per_", "/").replace("_", " ") for name in names))


def main(config: Config) -> None:
    flags.check(config)
    require(config.batch_size % config.micro_batch == 0, "--batch-size must be a multiple of --micro-batch")
    require(config.new_tokens <= config.tokens - config.tokens // 8, "--new-tokens: more than fit behind the prompts")
    parallel.start("cuda" if CUDA else "cpu", 0, "auto" if CUDA else "float32")
    about = {"card": card(), "threads": torch.get_num_threads(), "flags": asdict(config)}
    about["command"] = shlex.join(["python", "-m", "nanopref.bench", *sys.argv[1:]])
    about["versions"] = {name: version(name) for name in ("torch", "triton", "transformers", "trl")}
    if (ROOT / ".git").exists() and shutil.which("git"):
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        about["commit"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about["limits"] = limits()
    say(f"{card()}: " + ", ".join(f"{name} {value:.4g}" for name, value in about["limits"].items()))
    Path(config.out).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name:
        folder = Path(name)
        model = models.new(config.preset, vocab_size=config.vocab_size, block_size=config.tokens)
        models.save(model, synthetic_tokenizer(config.vocab_size), folder / "model")
        for measure in (step, parts, rollouts):
            if config.only not in ("all", measure.__name__):
                continue
            path = Path(config.out) / f"{card().replace(' ', '-').replace('/', '-')}-{measure.__name__}.json"
            rows = []
            for row in measure(config, folder, about["limits"]):
                rows.append(row)
                say(" ", "  ".join(map(cell, row.values())))
                write_atomic(path, json.dumps({**about, "rows": rows}, indent=1) + "\n")  # a cut run leaves these
            say(f"\n{show(rows)}\n\n{path}\n")


if __name__ == "__main__":
    flags.main(main, Config)
