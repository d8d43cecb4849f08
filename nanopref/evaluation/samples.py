"""What a policy says while it learns, for whoever watches: answers to the same prompts again and again."""

import itertools
import shutil
import textwrap
from collections.abc import Callable, Sequence
from functools import partial

from nanopref.data.tokenizer import Tokenizer
from nanopref.models.language import LM
from nanopref.models.sampling import respond
from nanopref.running.folder import Run
from nanopref.running.parallel import rank, say


def watch(
    run: Run, policy: LM, tokenizer: Tokenizer, prompts: Sequence[str], *,
    max_new_tokens: int | None = None, beside_first: bool = True,
) -> Callable[[], None]:  # fmt: skip
    """To be called before a policy learns; what it returns is called in a step, has the policy as it is now answer the
    first three prompts, prints that beside its first answers, and lets samples.jsonl hold it behind earlier steps.

    All answers are drawn from the same random stream, their own: they change only where the policy does.
    """
    config, prompts = run.config, prompts[:3]
    answers = partial(
        respond, policy, tokenizer, prompts, max_new_tokens=max_new_tokens or config.max_new_tokens, seed=config.seed,
        stream="samples", temperature=getattr(config, "temperature", 1.0),
    )  # fmt: skip
    first = {"reference": answers()} if beside_first else {}

    def show_samples() -> None:
        step, found = run.step + 1, first | {"policy": answers()}
        rows = [
            {"step": step, "prompt": prompt} | {name: found[name][i].text for name in found}
            for i, prompt in enumerate(prompts)
        ]
        if rank() == 0:
            run.logs.add("samples.jsonl", rows)
        say(f"\n{samples_table(rows)}")

    return show_samples


def samples_table(rows: Sequence[dict]) -> str:
    """A line for each prompt and three for its answers, however long they are, for the terminal."""
    width = min(120, shutil.get_terminal_size((100, 20)).columns)
    names = [name for name in ("reference", "policy") if name in rows[0]]
    lines = columns(["before", f"after {rows[0]['step']} steps"][-len(names) :], width)
    for row in rows:
        prompt = one_line(row["prompt"])
        lines.append(prompt if len(prompt) <= width else f"…{prompt[1 - width :]}")
        lines += columns([row[name] for name in names], width)
    return "\n".join(lines)


def columns(texts: Sequence[str], width: int) -> list[str]:
    """The texts beside one another, cut after three lines."""
    each = max(20, (width + 1) // len(texts) - 3)
    cells = [textwrap.wrap(one_line(text), each, max_lines=3, placeholder=" …") for text in texts]
    return [
        ("  " + " │ ".join(cell.ljust(each) for cell in line)).rstrip()
        for line in itertools.zip_longest(*cells, fillvalue="")
    ]


def one_line(text: str) -> str:
    """Without line breaks, or what else would move the cursor."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split()) or "(empty)"
