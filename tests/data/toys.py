"""Tiny tasks, tokenizers and backbones made on the spot; no file, no download."""

import json
from pathlib import Path
from typing import Any


def class_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a two-class task whose text gives the label away."""
    words = ("bad", "good")
    return [
        {"id": str(i), "text": f"film {i} was {words[i % 2]}", "choices": ["negative", "positive"], "label": i % 2}
        for i in range(start, start + count)
    ]


def choice_rows(count: int, start: int = 0, options: int = 3) -> list[dict[str, Any]]:
    """Rows of a multiple-choice task: which number comes next."""
    return [
        {"id": str(i), "text": f"after {i} comes", "choices": [str(i + 1 + k) for k in range(options)], "label": 0}
        for i in range(start, start + count)
    ]


def write_task(
    folder: Path,
    splits: dict[str, list[dict[str, Any]]],
    kind: str = "classification",
    template: str = "{text} :",
    metric: str = "accuracy",
    name: str | None = None,
) -> Path:
    """Writes a task folder."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"name": name or folder.name, "kind": kind, "metric": metric, "template": template}
    (folder / "task.json").write_text(json.dumps(description), encoding="utf-8")
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


def word_tokenizer(words: str, start: bool = False, end: bool = False, chat_template: str | None = None) -> Any:
    """A tokenizer of whole words: <pad> 0, <s> 1, </s> 2, <unk> 3, then `words` from 4 on.

    Args:
        words: The vocabulary, separated by blanks.
        start: Whether it puts <s> before a text by itself.
        end: Whether it puts </s> behind a text by itself.
        chat_template: Its chat template.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *dict.fromkeys(words.split())])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if start or end:
        single = f"{'<s> ' if start else ''}$A{' </s>' if end else ''}"
        core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


TOY_WORDS = "film was bad good : negative positive after comes " + " ".join(str(i) for i in range(2100))


class ToyBackbone:
    """What the data module needs of a backbone: its kind and its tokenizer."""

    def __init__(self, kind: str = "causal", tokenizer: Any = None) -> None:
        self.kind = kind
        self._tokenizer = tokenizer or word_tokenizer(TOY_WORDS)

    def tokenizer(self) -> Any:
        return self._tokenizer

    def packs_options(self, max_length: int) -> bool:
        return self.kind == "causal"
