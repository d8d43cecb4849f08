"""Groups of any K against plain lists: what is cut, what stands in a batch, and who gets which piece of it."""

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nanopref.data.groups import (
    Encoded,
    Group,
    encode,
    encode_prompt,
    grouped,
    micro_batches,
    prepare,
    split,
)
from nanopref.data.tokenizer import Tokenizer
from nanopref.running import parallel
from nanopref.running.flags import UserError

TOKENIZER = Tokenizer.train(["the film was good. the film was bad."], 270)
END = TOKENIZER.end_of_text
CUT_ANSWERS = "answers cut on the right to fit the context"
CUT_PROMPTS = "prompts cut on the left to fit the context"
words = st.lists(st.sampled_from(["the", " film", " was", " good", ".", "é"]), max_size=12).map("".join)
SIZES = st.sampled_from([1, 2, 4])


@st.composite
def some_groups(draw) -> list[Group]:
    """Groups of K = 1, 2 and 4; some whole, some with a prompt to each answer."""
    groups = []
    for k in draw(st.lists(SIZES, max_size=6)):
        answers = tuple(draw(st.lists(words, min_size=k, max_size=k)))
        own = tuple(draw(st.lists(words, min_size=k, max_size=k))) if draw(st.booleans()) else ()
        groups.append(Group(own[0] if own else draw(words), answers, prompts=own, whole=draw(st.booleans())))
    return groups


row_lists = st.tuples(*[st.lists(st.integers(0, 50), min_size=1, max_size=6)] * 2)
token_groups = st.lists(SIZES.flatmap(lambda k: st.lists(row_lists, min_size=k, max_size=k)), min_size=1, max_size=6)


def unpack(encoded: Encoded) -> list[list[tuple[list[int], list[int]]]]:
    """The same as lists: of groups, of rows, each a prompt and an answer."""
    tokens, starts = encoded.tokens.tolist(), encoded.starts.tolist()
    rows = [
        (tokens[i : i + n], tokens[i + n : j])
        for i, j, n in zip(starts, starts[1:], encoded.prompt_lengths.tolist(), strict=False)
    ]
    firsts = encoded.firsts.tolist()
    return [rows[i:j] for i, j in pairwise(firsts)]


def by_hand(groups: list[Group], block_size: int) -> tuple[list, list[int], Counter]:
    """The rows of each group but those to be learnt whole; the stream that these make; what was cut."""
    rows, stream, cut = [], [], Counter()
    for group in groups:
        answers = [[*TOKENIZER.encode(text), END] for text in group.responses]
        if group.whole and len(answers) == 1:
            stream += TOKENIZER.encode(group.prompt) + answers[0]
            continue
        longest = max(min(len(answer), block_size - 1) for answer in answers)
        fitted = []
        for k, answer in enumerate(answers):
            prompt = TOKENIZER.encode(group.prompts[k] if group.prompts else group.prompt) or [END]
            kept = answer[: block_size - 1]
            room = block_size - (len(kept) if group.prompts else longest)  # what one prompt loses, all answers miss
            fitted.append((prompt[max(0, len(prompt) - room) :], kept))
            cut[CUT_ANSWERS] += kept != answer
            cut[CUT_PROMPTS] += len(prompt) > room and (k == 0 or bool(group.prompts))
        rows.append(fitted)
    return rows, stream, +cut


# ---- encoding --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(some_groups(), st.integers(2, 24))
def test_groups_in_tokens_are_those_made_by_hand(groups, block_size):
    encoded, notes = encode(groups, TOKENIZER, block_size)
    rows, stream, cut = by_hand(groups, block_size)
    found = unpack(encoded)
    assert found[: len(rows)] == rows and notes == cut
    assert all(x and y and len(x) + len(y) <= block_size for group in found for x, y in group)
    blocks = found[len(rows) :]
    assert all(len(block) == 1 and len(block[0][0]) == 1 for block in blocks)
    assert [token for ((_, y),) in blocks for token in y] == stream[1:]  # each counts once, but for the very first
    assert [x for ((x, _),) in blocks] == [stream[i : i + 1] for i in range(0, len(stream) - 1, block_size - 1)]
    assert all(len(y) == block_size - 1 for ((_, y),) in blocks[:-1])
    assert len(encoded) == len(found) and encoded.lengths() == [max(len(x) + len(y) for x, y in g) for g in found]
    assert encoded.row_lengths.tolist() == [len(x) + len(y) for group in found for x, y in group]
    assert encoded.response_lengths.tolist() == [len(y) for group in found for _, y in group]


def test_an_empty_prompt_is_end_of_text():
    assert encode_prompt(TOKENIZER, "") == [END]
    assert encode_prompt(TOKENIZER, "the") == TOKENIZER.encode("the")


def test_dialogues_that_are_compared_keep_both_answers():
    """`whole` is for who imitates them: a comparison needs the prompt once and each answer."""
    group = Group("the film", (" was good.", " was bad."), whole=True)
    encoded, _ = encode([group], TOKENIZER, 64)
    prompt = TOKENIZER.encode("the film")
    assert unpack(encoded) == [[(prompt, [*TOKENIZER.encode(text), END]) for text in group.responses]]


@pytest.mark.parametrize("answers, what", [((" good", " bad"), "pairs"), ((" good", " film", " bad"), "groups")])
def test_what_was_cut_is_said_beside_what_was_dropped(capsys, answers, what):
    groups, notes = [Group("the film" * 9, answers)] * 3, Counter({"rows dropped": 1200})
    data, held_out = prepare("DPO", groups[:2], groups[2:], notes, TOKENIZER, 12)
    assert (len(data), len(held_out)) == (2, 1) and notes == {"rows dropped": 1200, CUT_PROMPTS: 3}
    said = capsys.readouterr().out.splitlines()
    assert said == [f"DPO: 2 {what}, 1 more held out", "  1,200 rows dropped", f"  3 {CUT_PROMPTS}"]


@settings(deadline=None, max_examples=200)
@given(token_groups, st.data())
def test_a_batch_counts_exactly_the_responses(groups, data):
    """Rows of K = 1, 2 and 4 in one batch, token by token."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(groups))), min_size=1, max_size=8))
    encoded = Encoded.pack(groups)
    assert unpack(encoded) == groups
    assert unpack(encoded.single_rows()) == [[row] for group in groups for row in group]
    batch = encoded.collate(chosen)
    rows = [row for g in chosen for row in groups[g]]
    every = [row for group in groups for row in group]
    assert [every[i] for i in encoded.rows(chosen)] == rows
    T = max(len(x) + len(y) for x, y in rows) - 1
    assert batch.tokens.tolist() == [x + y + [0] * (T + 1 - len(x) - len(y)) for x, y in rows]
    assert batch.mask.tolist() == [
        [float(len(x) <= t + 1 < len(x) + len(y)) for t in range(T)] for x, y in rows
    ]  # targets[:, t] is token t + 1
    assert torch.equal(batch.inputs, batch.tokens[:, :-1]) and torch.equal(batch.targets, batch.tokens[:, 1:])
    assert batch.last.tolist() == [len(x) + len(y) - 1 for x, y in rows]
    assert batch.sizes == [len(groups[g]) for g in chosen]
    assert batch.tokens.dtype == batch.last.dtype == torch.long and batch.mask.dtype == torch.float32
    for (_, y), target, mask in zip(rows, batch.targets, batch.mask, strict=True):
        assert target[mask == 1].tolist() == y
    moved = batch.to(torch.device("meta"))
    assert moved.tokens.is_meta and moved.mask.is_meta and moved.last.is_meta and moved.sizes == batch.sizes


@settings(deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8))
def test_grouped_against_a_loop(sizes):
    x = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(0), requires_grad=True)
    values, there = grouped(x, sizes)
    assert values.shape == there.shape == (len(sizes), max(sizes)) and there.dtype == torch.bool
    row = 0
    for g, k in enumerate(sizes):
        for i in range(max(sizes)):
            assert there[g, i] == (i < k) and values[g, i] == (x[row + i] if i < k else 0)
        row += k
    (values**2).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach(), atol=0, rtol=0)


# ---- what tells data from other data ---------------------------------------------------------------------------------


def changes(groups: list) -> Iterator[list]:
    """The groups with one thing changed: a token, the end of a prompt, of a row, of a group, the order."""

    def copy() -> list:
        return [[(list(x), list(y)) for x, y in group] for group in groups]

    for g, group in enumerate(groups):
        for k, (x, y) in enumerate(group):
            for part, n in enumerate((len(x), len(y))):
                changed = copy()
                changed[g][k][part][n - 1] += 1
                yield changed
            if len(x) > 1:
                changed = copy()
                changed[g][k][1].insert(0, changed[g][k][0].pop())
                yield changed
            if k + 1 < len(group) and len(y) > 1:  # a row's last token is the next one's first
                changed = copy()
                changed[g][k + 1][0].insert(0, changed[g][k][1].pop())
                yield changed
                changed[g][k + 1][1].insert(0, changed[g][k + 1][0].pop())  # and all prompts are as long as they were
                yield changed
        if g + 1 < len(groups) and len(group) > 1:
            changed = copy()
            changed[g + 1].insert(0, changed[g].pop())
            yield changed
        changed = copy()
        changed[g].reverse()
        if changed != groups:
            yield changed


@settings(deadline=None, max_examples=60)
@given(token_groups)
def test_the_digest_knows_every_token_and_every_boundary(groups):
    digest = Encoded.pack(groups).digest()
    assert digest == Encoded.pack(groups).digest()
    for changed in changes(groups):
        assert Encoded.pack(changed).digest() != digest, changed


# ---- batches ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(token_groups, st.integers(1, 7), st.integers(0, 3), st.data())
def test_micro_batches_hold_whole_groups_and_cover_the_batch_once(groups, size, world_size, data):
    """World size 0 stands for not sharing; the batch is a part of the data in any order."""
    chosen = data.draw(st.lists(st.sampled_from(range(len(groups))), unique=True, min_size=1))
    encoded, found, counts, longest = Encoded.pack(groups), [], [], 0
    for rank in range(max(1, world_size)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "world_size", lambda: world_size)
            patch.setattr(parallel, "rank", lambda rank=rank: rank)
            pieces = micro_batches(chosen, encoded.lengths(), size, share=world_size > 0)
        counts.append(len(pieces))
        for piece in pieces:
            longest = max(longest, len(piece))
            batch = encoded.collate(piece)
            rows = [row[: end + 1].tolist() for row, end in zip(batch.tokens, batch.last, strict=True)]
            for g, k in zip(piece, batch.sizes, strict=True):
                assert [rows.pop(0) for _ in range(k)] == [x + y for x, y in groups[g]]
            assert not rows
            found += piece
    assert sorted(found) == sorted(chosen)
    assert max(counts) - min(counts) <= 1  # none waits long for another
    # what would fit into one piece is shared all the same
    assert longest == min(size, math.ceil(len(chosen) / max(1, world_size)))


@settings(deadline=None)
@given(st.lists(st.integers(1, 256) | st.integers(1, 2000), min_size=1, max_size=40), st.integers(1, 12), st.data())
def test_micro_batches_are_alike_in_length(lengths, size, data):
    rows = data.draw(st.lists(st.sampled_from(range(len(lengths))), unique=True, min_size=1))
    pieces = micro_batches(rows, lengths, size)
    assert sorted(i for piece in pieces for i in piece) == sorted(rows)
    assert max(map(len, pieces)) <= size
    if max(lengths[i] for i in rows) <= 256:
        assert len(pieces) == -(-len(rows) // size)
    for piece in pieces:  # long ones are fewer
        assert len(piece) == 1 or len(piece) * max(lengths[i] for i in piece) <= 256 * size
    ordered = [lengths[i] for piece in pieces for i in piece]
    assert ordered == sorted(ordered)  # little padding


# ---- held out --------------------------------------------------------------------------------------------------------


def prompts_of(groups: list[Group]) -> set[str]:
    return {group.prompt for group in groups}


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), SIZES, *[st.booleans()] * 2), max_size=40), st.randoms())
def test_the_split_is_a_partition_by_prompts(kinds, rng):
    groups = [
        Group(x, tuple(f"{i}{j}" for j in range(k)), prompts=(x, *"zzz"[1:k]) if own else (), whole=whole)
        for i, (x, k, own, whole) in enumerate(kinds)
    ]
    assume(len(prompts_of(groups)) > 1)
    training, held_out = split(groups)
    assert training and held_out and Counter(training) + Counter(held_out) == Counter(groups)
    assert not prompts_of(training) & prompts_of(held_out)
    assert len(prompts_of(held_out)) == max(1, round(len(prompts_of(groups)) / 10))
    assert [group for group in groups if group in held_out] == held_out  # in their order
    rng.shuffle(groups)
    assert Counter(split(groups)[1]) == Counter(held_out)  # whatever the order, and so the file


@given(st.lists(SIZES, min_size=30, max_size=30), st.randoms())
def test_which_prompts_are_held_out_does_not_depend_on_the_number_of_answers(ks, rng):
    groups = [Group(f"prompt {i // 3}", ("answer",) * k) for i, k in enumerate(ks)]  # three groups a prompt
    pairs = [Group(f"prompt {i}", ("a", "b")) for i in range(10)]
    rng.shuffle(groups)
    assert prompts_of(split(groups)[1]) == prompts_of(split(pairs)[1])
    assert len(split(groups)[1]) == 3


def test_sft_and_dpo_hold_out_the_same_dialogues():
    pairs = [Group(f"prompt {i}", (f"chosen {i}", f"rejected {i}"), whole=True) for i in range(1000)]
    imitated = [Group(group.prompt, group.responses[:1], whole=True) for group in pairs]
    held_out = [group.prompt for group in split(pairs)[1]]
    assert len(held_out) == 100 and held_out == [group.prompt for group in split(imitated)[1]]
    assert 350 < sum(int(prompt.split()[1]) for prompt in held_out) / 100 < 650  # from all over the file


def test_texts_are_split_by_themselves():
    training, held_out = split([Group("", (f"text {i}",), whole=True) for i in range(50)])
    assert (len(training), len(held_out)) == (45, 5)


def test_one_prompt_cannot_be_split():
    with pytest.raises(UserError, match="only one prompt"):
        split([Group("p", ("a", "b")), Group("p", ("c",))])
