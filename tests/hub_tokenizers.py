"""Small tokenizers of the kinds that the hub has, with their chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fourstage.tokenizer import SPLIT

TEXTS = ["The quick brown fox jumps over the lazy dog. Say it is 12 + 3 = 15?\n", "It is so. "] * 20

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('system') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.index0 > ns.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

GLM = """\
[gMASK]<sop>
{%- for item in messages %}
    {{- '<|' + item['role'] + '|>\\n' + item['content'] }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}
"""


def backend(specials: list[str], thinks: bool = False) -> tokenizers.Tokenizer:
    """Byte-level BPE of a few merges; <think> and </think> as added tokens that aren't special."""
    found = tokenizers.Tokenizer(models.BPE())
    found.normalizer = normalizers.NFC()
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    found.train_from_iterator(TEXTS, trainer)
    found.add_special_tokens(specials)
    if thinks:
        found.add_tokens(["<think>", "</think>"])
    return found


def write(
    folder: Path, found: tokenizers.Tokenizer, template: str | None = None, **names: object
) -> Path:
    """A folder as the hub has it."""
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(found.to_str(), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def chatml(folder: Path) -> Path:
    """As Qwen3's: no bos, and an empty thought in front of the last answer."""
    made = backend(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], thinks=True)
    return write(folder, made, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def llama(folder: Path) -> Path:
    """As Llama 3's: its post-processor puts a bos in front of texts."""
    made = backend(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
        + ["<|eot_id|>"]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", made.token_to_id("<|begin_of_text|>"))],
    )
    bos = {"__type": "AddedToken", "content": "<|begin_of_text|>", "special": True}
    return write(folder, made, LLAMA, bos_token=bos, eos_token="<|eot_id|>")


def glm(folder: Path) -> Path:
    """As GLM-4's: nothing ends an answer but the next turn."""
    made = backend(["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"])
    return write(folder, made, GLM, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
