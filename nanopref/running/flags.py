"""Flags: a line each, with its default, what it does and what it may be; and the groups of them that scripts share.

A script's `Config` is a dataclass that inherits the groups it wants and adds its own flags. `main` turns it into a
command line (tyro does the parsing), checks every range, and makes a sentence and an exit code of what goes wrong.
"""

import errno
import inspect
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch.distributed as dist
import tyro

import kernels
from nanopref.running import terminal


class UserError(Exception):
    """Something the user can mend: one sentence that says what. Commands print it and exit with code 2."""


class RewardError(UserError):
    """A judge that failed: the weights are as good as they were, and are saved where a loop was under way."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


CODE = "FILE.py:FUNCTION"  # where it is among a flag's choices, a function of the user's own is one too


def is_code(word: str) -> bool:
    """Whether a flag's word names a function of the user's own; see functions.py."""
    return ".py:" in word


# ---- a flag ----------------------------------------------------------------------------------------------------------

BOUNDS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "least": ("at least", lambda value, bound: value >= bound),
    "above": ("above", lambda value, bound: value > bound),
    "most": ("at most", lambda value, bound: value <= bound),
    "below": ("below", lambda value, bound: value < bound),
}
LARGEST = 2**31 - 1  # whole number of a flag, unless its rules say otherwise
_NO_TEXT = re.compile("[\ud800-\udfff]")  # what Python makes of a command line's bytes that are no UTF-8
SITUATIONS = {  # where a default may differ, and how --help says so
    "task": "on the built-in task",
    "file": "with --data",
    "reward": "with --reward",
    "gae": "for gae",
    "groups": "for rloo and grpo",
    "reinforce": "for reinforce",
    "pretrained": "from a pretrained model",
    "lora": "with --lora",
    "adapters": "with --lora from a pretrained model",
}


def flag(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is a flag. `rules` are bounds (least, above, most, below), `among` (a list of choices),
    and defaults that differ by situation (see SITUATIONS), of which the last that holds is taken."""
    return field(default=default, metadata={"help": help, **rules})


def _rules(config: type | Any, name: str) -> dict[str, Any]:
    """What was said of a flag where it was first declared: a subclass may change its default alone."""
    cls = config if isinstance(config, type) else type(config)
    declared = (base.__dataclass_fields__[name].metadata for base in cls.__mro__ if name in _own(base))
    return dict(next((metadata for metadata in declared if metadata), {}))


def _own(cls: type) -> dict[str, Field]:
    """The fields that a dataclass itself declares or changes."""
    return {name: f for name, f in getattr(cls, "__dataclass_fields__", {}).items() if name in cls.__annotations__}


def check(config: Any) -> None:
    """Raise UserError for the first flag that is out of its range, for kernels that cannot run here, and for an
    optimiser that cannot update shares of weights."""
    for f in fields(config):
        rules, name, value = _rules(config, f.name), f"--{f.name.replace('_', '-')}", getattr(config, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, str):
                require(not _NO_TEXT.search(number), f"{name} holds bytes that are no text")
            if isinstance(number, float):
                require(math.isfinite(number), f"{name} must be a finite number, not {number}")
            if isinstance(number, int) and not {"most", "below"} & rules.keys():
                require(number <= LARGEST, f"{name} must be at most {LARGEST}, not {number}")
            for rule in BOUNDS.keys() & rules.keys() if number is not None else ():
                words, holds = BOUNDS[rule]
                require(holds(number, rules[rule]), f"{name} must be {words} {rules[rule]}, not {number}")
            if choices := rules.get("among"):
                fits = number is None or number in choices or (CODE in choices and is_code(number))
                require(fits, f"{name} must be one of {', '.join(choices)}, not {number}")
    if hasattr(config, "kernels"):
        try:
            with kernels.use(config.kernels):
                pass
        except RuntimeError as error:
            raise UserError(f"--kernels {config.kernels}: {error}") from None
    shares = getattr(config, "optimizer", None) == "adafactor" and config.parallel == "fsdp"
    require(not shares, "--optimizer adafactor: rows and columns of a weight need all of it: --parallel ddp")


def require_odd(annotators: int | None) -> None:
    """Raise UserError where a vote could tie."""
    odd = annotators is None or annotators % 2 == 1
    require(odd, f"--annotators must be odd, so that a vote cannot tie, not {annotators}")


def check_people(config: Any) -> None:
    """Raise UserError where what people say of answers would not make what is learnt from."""
    feedback, voters = getattr(config, "feedback", "pairs"), len(config.voters)
    require_odd(config.annotators)
    require(not voters or feedback != "responses", "--voters: nobody votes on what --select best takes")
    require(config.votes == "majority" or feedback == "pairs", f"--votes {config.votes} makes pairs and no {feedback}")
    odd = voters % 2 == 1 or not voters or config.votes != "majority"
    require(odd, f"--voters must be an odd number of people, so that a vote cannot tie, not {voters}")


def resolve(config: Any, *situations: str) -> Any:
    """The config with each flag that was not given set to its default in these situations, and in those that its own
    flags data, reward and lora make."""
    holds = {"file" if config.data else "task", "reward" if getattr(config, "reward", "") else "", *situations}
    if getattr(config, "lora", 0):
        holds |= {"lora", "adapters" if "pretrained" in situations else ""}
    chosen = {}
    for f in fields(config):
        defaults = [value for where, value in _rules(config, f.name).items() if where in holds]
        if getattr(config, f.name) is None and defaults:
            chosen[f.name] = defaults[-1]
    return replace(config, **chosen)


# ---- the command line ------------------------------------------------------------------------------------------------


def parse(Config: type, words: Sequence[str] | None = None) -> Any:
    """A `Config` from command-line words, with --help in the groups that its classes are."""
    groups, home = {}, {}
    for cls in reversed(Config.__mro__):
        home |= {name: home.get(name, cls) for name in _own(cls)}
    for cls in (Config, *Config.__mro__):  # its own flags first
        own = [f for f in fields(Config) if home[f.name] is cls]
        if own and cls not in groups:
            group = make_dataclass(cls.__name__, [_for_tyro(Config, f) for f in own])
            title = Path(inspect.getfile(cls)).stem if cls is Config else cls.__name__.removesuffix("Flags").lower()
            groups[cls] = (title, Annotated[group, tyro.conf.OmitArgPrefixes])
    everything = make_dataclass(Config.__name__, groups.values())
    plain = (tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone)
    words, meant = _printable(sys.argv[1:] if words is None else words)
    found = tyro.cli(everything, description=inspect.getdoc(Config), args=words, config=plain)
    values = {name: value for title, _ in groups.values() for name, value in vars(getattr(found, title)).items()}
    for name, value in values.items():
        if isinstance(value, str | tuple):
            values[name] = meant.get(value, value) if isinstance(value, str) else tuple(meant.get(x, x) for x in value)
    return Config(**values)


def _printable(words: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Command-line words as an error may repeat them, and what is meant by those of them that are not as they were."""
    found, meant = [], {}
    for word in words:
        option, equals, value = word.partition("=") if word.startswith("--") and "=" in word else ("", "", word)
        printable = terminal.line(value, 1000)
        while printable != value and (printable in words or meant.get(printable, value) != value):
            printable += "…"
        if printable != value:
            meant[printable] = value
        found.append(terminal.line(option, 200) + equals + printable)
    return found, meant


def _for_tyro(Config: type, f: Field) -> tuple:
    """Name, type and default of a flag, with its help."""
    rules = _rules(Config, f.name)
    here = [
        f"{value} {SITUATIONS[where]}" for where, value in rules.items() if where in SITUATIONS and f.default is None
    ]
    default = "" if f.default in ("", None, ()) or isinstance(f.default, bool) else f.default
    hint = f"(default: {'; '.join(here) or default})" if here or default != "" else ""
    choices = rules.get("among", ())
    kind = Literal[tuple(choices)] if choices and CODE not in choices else f.type
    kind = tuple[kind, ...] if "among" in rules and isinstance(f.default, tuple) else kind
    kind = kind | None if f.default is None else kind
    values = "{" + ",".join(choices) + "}" if CODE in choices else None  # of which `check` sees that it is one
    options = tyro.conf.arg(help=rules.get("help", ""), help_behavior_hint=hint, metavar=values)
    return (f.name, Annotated[kind, options], *(() if f.default is MISSING else (field(default=f.default),)))


def main(command: Callable[[Any], None], Config: type, words: Sequence[str] | None = None) -> None:
    """Run a command with the flags of its command line."""
    terminal.prepare()
    with terminal.said_once():
        config = parse(Config, words)
    execute(command, config)


def execute(command: Callable[[Any], None], config: Any) -> None:
    """Run a command: what the user can mend becomes one line and exit code 2, Ctrl-C exit code 130."""
    code, message, about, alike = 0, "", "", True
    again = f"{'add --resume to' if hasattr(config, 'resume') else 'start'} the same command to continue"
    try:
        with terminal.interrupts(again):
            command(config)
    except UserError as error:
        code, message = 2, f"error: {error}"
    except KeyboardInterrupt as stop:
        code, message = 130, f"stopped: {str(stop) or again}"
    except Exception as error:
        if is_out_of_memory(error):
            words = f"out of memory{_less_memory(config)}"
        elif isinstance(error, OSError):  # a full disk or a folder without permission names itself
            where = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
            resumes = error.errno in NO_ROOM and hasattr(config, "resume")
            words = f"{where}{'; make room, and --resume goes on' if resumes else ''}"
        elif is_loss_of_a_process(error):
            goes_on = ": start it again with --resume to go on" if hasattr(config, "resume") else ""
            why = terminal.line(re.split("\n|[.] ", re.sub(r"^\[\S*\] ", "", str(error).strip()))[0], 160)
            words = f"another process of this run has ended, so this one cannot go on{goes_on} ({why})"
            about = LOST.pattern  # which each of them sees in its own way
        else:
            raise
        code, message, alike = 2, f"error: {words}", False
    if code:
        if terminal.is_first_to_say(about or message, alike):
            print("\n" * (code == 130) + terminal.line(message), file=sys.stderr, flush=True)
        sys.exit(code)
    if dist.is_initialized():
        dist.destroy_process_group()


def is_loss_of_a_process(error: Exception) -> bool:
    """Whether what failed is that another process of the run no longer answers."""
    return dist.is_initialized() and isinstance(error, RuntimeError) and bool(LOST.search(str(error)))


LOST = re.compile("[Cc]onnection|[Tt]imed out|[Tt]imeout|gloo|NCCL|peer|Broken pipe")  # what is said of lost processes


NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, which PyTorch and what it builds on often say in words alone."""
    words = ("allocate memory", "not enough memory", "out of memory", "bad_alloc", "alloc_failed", "start new thread")
    words += ("failed to map segment",)  # of a library that is loaded only now
    said = isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)
    return said and not isinstance(error, UserError)


def _less_memory(config: Any) -> str:
    """What to do where memory ran out."""
    names = [name for name in ("micro_batch", "sample_batch") if hasattr(config, name)]
    names = names or [name for name in ("best_of", "max_new_tokens") if hasattr(config, name)]
    now = " or ".join(f"--{name.replace('_', '-')} (now {getattr(config, name)})" for name in names)
    hint = "; with --resume the run goes on from its last saved state" if hasattr(config, "resume") else ""
    return f"{': lower ' if names else ''}{now}{hint}"


# ---- the groups that scripts share -----------------------------------------------------------------------------------


@dataclass
class RunFlags:
    out: str = flag("", "the run's folder: model, metrics, report, and the state to resume from")
    resume: bool = flag(False, "continue the run in --out, however it ended")
    overwrite: bool = flag(False, "replace the run in --out")
    seed: int = flag(0, "the same seed gives the same numbers on the same machine", least=0, below=2**32)
    device: str = flag("auto", "auto (CUDA where there is one), cpu or cuda")
    kernels: str = flag(
        "auto", "log-probs and losses: auto is Triton on CUDA, PyTorch elsewhere", among=kernels.BACKENDS
    )
    save_seconds: float = flag(60.0, "time between two saves of the state that --resume continues from", least=0)
    tensorboard: bool = flag(False, "also write the curves for TensorBoard, in OUT/tensorboard, under TRL's names")


@dataclass
class ModelFlags:
    dtype: str = flag(
        "auto", "of matrix products; auto: bfloat16 on a GPU, and for a wide model on a CPU with units for it; weights "
        "that learn and sums are float32", among=("auto", "float32", "bfloat16"),
    )  # fmt: skip
    lora: int = flag(
        0, "train adapters of this rank, 16 say, on frozen weights (Hu et al. 2021); their learning rate is some ten "
        "times the usual (Schulman et al. 2025); 0: all weights", least=0,
    )  # fmt: skip
    block_size: int | None = flag(
        None, "longest sequence in tokens, prompt and answer together (default: the model's, at most 1024)", least=2
    )
    checkpoint_activations: bool = flag(
        False, "hold each block's input alone and compute the rest again: less memory, up to a third slower"
    )
    compile: bool = flag(False, "compile the blocks (torch.compile), for a GPU; a CPU gains little")
    parallel: str = flag(
        "ddp", "under torchrun: each process holds the model, and gradients are summed (ddp), or a share of it, and "
        "all of it while it samples (fsdp)", among=("ddp", "fsdp"),
    )  # fmt: skip


OF_MODELS = tuple(ModelFlags.__dataclass_fields__)  # their names


@dataclass
class StartFlags(ModelFlags):
    init: str = flag(
        "", "where to start, and the reference: a run or Hugging Face folder, or a hub name; default: new SFT"
    )
    sft_steps: int | None = flag(None, "without --init: steps of the new SFT model (default: its own)", least=1)


@dataclass
class RewardFlags:
    reward: tuple[str, ...] | None = flag(
        None, "who judges, if not people: a reward model's folder, true, specificity, rules, rules:FILE.toml, "
        "asks:FOLDER or rates:FOLDER (a chat model), implicit:FOLDER (of a DPO policy), FILE.py:FUNCTION; `*0.5` "
        "behind one is its weight, several are added",
    )  # fmt: skip
    doubt: float = flag(0.0, "subtract this many times the spread of a reward model's heads from its score", least=0)


@dataclass
class FeedbackFlags:
    data: str = flag("", "preferences: a file of pairs, rankings, ratings or labels, or a data set's name on the "
                     "Hugging Face hub, owner/name:split (README); default: film reviews")  # fmt: skip
    prompts: int = flag(5120, "prompts whose answers are sampled and judged, where no file tells what was", least=20)
    annotators: int | None = flag(
        None, "who vote on each sampled answer (odd)", least=1, most=10**6, task=3, reward=1
    )  # fmt: skip
    noise: float | None = flag(None, "how often they err, in units of reward; 0: never", least=0, task=0.5, reward=0.0)
    voters: tuple[float, ...] = flag(
        (), "people with a noise of their own each, instead of --annotators alike", least=0
    )
    votes: str = flag(
        "majority", "what makes of votes a pair: the majority; each vote a pair of its own; or the majority weighed by "
        "how reliable each voter's own votes show them to be", among=("majority", "count", "dawid-skene"),
    )  # fmt: skip


@dataclass
class ObjectiveFlags:
    feedback: str | None = flag(
        None, "what is said of sampled answers (default: what --loss learns from)",
        among=("pairs", "labels", "rankings", "ratings"),
    )  # fmt: skip
    judged: str = flag(
        "", "feedback.jsonl of another run on film reviews: what people said there is taken, instead of asking anew"
    )
    answers: int | None = flag(
        None,
        "answers to a prompt (default: 2; for rankings, ratings and --select 4, rso 8, best 16)",
        least=1,
        most=256,
    )
    select: str = flag(
        "all", "which of them are judged: best against worst; the two on whose order a reward model's heads differ "
        "most (doubt); two drawn as from π* (rso: Liu et al. 2023); or the best alone, to be imitated",
        among=("all", "best-worst", "doubt", "rso", "best"),
    )  # fmt: skip
    chooser: tuple[str, ...] | None = flag(
        None, "whose numbers --select goes by, in the notation of --reward (default: who judges)"
    )
    margin: float | None = flag(
        None, "by how much the better answer is to lead, times the pair's `margin` in the file (default: 0; simpo 1)",
        least=0,
    )  # fmt: skip
    label_smoothing: float | None = flag(
        None, "share of labels taken to be wrong (default: 0; cdpo and robust 0.1)", least=0, below=0.5
    )
    rating_temperature: float | None = flag(
        None, "infonca, nca: how far ratings must lie apart to count, in units of their deviation (default: 1)", above=0
    )
    good_weight: float | None = flag(
        None, "kto, binary: weight of a good answer (default: good and bad weigh as much in all)", above=0
    )
    bad_weight: float | None = flag(None, "weight of a bad one", above=0)


@dataclass
class StepFlags:
    batch_size: int = flag(64, "groups (pairs, say) a step, over all processes", least=1)
    micro_batch: int = flag(
        16, "groups in memory at once, of over 256 tokens fewer; a step is made of as many as it takes", least=1
    )
    lr: float | None = flag(None, "peak learning rate", above=0)
    grad_clip: float = flag(1.0, "largest norm of the gradient", above=0)


@dataclass
class LearningFlags(StepFlags):
    optimizer: str | None = flag(
        None, "muon for the blocks' matrices and AdamW for the rest, AdamW alone, or adafactor, which holds next to "
        "nothing beside the weights", among=("muon", "adamw", "adafactor"), task="muon", file="muon",
        pretrained="adamw", lora="adamw",
    )  # fmt: skip
    warmup: int = flag(10, "steps of linear warm-up, after which the rate falls to 0", least=0)
    weight_decay: float = flag(0.0, "AdamW's, on matrices", least=0)
    eval_every: int = flag(22, "steps between two looks at (256 of) the held-out tenth; all of it at the end", least=1)


@dataclass
class SamplingFlags:
    max_new_tokens: int = flag(64, "longest response that is sampled", least=1)
    sample_batch: int = flag(512, "responses that are sampled at once", least=1)
    eval_prompts: int = flag(512, "prompts that are answered for the report", least=1)
