"""One shape for every preference: a group is a prompt, K answers to it, and what was said of them.

A pair has K = 2 answers, the better one first; a ranking K in order; ratings K with a number each; what SFT imitates,
or somebody called good or bad, K = 1.
Groups of different K may share a batch. In tokens, all rows (a prompt and one answer) stand in one flat tensor.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanopref.data import chat
from nanopref.data.chat import encode_answer, encode_prompt
from nanopref.data.dialogues import Dialogue, as_json, turns
from nanopref.data.packing import Packed, pack
from nanopref.data.tokenizer import Tokenizer
from nanopref.running import parallel
from nanopref.running.flags import UserError, require

# The tokens of a prompt and of an answer to it; of a conversation also which of those behind the prompt count.
Row = tuple[list[int], list[int]] | tuple[list[int], list[int], list[bool]]
USUAL = 256  # tokens of a row up to which --micro-batch rows are held at once; of longer ones fewer
FAR = 1e30  # between answers in order: more than any scale of ratings holds


class Group(NamedTuple):
    prompt: str
    responses: tuple[str, ...]  # the best first, where they were compared; none, where only the prompt is known
    margin: float = 1.0  # by how much the first is to be better, on whatever scale the file uses: see --margin
    scores: tuple[float, ...] = ()  # ratings, one a response; or of a single one whether it is good: 1 or 0
    prompts: tuple[str, ...] = ()  # where each response answers another prompt, of which only reward models can learn
    whole: bool = False  # where K = 1, the prompt is to be learnt too, as in plain text, which has none, or a dialogue
    turns: bool = False  # where K = 1, all that the assistant says in the prompt is to be learnt too
    source: str = ""  # the text that prompt and response were cut from
    about: tuple[tuple[str, Any], ...] = ()  # what else a file is to say of it, for people to read

    def asked(self) -> tuple[str, ...]:
        """What each of the responses answers."""
        return self.prompts or (self.prompt,) * len(self.responses)

    def said(self) -> tuple[float, ...]:
        """A number for each response. Where the order says all, each is ahead of the next beyond all measure, and what
        is to be imitated is beyond what any label says."""
        order = tuple(-FAR * k for k in range(len(self.responses)))
        return self.scores or ((FAR,) if len(order) == 1 else order)


def write_groups(groups: Sequence[Group]) -> str:
    """Groups that answer one prompt as JSON Lines: pairs by their names, without margins that say nothing."""
    lines = []
    for group in groups:
        if len(group.responses) == 1:
            row = {"completion": group.responses[0]} | ({"label": int(group.scores[0])} if group.scores else {})
        elif len(group.responses) == 2 and not group.scores:
            row = dict(zip(("chosen", "rejected"), group.responses, strict=True))
        else:
            row = {"responses": group.responses} | ({"scores": group.scores} if group.scores else {})
        row |= ({} if group.margin == 1 else {"margin": group.margin}) | dict(group.about)
        lines.append(json.dumps({"prompt": as_json(group.prompt), **row}, ensure_ascii=False) + "\n")
    return "".join(lines)


def split(groups: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """(for training, held out): a tenth of the prompts, with all their groups, is held out.

    Which tenth depends on the prompts alone (on the texts, where groups are texts or were cut from them), so that no
    stage and no seed trains on what another holds out. Raises UserError where there are fewer than two prompts.
    """
    digests = [hashlib.sha256((g.source or g.prompt or "".join(g.responses[:1])).encode()).digest() for g in groups]
    ordered = sorted(set(digests))
    if len(ordered) < 2:
        raise UserError("the data hold only one prompt, but one is needed to train on and one to hold out")
    held_out = set(ordered[: max(1, round(len(ordered) / 10))])
    chosen = [digest in held_out for digest in digests]
    return (
        [group for group, held in zip(groups, chosen, strict=True) if not held],
        [group for group, held in zip(groups, chosen, strict=True) if held],
    )


def as_labels(groups: Sequence[Group]) -> list[Group]:
    """Each answer a group of its own. Of a pair the better one is good, the other bad; labels stay as they are."""
    return [
        group._replace(prompt=prompt, responses=(response,), scores=(score,), prompts=(), whole=False, turns=False)
        for group in groups
        for prompt, response, score in zip(group.asked(), group.responses, group.scores or (1.0, 0.0), strict=True)
    ]


def standardised(path: str, groups: Sequence[Group], held_out: Sequence[Group]) -> tuple[list[Group], list[Group]]:
    """Both parts with their ratings brought to mean 0 and deviation 1 over the first, whatever scale the file uses.

    Raises UserError, which names the file, where all are equal.
    """
    ratings = np.array([score for group in groups for score in group.scores])
    mean, spread = ratings.mean(), ratings.std()
    differ = bool(spread > 1e-9 * abs(ratings).max())
    require(differ, f"{path}: all ratings are equal, so there is nothing to learn from them")
    first, second = (
        [group._replace(scores=tuple(float((score - mean) / spread) for score in group.scores)) for group in part]
        for part in (groups, held_out)
    )
    return first, second


def unrelated(groups: Sequence[Group]) -> list[Group]:
    """Each prompt with the answer to another prompt (where there is one), in the same order."""
    order = sorted(range(len(groups)), key=lambda i: hashlib.sha256(groups[i].prompt.encode()).digest())
    found, end = list(groups), 0
    for _, block in groupby(order, key=lambda i: groups[i].prompt):  # those of one prompt take what stands behind them
        block = list(block)
        others, end = len(order) - len(block), end + len(block)
        for ahead, i in enumerate(block):
            other = order[(end + (ahead % others if others else ahead + 1)) % len(order)]
            found[i] = groups[i]._replace(responses=groups[other].responses)
    return found


# ---- tokens ----------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """Rows of some groups, padded on the right: inputs[:, t] is followed by targets[:, t], which counts where the mask
    is 1, that is on response tokens alone."""

    tokens: Tensor  # [B, T + 1]
    mask: Tensor  # [B, T]
    last: Tensor  # [B]: where in `tokens` each row's last token stands
    said: Tensor  # [B]: of each row, see Group.said
    margins: Tensor  # [B]: by how much the first row of each group is to be better; 0 for the others
    sizes: list[int]  # the rows of each group, whose sum is B
    packed: Packed | None = None  # the same tokens with what a group's rows share once, where that pays

    @property
    def inputs(self) -> Tensor:
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        return self.tokens[:, 1:]

    def to(self, device: torch.device) -> "Batch":
        tensors = (x.to(device, non_blocking=True) for x in self[:-2])
        return Batch(*tensors, self.sizes, self.packed and self.packed.to(device))


@dataclass
class Encoded:
    """Groups in tokens: N rows of G groups, one after the other."""

    tokens: Tensor  # int32 [all]
    counted: Tensor  # bool [all]: whether each is to be learnt, as those of a response
    starts: Tensor  # [N + 1]: where each row begins
    prompt_lengths: Tensor  # [N]: tokens before the first that counts
    firsts: Tensor  # [G + 1]: the first row of each group
    said: Tensor  # [N], and
    margins: Tensor  # [N]: as in Batch

    @classmethod
    def pack(
        cls, groups: Sequence[Sequence[Row]], said: Sequence[float] = (), margins: Sequence[float] = ()
    ) -> "Encoded":
        """`said` and `margins` of the rows; 0 where nothing was said."""
        rows = [row for group in groups for row in group]
        flat = [torch.tensor([*prompt, *answer], dtype=torch.int32) for prompt, answer, *_ in rows]
        counts = [
            [False] * len(prompt) + (marks[0] if marks else [True] * len(answer)) for prompt, answer, *marks in rows
        ]
        starts = torch.tensor([0, *map(len, flat)]).cumsum(0)
        firsts = torch.tensor([0, *map(len, groups)]).cumsum(0)
        prompt_lengths = torch.tensor([len(prompt) for prompt, *_ in rows], dtype=torch.long)
        tokens = torch.cat(flat) if flat else torch.empty(0, dtype=torch.int32)
        counted = torch.tensor([count for row in counts for count in row], dtype=torch.bool)
        told = (torch.tensor([*x, *[0.0] * (len(rows) - len(x))]) for x in (said, margins))
        return cls(tokens, counted, starts, prompt_lengths, firsts, *told)

    def __len__(self) -> int:
        return len(self.firsts) - 1

    @property
    def row_lengths(self) -> Tensor:
        return self.starts.diff()

    @property
    def response_lengths(self) -> Tensor:
        """Tokens of each row that count."""
        before = F.pad(self.counted.cumsum(0), (1, 0))
        return before[self.starts].diff()

    def lengths(self) -> list[int]:
        """Tokens of the longest row of each group."""
        rows = self.row_lengths.tolist()
        return [max(rows[i:j]) for i, j in pairwise(self.firsts.tolist())]

    def rows(self, groups: Sequence[int]) -> list[int]:
        """The row numbers of these groups."""
        return [row for g in groups for row in range(self.firsts[g], self.firsts[g + 1])]

    @property
    def repeated(self) -> float:
        """The share of all tokens that are of a prompt which stands in an earlier row of its group."""
        again = self.prompt_lengths.sum() - self.prompt_lengths[self.firsts[:-1]].sum()
        return float(again / max(1, len(self.tokens)))

    def single_rows(self) -> "Encoded":
        """The same rows as groups of one."""
        return replace(self, firsts=torch.arange(len(self.starts)))

    def digest(self) -> str:
        """What tells these data from others."""
        found = hashlib.sha256()
        for x in vars(self).values():
            found.update(x.numpy())
        return found.hexdigest()

    def collate(self, groups: Sequence[int]) -> Batch:
        """The rows of these groups as one batch."""
        rows = self.rows(groups)
        starts, ends = self.starts[rows], self.starts[1:][rows]
        tokens, counted = (
            pad([x[i:j] for i, j in zip(starts, ends, strict=True)]) for x in (self.tokens, self.counted)
        )
        sizes, lengths = (self.firsts[1:] - self.firsts[:-1])[list(groups)].tolist(), ends - starts
        told = self.said[rows], self.margins[rows]
        return Batch(tokens, counted[:, 1:].float(), lengths - 1, *told, sizes, pack(tokens, lengths.tolist(), sizes))


def pad(sequences: Sequence[Tensor | list[int]]) -> Tensor:
    """Sequences of tokens -> int64 [B, T], padded on the right with 0."""
    if not sequences:  # as one process of several may have, for which a model must do something too
        return torch.zeros(0, 2, dtype=torch.long)
    return pad_sequence([torch.as_tensor(x, dtype=torch.long) for x in sequences], batch_first=True)


def grouped(x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """One number (or vector) a row [B, …], and the rows of each group [G] -> [G, K, …] with 0 where a group has fewer
    rows, and a mask [G, K] of where it has one."""
    most = max(sizes, default=2)  # no groups at all are no pairs
    there = (torch.arange(most) < torch.tensor(sizes)[:, None]).to(x.device)
    alike = min(sizes, default=2) == most
    return x.view(*there.shape, *x.shape[1:]) if alike else pad_sequence(x.split(sizes), batch_first=True), there


def micro_batches(groups: Sequence[int], lengths: Sequence[int], size: int, share: bool = False) -> list[list[int]]:
    """Cut a batch into pieces of at most `size` groups, alike in length so that little of them is padding, and of fewer
    where these are longer than USUAL, so that what a piece takes in memory is bounded.

    With `share` each process takes its part of them; together they cover the batch once, in equally many pieces each,
    of which some may be empty, since processes that exchange weights or gradients must do so equally often.
    """
    ordered, n = sorted(groups, key=lambda i: lengths[i]), parallel.world_size() if share else 1
    parts: list[list[list[int]]] = [[] for _ in range(n)]
    for pieces, part in zip(parts, (ordered[k::n] for k in range(n)), strict=True):
        for i in part:
            most = max(1, size * USUAL // max(USUAL, int(lengths[i])))
            if not pieces or len(pieces[-1]) >= most:
                pieces.append([])
            pieces[-1].append(i)
    mine = parts[parallel.rank() if share else 0]
    return mine + [[]] * (max(map(len, parts)) - len(mine))


# ---- from text to tokens ---------------------------------------------------------------------------------------------


def encode(groups: Sequence[Group], tokenizer: Tokenizer, block_size: int) -> tuple[Encoded, Counter]:
    """Tokens of each group's rows, no row longer than block_size; and what was cut.

    What is to be learnt whole, K = 1, becomes one stream, end-of-text behind each text, that is cut into blocks in
    which every token but the first counts: groups of K = 1 behind the others. Of a conversation for a model with a chat
    template, or whose turns alone are to be learnt, what the assistant says counts.
    """
    encoded, said, margins, stream, notes = [], [], [], [], Counter()
    for group in groups:
        alone = len(group.responses) == 1 and isinstance(group.prompt, Dialogue)
        if alone and (group.turns or (group.whole and tokenizer.template)):
            rows = [_conversation(group, tokenizer, block_size, notes)]
        elif group.whole and len(group.responses) == 1:
            stream += (
                tokenizer.begin + tokenizer.encode(group.prompt) + encode_answer(tokenizer, "", group.responses[0])
            )
            continue
        elif group.prompts:
            asked = zip(group.prompts, group.responses, strict=True)
            rows = [row for x, y in asked for row in _fit(tokenizer, x, (y,), block_size, notes)]
        else:
            rows = _fit(tokenizer, group.prompt, group.responses, block_size, notes)
        encoded.append(rows)
        said += group.said()
        margins += [group.margin] + [0.0] * (len(rows) - 1)
    for i in range(0, len(stream) - 1, block_size - 1):  # a block's last token is the next one's first
        encoded.append([(stream[i : i + 1], stream[i + 1 : i + block_size])])
    return Encoded.pack(encoded, said, margins), +notes


def prepare(
    name: str, groups: Sequence[Group], held_out: Sequence[Group], notes: Counter, tokenizer: Tokenizer, block_size: int
) -> tuple[Encoded, Encoded]:
    """`encode` of both parts of a stage's data; what was cut joins `notes`, and all of them are said."""
    parts = []
    for part in (groups, held_out):
        encoded, cut = encode(part, tokenizer, block_size)
        parts.append(encoded)
        notes.update(cut)
    what = "pairs" if all(len(group.responses) == 2 for group in groups) else "groups"
    parallel.say(f"{name}: {len(parts[0]):,} {what}, {len(parts[1]):,} more held out")
    for note, count in notes.items():
        parallel.say(f"  {count:,} {note}")
    return parts[0], parts[1]


def _fit(tokenizer: Tokenizer, prompt: str, responses: Sequence[str], block_size: int, notes: Counter) -> list[Row]:
    """A prompt and its responses, cut so that no row is longer than block_size, and what was cut is counted.

    A prompt that is too long is shortened, the same for all responses. A response that fills the context by itself
    loses its end, and with it the token that ends it, which it does not reach.
    """
    answers = [encode_answer(tokenizer, prompt, response) for response in responses]
    notes["answers cut on the right to fit the context"] += sum(len(y) >= block_size for y in answers)
    answers = [y[: block_size - 1] for y in answers]
    asked = encode_prompt(tokenizer, prompt, block_size - max(map(len, answers)), notes)
    return [(asked, y) for y in answers]


def _conversation(group: Group, tokenizer: Tokenizer, block_size: int, notes: Counter) -> Row:
    """All of a conversation as one row; or its last turn, where that is too long by itself."""
    (response,) = group.responses
    said = turns(group.prompt + response) if group.whole else [*group.prompt.messages, ("assistant", response.strip())]
    while said and said[-1][0] != "assistant":
        said.pop()
    tokens, counted, shortened = chat.encode_turns(tokenizer, said, block_size)
    if not tokens:
        return _fit(tokenizer, Dialogue(said[:-1]), said[-1][1:], block_size, notes)[0]
    notes[chat.SHORTENED] += shortened
    start = counted.index(True)
    return tokens[:start], tokens[start:], counted[start:]
