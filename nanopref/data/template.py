"""A model's chat template, which comes with it as a program in Jinja: what it makes of a conversation, as text.

It is code of others. It runs in Jinja's sandbox, where it may change nothing, and takes so many steps and no more; what
goes wrong in it is a sentence. What `transformers` offers to templates is offered here too, but that every day is the
same: a run must not be another tomorrow.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nanopref.running.flags import UserError
from nanopref.running.terminal import line

STEPS = 200_000  # how often a rendering may loop or call, and how many characters it may make, and ten for each given
UNUSED = ("lipsum", "random", "urlize", "wordwrap")  # of Jinja's filters and functions: no dialogue needs them
TODAY = datetime(2024, 7, 26)  # which is what Llama 3's templates take where they are told no date


class _Endless(Exception):
    pass


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's, with an end. To go on for ever takes loops or calls, and to grow beyond all bounds takes what was
    assigned, passed on or put together, so these are watched, and before they run the few that make much of little."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    most = left = 0  # of the rendering under way

    def begin(self, characters: int) -> None:
        self.most = self.left = STEPS + 10 * characters

    def step(self, n: int = 1) -> None:
        self.left -= n
        if self.left < 0:
            raise _Endless

    def bounded(self, value: Any) -> Any:
        """The value, whose text is no longer than all that may be written."""
        size = seen = 0
        parts = [value]
        while parts:
            part = parts.pop()
            seen += 1
            if isinstance(part, str):
                size += len(part)
            elif isinstance(part, list | tuple | dict):
                size += len(part)
                parts += part if size <= self.most and not isinstance(part, dict) else ()
                parts += part.values() if size <= self.most and isinstance(part, dict) else ()
            if size > self.most:
                raise _Endless
        self.step(seen // 100 + size // 1000)  # whoever looks at it goes through all of it
        return value

    def foreseen(self, name: str, value: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        """Stop what would make too much of a text or a list: a method of it, or a filter."""
        args = [self.bounded(arg) for arg in (*args, *named.values())]
        size = max((abs(arg) for arg in args if isinstance(arg, int) and name in WIDTHS), default=0)
        if name == "replace" and len(args) > 1:
            size = str(value).count(str(args[0])) * len(str(args[1]))
        elif name == "join":
            size = math.prod(len(x) for x in (value, *args[:1]) if hasattr(x, "__len__"))
        elif name in ("indent", "expandtabs", "tojson"):
            size = max([8, size, *(len(arg) for arg in args if isinstance(arg, str))]) * len(str(value))
        elif name.startswith("format") and not re.search(r"\*|:{", str(value)):  # no width is an argument
            size = 0
        if size > self.most or (name.startswith("format") and _WIDE.search(str(value))):
            raise _Endless

    def call(self, context, obj, /, *args, **kwargs):
        self.step()
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)
        self.foreseen(getattr(obj, "__name__", ""), owner if isinstance(owner, str) else "", args, kwargs)
        return self.bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        much = operator == "*" and sizes[0] * sizes[1] > self.most
        much = much or (operator == "**" and (sizes[1] > 64 or sizes[0] > self.most))
        if much:
            raise _Endless
        if operator == "%" and isinstance(left, str):
            self.foreseen("format", left, right if isinstance(right, tuple) else (right,), {})
        return self.bounded(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args, **kwargs) -> str:  # Jinja's hook between parsing and compiling
        for kind, field, watch in WATCHED:
            for node in list(source.find_all(kind)):
                if kind is nodes.Getitem and not isinstance(node.arg, nodes.Slice):
                    continue
                given = getattr(node, field)
                some = given if isinstance(given, list) else [given]
                watched = [nodes.Filter(x, watch, [], [], None, None, lineno=node.lineno) for x in some]
                setattr(node, field, watched if isinstance(given, list) else watched[0])
        return super()._generate(source, *args, **kwargs)


WATCHED = (  # where a template goes through much, or makes it: the node, what of it, and the filter that looks at that
    (nodes.For, "iter", "counted"), (nodes.Assign, "node", "bounded"), (nodes.AssignBlock, "filter", "bounded"),
    (nodes.Concat, "nodes", "bounded"), (nodes.With, "values", "bounded"), (nodes.Operand, "expr", "bounded"),
    (nodes.Getitem, "node", "bounded"),
)  # fmt: skip
WIDTHS = ("ljust", "rjust", "center", "zfill", "indent", "expandtabs", "range", "batch", "slice", "tojson")
WIDTHS += ("format", "format_map")  # filters and methods of which a number may say how much they make
_WIDE = re.compile(r"(%[^a-zA-Z%]*|{[^{}]*:[^{}]*)\d{5}")  # a width of ten thousand and more in a format


def _watched(name: str, run: Callable) -> Callable:
    """A filter of Jinja's, stopped before it makes too much."""

    @jinja2.pass_context
    def watched(context, value, *args, **kwargs):
        sandbox = context.environment
        value = list(value) if name == "join" else value
        sandbox.foreseen(name, value, args, kwargs)
        first = {"context": context, "eval_context": context.eval_ctx, "environment": sandbox}
        wants = [first[run.jinja_pass_arg.name]] if hasattr(run, "jinja_pass_arg") else []
        return sandbox.bounded(run(*wants, value, *args, **kwargs))

    return watched


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
    filters = {name: run for name, run in sandbox.filters.items() if name not in UNUSED} | {"tojson": _to_json}
    sandbox.filters = {name: _watched(name, run) for name, run in filters.items()}
    sandbox.filters |= {"counted": _counted, "bounded": _bounded}
    sandbox.globals = {name: x for name, x in sandbox.globals.items() if name not in UNUSED}
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
        raise UserError(f"the model's chat template is none: line {error.lineno}: {_reason(error)}") from None
    except (_Endless, RecursionError, MemoryError, OverflowError):
        raise UserError("the model's chat template does not come to an end, or writes too much") from None
    except Exception as error:  # which may be any, since the code is not ours
        roles = ", ".join(dict.fromkeys(role for role, _ in messages))
        raise UserError(f"the model's chat template refuses messages of the roles {roles}: {_reason(error)}") from None
    return "".join(pieces)


def _reason(error: Exception) -> str:
    return line(" ".join(str(error).split()) or type(error).__name__, 300)
