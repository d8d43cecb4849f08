"""The commands with a chat model: conversations in and out, and what is refused before anything is written."""

import gzip
import itertools
import json
import shutil
from pathlib import Path

import by_hand
import pytest
from chat_templates import CHATML, MISTRAL, chat_tokenizer
from helpers import refused, results
from safetensors.torch import load_file

import train_dpo
import train_ppo
import train_rm
from nanopref import models, sft
from nanopref.data.dialogues import Dialogue
from nanopref.data.formats import read
from nanopref.models.gpt2 import GPT, GPTConfig
from nanopref.models.sampling import respond

SMALL = {"batch_size": 8, "epochs": 1, "max_new_tokens": 4, "eval_prompts": 2, "device": "cpu"}


def chat_model(
    folder: Path, name: str = "chatml", template: str | None = None, rows: int = 0, block_size: int = 96
) -> str:
    """A model of one layer that knows nothing but to end an answer soon, with a chat template; its vocabulary has so
    many rows more or less."""
    tokenizer = chat_tokenizer(folder / "tokenizer", name)
    model = by_hand.lively(GPT(GPTConfig(tokenizer.vocab_size + rows, block_size, 1, 2, 16, from_scratch=True)), 0)
    end = min(tokenizer.end_of_text, tokenizer.vocab_size + rows - 1)
    model.ln_f.bias.data[0] = model.wte.weight.data[end, 0] = 1.5
    models.save(model, tokenizer, folder / "model")
    if template is not None:
        settings = folder / "model" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": template}))
    return str(folder / "model")


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def pair(i: int) -> dict:
    shared = [{"role": "system", "content": "s"}, user(f"film {i}"), assistant("yes"), user("and?")]
    return {"chosen": [*shared, assistant("good")], "rejected": [*shared, assistant("bad <|im_end|>")]}


PAIRS = [pair(i) for i in range(24)]
ONE = {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]}
REFUSED = {  # the template, the rows, and what is said
    "a template that raises": ("{{ raise_exception('no') }}", PAIRS, "refuses messages of the roles user: no"),
    "a template that does not parse": ("{% if %}", PAIRS, "the model's chat template is none: line 1"),
    "a template without an end": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        PAIRS, "the model's chat template does not come to an end",
    ),
    "a role that it does not know": (
        CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if m.role == 'poet' %}"
                       "{{ raise_exception('what?') }}{% endif %}"),
        [ONE, ONE | {"prompt": [user("b"), {"role": "poet", "content": "c"}]}],
        "refuses messages of the roles user, poet: what?",
    ),
    "roles that do not take turns": (
        MISTRAL.replace("eos_token", "'<|im_end|>'").replace("bos_token", "''"), PAIRS, "roles must alternate",
    ),
    "an assistant turn that is missing": (
        None, [PAIRS[0], {"chosen": [user("a")], "rejected": [user("a")]}],
        "line 2: 'chosen': an assistant turn is missing",
    ),
    "content that is no text": (
        None, [ONE | {"chosen": [assistant([{"type": "text", "text": "b"}])]}],
        "line 1: 'content of a message in chosen' must be text, found a list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused(case, tmp_path, capsys):
    template, rows, message = REFUSED[case]
    init, data = chat_model(tmp_path, template=template), by_hand.write(tmp_path / "rows.jsonl", rows)
    out = str(tmp_path / "out")
    refused(train_dpo.train, train_dpo.Config(out=out, data=data, init=init, device="cpu"), message, capsys)
    refused(train_rm.train, train_rm.Config(out=out, data=data, init=init, device="cpu"), message, capsys)
    refused(sft.train, sft.Config(out=out, data=data, init=init, device="cpu"), message, capsys)
    if template:  # by whoever answers prompts too
        refused(train_ppo.train, train_ppo.Config(out=out, data=data, init=init, device="cpu"), message, capsys)


def test_parquet_that_is_cut_off_and_tokens_that_the_model_does_not_have_are_refused(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(PAIRS), tmp_path / "rows.parquet")
    content = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    init, setting = chat_model(tmp_path), {"out": str(tmp_path / "out"), "device": "cpu"}
    config = train_dpo.Config(data=str(tmp_path / "cut.parquet"), init=init, **setting)
    refused(train_dpo.train, config, "cut.parquet: no Parquet, or damaged or cut off", capsys)
    init = chat_model(tmp_path / "small", rows=-1)
    message = "tokens and the model only"
    refused(sft.train, sft.Config(data=str(tmp_path / "rows.parquet"), init=init, **setting), message, capsys)


def test_a_chat_model_learns_to_talk_and_from_preferences(tmp_path, capsys, no_picture):
    """SFT, DPO on a file, online DPO and PPO on its prompts; the folders are what `transformers` calls a chat model."""
    init = chat_model(tmp_path)
    rows = [{"messages": [*row["chosen"], user("more"), assistant(f"{i}")]} for i, row in enumerate(PAIRS)]
    data = by_hand.write(tmp_path / "talk.jsonl", rows)
    sft.train(sft.Config(out=str(tmp_path / "sft"), data=data, init=init, steps=4, batch_size=4, device="cpu"))
    assert "22 sequences" in capsys.readouterr().out
    data = by_hand.write(tmp_path / "pairs.jsonl", PAIRS)
    setting = SMALL | {"data": data, "init": str(tmp_path / "sft")}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "dpo"), **setting))
    report = results(tmp_path / "dpo")[1]
    assert {"kl", "response_length", "ended"} <= report.keys()
    reward = tmp_path / "mine.py"
    reward.write_text("def score(prompt, response):\n    assert prompt.startswith('\\n\\nSystem: s'), prompt\n"
                      "    return len(response)\n")  # fmt: skip
    online = setting | {"reward": (f"{reward}:score",), "prompts": 40, "answers": 4, "max_new_tokens": 24}
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "online"), **online, select="best-worst"))
    _, groups, _ = read(tmp_path / "online" / "feedback.jsonl")
    assert all(isinstance(group.prompt, Dialogue) and group.prompt.messages[0] == ("system", "s") for group in groups)
    ppo = {key: online[key] for key in ("data", "init", "reward", "device", "eval_prompts", "max_new_tokens")}
    train_ppo.train(train_ppo.Config(out=str(tmp_path / "ppo"), **ppo, iterations=1, batch_size=4, micro_batch=2))
    for name in ("sft", "dpo", "online", "ppo"):
        folder = tmp_path / name / "model"
        assert models.load(folder)[1].template == CHATML and load_file(folder / "model.safetensors")
        assert "im_start" in json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def test_hh_goes_into_a_chat_model(real_data, tmp_path, capsys, no_picture):
    with gzip.open(real_data / "hh_harmless.jsonl.gz", "rb") as file:
        (tmp_path / "hh.jsonl").write_bytes(b"".join(itertools.islice(file, 40)))
    init = chat_model(tmp_path, "llama3", block_size=256)
    train_dpo.train(train_dpo.Config(out=str(tmp_path / "out"), data=str(tmp_path / "hh.jsonl"), init=init, **SMALL))
    assert "dialogues that lost their oldest turns to fit the context" in capsys.readouterr().out
    model, tokenizer = models.load(tmp_path / "out")
    (answer,) = respond(model, tokenizer, [Dialogue([("user", "a")])], max_new_tokens=3, seed=0, stream="x")
    assert tokenizer.decode(answer.prompt).startswith("<|begin_of_text|><|start_header_id|>user")
    assert answer.asked == "\n\nHuman: a\n\nAssistant:"


def test_a_folder_that_was_saved_stops_where_its_template_does(tmp_path):
    """Though its tokenizer names another end of text."""
    init = Path(chat_model(tmp_path))
    settings = init / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": "<|endoftext|>"}))
    model, tokenizer = models.load(init)
    models.save(model, tokenizer, tmp_path / "again")
    ends = json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"]
    assert ends == [tokenizer.added["<|endoftext|>"], tokenizer.added["<|im_end|>"]]
    (tmp_path / "again" / "chat_template.jinja").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "tokenizer")
    assert models.load(tmp_path / "again")[1].ends >= set(ends)
