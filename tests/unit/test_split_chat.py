"""Chat templates: what models need works as in plain Jinja, what would take time or memory without end is refused."""

from __future__ import annotations

import threading
import tracemalloc
from typing import Any

import jinja2.ext
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from isthmus.protocol.errors import ModelError
from isthmus.split.chat import MAX_TEMPLATE_CHARS, render

TALK = [
    {"role": "system", "content": " Be brief. "},
    {"role": "user", "content": "hello <think>x</think> wörld"},
    {"role": "assistant", "content": "hi\nthere", "tool_calls": [{"name": "f", "arguments": {"a": [1, None, "é"]}}]},
    {"role": "user", "content": "bye"},
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}


def shown(template: str, messages: Any = TALK) -> str:
    return render(template, messages, True, NAMES)


DOUBLING = "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = BODY %}{% endfor %}{{ ns.x }}"
NESTED = (
    "{% set ns = namespace(x=['ha'], y=['ha']) %}"
    "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}"
)
MUCH = "takes too much time or memory"
PEAK_BYTES = 64 << 20


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("template", "says"),
    [
        # One operation that makes something huge, also in a constant, which is computed when the template is compiled.
        ("{{ 'a' * 10**10 }}", MUCH),
        ("{% set x = 'a' * 9999999999 %}", MUCH),
        ("{{ 9999999999 * [1] }}", MUCH),
        ("{{ ('a' | safe) * 9999999999 }}", MUCH),
        ("{{ 10 ** 9999999 }}", "too large a number"),
        (DOUBLING.replace("BODY", "(ns.x | int + 3) * (ns.x | int + 3)"), "too large a number"),
        ("{{ '%9999999999d' % 1 }}", "% takes numbers"),
        ("{{ '{:>9999999999}'.format(1) }}", "unsafe"),
        ("{{ '{:>9999999999}'['format'](1) }}", "unsafe"),
        ("{{ 'a'.ljust(9999999999) }}", "unsafe"),
        ("{{ (1).to_bytes(9999999999, 'big') }}", "unsafe"),
        ("{{ 'a' | center(9999999999) }}", "No filter named 'center'"),
        ("{{ '%9999999999d' | format(1) }}", "No filter named 'format'"),
        ("{{ 'a' | indent(9999999999) }}", MUCH),
        ("{{ [1] | tojson(indent=9999999999) }}", "indents by 9999999999"),
        ("{{ lipsum(n=9999999) }}", "undefined"),
        ("{{ ('a' * 99999).replace('', 'b' * 99999) }}", MUCH),
        ("{{ ('a' * 99999) | replace('', 'b' * 99999) }}", MUCH),
        ("{{ ('b' * 99999).join('a' * 99999) }}", MUCH),
        ("{{ range(99999) | join('b' * 99999) }}", MUCH),
        ("{% set x = 'a' * 99999 %}{{ " + "~".join("x" * 999) + " }}", MUCH),
        # Work without end.
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", MUCH),
        ("{% set x %}{% for a in range(99999) %}" + "static text " * 99 + "{% endfor %}{% endset %}", MUCH),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", MUCH),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for x in [9] recursive %}{{ loop([9, 9]) }}{% endfor %}", "recursion"),
        (
            "{% for x in [1] recursive %}" + "static text " * 999
            + "{% if loop.depth == 1 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}", MUCH,
        ),
        (
            "{% for x in [1] recursive %}" + "static text " * 999
            + "{% if loop.depth == 1 %}{{ loop(range(9999) | map('upper')) }}{% endif %}{% endfor %}", MUCH,
        ),
        ("{% set x = 'a' * 99999 %}{% for i in range(99999) %}{{ 'b' in x }}{% endfor %}", MUCH),
        ("{% set x = 'a' * 99999 %}{% for i in range(99999) %}{% set y = x[::-1] %}{% endfor %}", MUCH),
        ("{% for i in range(99999) %}{% set y = range(99999) | reject | list %}{% endfor %}", MUCH),
        ("{% for i in range(9) if -999999999 | pay %}{% for a in range(99999) %}{{ a }}{% endfor %}{% endfor %}", MUCH),
        # A little that grows with each round.
        *[
            (DOUBLING.replace("BODY", body), MUCH)
            for body in (
                "ns.x + ns.x", "ns.x ~ ns.x", "[ns.x, ns.x] | join", "''.join([ns.x, ns.x])", "ns.x.replace('a', 'aa')",
                "ns.x | replace('a', 'aa')", "ns.x * 2", "(ns.x | e) ~ ns.x",
            )
        ],
        # A list that holds itself twice, sixty times over, met by all that looks into it.
        *[
            (NESTED + body, MUCH)
            for body in (
                "{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x | string | length }}", "{{ ns.x == ns.y }}", "{{ ns }}",
                "{{ ns.x in [ns.y] }}", "{{ [ns.x] | select('equalto', ns.y) | list }}",
                "{{ [ns.x] | map('upper') | list }}", "{{ [ns.x, ns.y] | sort }}", "{{ [ns.x].index(ns.y) }}",
                "{{ raise_exception(ns.x) }}", "{{ ns.x ~ 1 }}",
            )
        ],
    ],
)  # fmt: skip
def test_time_and_memory_are_bounded(template: str, says: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="the chat template refuses the messages: ") as caught:
            shown(template)
        assert tracemalloc.get_traced_memory()[1] < PEAK_BYTES
    finally:
        tracemalloc.stop()
    assert says in caught.value.problem
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '>' + m.content | trim + eos_token }}\n"
        "{% endfor %}",
        "{% for m in messages if m.role != 'system' %}{{ loop.index0 }}{{ loop.last }}{{ loop.length }}{% endfor %}",
        "{% for m in messages %}{{ loop.previtem.role if loop.previtem }}{{ loop.nextitem.role }}{% endfor %}",
        "{% for m in messages[1:][::-1] %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}",
        "{% set ns = namespace(found=false, text='') %}{% for m in messages %}{% set ns.text = ns.text ~ m.role %}"
        "{% if 'hello' in m.content %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.text }}",
        "{% set m = messages[1].content %}{{ m.split('</think>')[-1].lstrip() }}{{ m.upper().startswith('HE') }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(', ') }}",
        "{{ messages | rejectattr('tool_calls', 'defined') | list | length }}{{ ', '.join(['a', 'b']) }}",
        "{% for k, v in messages[2].tool_calls[0].arguments.items() %}{{ k }}{{ v }}{% endfor %}",
        "{{ messages[2] | dictsort }}{{ messages[0] | first }}{{ [3, 1, 2] | sort | unique | reverse | list }}",
        "{% macro show(m, tail='') %}{{ m.role }}{{ caller() if caller }}{{ tail }}{% endmacro %}"
        "{{ show(messages[0], tail='!') }}{% call show(messages[1]) %}in{% endcall %}",
        "{% filter upper %}{{ messages[0].content }}{% endfilter %}"
        "{% set x %}a{{ 1 + 2 * 3 // 2 % 5 }}{% endset %}{{ x }}",
        "{% for x in [1, [2, [3]]] recursive %}{{ x if x is number else loop(x) }}{% endfor %}",
        "{{ 'x' is in 'xy' }}{{ messages[0].content is string }}{{ missing is defined }}{{ missing | default('d') }}",
        "{{ {'a': 1, 2: 'b'} }}{{ (1, 'a') }}{{ '<é>' | e }}{{ 'ab' | replace('b', 'cc') | indent(2, true) }}",
        "{{ 2 ** 8 }}{{ 'ab' * 3 }}{{ [1] * 2 + [3] }}{{ -3 | abs }}{{ '12' | int + 1 }}{{ 7 / 2 }}{{ 1.5 * 2 }}",
        "{% if add_generation_prompt and not tools %}<a>{% elif documents %}{% endif %}{{ missing.x | d('') }}",
    ],
)
def test_what_templates_do_is_done_as_by_plain_jinja(template: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    given = {"messages": TALK, "add_generation_prompt": True, "tools": None, "documents": None, **NAMES}
    try:
        expected = plain.from_string(template).render(given)
    except jinja2.UndefinedError as error:
        with pytest.raises(ModelError, match=str(error)):
            shown(template)
    else:
        assert shown(template) == expected


def test_json_is_written_as_hubs_do() -> None:
    call = "{% set call = messages[2].tool_calls[0] %}"
    assert shown(call + "{{ call | tojson }}") == '{"name": "f", "arguments": {"a": [1, null, "é"]}}'
    assert shown(call + "{{ call | tojson(ensure_ascii=true, separators=(',', ':')) }}") == (
        '{"name":"f","arguments":{"a":[1,null,"\\u00e9"]}}'
    )
    assert shown("{{ [1] | tojson(indent=2) }}") == "[\n  1\n]"


def test_a_long_conversation_is_not_too_much() -> None:
    look_back = (
        "{% for m in messages %}{% set ns = namespace(last=0) %}{% for p in messages[: loop.index0] %}"
        "{% if p.role == 'user' %}{% set ns.last = loop.index %}{% endif %}{% endfor %}{{ ns.last }},{% endfor %}"
    )
    talk = [{"role": "user" if i % 2 else "assistant", "content": "a"} for i in range(200)]
    assert shown(look_back, talk).split(",")[-2] == "198"
    text = "word " * 200_000
    assert (
        shown("{{ messages[0].content | trim | upper }}", [{"role": "user", "content": text}]) == text.strip().upper()
    )


def test_a_template_has_a_longest_length_and_its_words_too() -> None:
    assert shown("a" * MAX_TEMPLATE_CHARS) == "a" * MAX_TEMPLATE_CHARS
    with pytest.raises(ModelError, match="has 65537 characters, more than 65536"):
        shown("a" * (MAX_TEMPLATE_CHARS + 1))
    with pytest.raises(ModelError) as caught:
        shown("{{ raise_exception('two\nlines ' * 999) }}")
    assert "two lines two" in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize("unit", ["{{", "(", "{% if a %}", "{% for a in b %}", "{{ a }}", "+ a", "[", "not ", "{#"])
@pytest.mark.timeout(120)
def test_damaged_and_deep_templates_are_one_error_or_none(unit: str) -> None:
    try:
        shown("{{ a " + unit * 999)
    except ModelError as error:
        assert "refuses" in error.problem


def test_each_thread_has_a_purse_of_its_own() -> None:
    ends: list[str] = []

    def work() -> None:
        for _ in range(20):
            ends.append(shown("{% for i in range(2000) %}{{ i }}{% endfor %}")[-4:])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends == ["1999"] * 80
