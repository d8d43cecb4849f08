"""RLHF with PPO (Ziegler et al. 2019; Stiennon et al. 2020), from nothing to a report: `python train_ppo.py`

Without --data: film reviews (nanopref/data/reviews.py). A small GPT learns to write them, simulated people compare its
answers, a reward model learns from them (train_rm.py), and PPO moves the GPT towards high scores and a critic towards
knowing them in advance, while each nat of KL from where it began costs β. With --data: your pairs and their prompts.
"""

import nanopref  # noqa: F401, I001  (first, because it sets how torch's threads wait, which torch reads when loaded)

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from kernels.reference import logits, masked_mean
from nanopref import models, sft
from nanopref.data.chat import shortened
from nanopref.data.formats import read_feedback
from nanopref.evaluation.compare import compare, new_prompts, setting_of
from nanopref.evaluation.report import PPO_CURVES, conclude
from nanopref.evaluation.samples import watch
from nanopref.feedback import rewards
from nanopref.feedback.collect import training_prompts
from nanopref.feedback.rollout import Rollout, pieces, roll_out
from nanopref.learning import advantages as estimate
from nanopref.learning import trust_region
from nanopref.learning.objectives import SCORES, kinds
from nanopref.models.actor_critic import Learner, new_critic
from nanopref.models.sampling import room_for_prompt
from nanopref.running import flags, optim, parallel
from nanopref.running.flags import (
    FeedbackFlags, RewardFlags, RunFlags, SamplingFlags, StartFlags, StepFlags, flag, require,
)  # fmt: skip
from nanopref.running.folder import Run
from nanopref.running.parallel import say
from nanopref.running.sharding import accumulated
from train_rm import ensure_reward_model


@dataclass
class Config(SamplingFlags, StepFlags, FeedbackFlags, RewardFlags, StartFlags, RunFlags):
    """Train a GPT with PPO against a reward model: on the built-in film reviews, or on a file.

    Example: python train_ppo.py --reward out/rm --kl-target 6 --out out/mine
    """

    out: str = "out/ppo"
    missing_end: float = flag(1.0, "subtract this from the score of a response that does not end", least=0)
    advantage: str = flag("gae", "over a critic, the group, or earlier rounds", among=tuple(estimate.ADVANTAGES))
    group: int | None = flag(None, "responses to each prompt", least=1, gae=1, groups=4, reinforce=1)
    critic: str = flag("network", "of the reward model's size, or a head on the policy", among=("network", "head"))
    prompts: int = 6144
    iterations: int = flag(32, "rounds of answering and learning", least=1)
    batch_size: int = flag(128, "responses a round", least=1)
    epochs: int = flag(2, "passes over them", least=1)
    minibatch: int = flag(32, "responses an optimiser step", least=1)
    lr: float | None = flag(
        None, "the policy's at first", above=0, task=4e-4, file=1e-4, pretrained=1e-5, adapters=1e-4
    )
    critic_lr: float | None = flag(None, "the critic's; default: that of the policy", above=0)
    value_weight: float = flag(0.5, "weight of the critic's loss, which matters for --critic head", least=0)
    value_warmup: int | None = flag(None, "rounds for the critic alone", least=0, gae=2, groups=0, reinforce=0)
    beta: float = flag(0.1, "price of a nat of KL, in units of score; with --kl-target its first value", least=0)
    kl_target: float | None = flag(None, "change beta so that the KL comes to this many nats; default: fixed", above=0)
    kl_horizon: int = flag(1000, "responses after which a KL 20% too high has raised beta by 20%", least=1)
    max_kl: float = flag(100.0, "stop when the KL is beyond this many nats: the policy has collapsed", above=0)
    temperature: float = flag(1.0, "in sampling and in every log-prob", least=1e-6)
    gamma: float = flag(1.0, "discount a token", above=0, most=1)
    lam: float = flag(0.95, "GAE's λ: lower trusts the critic more", least=0, most=1)
    clip: float = flag(0.2, "the ratio π_θ/π_old is of use within 1 ± this", above=0, below=1)
    value_clip: float = flag(0.2, "the critic's values move by this much a round, in units of score", above=0)
    early_stop_kl: float | None = flag(None, "end a round's passes at this many nats a token from π_old", above=0)
    entropy: float = flag(0.0, "weight of the entropy bonus", least=0)
    whiten_rewards: bool = flag(False, "divide the rewards of a round's tokens by their deviation")
    whiten_advantages: bool | None = flag(None, "bring to mean 0, variance 1", gae=True, groups=False, reinforce=False)
    update: str = flag("ppo", "clipped ratios, or a step of natural gradient a round", among=("ppo", "trpo"))
    trust_region: float = flag(0.01, "trpo: how far a step may go, in nats a token", above=0)
    cg_steps: int = flag(10, "trpo: steps of conjugate gradient", least=1)
    replay: int = flag(1, "learn from the responses of this many policies, the last included", least=1)


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    flags.check(config)
    device = parallel.start(config.device, config.seed, config.dtype, config.parallel)
    config.init = config.init or rewards.made_from(config.reward or ())
    policy, tokenizer, origin = models.load_init(config, device)
    config = resolve(config, origin)
    run = Run(config)
    given, reward = config.reward, None
    if given is not None:
        reward = rewards.load(given, policy, tokenizer, config)
    elif config.data:
        hint = "give a --reward of train_rm.py --loss"  # or else it trains one on pairs
        read_feedback(config.data, kinds(SCORES), "bradley-terry", config.votes, tokenizer, meet=True, hint=hint)
    asked = config.batch_size // config.group  # prompts a round
    prompts = training_prompts(config.data, config.iterations * asked, f"ppo {config.seed}", tokenizer)
    held_out_prompts = new_prompts(config.data, config.eval_prompts, config.seed, tokenizer)
    run.begin()

    # 1. π_SFT, where the policy starts and what it is held to; and who judges.
    if policy is None:
        policy, tokenizer, _ = models.load_init(config, device, sft.ensure_sft(run))
    if reward is None:
        reward = rewards.load(given or (ensure_reward_model(run),), policy, tokenizer, config)
    reference = models.reference(policy)

    # 2. What learns. No dropout: it would make π_θ another policy at each look (Huang et al. 2023).
    critic = new_critic(config.critic, policy, reward.models, config) if config.advantage == "gae" else None
    learner = Learner(policy, critic, config.beta).to(device).eval()
    show_samples = watch(run, policy, tokenizer, held_out_prompts)
    shared = set(policy.parameters())
    parts = [optim.learning(policy), [p for p in optim.learning(learner) if p not in shared]]
    parts = [part for part in parts if part]  # each with a gradient clip of its own
    groups = [{"params": p, "peak": lr} for p, lr in zip(parts, (config.lr, config.critic_lr), strict=False)]
    # ε = 1e-5 as in PPO2: with 1e-8 weights that hardly have a gradient move by all of lr (Huang et al. 2022, detail 3)
    optimizer = torch.optim.Adam(groups, eps=1e-5, fused=True)
    how = {"gamma": config.gamma, "lam": config.lam, "group": config.group, "baseline": learner.baseline}
    advantage = partial(estimate.ADVANTAGES[config.advantage], **how)
    notes = shortened(tokenizer, prompts, room_for_prompt(policy, config.max_new_tokens))
    notes["prompts a round more than there are, so that some come twice"] = max(0, asked - len(prompts))
    run.pin("prompts", prompts, held_out_prompts)
    say(f"PPO: {config.iterations} rounds of {config.batch_size} responses to {len(prompts):,} prompts")
    for note, count in (+notes).items():
        say(f"  {count:,} {note}")

    with run.stage("ppo"):
        for step, rows in run.steps("PPO", len(prompts), asked, config.iterations, learner, optimizer):
            # 3. Rollout: responses y ~ π_old, the policy as it is now.
            began = time.monotonic()
            queries = [prompts[i] for i in rows for _ in range(config.group)]
            rollout = roll_out(learner, reference, tokenizer, queries, step, config)
            mask, n = rollout.batch.mask, config.batch_size  # the first n responses are the policy's own
            kl = estimate.kl_k1(rollout.now, rollout.ref_logprobs, mask)[:n]  # of each response
            stop_if_collapsed(run, kl.mean().item(), all(answer.text == "" for answer in rollout.answers[:n]))
            if step == run.last_saved:  # as often as the state; what a later collapse leaves
                models.save(policy, tokenizer, run.folder / "model")

            # 4. Rewards: r_t = -β (log π_θ - log π_ref)_t + [t = T] r(x, y) (Stiennon et al. 2020), less a penalty
            # where T is not the end (Huang et al. 2024, the EOS trick).
            scores = reward.total(each := reward.each(rollout.answers)).to(device)
            unended = torch.tensor([not answer.ended for answer in rollout.answers], device=device)
            scored, beta = scores - config.missing_end * unended, learner.beta.float()
            token_rewards = estimate.token_rewards(scored, rollout.now, rollout.ref_logprobs, mask, beta)
            if config.whiten_rewards:  # Ziegler et al. 2019's code
                token_rewards = estimate.whiten(token_rewards, mask, shift_mean=False)

            # 5. Advantages: how much better than expected was each token? And returns: what V should have been.
            log_ratios = rollout.now - rollout.logprobs  # 0 but for replayed responses (V-trace, Espeholt et al. 2018)
            advantages, returns = advantage(token_rewards, rollout.values, mask, log_ratios=log_ratios)
            if config.whiten_advantages:  # Huang et al. 2022, detail 7, but over the round
                advantages = estimate.whiten(advantages, mask)

            # 6. Update: several passes of minibatches with the clipped losses, or as far as a trust region reaches.
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / config.iterations)  # Huang et al. 2022, detail 4
            metrics = UPDATES[config.update](run, learner, parts, rollout, advantages, returns, step)
            learner.remember(rollout.answers[: (config.replay - 1) * n], token_rewards[:n].sum(1))

            # 7. What happened; and a β for the next round (Ziegler et al. 2019, section 2.2).
            tokens, learning = int(mask[:n].sum()), time.monotonic() - began - rollout.sampling_seconds
            metrics |= {
                **reward.means(each[:, :n]),
                "kl": kl.mean().item(),
                "kl_k3": estimate.kl_k3(rollout.now, rollout.ref_logprobs, mask)[:n].mean().item(),
                "beta": learner.beta.item(),
                "explained_variance": estimate.explained_variance(rollout.values, returns, mask).item(),
                "response_length": tokens / n,
                "unended": unended[:n].float().mean().item(),
                "rollout_tokens_per_second": tokens / rollout.sampling_seconds,
                "learning_tokens_per_second": metrics.pop("learned_tokens") / learning,
            }
            if not config.data:
                metrics["true_reward"] = rewards.true_reward(rollout.answers[:n]).mean().item()
            if config.kl_target:
                settings = config.kl_target, n, config.kl_horizon
                learner.beta.fill_(estimate.adapt_kl_coefficient(metrics["beta"], metrics["kl"], *settings))
            run.log(metrics)
            if 5 * (step + 1) // config.iterations > 5 * step // config.iterations:  # five times a run
                show_samples()

    # 8. What came of it: policy and reference answer the same new prompts.
    with run.stage("evaluation"):
        result, answers = compare(policy, reference, tokenizer, held_out_prompts, score=reward, **setting_of(config))
    empty = len(answers) > 1 and not any(answer["policy"] for answer in answers)  # of one, it says nothing
    stop_if_collapsed(run, result["kl"], empty)
    models.save(policy, tokenizer, run.folder / "model")
    if learner.critic is not None:
        models.save(learner.critic, tokenizer, run.folder / "critic")
    conclude(run, result | {"data": dict(+notes)}, answers, PPO_CURVES, xlabel="round")


def ppo(
    run: Run, learner: Learner, parts: list, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int,
    policy_learns: bool = True,
) -> dict[str, float]:  # fmt: skip
    """PPO's update (Schulman et al. 2017, algorithm 1): several passes over the round in minibatches. The means of what
    was measured on the way."""
    config, mask = run.config, rollout.batch.mask
    shuffle = parallel.generator(config.seed, f"minibatches {step}")
    order = [torch.randperm(len(mask), generator=shuffle) for _ in range(config.epochs)]
    totals, done, learned = torch.zeros(6 + len(parts), device=mask.device), 0, 0
    for minibatch in [m for epoch in order for m in epoch.split(config.minibatch)]:
        sums = torch.zeros(6, device=mask.device)
        mine = pieces(rollout.encoded, minibatch.tolist(), config.micro_batch, mask.device)
        for at, batch in accumulated(learner, mine):  # this process's share
            logprobs, entropies, values = learner(batch, config.temperature)
            policy_loss, policy_stats = kernels.ppo_clip_loss(  # eq. 7: -min(ρA, clip(ρ, 1 ± ε) A), ρ = π_θ/π_old
                logprobs, rollout.logprobs[at], advantages[at], batch.mask, clip=config.clip
            )
            value_loss, value_stats = kernels.clipped_value_loss(  # ½ max((V - R)², (clip(V, V_old ± ε) - R)²)
                values, rollout.values[at], returns[at], batch.mask, clip=config.value_clip
            )
            entropy = masked_mean(entropies, batch.mask)
            loss = policy_loss + config.value_weight * value_loss - config.entropy * entropy  # eq. 9
            share = batch.mask.sum() / mask[minibatch].sum()  # a mean over all tokens of the minibatch
            (share * loss).backward()
            stats = [policy_loss, value_loss, entropy, policy_stats["approx_kl"]]
            stats += [policy_stats["clip_fraction"], value_stats["clip_fraction"]]
            sums += share * torch.stack(stats).detach()
        parallel.sum_processes(sums)
        if step < config.value_warmup or not policy_learns:  # a bad critic would undo it (Zheng et al. 2023)
            learner.policy.zero_grad()
        norms = run.update(sums[0] + sums[1], config.grad_clip, *parts)  # Huang et al. 2022, detail 11
        totals, done = totals + torch.cat([sums, torch.tensor(norms, device=mask.device)]), done + 1
        learned += int(mask[minibatch].sum())
        if config.early_stop_kl and sums[3] > config.early_stop_kl:
            break
    names = ("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "value_clip_fraction")
    names += ("grad_norm", "critic_grad_norm")[: len(parts)]
    return dict(zip(names, (totals / done).tolist(), strict=True)) | {"minibatches": done, "learned_tokens": learned}


def trpo(
    run: Run, learner: Learner, parts: list, rollout: Rollout, advantages: Tensor, returns: Tensor, step: int
) -> dict[str, float]:
    """TRPO's update (Schulman et al. 2015): one step for the policy, inside the trust region, and PPO's minibatches for
    the critic. In float32, since little differences and second derivatives decide."""
    config, policy, mask = run.config, learner.policy, rollout.batch.mask
    old = models.twin(policy).requires_grad_(False)
    batches = pieces(rollout.encoded, range(len(mask)), config.micro_batch, mask.device)
    batches = [(at, batch) for at, batch in batches if len(batch.mask)]  # of nothing is no second derivative

    def surrogate() -> Iterator[Tensor]:  # eq. 14: mean ρA, ρ = π_θ/π_old
        for at, batch in batches:
            logprobs = policy(batch.inputs, batch.targets, batch.mask, config.temperature)
            yield ((logprobs - rollout.logprobs[at]).exp() * advantages[at]).sum() / mask.sum()

    def kl() -> Iterator[Tensor]:  # mean over the tokens' contexts of the KL over the whole vocabulary
        for _, batch in batches:
            there = batch.mask.bool()
            scores = (logits(m.hidden(batch.inputs)[there], m.unembedding) / config.temperature for m in (policy, old))
            yield F.kl_div(*(x.log_softmax(-1) for x in scores), log_target=True, reduction="sum") / mask.sum()

    delta = config.trust_region * (1 - step / config.iterations) ** 2  # as of steps whose length falls to 0
    found = {"clip_fraction": 0.0}
    if step >= config.value_warmup:
        found |= trust_region.improve(surrogate, kl, parts[0], delta=delta, cg_steps=config.cg_steps)
    return ppo(run, learner, parts, rollout, advantages, returns, step, policy_learns=False) | found


UPDATES = {"ppo": ppo, "trpo": trpo}
USELESS = {"ppo": ("trust_region", "cg_steps"), "trpo": ("lr", "clip", "early_stop_kl", "entropy")}  # flags of others


def stop_if_collapsed(run: Run, kl: float, empty: bool) -> None:
    """Raise UserError where nothing good can follow."""
    good = f" (the last good policy is in {run.folder / 'model'})" if (run.folder / "model").exists() else ""
    hint = f"start again with a higher --beta or a lower --lr, in another --out{good}"
    require(kl <= run.config.max_kl, f"the policy has collapsed: its KL of {kl:.3g} nats is beyond --max-kl; {hint}")
    require(not empty, f"the policy has collapsed: every response is empty; {hint}")


# ---- before the loop -------------------------------------------------------------------------------------------------


def resolve(config: Config, origin: str) -> Config:
    """The defaults that depend on other flags filled in, and flags that do not go together refused."""
    own = any(rewards.parse(word)[0].rstrip(":") == "implicit" for word in config.reward or ())
    compares = config.advantage != "gae"
    early = config.value_warmup is None  # a default that leaves a round for the policy
    useless = [name for name in USELESS[config.update] if getattr(config, name) != getattr(Config, name)]
    groups, trpo = config.advantage in ("rloo", "grpo"), config.update == "trpo"
    config = flags.resolve(config, "groups" if groups else config.advantage, origin)
    config.value_warmup = min(config.value_warmup, config.iterations - 1) if early else config.value_warmup
    config.critic_lr = config.critic_lr or config.lr
    for holds, message in (
        (not own, "--reward implicit: of a policy that learns it would change; name a folder, as implicit:out/dpo"),
        (not config.doubt or config.reward, "--doubt needs a --reward with several heads (train_rm.py --heads)"),
        (not groups or config.group > 1, f"--advantage {config.advantage} compares, so --group must be at least 2"),
        (config.batch_size % config.group == 0, f"--batch-size must be a multiple of --group {config.group}"),
        (config.value_warmup < config.iterations, "--value-warmup leaves none of the --iterations for the policy"),
        (not compares or not config.value_warmup, "--value-warmup is for --advantage gae: the others have no critic"),
        (not useless, f"--{''.join(useless[:1]).replace('_', '-')} has no use with --update {config.update}"),
        (not trpo or config.critic != "head", "--critic head: its steps would leave the trust region of --update trpo"),
        (not (trpo and config.lora) or config.dtype == "float32", "--update trpo with --lora: give --dtype float32"),
        (not trpo or config.parallel == "ddp", "--update trpo: second derivatives need whole models: --parallel ddp"),
        (config.beta > 0 or not config.kl_target, "--kl-target multiplies --beta, which must not be 0 then"),
    ):
        require(holds, message)
    flags.check_people(config)
    return config


if __name__ == "__main__":
    flags.main(train, Config)
