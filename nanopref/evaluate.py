"""Policies beside a reference, on the same new prompts: `python -m nanopref.evaluate`"""

from dataclasses import dataclass

from nanopref import models
from nanopref.evaluation import best_of_n, report, tournament
from nanopref.evaluation.compare import compare, new_prompts
from nanopref.feedback import rewards
from nanopref.models.sampling import respond
from nanopref.running import flags, parallel
from nanopref.running.flags import RewardFlags, flag, require
from nanopref.running.parallel import say


@dataclass
class Config(RewardFlags):
    """Compare policies with a reference: KL, length and, on the built-in task, true reward and win rate.

    Example: python -m nanopref.evaluate --policy out/dpo out/ppo --reference out/dpo/sft
    """

    policy: tuple[str, ...] = flag(("out/dpo",), "one or more models: run folders, Hugging Face folders, or hub names")
    reference: str = flag("out/dpo/sft", "the model that they are held against")
    tournament: tuple[str, ...] = flag(
        (), "instead: these models and the reference all against one another, each pair of answers compared by --reward"
    )
    data: str = flag(
        "", "take the held-out prompts of this file (or data set of the hub); default: new ones of the built-in task"
    )
    best_of: int = flag(
        1, "also the best of 1, 2, 4 … of so many of the reference's answers, by --reward", least=1, most=4096
    )
    eval_prompts: int = flag(512, "how many prompts all models answer", least=1)
    max_new_tokens: int = flag(64, "longest response that is sampled", least=1)
    sample_batch: int = flag(512, "responses that are sampled at once", least=1)
    seed: int = flag(0, "another seed, other prompts and responses", least=0, below=2**32)
    device: str = flag("auto", "auto, cpu or cuda")


def main(config: Config) -> None:
    flags.check(config)
    names = [config.reference, *(config.tournament or config.policy)]
    require(len(config.policy) > 0, "--policy: name at least one policy")
    require(not config.tournament or len({*names}) == len(names), "--tournament: name each model once; the reference "
            "takes part by itself")  # fmt: skip
    require(not config.tournament or bool(config.reward) or not config.data, "--tournament: name a --reward that says "
            "who wins")  # fmt: skip
    require(config.best_of == 1 or config.reward is not None, "--best-of needs a --reward, to say which is best")
    device = parallel.start(config.device, config.seed)
    found = {name: models.load(name) for name in names}
    reference, tokenizer = found[config.reference]
    prompts = new_prompts(config.data, config.eval_prompts, config.seed, tokenizer)
    for name, (policy, other) in found.items():
        require(other == tokenizer, f"{name} and {config.reference} have different tokenizers")
        same = policy.context == reference.context
        require(same, f"{name} and {config.reference} have contexts of different length")
    reference.to(device)
    judge = None if config.reward is None else rewards.load(config.reward, reference, tokenizer, config)
    sampling = {"max_new_tokens": config.max_new_tokens, "batch_size": config.sample_batch, "seed": config.seed}
    if config.tournament:
        judge = judge or rewards.alone(rewards.true_reward)
        answers = [
            answer
            for k, x in enumerate(names)
            for answer in respond(found[x][0].to(device), tokenizer, prompts, stream=f"answers of {k}", **sampling)
        ]
        scores = judge(answers).view(len(names), -1).numpy()  # at once: some compare the answers to a prompt
        say(f"\n{len(names)} models, {len(prompts)} prompts, each two answers to a prompt compared by {by(config)}\n")
        say(tournament.table(names, scores, reference=0))
        return
    for name in config.policy:
        result, rows = compare(
            found[name][0].to(device), reference, tokenizer, prompts, max_new_tokens=config.max_new_tokens,
            sample_batch=config.sample_batch, seed=config.seed, true=not config.data, score=judge,
        )  # fmt: skip
        say(f"\n{name} (after) against {config.reference} (before), {len(prompts)} prompts\n")
        say(report.comparison_table(result))
    report.print_samples(rows[:3])
    if config.best_of > 1:
        others = {} if config.data else {"true reward": rewards.true_reward}
        curve = best_of_n.measure(reference, tokenizer, prompts, judge, others, config.best_of, **sampling)
        say(f"\nthe best of n answers of {config.reference}, by the score\n")
        columns = [name for name in curve[0] if name not in ("n", "bound")]
        cells = [[str(row["n"]), *(f"{row[name]:.2f}" for name in columns), f"{row['bound']:.2f}"] for row in curve]
        say(report.table(cells, ("n", *columns, "log n - (n-1)/n")))


def by(config: Config) -> str:
    """Who says which answer is better."""
    return "the true reward" if config.reward is None else f"--reward {' '.join(config.reward)}"


if __name__ == "__main__":
    flags.main(main, Config)
