"""--loss FILE.py:FUNCTION: a loss of one's own takes the place of a row, or is refused in a sentence."""

import random

import by_hand
import pytest
import torch
from helpers import refused, results, stopped
from safetensors.torch import load_file
from small_models import message_of

import train_dpo
from nanopref.learning import objectives
from nanopref.learning.objectives import Knobs
from nanopref.running import flags
from nanopref.running.inputs import Inputs

SMALL = {"batch_size": 8, "epochs": 1, "max_new_tokens": 4, "eval_prompts": 2, "device": "cpu"}
HEAD = "import torch\nimport torch.nn.functional as F\n"
DPO = HEAD + "def f(h, beta): return -F.logsigmoid(beta * h)\n"
CDPO = HEAD + (
    "def f(h, beta, label_smoothing):\n"
    "    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)\n"
)
HINGE = HEAD + "def f(h, beta): return F.relu(1 - beta * h)\n"


def function(path, text: str) -> str:
    path.write_text(text)
    return f"{path}:f"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_and_plain):
    """(--loss, flags) -> metrics, report and weights of a run on the same few pairs, from the same model."""
    folder, rng = tmp_path_factory.mktemp("own"), random.Random(0)
    rows = [
        {"prompt": by_hand.text(rng, 2, 5), "margin": float(i % 3),
         "chosen": by_hand.text(rng, 1, 4), "rejected": by_hand.text(rng, 1, 4)} for i in range(24)
    ]  # fmt: skip
    start = {"data": by_hand.write(folder / "pairs.jsonl", rows), "init": by_hand.tiny_model(folder / "init")}
    done = {}

    def train(loss: str, text: str = "", **more):
        key = (loss, text, *more.items())
        if key not in done:
            name = function(folder / f"{loss}{len(done)}.py", text) if text else loss
            config = train_dpo.Config(out=str(folder / f"out{len(done)}"), loss=name, lr=0.02, **SMALL, **start, **more)
            train_dpo.train(config)
            out = folder / f"out{len(done)}"
            done[key] = *results(out), load_file(out / "model" / "model.safetensors")
        return done[key]

    train.start = start
    return train


KNOBS = [
    {},
    {"beta": 0.3, "margin": 0.7, "likelihood": 0.5},
    {"reference": "none", "logprobs": "mean"},
]


@pytest.mark.parametrize("more", KNOBS, ids=["plain", "knobs", "reward"])
def test_dpos_function_is_dpo(more, trained):
    """To the bit, whatever the knobs."""
    (rows, report, weights), (others, other, its) = trained("dpo", **more), trained("own", DPO, **more)
    assert rows == others and report == other
    assert weights.keys() == its.keys() and all(torch.equal(x, its[name]) for name, x in weights.items())


def test_label_smoothing_goes_to_a_function_that_names_it(trained):
    more = {"label_smoothing": 0.2}
    assert trained("dpo", **more)[0] == trained("own", CDPO, **more)[0] != trained("own", CDPO)[0]
    assert trained("own", CDPO)[0] == trained("dpo")[0]  # DPO's default, 0


def test_another_function_is_another_loss(trained):
    (rows, _, weights), (others, _, its) = trained("own", HINGE), trained("dpo")
    assert rows[0]["loss"] == pytest.approx(1.0, abs=1e-5) and others[0]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert any(not torch.equal(x, its[name]) for name, x in weights.items())
    assert rows == trained("hinge")[0]


def test_the_slope_is_that_of_the_formula(tmp_path):
    name = function(tmp_path / "mine.py", HEAD + "def f(h, beta): return (beta * h).exp() - torch.tanh(h) + beta**2\n")
    loss, beta = objectives.loss_of(objectives.named(name)), 0.3
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(9, 2, dtype=torch.float64, generator=draw, requires_grad=True)
    baseline = torch.randn(9, 2, dtype=torch.float64, generator=draw)
    losses = loss.losses(values, baseline, None, None, Knobs(beta))
    (slope,) = torch.autograd.grad(losses.sum(), values)
    h = ((values - baseline)[:, 0] - (values - baseline)[:, 1]).detach()
    torch.testing.assert_close(losses, (beta * h).exp() - torch.tanh(h) + beta**2, rtol=1e-12, atol=0)
    expected = beta * (beta * h).exp() - 1 + torch.tanh(h) ** 2
    torch.testing.assert_close(slope, torch.stack([expected, -expected], 1), rtol=1e-12, atol=1e-15)


WRONG = {  # what stands in the file, and what is said of it
    "has no function 'f'": "def g(h, beta): return h\n",
    "cannot be imported: ZeroDivisionError: division by zero": "1 / 0\n",
    "cannot be imported: SyntaxError": "def f(\n",
    "TypeError: f() takes 1 positional argument but 2 were given; it was asked for margins": "def f(h): return h\n",
    "ValueError: no; it was asked for margins": "def f(h, beta): raise ValueError('no')\n",
    "gives [] for 21 margins, where it must give a loss each": "def f(h, beta): return -h.mean()\n",
    "gives [21, 1] for 21 margins": "def f(h, beta): return -h[:, None]\n",
    "gives float for 21 margins": "def f(h, beta): return 0.5\n",
    "gives a loss of nan at a margin of -10, where": "def f(h, beta): return -h.log()\n",
    "gives a slope of nan at a margin of 0, where": "def f(h, beta): return -h.abs().sqrt()\n",
    "its losses have no gradient in the margins": "def f(h, beta): return -h.detach()\n",
    "its losses have no gradient in the margins ": "def f(h, beta): return 0 * h\n",
    "must follow from its own margin, and not from other pairs": "def f(h, beta): return -(h - h.max())\n",
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_no_loss_is_refused(message, trained, tmp_path, capsys):
    name, out = function(tmp_path / "mine.py", WRONG[message]), tmp_path / "out"
    config = train_dpo.Config(out=str(out), loss=name, device="cpu", init=trained.start["init"])
    refused(train_dpo.train, config, message.strip(), capsys)
    said = message_of(objectives.resolve, config, objectives.named(name)) if "import" not in message else ""
    assert not said or (said.startswith(f"--loss {name}: ") and message.strip() in said)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"loss": "{}/none.py:f"}, "--loss {}/none.py:f: {}/none.py: no such file"),
        ({"label_smoothing": 0.1}, "has no use for --label-smoothing"),
        ({"rating_temperature": 2.0}, "has no use for --rating-temperature"),
        ({"feedback": "labels"}, "learns from pairs"),
        ({"data": "{}/labels.jsonl"}, "labels: use --loss kto or binary"),
        ({"loss": "mine"}, f"regression, {flags.CODE}, not mine"),
    ],
)
def test_it_takes_pairs_and_the_flags_of_dpo(settings, message, tmp_path, capsys):
    by_hand.write(tmp_path / "labels.jsonl", [{"prompt": x, "completion": " b", "label": 1} for x in "xy"])
    settings = {k: x.format(tmp_path) if isinstance(x, str) else x for k, x in settings.items()}
    config = {"loss": function(tmp_path / "mine.py", DPO), "out": str(tmp_path / "out"), "device": "cpu"} | settings
    refused(train_dpo.train, train_dpo.Config(**config), message.replace("{}", str(tmp_path)), capsys)


def test_its_code_must_be_the_same_when_the_run_goes_on(trained, tmp_path, capsys, no_picture):
    name = function(tmp_path / "mine.py", DPO)
    config = {"out": str(tmp_path / "out"), "loss": name} | SMALL | trained.start
    train_dpo.train(train_dpo.Config(**config))
    train_dpo.train(train_dpo.Config(resume=True, **config))
    known = Inputs(tmp_path / "out").digests
    function(tmp_path / "mine.py", HINGE)
    message = stopped(train_dpo.train, train_dpo.Config(resume=True, **config), capsys)
    assert f"--loss {name}: {tmp_path}/mine.py is not what the run in {tmp_path}/out began with: put that" in message
    assert Inputs(tmp_path / "out").digests == known
    function(tmp_path / "mine.py", DPO)
    train_dpo.train(train_dpo.Config(resume=True, **config))
    other = config | {"loss": function(tmp_path / "other.py", DPO)}
    assert f"was started with --loss {name}" in stopped(train_dpo.train, train_dpo.Config(resume=True, **other), capsys)


def test_a_loss_that_lies_in_the_folder_of_the_run_is_not_overwritten(trained, tmp_path, capsys, no_picture):
    config = {"out": str(tmp_path / "out")} | SMALL | trained.start
    train_dpo.train(train_dpo.Config(**config))
    config["loss"] = function(tmp_path / "out" / "mine.py", DPO)
    assert "--overwrite would remove" in stopped(train_dpo.train, train_dpo.Config(overwrite=True, **config), capsys)


def test_the_command_line_takes_it_and_says_so(capsys):
    assert flags.parse(train_dpo.Config, ["--loss", "a/mine.py:f"]).loss == "a/mine.py:f"
    with pytest.raises(SystemExit):
        flags.parse(train_dpo.Config, ["--help"])
    assert "f(h, beta)" in " ".join(capsys.readouterr().out.replace("│", " ").split())
