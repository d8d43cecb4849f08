"""An answer to a prompt, as it is sampled, or the best of several: `python -m nanopref.generate`"""

import codecs
from dataclasses import dataclass

from nanopref import models
from nanopref.data.groups import encode_prompt
from nanopref.feedback import rewards
from nanopref.models.sampling import as_answer, check_room, check_sampling, generate, response_text
from nanopref.running import flags, parallel
from nanopref.running.flags import RewardFlags, flag, require


@dataclass
class Config(RewardFlags):
    """Let a trained model finish a prompt, printing as it samples.

    Example: python -m nanopref.generate --model out/dpo --prompt "Last night I watched Paper Crown,"
    """

    prompt: str = flag("", "what the response should follow; default: nothing, a text from its beginning")
    model: str = flag("out/dpo", "a run folder, a Hugging Face folder, or a name on the hub")
    max_new_tokens: int = flag(200, "stop here if the response has not ended by itself", least=1)
    temperature: float = flag(1.0, "below 1 more cautious, above 1 wilder, 0 always the most likely token", least=0)
    top_k: int = flag(0, "sample from the k most likely tokens only (0: all)", least=0)
    top_p: float = flag(1.0, "sample from the most likely tokens that hold this much probability", above=0, most=1)
    best_of: int = flag(1, "sample so many responses and print the one that --reward gives most", least=1, most=4096)
    seed: int = flag(0, "another seed, another response", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    require((config.best_of > 1) == (config.reward is not None), "--best-of n, above 1, and --reward go together")
    device = parallel.start(config.device, config.seed)
    model, tokenizer = models.load(config.model)
    model.to(device).eval()
    judge = rewards.load(config.reward, model, tokenizer, config) if config.best_of > 1 else None
    prompt = encode_prompt(tokenizer, config.prompt)
    check_room([prompt], model)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def show(_row: int, token: int) -> None:
        if token != tokenizer.end_of_text:
            print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    print(config.prompt, end="", flush=True)
    with parallel.autocast(model):
        samples = generate(
            model,
            [prompt] * config.best_of,
            config.max_new_tokens,
            end_of_text=tokenizer.end_of_text,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=parallel.generator(config.seed, "generate", device),
            on_token=show if judge is None else None,
        )
    if judge is None:
        print(text.decode(b"", final=True))
    else:
        scores = judge([as_answer(prompt, sample, tokenizer) for sample in samples])
        print(response_text(samples[int(scores.argmax())].tokens, tokenizer))
        mean, most = scores.mean().item(), scores.max().item()
        print(f"\nscore {most:.2f}: the best of {config.best_of}, whose mean is {mean:.2f}")


if __name__ == "__main__":
    flags.main(main, Config)
