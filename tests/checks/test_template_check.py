"""Chat templates: what people write passes, what leads out of the messages is named, however it is spelled. Nothing is rendered."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llava_weights.checkpoint.chat_template import chat_template
from llava_weights.checkpoint.checkpoint import open_checkpoint
from llava_weights.checks.health import health
from llava_weights.checks.template_check import LONGEST_TEMPLATE, asks_for
from llava_weights.families.prompts import CONVERSATIONS

# After the constructs of published templates; none is a copy.
HONEST = {
    "Llama 3": """{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +
        message['role']
        + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token +
        content
        %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%
        endif %}""",
    "Llama 3.1, tools": """{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}{%- endif %}
        {%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
        {%- endif %}{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}{%- for t in tools or [] %}
        {{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}{%- if builtin_tools is defined %}{{- "Tools: " + builtin_tools |
        reject('equalto', 'code_interpreter') | join(", ") + "\\n\\n"}}{%- endif %}{%- for message in messages %}
        {%- if 'tool_calls' in message %}{%- if not message.tool_calls|length == 1 %}{{- raise_exception("one call at a time") }}{%-
        endif %}
        {%- set tool_call = message.tool_calls[0].function %}{%- for arg_name, arg_val in tool_call.arguments | items %}
        {{- arg_name + '="' + arg_val + '"' }}{%- if not loop.last %}{{- ", " }}{%- endif %}{%- endfor %}{%- endif %}{%- endfor %}""",
    "Qwen2-VL": """{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}
        {% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}
        <|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}
        {% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}
        {% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}
        <|vision_start|><|image_pad|><|vision_end|>{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n
        {% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}""",
    "Qwen3": """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}{%- for message in messages[::-1] %}
        {%- set index = (messages|length - 1) - loop.index0 %}{%- if ns.multi_step_tool and message.role == "user" and message.content is
        string
        and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}{%- set ns.last_query_index = index %}{%- endif %}{%- endfor %}{%- for message in messages %}
        {%- set reasoning_content = '' %}{%- if message.reasoning_content is string %}{%- set reasoning_content =
        message.reasoning_content %}
        {%- elif '</think>' in message.content %}{%- set reasoning_content =
        message.content.split('</think>')[0].rstrip('\\n').split('<think>')[-1]
        .lstrip('\\n') %}{%- endif %}{%- if loop.index0 > ns.last_query_index %}{{- reasoning_content.strip('\\n') }}{%- endif %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}x{%- endif %}{{- messages[ns.last_query_index].content }}
        {%- if (loop.last) or (messages[loop.index0 + 1].role != "tool") %}{{- messages[index].role }}{%- endif %}{%- endfor %}""",
    "Qwen3-Coder": """{% macro render_extra_keys(json_dict, handled_keys) %}{%- if json_dict is mapping %}{%- for json_key in json_dict
        if json_key not in handled_keys %}{%- if json_dict[json_key] is mapping %}{{- '\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] |
        tojson | safe)
        ~ '</' ~ json_key ~ '>' }}{%- else %}{{-'\\n<' ~ json_key ~ '>' ~ (json_dict[json_key] | string) ~ '</' ~ json_key ~ '>' }}{%-
        endif %}
        {%- endfor %}{%- endif %}{% endmacro %}{%- for tool in tools %}{%- set key = tool.name | replace("-", "_") | replace(" ", "_")
        %}{{ key }}
        {%- set handled_keys = ['name', 'description', 'parameters'] %}{{- render_extra_keys(tool, handled_keys) }}{%- endfor %}""",
    "Mistral": """{%- if messages[0]["role"] == "system" %}{%- set system_message = messages[0]["content"] %}{%- set loop_messages =
        messages[1:] %}
        {%- else %}{%- set loop_messages = messages %}{%- endif %}{%- set user_messages = loop_messages | selectattr("role", "equalto",
        "user") |
        list %}{%- set filtered_messages = [] %}{%- for message in loop_messages %}{%- if message["role"] not in ["tool", "tool_results"]
        and not
        message.get("tool_calls") %}{%- set filtered_messages = filtered_messages + [message] %}{%- endif %}{%- endfor %}
        {%- for message in filtered_messages %}{%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}{{- raise_exception("roles
        must
        alternate") }}{%- endif %}{{ {"user": "[INST]", "assistant": ""}[message["role"]] }}{%- endfor %}{%- for message in loop_messages
        %}
        {%- if message == user_messages[-1] %}{%- for tool in tools %}{%- set tool = tool.function %}{%- for key, val in tool.items()
        if key != "return" %}{{- '"' + key + '": ' + val|tojson }}{%- endfor %}{%- endfor %}{%- endif %}{%- set out = tool_call|tojson %}
        {{- out[:-1] }}{{- ', "id": "' + tool_call.id[-9:] + '"}' }}{%- endfor %}{{ eos_token }}""",
    "OneVision": """{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{# images first #}{% for content in
        message['content'] |
        selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% for content in message['content'] | selectattr('type',
        'equalto',
        'video') %}{{ '<video>' }}{% endfor %}{% if message['role'] != 'assistant' %}{% for content in message['content'] |
        selectattr('type',
        'equalto', 'text') %}{{ '\\n' + content['text'] }}{% endfor %}{% else %}{% for content in message['content'] | selectattr('type',
        'equalto', 'text') %}{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{%
        endfor %}
        {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}""",
    "Hermes": """{%- macro json_to_python_type(json_spec) %}{%- set basic_type_map = {"string": "str", "number": "float", "array":
        "list"} %}
        {%- if basic_type_map[json_spec.type] is defined %}{{- basic_type_map[json_spec.type] }}{%- elif json_spec.type == "array" %}
        {{- "list[" + json_to_python_type(json_spec|items) + "]" }}{%- elif json_spec.type is iterable %}{{- "Union[" }}
        {%- for t in json_spec.type %}{{- json_to_python_type({"type": t}) }}{%- if not loop.last %}{{- "," }}{%- endif %}{%- endfor
        %}{{- "]" }}
        {%- else %}{{- "Any" }}{%- endif %}{%- endmacro %}{%- for name, fields in tool.parameters.properties|items %}{{- name + ": " +
        json_to_python_type(fields) }}{%- if name in tool.parameters.required %}!{%- endif %}{%- endfor %}""",
    "Command R": """{%- macro seen(messages, tool_call_id) %}{%- set counter = namespace(value=0) %}{%- for msg in messages %}{%- for
        tool_call in
        msg.tool_calls %}{%- if tool_call.id == tool_call_id %}{{ counter.value }}{%- break %}{%- else %}{%- continue %}{%- endif %}
        {%- set counter.value = counter.value + 1 %}{%- endfor %}{%- endfor %}{%- endmacro %}{%- set ids = namespace(value=[]) %}
        {%- for message in messages %}{%- if message.role|lower == 'tool' and message.tool_call_id not in ids.value %}{{ seen(messages,
        message.tool_call_id) }}{%- for msg in messages[loop.index0 + 1:] %}{%- set ids.value = ids.value + [msg.tool_call_id] %}{%-
        endfor %}
        {%- endif %}{%- endfor %}""",
    "Gemma": """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}{%- set
        first_user_prefix =
        messages[0]['content'] + '\\n\\n' -%}{%- else -%}{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%-
        endif -%}
        {%- endif -%}{%- for message in messages -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
        {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}{%- if message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}{%- endif -%}{{ value['items'] | dictsort }}
        {%- for req in value | default([]) | map('upper') | list %}{{ req }}{% endfor %}{%- endfor -%}""",
    "ChatML": """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% for message in
        messages %}
        {{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}""",
    "Vicuna": """{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + ' ' }}{% set messages = messages[1:] %}{% endif %}
        {% for message in messages %}{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + ' ' }}{% elif
        message['role']
        == 'assistant' %}{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}{% endfor %}""",
    "GPT-OSS": """{%- macro render(param_spec, required_params, is_nullable=false) -%}{%- if param_spec.type == "array" -%}{%- if
        param_spec['items']
        %}{{- render(param_spec['items'], required_params) + "[]" }}{%- endif %}{%- elif param_spec.type is defined and param_spec.type
        is iterable
        and param_spec.type is not string and param_spec.type[0] is defined -%}{{- param_spec.type | join(" | ") }}{%- elif
        param_spec.oneOf -%}
        {%- for variant in param_spec.oneOf -%}{{- render(variant, required_params) -}}{%- if loop.length > 1 and loop.index <
        loop.length %}|
        {%- endif %}{%- endfor -%}{%- endif -%}{%- endmacro -%}{%- set model_identity = "x" %}{{- "Current date: " +
        strftime_now("%Y-%m-%d") }}
        {%- set last_tool_call = namespace(name=none) %}{%- for message in messages -%}{%- set last_tool_call.name =
        message.tool_calls[-1].function.name %}
        {%- for k, v in _args|items if false %}{% endfor %}{%- set _args = message.arguments %}{%- endfor -%}{{ "%s|%d" | format("a", 3)
        }}""",
    "lists and dicts that are filled": """{% set seen = [] %}{% set by = {} %}{% for m in messages|reverse %}
        {% if m.name not in seen %}{% set _ = seen.append(m.name) %}{% set _ = by.update({m.id: m.content ~ ' '}) %}{% endif %}{% endfor %}
        {% for s in seen %}{{ tools[s] }}{% endfor %}{{ seen[-1] }}{{ by['x'] }}{{ messages|join(', ', 'role') }}
        {% macro f() %}{{ varargs|join(', ') }}{{ varargs[0] }}{% endmacro %}{{ f('a') }}
        {% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == m.role %}{{ m['content'] }}{% endif %}
        {% endfor %}""",
    "words with underscores in the text": """The __init__ method of ''.__class__ {# {{ x.__class__ }} #}{{ "__init__ is" ~ ' "__class__"'
        }}""",
    "nothing": "",
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_what_people_write_is_no_alarm(name: str) -> None:
    assert asks_for(HONEST[name]) == []


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_our_own_are_no_alarm(name: str) -> None:
    assert asks_for(chat_template(CONVERSATIONS[name], "<image>")) == []


HOSTILE = {
    "{% macro f() %}{{ x[varargs[0]] }}{% endmacro %}{{ f('__class__') }}": "puts together",
    "{% macro f() %}{{ x[kwargs['a']] }}{% endmacro %}{{ f(a='__class__') }}": "puts together",
    "{% macro __class__() %}{% endmacro %}{{ x[__class__.name] }}": "puts together",
    "{% macro f(__class__) %}{% endmacro %}{{ x[f.arguments[0]] }}": "puts together",
    "{% set d = {} %}{% set _ = d.update({'k': '__class__'}) %}{{ x[d['k']] }}": "puts together",
    "{% set l = [] %}{% set _ = l.append('__class__') %}{{ x[l[0]] }}": "puts together",
    "{% set l = [[]] %}{% set _ = l[0].append('__class__') %}{% for k in l[0] %}{{ x[k] }}{% endfor %}": "puts together",
    "{% set n = namespace(l=[]) %}{% set _ = n.l.append('__class__') %}{{ x[n.l[0]] }}": "puts together",
    "{% set n = namespace() %}{% set n.k = '__class__' %}{{ x[n['k']] }}": "puts together",
    "{% for k in ['__class__', 'a'] %}{{ x[loop.previtem] }}{% endfor %}": "puts together",
    "{{ x|sort(attribute='role,__class__') }}": "`role,__class__`",
    "{{ x|join(',', '__class__') }}": "`__class__`",
    "{{ x|map('join', ',', '__class__')|list }}": "`__class__`",
    "{{ x['slabolg_'|reverse] }}": "puts together",
    "{{ lipsum.append('x') }}": "`lipsum`",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "`__class__`",
    r"""{{ messages | attr("\x5f\x5finit\x5f\x5f") }}""": "the filter `attr`",
    r"""{{ messages["\x5f\x5fclass\x5f\x5f"] }}""": "`__class__`",
    r"""{{ messages["\137_class__"]["\u005f_base__"] }}""": "`__class__`",
    "{{ messages['__cla' '__ss__'] }}": "`__cla__ss__`",
    "{{ messages['__cla' ~ 'ss__'] }}": "puts together",
    "{{ messages['__cla' + 'ss__'] }}": "puts together",
    "{{ messages['%cclass' % 95] }}": "puts together",
    "{{ messages[('_' * 2) ~ 'class'] }}": "puts together",
    "{{ messages['ssalc'[::-1]] }}": "puts together",
    "{{ messages['xgi_frame'[1:]] }}": "puts together",
    "{% set a = '__class__' %}{{ messages[a] }}": "puts together",
    "{% set a = '__cla' %}{% set b = a ~ 'ss__' %}{% set c = b %}{{ messages[c] }}": "puts together",
    "{% set n = namespace(a='') %}{% set n.a = n.a + '__x' %}{{ messages[n.a] }}": "puts together",
    "{% set a %}__class__{% endset %}{{ messages[a] }}": "puts together",
    "{% for a in ['__class__'] %}{{ messages[a] }}{% endfor %}": "puts together",
    "{% for a in 'x.__class__'.split('.') %}{{ messages[a] }}{% endfor %}": "puts together",
    "{% with a = '__class__' %}{{ messages[a] }}{% endwith %}": "puts together",
    "{% macro m(a) %}{{ messages[a] }}{% endmacro %}{{ m('__cla' ~ 'ss__') }}": "puts together",
    "{% macro m(a='__class__') %}{{ messages[a] }}{% endmacro %}{{ m() }}": "puts together",
    "{{ messages[dict(__class__=1) | list | first] }}": "`__class__`",
    "{{ messages[['__cla', 'ss__'] | join] }}": "puts together",
    "{{ messages['CLASS' | lower] }}": "puts together",
    "{{ messages[bos_token] }}": "puts together",
    "{{ messages[strftime_now('__class__')] }}": "puts together",
    "{{ messages[{'a': '__class__'}.a] }}": "puts together",
    "{{ messages | map(attribute='__class__') | list }}": "`__class__`",
    "{{ messages | map(attribute='a.__class__.b') | list }}": "`a.__class__.b`",
    "{{ messages | map(attribute='__cla' ~ 'ss__') | list }}": "puts together",
    "{{ messages | map('attr', '__class__') | list }}": "the filter `attr`",
    "{{ messages | map(x) | list }}": "puts together",
    "{{ messages | selectattr('__class__') | list }}": "`__class__`",
    "{{ messages | groupby('__class__') }}": "`__class__`",
    "{{ messages | sort(attribute='__class__') }}": "`__class__`",
    "{{ messages | sum('__class__') }}": "`__class__`",
    "{{ messages | map(*args) }}": "unpacks",
    "{{ lipsum.__globals__ }}": "`lipsum`",
    "{{ self }}": "`self`",
    "{{ _internal }}": "`_internal`",
    "{{ x.gi_frame.f_globals }}": "`gi_frame`",
    "{{ x.mro() }}": "`mro`",
    "{{ '{0.__class__}'.format(x) }}": "the method `format`",
    "{{ ''['format'](x) }}": "a call of what it looks up",
    "{{ '{0}'.format_map(x) }}": "`format_map`",
    "{{ open('/etc/passwd') }}": "the function `open`",
    "{{ x() }}": "the function `x`",
    "{{ (x or y)() }}": "a call",
    "{{ x[y]() }}": "a call",
    "{{ cycler.init('x') }}": "the method `init`",
    "{{ x.os.system('id') }}": "the method `system`",
    "{% include '/etc/passwd' %}": "`include`",
    "{% import 'x' as y %}": "`import`",
    "{% from 'x' import y %}": "`fromimport`",
    "{% extends 'x' %}": "`extends`",
    "{% block a %}{% endblock %}": "`block`",
    "{{ 9 ** 9 ** 9 }}": "`pow`",
    "{% if x is nosuch %}{% endif %}": "nosuch",
    "{{ x | nosuch }}": "nosuch",
    "{% filter attr('x') %}a{% endfilter %}": "the filter `attr`",
    "{% do x.append(1) %}": "another language",
    "{% if %}": "another language",
    "{{ '": "another language",
    "{{ " + "9" * 10_000 + " }}": "more than",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}": "more than",
    "{{ " + "-" * 5000 + "1 }}": "more than",
    "{{ " + "+".join("x" * 10_000) + " }}": "",
    "x" * (LONGEST_TEMPLATE + 1): "characters",
    "{% generation %}{{ x.__class__ }}{% endgeneration %}": "`__class__`",
    "{% trans %}x{% endtrans %}": "another language",
    "{% for a in x recursive %}{{ messages[a] }}{{ loop(['__class__']) }}{% endfor %}": "puts together",
    "{% call(a) m() %}{{ messages[a] }}{% endcall %}{% macro m() %}{{ caller('__class__') }}{% endmacro %}": "puts together",
    "{{ {}.__class__ if false else ''|trim }}": "`__class__`",
    "{{ x is __test }}": "`__test`",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("template", HOSTILE, ids=lambda template: template[:60])
def test_what_leads_out_is_named(template: str) -> None:
    asked = asks_for(template)
    assert HOSTILE[template] in "; ".join(asked)
    assert asked or not HOSTILE[template]
    assert all(len(text) < 400 for text in asked)


@pytest.mark.timeout(60)
def test_a_long_template_takes_no_long_time() -> None:
    names = range(6000)
    asks_for("".join(f"{{%set a{i}=a{i + 1}%}}" for i in names))
    asks_for("".join(f"{{%set a{i + 1}=a{i}%}}" for i in names))
    asks_for("{% macro m(" + ",".join(f"a{i}" for i in names) + ") %}{% endmacro %}" + "{{m(x)}}" * 6000)
    asks_for("{{ " + "[" * 200 + "x" + "]" * 200 + " }}" * 100)
    asks_for("{#" * 30_000)


# --- where they lie -------------------------------------------------------------------------------------------------

BAD, NAMED = r"""{{ x | attr("\x5f\x5finit\x5f\x5f") }}""", "the filter `attr`"
PLACES = {
    "chat_template.json": {"chat_template": BAD},
    "processor_config.json": {"chat_template": {"default": "{{ messages }}", "tools": BAD}},
    "tokenizer_config.json": {"chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": BAD}]},
    "chat_template.jinja": BAD,
    "additional_chat_templates/tool_use.jinja": BAD,
    "tool.jinja": BAD,
}


@pytest.fixture
def model(fixtures: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(fixtures / "C-v1.5/hf-by-tf4.47.1", tmp_path / "model"))


def warnings(folder: Path) -> dict[str, str]:
    found = health(open_checkpoint(folder), folder)
    return {finding.subject: finding.text for finding in found if finding.verdict == "warning" and "asks for" in finding.text}


@pytest.mark.parametrize("place", PLACES)
def test_every_place_of_a_template_is_looked_at(model: Path, place: str) -> None:
    assert warnings(model) == {}
    value: Any = PLACES[place]
    (model / place).parent.mkdir(exist_ok=True)
    if isinstance(value, dict):
        value = json.dumps((json.loads((model / place).read_text()) if (model / place).exists() else {}) | value)
    (model / place).write_text(value)
    assert {name: NAMED in text for name, text in warnings(model).items()} == {place: True}


def test_jinja_is_imported_where_a_template_is_read_only() -> None:
    code = "import sys, llava_weights.checks.template_check, llava_weights.cli.main; sys.exit('jinja2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_template_that_is_a_link_out_is_a_finding(model: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.jinja").write_text(BAD)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/x.jinja").symlink_to(tmp_path / "outside.jinja")
    found = health(open_checkpoint(model), model)
    assert [finding.verdict for finding in found if finding.subject == "additional_chat_templates/x.jinja"] == ["failed"]
