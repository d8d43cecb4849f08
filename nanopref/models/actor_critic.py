"""Policy and critic, side by side or on one trunk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nanopref.data.groups import Batch
from nanopref.models.checkpoint import load, load_scalar, set_up
from nanopref.models.frozen import placed, thawed, twin
from nanopref.models.language import LM
from nanopref.models.scalar import ScalarModel
from nanopref.running import parallel, sharding


class Learner(nn.Module):
    """All that learns, and what else --resume must find again: β, which may adapt, and what earlier rounds left."""

    def __init__(self, policy: LM, critic: ScalarModel | None, beta: float):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.register_buffer("beta", torch.tensor(beta, dtype=torch.float64))
        self.register_buffer("baseline", torch.zeros((), dtype=torch.float64))  # what --advantage reinforce expects
        self.replayed: list[tuple] = []  # answers of earlier rounds, the last first

    @torch.no_grad()
    def remember(self, answers: Sequence[tuple], returns: Tensor) -> None:
        """Answers to learn from again, and a round's returns [B], whose mean the baseline goes half the way to."""
        self.replayed = [tuple(answer) for answer in answers]  # plain, as a state, which is JSON, needs them
        self.baseline.lerp_(returns.mean().double(), 0.5)

    def get_extra_state(self) -> list[tuple]:
        return self.replayed

    def set_extra_state(self, state: list[tuple]) -> None:
        self.replayed = [tuple(answer) for answer in state]

    def forward(self, batch: Batch, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        """log π_θ of the targets, entropy, and V before each target: each [B, T], float32."""
        with parallel.autocast(self.policy):
            hidden = self.policy.hidden(batch.inputs)
            logprobs, entropies = self.policy.logprobs(hidden, batch.targets, batch.mask, temperature, entropy=True)
        return logprobs, entropies, self.values(batch, hidden)

    def values(self, batch: Batch, hidden: Tensor | None = None) -> Tensor:
        """V [B, T], float32; 0 without a critic. `hidden` saves a critic that is a head on the policy a second look."""
        if self.critic is None:
            return torch.zeros_like(batch.mask)
        with parallel.autocast(self.critic):
            if hidden is None or self.critic.transformer is not self.policy:
                hidden = self.critic.transformer.hidden(batch.inputs)
            return self.critic.read(hidden)[..., 0]


def new_critic(kind: str, policy: LM, reward_models: Sequence[ScalarModel], config: Any) -> ScalarModel:
    """A critic for PPO. "network": one that starts from a reward model, which knows what a response is worth (Stiennon
    et al. 2020), or without one from the policy with a head that says 0. "head": such a head on the policy itself.

    With --lora a network has adapters of its own, on the memory of what it starts from. The config has ModelFlags.
    """
    if kind == "network" and reward_models:
        judge, copied = reward_models[0], twin if config.lora else thawed
        critic = load_scalar(judge.name)[0] if sharding.spread(judge) else copied(judge)
        critic.score = nn.Linear(critic.config.n_embd, 1, bias=False)
        critic.score.weight = nn.Parameter(parallel.full(judge.score.weight.detach()).mean(0, keepdim=True))
        critic.bias = judge.bias.mean(0, keepdim=True)
    elif kind == "network":
        read = sharding.spread(policy)
        critic = ScalarModel(load(policy.name, context=policy.context)[0] if read else twin(policy))
        nn.init.zeros_(critic.score.weight)
    else:
        critic = ScalarModel(policy, writes=True)
        nn.init.zeros_(critic.score.weight)
    if kind == "network":
        set_up(critic.transformer, config)
    return placed(critic, policy.device)
