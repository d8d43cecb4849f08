"""Small expressions of z = βh, the margin of a pair's rewards: what a loss can be, written by a grammar and changed at
random.

A tree is "z", a number, or the name of an operation and the trees that it takes, all of it as JSON has it.
"""

import math
import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Tree = Any  # "z" | float | (name, Tree) | (name, Tree, Tree)
MOST = 14  # nodes of a tree


class Operation(NamedTuple):
    takes: int
    function: Callable[..., Tensor]
    code: str  # in a file of its own, with torch and F
    formula: str  # for readers


OPERATIONS = {
    "neg": Operation(1, torch.neg, "(-{})", "-{}"),
    "exp": Operation(1, torch.exp, "torch.exp({})", "exp({})"),
    "log": Operation(1, torch.log, "torch.log({})", "log({})"),
    "sigmoid": Operation(1, torch.sigmoid, "torch.sigmoid({})", "σ({})"),
    "logsigmoid": Operation(1, F.logsigmoid, "F.logsigmoid({})", "log σ({})"),
    "softplus": Operation(1, F.softplus, "F.softplus({})", "softplus({})"),
    "tanh": Operation(1, torch.tanh, "torch.tanh({})", "tanh({})"),
    "relu": Operation(1, F.relu, "F.relu({})", "max(0, {})"),
    "square": Operation(1, torch.square, "torch.square({})", "({})²"),
    "add": Operation(2, torch.add, "({} + {})", "({} + {})"),
    "mul": Operation(2, torch.mul, "({} * {})", "{}·{}"),
}
KNOWN: tuple[Tree, ...] = (  # what DPO's relatives descend: hinge, exponential, IPO but for a factor
    ("relu", ("add", 1.0, ("neg", "z"))),
    ("exp", ("neg", "z")),
    ("square", ("add", -0.5, "z")),
)
FILE = '''"""A margin loss that was searched for, see nanopref/experiments/discovery.py: {formula}, z = βh."""

import torch
import torch.nn.functional as F


def loss(h, beta):
    z = beta * h
    return {code}
'''

# ---- what a tree says ------------------------------------------------------------------------------------------------


def as_tree(found: Any) -> Tree:
    """Of what JSON gives back."""
    return (found[0], *map(as_tree, found[1:])) if isinstance(found, list | tuple) else found


def values(tree: Tree, z: Tensor) -> Tensor:
    if tree == "z":
        return z
    if isinstance(tree, float):
        return torch.full_like(z, tree)
    return OPERATIONS[tree[0]].function(*(values(part, z) for part in tree[1:]))


def code(tree: Tree) -> str:
    """In Python, of the variable z. Numbers stand beside z alone, see `folded`."""
    if not isinstance(tree, tuple):
        return str(tree)
    return OPERATIONS[tree[0]].code.format(*map(code, tree[1:]))


def formula(tree: Tree) -> str:
    if not isinstance(tree, tuple):
        return f"{tree:.3g}" if isinstance(tree, float) else tree
    inner = [formula(part) for part in tree[1:]]
    brackets = tree[0] not in ("add", "mul", "neg")
    if brackets and isinstance(tree[1], tuple) and tree[1][0] == "add":  # one pair of them is enough
        inner = [inner[0][1:-1]]
    return OPERATIONS[tree[0]].formula.format(*inner).replace("+ -", "- ")


def file_of(tree: Tree) -> str:
    """A file whose function `loss` can stand behind --loss."""
    return FILE.format(formula=formula(tree), code=code(tree))


# ---- which are worth a run -------------------------------------------------------------------------------------------


@cache
def shape(tree: Tree) -> Tensor | None:
    """What counts of a loss: its values for z from -5 to 5, with mean 0 and deviation 1, since steps of Muon and Adam
    hardly depend on a factor. None of what is no loss: not finite or without a slope, flat where a run begins, or
    nowhere falling."""
    z = torch.linspace(-5, 5, 101, requires_grad=True)
    found = values(tree, z)
    if not found.requires_grad:
        return None
    (slopes,) = torch.autograd.grad(found.sum(), z)
    found = found.detach()
    usable = found.isfinite().all() and slopes.isfinite().all() and 1e-4 < found.std() < torch.inf
    if not usable or slopes[50].abs() < 1e-5 * slopes.abs().max() or slopes.min() > -1e-3 * slopes.abs().max():
        return None
    return (found - found.mean()) / found.std()


def is_new(tree: Tree, others: list[Tree], apart: float = 0.05) -> bool:
    """Whether it is a loss whose shape is that of no other."""
    mine = shape(tree)
    return mine is not None and all((mine - shape(other)).abs().max() > apart for other in others)


# ---- chance ----------------------------------------------------------------------------------------------------------


def nodes(tree: Tree) -> Iterator[Tree]:
    """The tree and all that is in it, in the order in which it is written."""
    yield tree
    for part in tree[1:] if isinstance(tree, tuple) else ():
        yield from nodes(part)


def size(tree: Tree) -> int:
    return sum(1 for _ in nodes(tree))


def replaced(tree: Tree, n: int, new: Tree) -> Tree:
    """With another tree in the place of its n-th node."""
    if n == 0:
        return new
    parts, n = [], n - 1
    for part in tree[1:]:
        parts.append(replaced(part, n, new) if 0 <= n < size(part) else part)
        n -= size(part)
    return (tree[0], *parts)


def folded(tree: Tree) -> Tree:
    """The same in short: a number for each part in which there is no z, and in a sum or a product one number, first and
    with its sign."""
    if not isinstance(tree, tuple):
        return tree
    name, *parts = tree[0], *map(folded, tree[1:])
    if all(isinstance(part, float) for part in parts):
        return number_of((name, *parts))
    name, parts = ("mul", [-1.0, *parts]) if name == "neg" else (name, parts)
    parts.sort(key=lambda part: not isinstance(part, float))
    if not isinstance(parts[0], float):
        return (name, *parts)
    number, rest = parts
    inner = ("mul", -1.0, rest[1]) if rest[0] == "neg" else rest
    if inner[0] == name and isinstance(inner[1], float):
        number, rest = number_of((name, number, inner[1])), inner[2]
    if (name, number) in (("mul", 1.0), ("add", 0.0)):
        return rest
    return ("neg", rest) if (name, number) == ("mul", -1.0) else (name, number, rest)


def number_of(tree: Tree) -> float:
    """Of a tree without z."""
    return rounded(values(tree, torch.zeros(())).item())


def rounded(number: float) -> float:
    return float(f"{number:.3g}")


def drawn(rng: random.Random, depth: int = 2) -> Tree:
    """A tree of at most so many operations on top of each other."""
    if depth == 0 or rng.random() < 0.3:
        return "z" if rng.random() < 0.6 else rounded(rng.choice((-1, 1)) * math.exp(rng.gauss(0, 1)))
    name = rng.choice(list(OPERATIONS))
    return (name, *(drawn(rng, depth - 1) for _ in range(OPERATIONS[name].takes)))


def mutated(tree: Tree, rng: random.Random) -> Tree:
    """One node changed: another tree in its place, an operation on top of it or instead of it, one of its parts in its
    place, or a number that is somewhat larger or smaller."""
    while True:
        n = rng.randrange(size(tree))
        old = list(nodes(tree))[n]
        way = rng.choice(("draw", "wrap", "swap", "lift", "nudge"))
        if way == "draw":
            new = drawn(rng)
        elif way == "wrap":
            name = rng.choice(list(OPERATIONS))
            new = (name, old, *(drawn(rng, 0) for _ in range(OPERATIONS[name].takes - 1)))
        elif isinstance(old, float):
            new = rounded(old * math.exp(rng.gauss(0, 0.5)))
        elif isinstance(old, tuple) and way == "swap":
            alike = [name for name, other in OPERATIONS.items() if other.takes == len(old) - 1]
            new = (rng.choice(alike), *old[1:])
        elif isinstance(old, tuple) and way == "lift":
            new = rng.choice(old[1:])
        else:
            new = ("mul", rounded(math.exp(rng.gauss(0, 0.5))), old)  # as another β does to z
        found = folded(replaced(tree, n, new))
        sound = all(math.isfinite(node) for node in nodes(found) if isinstance(node, float))
        if found != tree and size(found) <= MOST and sound:
            return found
