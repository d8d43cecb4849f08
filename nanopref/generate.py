"""Answers to one prompt, as they are sampled: `python -m nanopref.generate`"""

import codecs
from dataclasses import dataclass

from nanopref import models
from nanopref.data.groups import encode_prompt
from nanopref.models.sampling import check_room, check_sampling, generate
from nanopref.running import flags, parallel
from nanopref.running.flags import flag


@dataclass
class Config:
    """Let a trained model finish a prompt, printing as it samples.

    Example: python -m nanopref.generate --model out/dpo --prompt "Last night I watched Paper Crown,"
    """

    prompt: str = flag("", "what the response should follow; default: nothing, a text from its beginning")
    model: str = flag("out/dpo", "a run folder, a Hugging Face folder, or a name on the hub")
    max_new_tokens: int = flag(200, "stop here if the response has not ended by itself", least=1)
    temperature: float = flag(1.0, "below 1 more cautious, above 1 wilder, 0 always the most likely token", least=0)
    top_k: int = flag(0, "sample from the k most likely tokens only (0: all)", least=0)
    top_p: float = flag(1.0, "sample from the most likely tokens that hold this much probability", above=0, most=1)
    seed: int = flag(0, "another seed, another response", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    check_sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
    device = parallel.start(config.device, config.seed)
    model, tokenizer = models.load(config.model)
    prompt = encode_prompt(tokenizer, config.prompt)
    check_room([prompt], model)
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def show(_row: int, token: int) -> None:
        if token != tokenizer.end_of_text:
            print(text.decode(tokenizer.decode_bytes([token])), end="", flush=True)

    print(config.prompt, end="", flush=True)
    with parallel.autocast(device):
        generate(
            model.to(device).eval(),
            [prompt],
            config.max_new_tokens,
            end_of_text=tokenizer.end_of_text,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            generator=parallel.generator(config.seed, "generate", device),
            on_token=show,
        )
    print(text.decode(b"", final=True))


if __name__ == "__main__":
    flags.main(main, Config)
