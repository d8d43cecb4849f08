"""RLHF with PPO (Ziegler et al. 2019; Stiennon et al. 2020), from nothing to a report: `python train_ppo.py`

Without --data: film reviews (nanopref/reviews.py). A small GPT learns to write them, simulated people compare its
answers, a reward model learns from them (train_rm.py), and PPO moves the GPT towards high scores and a critic towards
knowing them in advance, while each nat of KL from where it began costs β. With --data: your pairs and their prompts.
"""

import nanopref  # noqa: F401  (first, because it sets how torch's threads wait, which torch reads when it is loaded)

# isort: split
import copy
import functools
import math
import random
import shlex
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import tyro
from torch import Tensor, nn

import kernels
import train_rm
from kernels.reference import IGNORE, masked_mean
from nanopref import data, evaluate, feedback, losses, reviews, run, sft
from nanopref.generate import check_sampling, generate, response_text
from nanopref.model import GPT, ScalarGPT, find_model, load_pretrained, save_pretrained
from nanopref.run import Run, require, say


@dataclass
class Config(run.Options):
    """Train a GPT with PPO against a reward model: on the built-in film reviews, or on a file."""

    out: str = "out/ppo"
    """the run's folder: models, metrics, report, and the state to resume from"""
    init: str = ""
    """the policy to start from, also the reference; default: what --reward was made from, else a new SFT model"""
    sft_steps: int | None = None
    """steps of a new SFT model (default: its own); `python -m nanopref.sft --help` has the rest"""
    data: str = ""
    """what train_rm.py takes: prompts to answer, and what a new reward model is trained on; default: film reviews"""
    reward: tuple[str, ...] | None = None
    """reward models: run folders, or `true` for the built-in task's own; default: one is trained first, in OUT/rm"""
    reward_weights: tuple[float, ...] = ()
    """a weight for each --reward, whose weighted scores are added; default: 1 each"""
    rm_pairs: int = 6144
    """built-in task: pairs for that new reward model; `python train_rm.py --help` has the rest"""
    doubt: float = 0.0
    """subtract this many times the spread of a reward model's heads from its score"""
    missing_end: float = 1.0
    """subtract this from the score of a response that does not end"""
    advantage: Literal["gae", "rloo", "grpo"] = "gae"
    """gae: from a critic; rloo and grpo: from the other responses to the same prompt, without one"""
    group: int | None = None
    """responses to each prompt; default: 1 for gae, 4 for rloo and grpo"""
    critic: Literal["network", "head"] = "network"
    """the critic: a network that starts from the reward model, or a scalar head on the policy"""
    iterations: int = 40
    """rounds of answering and learning"""
    batch_size: int = 128
    """responses a round"""
    epochs: int = 2
    """passes over them"""
    minibatch: int = 32
    """responses an optimiser step"""
    micro_batch: int = 16
    """responses in memory at once; more steps of this size are accumulated"""
    lr: float | None = None
    """the policy's at first, then falling to 0; default: 3e-4 on the built-in task, 1e-4 on a file, 1e-5 with --init"""
    critic_lr: float | None = None
    """the critic's; default: that of the policy"""
    value_weight: float = 0.5
    """weight of the critic's loss, which matters for --critic head and for the gradient's norm"""
    value_warmup: int | None = None
    """gae: rounds in which only the critic learns; default: 2, but always fewer than --iterations"""
    beta: float = 0.1
    """price of a nat of KL from the reference, in units of score; with --kl-target its first value"""
    kl_target: float | None = None
    """change beta from round to round so that the KL comes to this many nats; default: beta is fixed"""
    kl_horizon: int = 1000
    """responses after which a KL that is 20% too high has raised beta by 20%"""
    max_kl: float = 100.0
    """stop when the KL is beyond this many nats: the policy has collapsed"""
    temperature: float = 1.0
    """in sampling and in every log-prob"""
    gamma: float = 1.0
    """discount a token"""
    lam: float = 0.95
    """GAE's λ: lower trusts the critic more"""
    clip: float = 0.2
    """the ratio π_θ/π_old is of use within 1 ± this"""
    value_clip: float = 0.2
    """the critic's values move by this much a round, in units of score"""
    early_stop_kl: float | None = None
    """end a round's passes early when π_θ is this many nats a token from π_old; default: never"""
    entropy: float = 0.0
    """weight of the entropy bonus"""
    whiten_rewards: bool = False
    """bring the rewards of a round's tokens to variance 1, but leave their mean"""
    whiten_advantages: bool | None = None
    """bring the advantages of a round to mean 0 and variance 1; default: for gae, as the others compare in a group"""
    grad_clip: float = 1.0
    """largest norm of the gradient"""
    save_every: int = 5
    """rounds between two saves of the state that --resume continues from, and of the policy if its KL is in bounds"""
    eval_prompts: int = 512
    """prompts that policy and reference answer for the report"""
    max_new_tokens: int = 64
    """longest response that is sampled"""

    def check(self) -> None:
        super().check()
        counts = ("sft_steps", "group", "iterations", "batch_size", "epochs", "minibatch", "micro_batch", "kl_horizon")
        run.require_at_least_one(self, *counts, "eval_prompts", "max_new_tokens")
        names = ("lr", "critic_lr", "kl_target", "max_kl", "clip", "value_clip", "early_stop_kl", "grad_clip")
        run.require_positive(self, *names)
        run.require_not_negative(self, "beta", "doubt", "missing_end", "value_weight", "value_warmup", "entropy")
        require(self.clip < 1, f"--clip must be below 1, so that 1 - clip is a ratio, not {self.clip}")
        require(self.reward != (), "--reward: name at least one reward model, or leave the flag out")
        check_sampling(self.max_new_tokens, self.temperature, 0, 1.0)
        require(self.temperature > 0, "--temperature must be above 0: a greedy policy has nothing to learn from")
        require(self.rm_pairs >= 20, f"--rm-pairs must be at least 20, not {self.rm_pairs}")
        require(0 < self.gamma <= 1, f"--gamma must be above 0 and at most 1, not {self.gamma}")
        require(0 <= self.lam <= 1, f"--lam must be from 0 to 1, not {self.lam}")
        reward = self.reward or ()
        require(
            len(self.reward_weights) in (0, len(reward)),
            f"--reward-weights: {len(self.reward_weights)} weights for {len(reward)} reward models",
        )
        require(all(map(math.isfinite, self.reward_weights)), "--reward-weights must be finite numbers")
        require("true" not in reward or not self.data, "--reward true: only the built-in task knows its own")
        require(
            self.advantage == "gae" or self.group is None or self.group > 1,
            f"--advantage {self.advantage} compares the responses to one prompt, so --group must be at least 2",
        )
        group = self.resolved().group
        require(self.batch_size % group == 0, f"--batch-size {self.batch_size} is no multiple of --group {group}")
        require(
            self.resolved().value_warmup < self.iterations,
            f"--value-warmup {self.value_warmup} leaves none of {self.iterations} --iterations for the policy",
        )
        require(self.beta > 0 or not self.kl_target, "--kl-target multiplies --beta, which must not be 0 then")
        require(not self.doubt or reward, "--doubt needs a --reward with several heads (train_rm.py --heads)")

    def resolved(self) -> "Config":
        """The defaults that depend on other flags, filled in."""
        reward = self.reward or ()
        init = self.init or next(filter(None, map(feedback.made_from, reward)), "")
        lr = self.lr or ((1e-5 if init else 1e-4) if self.data else 3e-4)
        warmup = min(2, self.iterations - 1) if self.value_warmup is None else self.value_warmup
        return replace(
            self,
            init=init,
            reward=reward,
            lr=lr,
            critic_lr=self.critic_lr or lr,
            value_warmup=warmup if self.advantage == "gae" else 0,
            group=self.group or (1 if self.advantage == "gae" else 4),
            # over the round, RLOO's baseline would see its own sample after all, and GRPO's would be scaled twice
            whiten_advantages=self.advantage == "gae" if self.whiten_advantages is None else self.whiten_advantages,
            reward_weights=self.reward_weights or (1.0,) * max(1, len(reward)),
        )


class Learner(nn.Module):
    """All that learns, and β, which may adapt: what --resume must find again."""

    def __init__(self, policy: GPT, critic: ScalarGPT | None, beta: float):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))

    def forward(self, inputs: Tensor, targets: Tensor, mask: Tensor, temperature: float) -> tuple[Tensor, ...]:
        """log π_θ(targets), entropy, and V before each target: each [B, T], float32."""
        with run.autocast(inputs.device):
            hidden = self.policy.hidden(inputs)
            logprobs, entropies = token_logprobs(self.policy, hidden, targets, mask, temperature, entropy=True)
        return logprobs, entropies, self.values(inputs, hidden)

    def values(self, inputs: Tensor, hidden: Tensor | None = None) -> Tensor:
        """V [B, T], float32; 0 without a critic. `hidden` saves a critic that is a head on the policy a second look."""
        if self.critic is None:
            return torch.zeros(inputs.shape, device=inputs.device)
        with run.autocast(inputs.device):
            if hidden is None or self.critic.transformer is not self.policy:
                hidden = self.critic.transformer.hidden(inputs)
            return self.critic.score(hidden)[..., 0].float()


class Rollout(NamedTuple):
    """A round's responses, each [B, T], laid out as data.Batch: what stands at t is about targets[:, t]."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor
    logprobs: Tensor  # log π_old, as the sampler knew it
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: list[int], length: int) -> "Rollout":
        """These rows and the first columns."""
        return Rollout(*(x[rows, :length] for x in self))


def train(config: Config) -> None:
    # What can be wrong is found before anything is written.
    config.check()
    config = config.resolved()
    this = Run(config)
    device = run.start(config.device, config.seed)
    require(run.world_size() == 1, "train_ppo.py runs as one process: start it without torchrun")
    if config.init:
        policy, tokenizer = load_pretrained(config.init)
        load_reward_models(config, config.reward, policy, tokenizer)
    else:
        folders = [find_model(name) for name in config.reward if name != "true"]
        require(not folders, "--reward: name the policy that it was trained for with --init")
    context = policy.config.block_size if config.init else sft.Config(data=config.data).resolved().block_size
    room = context - config.max_new_tokens
    require(room > 0, f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt in a context of {context}")
    prompts, new_prompts = read_prompts(config)
    if config.data and not config.reward:
        data.read_comparisons(config.data)  # what a reward model will be trained on
    this.begin()

    # 1. π_SFT, where the policy starts and what it is held to; and the reward model.
    if not config.init:
        policy, tokenizer = load_pretrained(sft.first(config, this))
    names = config.reward or (first_reward_model(config, this),)
    reward_models = load_reward_models(config, names, policy.to(device), tokenizer)
    reference = copy.deepcopy(policy).eval()
    encoded = [data.encode_prompt(tokenizer, prompt) for prompt in prompts]
    notes = Counter({"prompts cut on the left to fit the context": sum(len(prompt) > room for prompt in encoded)})
    prompts = [prompt[-room:] for prompt in encoded]

    # 2. What learns. No dropout: it would make π_θ another policy at each look (Huang et al. 2023).
    learner = Learner(policy, new_critic(config, policy, reward_models), config.beta).to(device).eval()
    shared = set(policy.parameters())
    groups = [
        {"params": list(policy.parameters()), "peak": config.lr},
        {"params": [p for p in learner.parameters() if p not in shared], "peak": config.critic_lr},
    ]
    # ε = 1e-5 as in PPO2: with 1e-8 weights that hardly have a gradient move by all of lr (Huang et al. 2022, detail 3)
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], eps=1e-5, fused=True)
    start = this.load(learner, optimizer)
    batches = run.batches(len(prompts), config.batch_size // config.group, config.iterations, config.seed, start)
    say(f"PPO: {config.iterations} rounds of {config.batch_size} responses to {len(prompts):,} prompts")
    for note, count in (+notes).items():
        say(f"  {count:,} {note}")

    with this.stage("ppo"), kernels.use(config.kernels):
        for step, rows in this.steps(batches, config.iterations, learner, optimizer, "PPO"):
            # 3. Responses of the policy as it is now, and what the reward model thinks of them.
            began = time.monotonic()
            queries = [prompts[i] for i in rows for _ in range(config.group)]
            with run.autocast(device):
                samples = generate(
                    policy,
                    queries,
                    config.max_new_tokens,
                    end_of_text=tokenizer.end_of_text,
                    temperature=config.temperature,
                    generator=run.generator(config.seed, f"round {step}", device),
                )
            responses = [(x, sample.tokens) for x, sample in zip(queries, samples, strict=True)]
            batch = data.collate(responses).to(device)
            mask = batch.mask
            old_logprobs = torch.zeros_like(mask)
            old_logprobs[mask.bool()] = torch.tensor([p for s in samples for p in s.logprobs], device=device)
            rolled_out = time.monotonic()

            scores = score(config, reward_models, responses, tokenizer).to(device)
            unended = torch.tensor([y[-1] != tokenizer.end_of_text for _, y in responses], device=device)
            lengths = [len(x) + len(y) - 1 for x, y in responses]
            values, ref_logprobs = look(learner, reference, batch, lengths, config)
            kl = losses.kl_k1(old_logprobs, ref_logprobs, mask).mean().item()
            stop_if_collapsed(config, this, kl, all(y == [tokenizer.end_of_text] for _, y in responses))
            if step % config.save_every == 0:
                save_pretrained(policy, tokenizer, this.folder / "model")  # what a later collapse leaves

            # 4. A reward at each token, -β (log π_θ - log π_ref), and at the last one the score (Stiennon et al. 2020),
            # less a penalty where it is not the end (Huang et al. 2024, the EOS trick). How much better than expected
            # was each token?
            scored = scores - config.missing_end * unended
            rewards = losses.token_rewards(scored, old_logprobs, ref_logprobs, mask, learner.beta.float())
            if config.whiten_rewards:  # Ziegler et al. 2019's code
                rewards = losses.whiten(rewards, mask, shift_mean=False)
            advantages, returns = estimate_advantages(config, rewards, values, mask)
            if config.whiten_advantages:  # Huang et al. 2022, detail 7, but over the round
                advantages = losses.whiten(advantages, mask)
            rollout = Rollout(*batch, old_logprobs, values, advantages, returns)

            # 5. Several passes of minibatches with the clipped losses (Schulman et al. 2017, algorithm 1).
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * (1 - step / config.iterations)  # Huang et al. 2022, detail 4
            shuffle = run.generator(config.seed, f"minibatches {step}")
            order = [torch.randperm(len(responses), generator=shuffle) for _ in range(config.epochs)]
            totals = torch.zeros(7, device=device)
            done = learned = 0
            for minibatch in [m for epoch in order for m in epoch.split(config.minibatch)]:
                tokens = mask[minibatch].sum()
                approx_kl = torch.zeros((), device=device)
                for piece in data.micro_batches(minibatch.tolist(), lengths, config.micro_batch):
                    now = rollout.take(piece, max(lengths[i] for i in piece))
                    share = now.mask.sum() / tokens  # a mean over the minibatch's tokens, not over this piece's
                    logprobs, entropies, values = learner(now.inputs, now.targets, now.mask, config.temperature)
                    policy_loss, policy_stats = kernels.ppo_clip_loss(
                        logprobs, now.logprobs, now.advantages, now.mask, clip=config.clip
                    )
                    value_loss, value_stats = kernels.clipped_value_loss(
                        values, now.values, now.returns, now.mask, clip=config.value_clip
                    )
                    entropy = masked_mean(entropies, now.mask)
                    loss = policy_loss + config.value_weight * value_loss - config.entropy * entropy
                    (share * loss).backward()  # Schulman et al. 2017, eq. 9
                    approx_kl += share * policy_stats["approx_kl"]
                    stats = [policy_loss, value_loss, entropy, policy_stats["clip_fraction"]]
                    stats += [value_stats["clip_fraction"], policy_stats["approx_kl"]]
                    totals[:6] += share * torch.stack(stats).detach()
                if step < config.value_warmup:  # advantages from a bad critic would undo the policy (Zheng et al. 2023)
                    policy.zero_grad()
                norm = nn.utils.clip_grad_norm_(learner.parameters(), config.grad_clip)  # Huang et al. 2022, detail 11
                this.stop_if_not_finite(step, norm, learner, optimizer)
                optimizer.step()
                optimizer.zero_grad()
                totals[6] += norm
                done, learned = done + 1, learned + sum(len(samples[i].tokens) for i in minibatch)
                if config.early_stop_kl and approx_kl > config.early_stop_kl:
                    break

            # 6. What happened; and a β for the next round (Ziegler et al. 2019, section 2.2).
            measured = ("policy_loss", "value_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl")
            metrics = dict(zip((*measured, "grad_norm"), (totals / done).tolist(), strict=True))
            tokens, finished = sum(len(sample.tokens) for sample in samples), time.monotonic()
            metrics |= {
                "score": scores.mean().item(),
                "kl": kl,
                "kl_k3": losses.kl_k3(old_logprobs, ref_logprobs, mask).mean().item(),
                "beta": learner.beta.item(),
                "explained_variance": losses.explained_variance(rollout.values, returns, mask).item(),
                "response_length": tokens / len(responses),
                "unended": unended.float().mean().item(),
                "minibatches": done,
                "rollout_tokens_per_second": tokens / (rolled_out - began),
                "learning_tokens_per_second": learned / (finished - rolled_out),
            }
            if not config.data:
                texts = [response_text(y, tokenizer) for _, y in responses]
                metrics["true_reward"] = sum(map(reviews.true_reward, texts)) / len(texts)
            if config.kl_target:
                adapted = losses.adapt_kl_coefficient(
                    metrics["beta"], kl, config.kl_target, len(responses), config.kl_horizon
                )
                learner.beta.fill_(adapted)
            this.log(step + 1, metrics)

    # 7. What came of it: policy and reference answer the same new prompts.
    with this.stage("evaluation"), kernels.use(config.kernels):
        result, answers = evaluate.compare(
            policy,
            reference,
            tokenizer,
            new_prompts,
            config.max_new_tokens,
            config.seed,
            true_reward=None if config.data else reviews.true_reward,
            score=lambda responses: score(config, reward_models, responses, tokenizer).tolist(),
            temperature=config.temperature,
        )
    stop_if_collapsed(config, this, result["kl"], not any(answer["policy"] for answer in answers))
    save_pretrained(policy, tokenizer, this.folder / "model")
    if learner.critic is not None:
        save_pretrained(learner.critic, tokenizer, this.folder / "critic")
    report(config, this, result | {"data": dict(notes)}, answers)


def token_logprobs(model: GPT, hidden: Tensor, targets: Tensor, mask: Tensor, temperature: float, entropy=False):
    """log π(targets) at the mask's tokens [B, T], 0 elsewhere; with `entropy` a pair, the entropies too."""
    counted = targets.where(mask.bool(), IGNORE)
    shaped = hidden.flatten(0, 1), model.unembedding, counted.flatten()
    results = kernels.token_logprobs(*shaped, temperature=temperature, entropy=entropy)
    return tuple(x.view_as(targets) for x in results) if entropy else results.view_as(targets)


@torch.no_grad()
def look(learner: Learner, reference: GPT, batch: data.Batch, lengths: list[int], config: Config):
    """The critic's values and log π_ref, each [B, T]."""
    values, ref_logprobs = torch.zeros_like(batch.mask), torch.zeros_like(batch.mask)
    for piece in data.micro_batches(list(range(len(lengths))), lengths, 4 * config.micro_batch):
        length = max(lengths[i] for i in piece)
        inputs, targets, mask = (x[piece, :length] for x in batch)
        values[piece, :length] = learner.values(inputs)
        with run.autocast(inputs.device):
            hidden = reference.hidden(inputs)
            ref_logprobs[piece, :length] = token_logprobs(reference, hidden, targets, mask, config.temperature)
    return values, ref_logprobs


def estimate_advantages(config: Config, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Advantages, and the critic's targets, each [B, T]."""
    if config.advantage == "gae":
        return losses.gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    # the whole response is one action, whose return is its score less β times its KL
    compare = {"rloo": losses.rloo_advantages, "grpo": losses.grpo_advantages}[config.advantage]
    return compare(rewards.sum(1), config.group)[:, None] * mask, torch.zeros_like(mask)


def score(config: Config, reward_models: list, responses: list, tokenizer) -> Tensor:
    """The weighted sum of the rewards of (prompt, response) tokens [N]. Raises UserError where one is not finite."""
    total = torch.zeros(len(responses))
    for weight, model in zip(config.reward_weights, reward_models, strict=True):
        if model is None:
            rewards = torch.tensor([reviews.true_reward(response_text(y, tokenizer)) for _, y in responses])
        else:
            heads = evaluate.response_scores(model, responses)
            rewards = heads.mean(1) - config.doubt * heads.std(1, correction=0)
        total += weight * rewards
    require(bool(total.isfinite().all()), "the weighted scores of --reward are no finite numbers")
    return total


def stop_if_collapsed(config: Config, this: Run, kl: float, empty: bool) -> None:
    """Raise UserError where nothing good can follow."""
    good = this.folder / "model"
    hint = "start again with a higher --beta or a lower --lr, in another --out"
    hint += f" (the last good policy is in {good})" if good.exists() else ""
    require(not empty, f"the policy has collapsed: every response is empty; {hint}")
    require(kl <= config.max_kl, f"the policy has collapsed: its KL of {kl:.3g} nats is beyond --max-kl; {hint}")


# ---- before the loop -------------------------------------------------------------------------------------------------


def read_prompts(config: Config) -> tuple[list[str], list[str]]:
    """Prompts to learn from, and others for the report."""
    if config.data:
        prompts, _ = data.read_prompts(config.data)
    else:
        rng = random.Random(f"ppo {config.seed}")
        prompts = [reviews.sample_prompt(rng) for _ in range(config.iterations * config.batch_size // config.group)]
    return prompts, evaluate.new_prompts(config.data, config.eval_prompts, config.seed)


def first_reward_model(config: Config, this: Run) -> str:
    """The reward model of a run without --reward, in OUT/rm: trained now if it is not there yet."""
    folder = this.folder / "rm"
    if not (folder / "report.json").exists():
        say(f"no --reward: a reward model first, in {folder}")
        names = ("data", "seed", "device", "kernels", "resume", "max_new_tokens")
        same = {name: getattr(config, name) for name in names}
        small = {"lr": 1e-4} if config.data and not config.init else {}  # what train_rm.py takes for a model of its own
        init = config.init or str(this.folder / "sft")
        train_rm.train(train_rm.Config(out=str(folder), init=init, pairs=config.rm_pairs, **same, **small))
    this.add_seconds(folder, "reward model")
    return str(folder)


def load_reward_models(config: Config, names: tuple[str, ...], policy: GPT, tokenizer) -> list[ScalarGPT | None]:
    """The model in each folder, None for the task's true reward. Raises UserError where one does not fit the policy."""
    models = [None if name == "true" else evaluate.load_reward_model(name, policy, tokenizer) for name in names]
    several = any(model is not None and len(model.score.weight) > 1 for model in models)
    require(not config.doubt or several, "--doubt needs a --reward with several heads (train_rm.py --heads)")
    return models


def new_critic(config: Config, policy: GPT, reward_models: list[ScalarGPT | None]) -> ScalarGPT | None:
    """A network that starts from the reward model, which knows what a response is worth (Stiennon et al. 2020); or from
    the policy with a head that says 0; or such a head on the policy itself; or none."""
    if config.advantage != "gae":
        return None
    knows = next((model for model in reward_models if model is not None), None)
    if config.critic == "network" and knows is not None:
        critic = copy.deepcopy(knows)
        critic.score.weight = nn.Parameter(critic.score.weight.detach().mean(0, keepdim=True))
        critic.score.out_features = 1
        return critic
    critic = ScalarGPT(copy.deepcopy(policy) if config.critic == "network" else policy)
    nn.init.zeros_(critic.score.weight)
    return critic


def report(config: Config, this: Run, result: dict, answers: list[dict]) -> None:
    """Write report.json and report.png, print the table and three prompts with both answers."""
    metrics = this.metrics()
    rewards = {"score": "score"}
    if true := result.get("true_reward"):
        # in one unit: what the reward model believes and what is so part where the policy games it
        for row in metrics:
            row["true_reward_std"] = (row["true_reward"] - true["reference"]) / (true["reference_std"] or 1.0)
        rewards["true_reward_std"] = "true reward, in reference std"
    curves = functools.partial(evaluate.curves, metrics, xlabel="round")
    panels = [
        curves(rewards, "reward"),
        curves({"kl": "k1", "kl_k3": "k3"}, "KL to the reference, nats a response"),
        curves({"entropy": "π_θ"}, "entropy, nats a token"),
        curves({"clip_fraction": "policy", "value_clip_fraction": "value"}, "share clipped"),
        curves({"value_loss": "value"}, "value loss"),
        curves({"explained_variance": "critic"}, "explained variance of the returns"),
        curves({"response_length": "tokens"}, "response length"),
        curves({"unended": "share"}, "responses without end-of-text"),
        curves({"approx_kl": "π_old, π_θ"}, "KL within a round, nats a token"),
        curves({"beta": "β"}, "β"),
        curves({"rollout_tokens_per_second": "rollout", "learning_tokens_per_second": "learning"}, "tokens a second"),
    ]
    if true:
        after = {name: [row[f"{name}_true_reward"] for row in answers] for name in ("reference", "policy")}
        panels.append(evaluate.histograms(after, "true reward, before and after", "true reward"))
    evaluate.plot(panels, this.folder / "report.png")
    this.report({**result, "samples": answers[:3]})
    evaluate.print_samples(answers[:3])
    say(f"\n{evaluate.comparison_table(result)}\n\n{evaluate.seconds_line(this.seconds)}")
    say(f"model, metrics, report.json and report.png are in {this.folder}; try it:")
    prompt = "your prompt" if config.data else answers[0]["prompt"]
    say(f"  python -m nanopref.generate --model {shlex.quote(str(this.folder))} --prompt {shlex.quote(prompt)}")


if __name__ == "__main__":
    run.main(train, tyro.cli(Config, description=__doc__))
