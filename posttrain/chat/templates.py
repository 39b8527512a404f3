"""Templates of our own, for base models that bring none: `chat.template: chatml`.

Each marks with `{% generation %}` what the assistant writes, its stop token included, and writes
system text, reasoning and tools wherever the conversation has them.
"""

from __future__ import annotations

_TOOLS = """\
{%- macro tool_text() -%}
# Tools

You can call the functions below. Their signatures, one per line:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor -%}
</tools>

To call one, write a JSON object with its name and arguments:
<tool_call>
{"name": <name>, "arguments": <arguments>}
</tool_call>
{%- endmacro -%}
"""

_WRITTEN = """\
{%- macro written(message) -%}
{%- if message.reasoning_content -%}
{{ '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
{%- endif -%}
{{ message.content }}
{%- for call in message.tool_calls or [] -%}
{{ ('\\n' if message.content or not loop.first else '') + '<tool_call>\\n{"name": ' }}
{{- call.function.name | tojson }}{{ ', "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor -%}
{%- endmacro -%}
"""

_CHATML = (
    _TOOLS
    + _WRITTEN
    + """\
{%- if tools and messages[0].role != 'system' -%}
{{ '<|im_start|>system\\n' + tool_text() + '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- generation -%}{{ written(message) + '<|im_end|>' }}{%- endgeneration -%}
{{ '\\n' }}
{%- elif message.role == 'system' and tools and loop.first -%}
{{ '<|im_start|>system\\n' + message.content + '\\n\\n' + tool_text() + '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
)

_LLAMA3 = (
    _TOOLS
    + _WRITTEN
    + """\
{%- macro header(role) -%}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- endmacro -%}
{{ bos_token }}
{%- if tools and messages[0].role != 'system' -%}
{{ header('system') + tool_text() + '<|eot_id|>' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{{ header('assistant') }}
{%- generation -%}{{ written(message) + '<|eot_id|>' }}{%- endgeneration -%}
{%- elif message.role == 'system' and tools and loop.first -%}
{{ header('system') + message.content + '\\n\\n' + tool_text() + '<|eot_id|>' }}
{%- else -%}
{{ header('ipython' if message.role == 'tool' else message.role) + message.content + '<|eot_id|>' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ header('assistant') }}{%- endif -%}
"""
)

TEMPLATES: dict[str, str] = {"chatml": _CHATML, "llama3": _LLAMA3}

CONTROL_TOKENS: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
"""The tokens a template needs in the vocabulary (see `model.new_tokens`)."""
