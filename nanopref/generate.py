"""An answer to a prompt, as it is sampled, the best of several, or a conversation: `python -m nanopref.generate`

With --credit also which of its tokens the policy holds to be good and which bad.
"""

import codecs
import os
import sys
from contextlib import suppress
from dataclasses import dataclass

from nanopref import models
from nanopref.data import chat
from nanopref.data.chat import encode_prompt
from nanopref.data.dialogues import NEXT, Dialogue
from nanopref.data.tokenizer import Tokenizer
from nanopref.evaluation import credit
from nanopref.feedback import rewards
from nanopref.models.frozen import rounded
from nanopref.models.language import LM
from nanopref.models.sampling import as_answer, check_room, check_sampling, generate, room_for_prompt
from nanopref.running import flags, parallel, terminal
from nanopref.running.flags import RewardFlags, flag, require


@dataclass
class Config(RewardFlags):
    """Let a trained model finish a prompt, or talk with you, printing as it samples.

    Example: python -m nanopref.generate --model out/dpo --prompt "Last night I watched Paper Crown,"
    """

    prompt: str = flag("", "what the response should follow; default: nothing, a text from its beginning")
    chat: bool = flag(False, "talk with the model: it answers each line you type; an empty line or Ctrl-D ends")
    system: str = flag("", "with --chat: tell the model first how it is to behave")
    model: str = flag("out/dpo", "a run folder, a Hugging Face folder, or a name on the hub")
    max_new_tokens: int = flag(200, "stop here if the response has not ended by itself", least=1)
    temperature: float = flag(1.0, "below 1 more cautious, above 1 wilder, 0 always the most likely token", least=0)
    top_k: int = flag(0, "sample from the k most likely tokens only (0: all)", least=0)
    top_p: float = flag(1.0, "sample from the most likely tokens that hold this much probability", above=0, most=1)
    best_of: int = flag(1, "sample so many responses and print the one that --reward gives most", least=1, most=4096)
    credit: bool = flag(False, "then show what each token is credited with by the run in --model: β log π/π_ref and, "
                        "after PPO, what its critic says (with --reward as the judge, or the run's own)")  # fmt: skip
    seed: int = flag(0, "another seed, another response", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    together = (config.best_of > 1) == (config.reward is not None) or (config.credit and config.best_of == 1)
    require(together, "--best-of n, above 1, and --reward go together")
    require(config.reward is not None or not config.doubt, "--doubt: there is no --reward that has any")
    require(not (config.chat and config.credit), "--credit is of a single answer: leave out --chat")
    require(config.chat or not config.system, "--system goes with --chat")
    alone = not config.chat or (not config.prompt and config.best_of == 1)
    require(alone, "--chat asks for what you say line by line: leave out --prompt and --best-of")
    device = parallel.start(config.device, config.seed)
    model, tokenizer = models.load(config.model)
    model.to(device).eval()
    setting = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    setting |= {"generator": parallel.generator(config.seed, "generate", device), "ends": chat.ends(tokenizer)}
    if config.chat:
        return converse(config, model, tokenizer, setting)
    critic = credit.critic_of(config.model) if config.credit else ""
    idle = config.credit and not critic and config.best_of == 1 and config.reward is not None
    require(not idle, f"--reward: {config.model} has no critic, for which it would judge")
    judge = rewards.load(config.reward, model, tokenizer, config) if config.reward is not None else None
    if critic and judge is None:
        judge = credit.judge_of(config.model, model, tokenizer)
    credits = credit.load(config.model, model, tokenizer, judge if critic else None) if config.credit else None
    prompt = encode_prompt(tokenizer, config.prompt)
    check_room([prompt], model)
    write(config.prompt)
    if config.best_of == 1:
        printer = Printer(tokenizer, setting["ends"])
        (said,) = sample(model, [prompt], config.max_new_tokens, on_token=printer.show, **setting)
        printer.finish()
        answer = as_answer(prompt, said, tokenizer, config.prompt)
    else:
        samples = sample(model, [prompt] * config.best_of, config.max_new_tokens, **setting)
        answers = [as_answer(prompt, sample, tokenizer, config.prompt) for sample in samples]
        scores = judge(answers)
        answer = answers[int(scores.argmax())]
        write(answer.text, "\n")
        mean, most = scores.mean().item(), scores.max().item()
        print(f"\nscore {most:.2f}: the best of {config.best_of}, whose mean is {mean:.2f}")
    if credits:
        found = {name: numbers for name, (numbers,) in credits([answer]).items()}
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(f"\n{credit.shown(credit.token_texts(answer.tokens, tokenizer), found, colour)}")


def sample(model: LM, prompts: list[list[int]], max_new_tokens: int, **setting) -> list:
    with parallel.autocast(model), rounded(model):
        return generate(model, prompts, max_new_tokens, **setting)


def converse(config: Config, model: LM, tokenizer: Tokenizer, setting: dict) -> None:
    """Answer each line of stdin, knowing all that was said before, or what of it there is room for."""
    with suppress(ImportError):
        import readline  # noqa: F401, which lets one edit what one types
    asking = "> " if sys.stdin.isatty() else ""
    messages = [("system", config.system)] if config.system else []
    with suppress(EOFError, KeyboardInterrupt):
        while line := input(asking).strip():
            messages.append(("user", line))
            prompt = encode_prompt(tokenizer, Dialogue(messages), room_for_prompt(model, config.max_new_tokens))
            printer = Printer(tokenizer, setting["ends"], stop="" if tokenizer.template else NEXT, strip=True)
            with suppress(Stop):
                sample(model, [prompt], config.max_new_tokens, on_token=printer.show, **setting)
            messages.append(("assistant", printer.finish()))


def write(text: str, end: str = "") -> None:
    """Print a text as it is; at a terminal, which would obey some of it, as it can be shown."""
    print(terminal.shown(text) if sys.stdout.isatty() else text, end=end, flush=True)


class Stop(Exception):
    """The answer is over, though the model goes on."""


class Printer:
    """Prints an answer as its tokens come."""

    def __init__(self, tokenizer: Tokenizer, ends: frozenset[int], stop: str = "", strip: bool = False):
        """`stop` is a text that ends the answer; with `strip` it begins with what is no space."""
        self.tokenizer, self.ends, self.stop, self.strip = tokenizer, ends, stop, strip
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
        self.said = self.held = ""  # what was printed, and what may turn out to be the stop

    def show(self, _row: int, token: int) -> None:
        if token not in self.ends:
            self.write(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def write(self, text: str) -> None:
        self.held += text
        self.held = self.held.lstrip() if self.strip and not self.said else self.held
        text, stop, _ = self.held.partition(self.stop) if self.stop else (self.held, "", "")
        ahead = range(min(len(self.stop), len(text)), 0, -1) if not stop else ()
        n = len(text) - next((n for n in ahead if self.stop.startswith(text[-n:])), 0)
        write(text[:n])
        self.said, self.held = self.said + text[:n], text[n:]
        if stop:
            raise Stop

    def finish(self) -> str:
        """All that was said."""
        last = self.held + self.decoder.decode(b"", final=True)
        write(last, "\n")
        return self.said + last


if __name__ == "__main__":
    flags.main(main, Config)
