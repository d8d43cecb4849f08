"""JSON Lines in, padded batches out.

A file is `.jsonl` or `.jsonl.gz`, one object a row, in the field names that the ecosystem uses:

    pairs      {"prompt": …, "chosen": …, "rejected": …}, and perhaps a "margin": by how much
               {"chosen": …, "rejected": …}   two whole dialogues, as in Anthropic's HH: what they share is the prompt
    responses  {"prompt": …, "response": …}
    text       {"text": …}
    labels     {"text": …, "label": …}   1 or 0: whether the text is what people want

Other fields are ignored. A row that does not fit is refused with the file, the line and the reason; what real data
makes necessary (a prompt cut on the left, an empty answer dropped) is counted, and the counts are for the user to see.
"""

import codecs
import gzip
import hashlib
import json
import os
import random
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nanopref import run
from nanopref.run import UserError
from nanopref.tokenizer import Tokenizer

TURN = "\n\nAssistant:"  # what opens an answer in an HH dialogue
PASSAGE, OPENING = 32, 12  # words of a passage, at least, and of the prompt that it begins with


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    margin: float = 1.0  # by how much, on whatever scale the file uses; only reward models ask
    rejected_prompt: str | None = None  # where `rejected` answers another prompt, of which only reward models can learn

    @property
    def prompts(self) -> tuple[str, str]:
        """What each of the two answers."""
        return self.prompt, self.prompt if self.rejected_prompt is None else self.rejected_prompt


class Response(NamedTuple):
    """What SFT imitates. `whole`: the prompt is to be learnt too, as in plain text, which has none, or a dialogue."""

    prompt: str
    response: str
    whole: bool = False
    source: str = ""  # the text that both were cut from
    good: bool | None = None  # that text's label


Row = tuple[list[int], list[int]]  # the tokens of a prompt and of its response


def read_rows(path: str | Path) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) for each row. Raises UserError where the file cannot be read or a row is no JSON object."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'a folder, not a file' if path.is_dir() else 'no such file'}")
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as f:
            for number, line in enumerate(f, 1):
                where = f"{path}, line {number}"
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode())
                except UnicodeDecodeError:
                    raise UserError(f"{where}: not valid UTF-8") from None
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error})") from None
                if not isinstance(row, dict):
                    raise UserError(f"{where}: must be an object with named fields, found a {type(row).__name__}")
                yield where, row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or cut off after line {number} ({error})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def _field(where: str, row: dict, name: str) -> str:
    if name not in row:
        raise UserError(f"{where}: has no field {name!r}")
    value = row[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: {name!r} must be text, found a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: {name!r} holds half of a surrogate pair, which no text can") from None
    return value


def _margin(where: str, row: dict) -> float:
    value = row.get("margin")
    value = 1.0 if value is None else value
    if type(value) not in (int, float) or not 0 <= value < 1e30:  # an int of JSON may be too large for a float
        raise UserError(f"{where}: 'margin' must be a number of at least 0, found {value!r}")
    return float(value)


def read_pairs(path: str | Path) -> tuple[list[Pair], Counter]:
    """All pairs of a file, and how many rows were dropped and why. Raises UserError for a row that does not fit."""
    pairs, notes = [], Counter()
    for where, row in read_rows(path):
        if "text" in row and "chosen" not in row:
            raise UserError(
                f"{where}: a text, no pair; train_rm.py learns from texts with labels, and then --reward "
                "names what it learnt"
            )
        chosen, rejected = _field(where, row, "chosen"), _field(where, row, "rejected")
        if chosen == rejected:
            raise UserError(f"{where}: 'chosen' and 'rejected' are equal, so the row says nothing")
        if not chosen.strip():
            raise UserError(f"{where}: 'chosen' is empty")
        if "prompt" in row:
            pairs.append(Pair(_field(where, row, "prompt"), chosen, rejected, _margin(where, row)))
        else:
            pair = split_dialogues(chosen, rejected)
            if pair is None:
                raise UserError(
                    f"{where}: has no field 'prompt', and the two share no dialogue up to a {TURN.strip()!r}"
                )
            if not pair.chosen.strip():
                notes["pairs dropped: the chosen answer is empty"] += 1
                continue
            if TURN in pair.chosen or TURN in pair.rejected:
                notes["pairs that part before the last turn (kept: the answer runs to the end)"] += 1
            pairs.append(pair._replace(margin=_margin(where, row)))
    if not pairs:
        raise UserError(f"{path}: holds no usable pair")
    return pairs, notes


def kind_of(path: str | Path) -> str:
    """What a file's first row says that it holds: pairs, dialogues, labels, text or responses. UserError if nothing."""
    first = next(read_rows(path), None)
    if first is None:
        raise UserError(f"{path}: holds no row")
    if "chosen" in first[1]:
        return "pairs" if "prompt" in first[1] else "dialogues"
    if "text" in first[1]:
        return "labels" if "label" in first[1] else "text"
    return "responses"


def split_dialogues(chosen: str, rejected: str) -> Pair | None:
    """Two whole dialogues -> what they share up to the answer in which they part, and the rest of each."""
    prompt = os.path.commonprefix([chosen, rejected])  # noqa: RUF071, which takes the two for paths
    # where one answer begins like the other, or one is a turn longer, the turn opens before the first difference
    cut = prompt.rfind(TURN)
    if cut < 0:
        return None
    cut += len(TURN)
    return Pair(chosen[:cut], chosen[cut:], rejected[cut:])


def read_responses(path: str | Path) -> tuple[list[Response], Counter]:
    """What to imitate, and how many rows were dropped and why. Raises UserError for a row that does not fit.

    Rows may be text, prompt and response, or pairs, whose chosen side counts: of two dialogues the whole of it. Texts
    with a label become passages, the good and the bad, which is what a reward model will judge.
    """
    kind = kind_of(path)
    if kind in ("pairs", "dialogues"):
        pairs, notes = read_pairs(path)
        return [Response(pair.prompt, pair.chosen, whole=kind == "dialogues") for pair in pairs], notes
    if kind == "labels":
        return read_passages(path)
    if kind == "text":
        found = [Response("", _field(where, row, "text"), whole=True) for where, row in read_rows(path)]
    else:
        fields = ("prompt", "response")
        found = [Response(*(_field(where, row, name) for name in fields)) for where, row in read_rows(path)]
    kept = [row for row in found if row.response.strip()]
    if not kept:
        raise UserError(f"{path}: holds no text")
    return kept, Counter({"rows dropped: no text": len(found) - len(kept)} if len(kept) < len(found) else {})


def read_passages(path: str | Path) -> tuple[list[Response], Counter]:
    """`passages` of a file of labelled texts, each with its text's label, and how many texts were too short."""
    found, notes = [], Counter()
    for where, row in read_rows(path):
        text, label = _field(where, row, "text"), row.get("label")
        if label not in (0, 1):
            raise UserError(f"{where}: 'label' must be 1 (good) or 0 (bad), found {label!r}")
        cut = [Response(*parts, source=text, good=bool(label)) for parts in passages(text)]
        notes[f"texts dropped: no sentence ends after its first {PASSAGE} words"] += not cut
        found += cut
    if not found:
        raise UserError(f"{path}: holds no text in which a sentence ends after its first {PASSAGE} words")
    return found, +notes


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Openings of a text and how each goes on: it is cut at the first end of a sentence after every 32 words, or after
    64, and the first 12 words of such a passage are the prompt. What is left at the end is dropped."""
    passage: list[str] = []
    for word in text.split():
        passage.append(word)
        if (len(passage) >= PASSAGE and word[-1] in ".!?") or len(passage) == 2 * PASSAGE:
            yield " ".join(passage[:OPENING]), " " + " ".join(passage[OPENING:])
            passage = []


def read_comparisons(path: str | Path) -> tuple[list[Pair], list[Pair], Counter]:
    """What a reward model can learn from: pairs, or labelled texts, of which each good passage meets a bad one.

    (for training, held out, how many rows were dropped and why). Raises UserError for a row that does not fit.
    """
    if kind_of(path) != "labels":
        pairs, notes = read_pairs(path)
        return *split(pairs), notes
    rows, notes = read_passages(path)
    parts = []
    for part in split(rows):
        random.Random(0).shuffle(part)  # or all passages of a text would meet those of one other
        good, bad = ([row for row in part if row.good == which] for which in (True, False))
        if not (good and bad):
            raise UserError(f"{path}: needs good and bad texts (label 1 and 0), to train on and to hold out")
        met = zip(good, bad, strict=False)  # what one side has more of is left over
        parts.append([Pair(a.prompt, a.response, b.response, rejected_prompt=b.prompt) for a, b in met])
        notes["passages dropped: more of one label than of the other"] += abs(len(good) - len(bad))
    return *parts, +notes


def read_prompts(path: str | Path) -> tuple[list[str], list[str]]:
    """(for training, held out): the prompts of a file's pairs, or of its labelled texts' passages, each once."""
    rows = read_passages(path)[0] if kind_of(path) == "labels" else read_pairs(path)[0]
    training, held_out = (dict.fromkeys(row.prompt for row in part) for part in split(rows))
    # passages of two texts may begin alike
    training, held_out = list(training), [prompt for prompt in held_out if prompt not in training]
    if not held_out:
        raise UserError(f"{path}: holds too few different prompts: there is none to hold out")
    return training, held_out


def write_pairs(pairs: Sequence[Pair]) -> str:
    """Pairs that answer one prompt as JSON Lines, without the margins that say nothing."""
    names = ("prompt", "chosen", "rejected")
    rows = [{k: v for k, v in pair._asdict().items() if k in names or (k == "margin" and v != 1)} for pair in pairs]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def split(rows: Sequence[Pair] | Sequence[Response]) -> tuple[list, list]:
    """(for training, held out): a tenth of the prompts, with all their rows, is held out.

    Which tenth depends on the prompts alone (on the texts, where rows are texts or were cut from them), so that no
    stage and no seed trains on what another holds out. Raises UserError where there are fewer than two prompts.
    """
    digests = [hashlib.sha256((getattr(row, "source", "") or row[0] or row[1]).encode()).digest() for row in rows]
    ordered = sorted(set(digests))
    if len(ordered) < 2:
        raise UserError("the data hold only one prompt, but one is needed to train on and one to hold out")
    held_out = set(ordered[: max(1, round(len(ordered) / 10))])
    chosen = [digest in held_out for digest in digests]
    return (
        [row for row, held in zip(rows, chosen, strict=True) if not held],
        [row for row, held in zip(rows, chosen, strict=True) if held],
    )


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens of a prompt; an empty one becomes end-of-text, after which anything may begin."""
    return tokenizer.encode(prompt) or [tokenizer.end_of_text]


def _fit(prompt: list[int], answers: list[list[int]], block_size: int, notes: Counter) -> tuple[list[int], ...]:
    """Cut a prompt and its answers so that no sequence is longer than block_size, and count what was cut.

    A prompt that is too long loses its beginning, the same for all answers. An answer that fills the context by itself
    loses its end, and with it the end-of-text, which it does not reach.
    """
    notes["answers cut on the right to fit the context"] += sum(len(answer) >= block_size for answer in answers)
    answers = [answer[: block_size - 1] for answer in answers]
    room = block_size - max(map(len, answers))
    notes["prompts cut on the left to fit the context"] += len(prompt) > room
    return (prompt[-room:], *answers)


def encode_pairs(pairs: Sequence[Pair], tokenizer: Tokenizer, block_size: int) -> tuple[list[tuple[Row, Row]], Counter]:
    """Tokens of each pair, the chosen row and the rejected one, end-of-text behind both answers, no row longer than
    block_size; and what was cut."""
    encoded, notes = [], Counter()
    for pair in pairs:
        prompt = encode_prompt(tokenizer, pair.prompt)
        chosen, rejected = ([*tokenizer.encode(x), tokenizer.end_of_text] for x in (pair.chosen, pair.rejected))
        if pair.rejected_prompt is None:  # what one prompt loses, both answers miss
            prompt, chosen, rejected = _fit(prompt, [chosen, rejected], block_size, notes)
            encoded.append(((prompt, chosen), (prompt, rejected)))
        else:
            other = encode_prompt(tokenizer, pair.rejected_prompt)
            encoded.append((_fit(prompt, [chosen], block_size, notes), _fit(other, [rejected], block_size, notes)))
    return encoded, +notes


def encode_responses(rows: Sequence[Response], tokenizer: Tokenizer, block_size: int) -> tuple[list[Row], Counter]:
    """Sequences (prompt, response) in tokens, none longer than block_size, in which the response is to be learnt.

    Rows become one sequence each, but those to be learnt whole become one stream, end-of-text behind each, that is cut
    into blocks in which every token but the first counts.
    """
    encoded, stream, notes = [], [], Counter()
    for row in rows:
        response = [*tokenizer.encode(row.response), tokenizer.end_of_text]
        if row.whole:
            stream += tokenizer.encode(row.prompt) + response
        else:
            encoded.append(_fit(encode_prompt(tokenizer, row.prompt), [response], block_size, notes))
    for i in range(0, len(stream) - 1, block_size - 1):  # a block's last token is the next one's first
        encoded.append((stream[i : i + 1], stream[i + 1 : i + block_size]))
    return encoded, +notes


class Batch(NamedTuple):
    """inputs, targets, mask, each [B, T]: inputs[:, t] is followed by targets[:, t], which counts where mask is 1."""

    inputs: Tensor
    targets: Tensor
    mask: Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self))


def collate(rows: Sequence[Row]) -> Batch:
    """(prompt, response) tokens -> one batch, padded on the right; only response tokens are in the mask."""
    tokens = pad([prompt + response for prompt, response in rows])
    mask = torch.zeros(tokens.shape)[:, 1:]
    for i, (prompt, response) in enumerate(rows):
        mask[i, len(prompt) - 1 : len(prompt) + len(response) - 1] = 1
    return Batch(tokens[:, :-1], tokens[:, 1:], mask)


def pad(sequences: Sequence[list[int]]) -> Tensor:
    """Sequences of tokens -> [B, T], padded on the right with 0."""
    tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
    for i, sequence in enumerate(sequences):
        tokens[i, : len(sequence)] = torch.tensor(sequence)
    return tokens


def pair_lengths(pairs: Sequence[tuple[Row, Row]]) -> list[int]:
    """Tokens of the longer row of each pair."""
    return [max(len(prompt) + len(response) for prompt, response in pair) for pair in pairs]


def micro_batches(rows: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """Cut a batch into pieces of at most `size` rows, alike in length so that little of them is padding."""
    ordered = sorted(rows, key=lambda i: lengths[i])
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def my_micro_batches(rows: list[int], lengths: Sequence[int], size: int) -> list[list[int]]:
    """`micro_batches`, of which each process takes its share; together they cover the batch once."""
    size = min(size, -(-len(rows) // run.world_size()))
    return micro_batches(rows, lengths, size)[run.rank() :: run.world_size()]
