"""TensorBoard: what a run logs, under the names that TRL's trainers give the same figures, so that runs of both lie
in one board: `tensorboard --logdir out`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopref.running.flags import UserError

TAGS = {  # by stage, as Hugging Face's callback for TensorBoard shows what a trainer logs, after train/ or eval/
    "sft": {"lr": "learning_rate"},
    "reward model": {"lr": "learning_rate", "score_gap": "margin"},
    "dpo": {
        "lr": "learning_rate",
        "chosen_reward": "rewards/chosen",
        "rejected_reward": "rewards/rejected",
        "accuracy": "rewards/accuracies",
        "margin": "rewards/margins",
    },
    "ppo": {  # PPOTrainer's, which later versions of TRL have not
        "score": "objective/scores",
        "kl": "objective/kl",
        "entropy": "policy/entropy_avg",
        "approx_kl": "policy/approxkl_avg",
        "clip_fraction": "policy/clipfrac_avg",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
        "value_clip_fraction": "val/clipfrac_avg",
    },
}


def tag(stage: str, name: str) -> str:
    """Where the board shows what a stage logs by this name; what TRL has no name for keeps its own."""
    own = name.removeprefix("held_out_")
    return f"{'train' if own == name else 'eval'}/{TAGS.get(stage, {}).get(own, own)}"


def writer_class() -> type:
    """torch's SummaryWriter. Raises UserError where the package that it needs is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: the package is missing; pip install 'nanopref[tensorboard]'") from None
    return SummaryWriter


def open_board(folder: Path) -> Any:
    """A new event file, which has a board forget all steps of earlier ones in the folder, since a run that was killed
    may have gone further than the state that it is resumed from. (Removing them would confuse a board that is open.)"""
    return writer_class()(folder, purge_step=0)


def show(board: Any, stage: str, rows: Sequence[dict[str, float]]) -> None:
    """Write rows of metrics.jsonl, and have them on the disk before the process can be killed."""
    for row in rows:
        for name in row.keys() - {"step"}:
            board.add_scalar(tag(stage, name), row[name], row["step"])
    board.flush()
