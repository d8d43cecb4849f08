"""Tokenizers with chat templates in the styles of several families, of vocabularies learnt here."""

import json
from pathlib import Path

from tokenizer_layouts import added, family, write

from nanopref.data.tokenizer import Tokenizer

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SMOLLM2 = """{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful assistant<|im_end|>
' }}{% endif %}{{'<|im_start|>' + m['role'] + '
' + m['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('Unknown role: ' + message.role) }}
    {%- endif %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
QWEN3 = """{%- set ns = namespace(last=messages|length - 1, open=true) %}
{%- for m in messages[::-1] %}
    {%- if ns.open and m.role == 'user' %}
        {%- set ns.open = false %}
        {%- set ns.last = (messages|length - 1) - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- set thought = '' %}
    {%- if m.role == 'assistant' and '</think>' in content %}
        {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > ns.last %}
        {%- set content = '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
MISTRAL = """{{- bos_token }}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + message['content'] + ' [/INST]' }}
    {%- else %}
        {{- message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
PLAIN = """{% for m in messages %}### {{ m.role }}
{{ m.content }}

{% endfor %}{% if add_generation_prompt %}### assistant
{% endif %}"""
SPECIAL = {"llama3": ["<|start_header_id|>", "<|end_header_id|>"], "mistral": ["<s>", "</s>", "[INST]", "[/INST]"]}
TEMPLATES = {  # the layout of the tokenizer, and the template
    "chatml": ("qwen2", CHATML),
    "smollm2": ("smollm2", SMOLLM2),
    "llama3": ("llama3", LLAMA3),
    "qwen3": ("qwen2", QWEN3),
    "mistral": ("qwen2", MISTRAL),
    "plain": ("gpt2", PLAIN),
}
ENDS = {"llama3": "<|eot_id|>", "mistral": "</s>", "plain": "<|endoftext|>"}  # others: <|im_end|>


def chat_folder(folder: Path, name: str, template: str | None = None) -> Path:
    """A tokenizer's folder with a chat template: that of this name, or another in its place."""
    layout, own = TEMPLATES[name]
    file, settings = map(json.loads, family(layout))
    size = max(token["id"] for token in file["added_tokens"]) + 1
    size = max(size, len(file["model"]["vocab"]))
    file["added_tokens"] += [added(token, size + i) for i, token in enumerate(SPECIAL.get(name, []))]
    if name == "mistral":
        settings |= {"bos_token": "<s>", "eos_token": "</s>"}
        settings.pop("added_tokens_decoder")
    return write(folder, file, settings | {"chat_template": own if template is None else template})


def chat_tokenizer(folder: Path, name: str, template: str | None = None) -> Tokenizer:
    return Tokenizer.load(chat_folder(folder, name, template))
