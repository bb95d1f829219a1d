"""The character tokenizer of the demo base, as a real Hugging Face fast tokenizer.

One id per ASCII character keeps the embedding at 128 rows, a hundredth of the parameters, where a word-piece
vocabulary would be most of such a small model. The id of a character is its ASCII code, so ids are readable in a
debugger; codes 0, 1 and 2, which no text needs, are <pad>, <s> and </s>.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
VOCABULARY_SIZE = 128

# A conversation is documents one after the other, exactly as in pretraining: each turn opens its own.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- bos_token + message['content'] + '>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- message['content'] + eos_token -}}"
    "{%- else -%}{{- raise_exception('the demo model knows the roles user and assistant only') -}}"
    "{%- endif -%}{%- endfor -%}"
)


def character_ids(text: str) -> list[int]:
    """Encode plain text without special tokens: what the tokenizer does, minus the parsing of "<s>"."""
    return [code if code > EOS_ID else ord("?") for code in text.encode("ascii", "replace")]


def build_tokenizer(*, max_length: int) -> PreTrainedTokenizerFast:
    """Build the tokenizer; `save_tokenizer` writes it for AutoTokenizer."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    vocabulary |= {chr(code): code for code in range(len(SPECIAL_TOKENS), VOCABULARY_SIZE)}
    # BPE without merges is a character model. It has no unk_token: naming "?" as one would make it special, and
    # decoding would then drop every question mark. The normalizer replaces what has no id instead.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[^\x03-\x7f]"), "?")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS_ID)]
    )
    pad, bos, eos = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the tokenizer files of a Hugging Face directory."""
    tokenizer.save_pretrained(directory)
    # transformers 5 records its own new name of this class; versions 4 and 5 both know the old one.
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
