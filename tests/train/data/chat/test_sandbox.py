"""Templates from outside: what they may do, and that nothing else happens, however long or large it would be."""

from __future__ import annotations

import pytest

from train.data.chat import sandbox
from train.data.chat.sandbox import CompiledTemplate, TemplateError

MESSAGES = {"messages": [{"role": "user", "content": " hi "}]}
DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}"
)
REFUSED = {
    "class of a string": "{{ ''.__class__.__mro__ }}",
    "change of a message": "{{ messages.pop() }}",
    "format": "{{ '{:99999999}'.format(1) }}",
    "old format": "{{ '%099999999d' % 1 }}",
    "repetition": "{{ 'a' * 1000000000 }}",
    "list repetition": "{{ [1] * 1000000000 }}",
    "power": "{{ 9 ** 999999999 }}",
    "unknown filter": "{{ 'a' | center(999999999) }}",
    "large range": "{% for a in range(10000000) %}{% endfor %}",
    "doubling": DOUBLING.replace("+", "~"),
    "doubling by +": DOUBLING,
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "own refusal": "{{ raise_exception('no system role') }}",
    "missing value": "{{ a.b.c }}",
    "division": "{{ 1 / 0 }}",
    "broken": "{% if %}",
}


@pytest.mark.parametrize("name", REFUSED)
def test_template_that_would_harm_is_refused_in_words(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MOST_CHARACTERS", 1 << 16)
    with pytest.raises(TemplateError) as error:
        CompiledTemplate(REFUSED[name]).render(MESSAGES)
    assert len(str(error.value)) > 10


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    ],
    ids=["loops", "macros"],
)
def test_template_that_takes_too_long_is_ended(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MOST_SECONDS", 0.2)
    with pytest.raises(TemplateError, match=r"more than 0\.2 s"):
        CompiledTemplate(source).render(MESSAGES)


def test_objects_of_python_are_not_reached():
    for source in (
        "{{ messages.__class__ }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ raise_exception.__globals__ }}",
    ):
        assert CompiledTemplate(source).render(MESSAGES) in ("", "[Undefined]")


def test_what_templates_use_works():
    source = (
        "{%- for m in messages if m.role != 'x' -%}{{ loop.index0 ~ m['role'] + m.content.strip() | upper }}"
        "{% if loop.last %}{{ {'a': 'ä'} | tojson }}{% endif %}{% break %}{%- endfor -%}"
    )
    assert CompiledTemplate(source).render(MESSAGES) == '0userHI{"a": "ä"}'
