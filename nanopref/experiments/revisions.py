"""A chat model criticises its answers and writes them anew: `python -m nanopref.experiments.revisions --model FOLDER`

The first stage of constitutional AI (Bai et al. 2022, section 3) with principles in words; `constitution` has both
stages on the built-in task. The revisions are a file to which `nanopref.sft` can be trained. And the model is asked
whether it finds that they follow the principle better than the drafts.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from nanopref.data.dialogues import as_json
from nanopref.data.formats import read
from nanopref.evaluation.metrics import win_rate
from nanopref.feedback import asking, rules
from nanopref.feedback.revise import revise_in_words
from nanopref.running import flags
from nanopref.running.files import write_atomic
from nanopref.running.flags import flag, require
from nanopref.running.parallel import say, start


@dataclass
class Config:
    """Answers, critiques by a principle, and revisions, of a chat model to the prompts of a file.

    Example: python -m nanopref.experiments.revisions --model SmolLM2-1.7B-Instruct --data hh_harmless.jsonl.gz
    """

    out: str = flag("out/revisions", "the folder of revisions.jsonl")
    model: str = flag("", "the chat model: a run folder, a Hugging Face folder, or a hub name")
    data: str = flag("", "a file that has prompts (README)")
    prompts: int = flag(64, "how many of them, drawn at random", least=1)
    rules: str = flag(str(rules.SHIPPED.parent / "harmless.toml"), "principles: a TOML file of rules")
    max_new_tokens: int = flag(128, "longest draft, critique and revision", least=1)
    sample_batch: int = flag(64, "responses that are sampled at once", least=1)
    temperature: float = flag(0.7, "of sampling", least=0)
    seed: int = flag(0, "another seed, other prompts, principles and answers", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    require(bool(config.model and config.data), "--model and --data: name a chat model and a file with prompts")
    principles = rules.load(config.rules, sentences=True)
    for rule in principles:
        require(bool(rule.principle), f"--rules {config.rules}: {rule.name!r} has no principle to criticise by")
    prompts = list(dict.fromkeys(group.prompt for group in read(config.data)[1] if group.prompt))
    require(bool(prompts), f"--data {config.data}: holds no prompts")
    prompts = random.Random(config.seed).sample(prompts, min(config.prompts, len(prompts)))
    judge = asking.load_judge(config.model)
    judge.model.to(start(config.device, config.seed))
    names = ("max_new_tokens", "temperature", "seed")
    setting = {name: getattr(config, name) for name in names} | {"batch_size": config.sample_batch}
    rows = revise_in_words(judge.model, judge.tokenizer, prompts, principles, **setting)
    require(bool(rows), "no revision has an end: raise --max-new-tokens")
    path = Path(config.out) / "revisions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row | {"prompt": as_json(row["prompt"])}, ensure_ascii=False) + "\n" for row in rows]
    write_atomic(path, "".join(lines))

    cases = [
        {"prompt": asking.prompt_text(row["prompt"]), "a": row["completion"], "b": row["draft"],
         "question": asking.FOLLOWS_BETTER.format(**row)}
        for row in rows
    ]  # fmt: skip
    lead = asking.margins(judge.log_odds(asking.WHICH, cases, config.sample_batch)).numpy()
    for row in rows[:3]:
        say("\n" + "\n".join(f"{name}: {text}" for name, text in row.items()))
    rate, (low, high) = win_rate(lead, 0 * lead)
    say(f"\n{len(rows)} revisions of {len(prompts)} drafts; the model itself finds {rate:.1%} of them ({low:.1%} to "
        f"{high:.1%}) to follow the principle better")  # fmt: skip
    say(f"python -m nanopref.sft --data {path} --init {config.model}  # learns them")


if __name__ == "__main__":
    flags.main(main, Config)
