"""A model's chat template, which comes with it as a program in Jinja: what it makes of a conversation, as text.

It is code of others. It runs in Jinja's sandbox, where it may change nothing, and takes so many steps and no more; what
goes wrong in it is a sentence. What `transformers` offers to templates is offered here too, but that every day is the
same: a run must not be another tomorrow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopref.running.flags import UserError

STEPS = 200_000  # how often a rendering may loop or call, and how many characters it may make, and ten for each given
TODAY = datetime(2024, 7, 26)  # which is what Llama 3's templates take where they are told no date


class _Endless(Exception):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, with an end. To go on for ever takes loops or calls, and to grow beyond all bounds takes what was
    assigned, so these are watched, and the two operators that make much of little."""

    intercepted_binops = frozenset(("*", "**"))
    most = left = 0  # of the rendering under way

    def begin(self, characters: int) -> None:
        self.most = self.left = STEPS + 10 * characters

    def step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _Endless

    def bounded(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple | dict) and len(value) > self.most:
            raise _Endless
        return value

    def call(self, context, obj, /, *args, **kwargs):
        self.step()
        return self.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        if (operator == "*" and sizes[0] * sizes[1] > self.most) or (operator == "**" and sizes[1] > 64):
            raise _Endless
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args, **kwargs) -> str:  # Jinja's hook between parsing and compiling
        for node in list(source.find_all((nodes.For, nodes.Assign, nodes.AssignBlock))):
            name = {nodes.For: "iter", nodes.Assign: "node", nodes.AssignBlock: "filter"}[type(node)]
            watch = "counted" if name == "iter" else "bounded"
            setattr(node, name, nodes.Filter(getattr(node, name), watch, [], [], None, None, lineno=node.lineno))
        return super()._generate(source, *args, **kwargs)


@jinja2.pass_context
def _counted(context, items: Iterable) -> Iterator:
    for item in items:
        context.environment.step()
        yield item


@jinja2.pass_context
def _bounded(context, value: Any) -> Any:
    return context.environment.bounded(value)


class _Generation(Extension):
    """{% generation %}, with which a template marks what the assistant says: nothing but its contents."""

    tags = frozenset(("generation",))

    def parse(self, parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(maxsize=8)
def _compiled(source: str) -> jinja2.Template:
    sandbox = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    sandbox.filters |= {"tojson": _to_json, "counted": _counted, "bounded": _bounded}
    sandbox.globals |= {"raise_exception": _raise_exception, "strftime_now": TODAY.strftime}
    return sandbox.from_string(source)


def render(source: str, variables: Mapping[str, str], messages: Sequence[tuple[str, str]], answer: bool) -> str:
    """What the template makes of (role, content) messages; with `answer` also what opens the assistant's.

    Raises UserError where the template does not parse, refuses the messages, fails, or does not come to an end.
    """
    given = [{"role": role, "content": content} for role, content in messages]
    setting = {**variables, "tools": None, "documents": None, "add_generation_prompt": answer}
    pieces = []
    try:
        template = _compiled(source)
        sandbox = template.environment
        sandbox.begin(sum(len(content) for _, content in messages))
        written = 0
        for piece in template.generate(messages=given, **setting):
            pieces.append(piece)
            written += len(piece)
            if written > sandbox.most:
                raise _Endless
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the model's chat template is none: line {error.lineno}: {_line(error)}") from None
    except (_Endless, RecursionError, MemoryError, OverflowError):
        raise UserError("the model's chat template does not come to an end, or writes too much") from None
    except Exception as error:  # which may be any, since the code is not ours
        roles = ", ".join(dict.fromkeys(role for role, _ in messages))
        raise UserError(f"the model's chat template refuses messages of the roles {roles}: {_line(error)}") from None
    return "".join(pieces)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
