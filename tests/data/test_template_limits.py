"""A chat template that makes much of little is stopped before it has made it; what real ones do is not."""

import tracemalloc

import pytest
from damage import within

from nanopref.data.template import render
from nanopref.running.flags import UserError

MACRO = "{% macro f(x, n) %}{% if n %}{{ f(x ~ x, n - 1) }}{% else %}{{ x|length }}{% endif %}{% endmacro %}"
HUGE = {
    "ljust": "{{ 'a'.ljust(300000000) }}",
    "center": "{{ 'a'|center(300000000) }}",
    "map": "{{ ['a']|map('center', 300000000)|list|length }}",
    "filter block": "{% filter center(300000000) %}a{% endfilter %}",
    "%": "{{ ('%300000000d' % 1)|length }}",
    "% *": "{{ ('%*d' % (300000000, 1))|length }}",
    "format": "{{ '{:300000000}'.format(1) }}",
    "format {}": "{{ '{:{}}'.format(1, 300000000) }}",
    "with": "{% with a = 'aa' %}" + "{% with a = a ~ a %}" * 27 + "{{ a|length }}" + "{% endwith %}" * 28,
    "macro": MACRO + "{{ f('aaaa', 26) }}",
    "**": "{{ ((((10 ** 64) ** 64) ** 64) ** 64) > 3 }}",
    "indent": "{{ ('a\n' * 1000)|indent(300000) }}",
    "tojson": "{{ range(9999)|list|tojson(indent=190000)|length }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 3000)|length }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 3000)|length }}",
    "join": "{{ ('b' * 3000).join(['a'] * 99999)|length }}",
    "join filter": "{{ range(99999)|map('string')|join('b' * 3000)|length }}",
    "expandtabs": "{{ ('\t' * 3000).expandtabs(100000)|length }}",
    "batch": "{{ [1]|batch(300000000, 0)|list|length }}",
    "lists of lists": "{% set a = ['x' * 1000] * 100 %}" + "{% set a = [a, a, a, a, a, a, a, a] %}" * 10 + "{{ a }}",
    "+": "{% macro g(x, n) %}{% if n %}{{ g(x + x, n - 1) }}{% endif %}{% endmacro %}{{ g([1, 2], 24) }}",
}


@pytest.mark.parametrize("source", HUGE.values(), ids=HUGE)
def test_a_template_that_would_fill_the_memory_is_refused(source):
    tracemalloc.start()
    try:
        with within(5), pytest.raises(UserError, match="does not come to an end, or writes too much"):
            render(source, {}, [("user", "?")], False)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


SLOW = {
    "in": "{% if 'ac' in a %}{% endif %}",
    "==": "{% if a == a ~ 'b' %}{% endif %}",
    "filter": "{% set b = a|upper %}",
    "slice": "{{ a[::-1]|length }}",
}


@pytest.mark.parametrize("source", SLOW.values(), ids=SLOW)
def test_a_template_that_goes_through_much_again_and_again_is_refused(source):
    loop = (
        "{% set a = 'ab' * 95000 %}{% for i in range(300) %}{% for j in range(300) %}"
        + source
        + "{% endfor %}{% endfor %}"
    )
    with within(5), pytest.raises(UserError, match="does not come to an end, or writes too much"):
        render(loop, {}, [("user", "?")], False)


REAL = {
    "{{ none|default(1000000000000000019884624838656) }}": "None",
    "{{ x|default(1000000000000000019884624838656) }}": "1000000000000000019884624838656",
    "{{ messages[0].content.split('</think>')[-1].strip() }}": "b",
    "{{ '%s of %d' % ('one', 1722000000) }} {{ '{} {:>3}'.format('In 2024', 5) }}": "one of 1722000000 In 2024   5",
    "{{ messages|map(attribute='role')|join(', ') }}": "user",
    "{{ {'a': [1]}|tojson(indent=1) }}": '{\n "a": [\n  1\n ]\n}',
    "{{ messages[0].content|replace('</think>', '')|trim|upper }}": "A  B",
    "{% set ns = namespace(x='') %}{% for i in range(3) %}{% set ns.x = ns.x ~ i %}{% endfor %}{{ ns.x }}": "012",
    "{{ 'a\nb'|indent }}{{ ['c', 'd']|first }}{{ [3, 1]|sort }}{{ [1, 2]|sum }}": "a\n    bc[1, 3]3",
}


@pytest.mark.parametrize("source", REAL)
def test_what_templates_do_they_may(source):
    assert render(source, {}, [("user", "a </think> b")], False) == REAL[source]


def test_a_long_dialogue_is_no_long_loop():
    messages = [("user", "word " * 2000), ("assistant", "answer\n" * 500)] * 50
    source = (
        "{% set all = messages %}{% for m in all %}{{ m.role + ': ' + m.content|trim|replace('\n', '\\n') }}"
        "{% endfor %}{{ all|map(attribute='content')|join('\n---------------------\n') }}"
    )
    assert len(render(source, {}, messages, False)) > 1_300_000
