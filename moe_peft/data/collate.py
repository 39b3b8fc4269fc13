"""From encoded rows to padded batches: for training, for evaluation, and prompts alone.

Causal batches are left-padded, so that answers end together; all others are right-padded. Padding is told apart by
length, never by token id (many tokenizers pad with the end token).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_peft.backbones import Kind
from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.data.encoding import EncodedRow


class Collator:
    """Pads encoded rows for one backbone.

    Args:
        kind: The backbone's kind.
        pad_id: Its padding token.
        pack: Whether a causal model scores a row's options side by side behind one prompt (`Backbone.packs_options`)
            rather than one sequence per option.
    """

    def __init__(self, kind: Kind, pad_id: int, pack: bool = True) -> None:
        self.kind = kind
        self.pad_id = pad_id
        self.pack = pack and kind == "causal"

    def train(
        self, rows: Sequence[EncodedRow], rows_share: float, tokens_share: float, task_share: Sequence[float] = ()
    ) -> Batch:
        """Makes a training batch: the right answer behind every prompt, or its class or value.

        Args:
            rows: B rows.
            rows_share: Rows of the global batch / (ranks x accumulation steps).
            tokens_share: Its answer tokens / (ranks x accumulation steps).
            task_share: For each of the rows, the global batch's rows of its task / (ranks x accumulation steps).
        """
        batch = self._sequences(rows, None if self.kind == "classifier" else [row.answer for row in rows])
        batch["rows_share"] = rows_share
        batch["tokens_share"] = tokens_share
        batch["task_share"] = torch.tensor(task_share, dtype=torch.float32)
        if self.kind == "classifier":
            batch["target"] = _targets(rows)
        return batch

    def evaluate(self, rows: Sequence[EncodedRow]) -> Batch:
        """Makes an evaluation batch of one task: a row's prompt with all its options, or prompts alone.

        Packed: one sequence per row, options side by side behind the prompt (`Batch.option_of`). Otherwise: one
        sequence per option, a row's options consecutive. Where nothing is ranked: one prompt per row.

        Args:
            rows: Rows of one task.
        """
        if any(row.task_id != rows[0].task_id for row in rows):
            raise ValueError("an evaluation batch holds rows of one task; group the rows by task first.")
        if not rows[0].options:
            batch = self.prompts(rows)
            if self.kind == "classifier" and all(row.target is not None for row in rows):
                batch["target"] = _targets(rows)
        elif self.pack:
            batch = self._sequences(rows, [sum(row.options, []) for row in rows])
            batch["option_of"] = self._pad([_option_of(row) for row in rows], 0)
        else:
            repeated = [row for row in rows for _ in row.options]
            batch = self._sequences(repeated, [option for row in rows for option in row.options])
        batch["rows"] = [row.row for row in rows]
        return batch

    def prompts(self, rows: Sequence[EncodedRow]) -> Batch:
        """Makes a batch of prompts alone, without labels."""
        return self._sequences(rows, None)

    def _sequences(self, rows: Sequence[EncodedRow], answers: list[list[int]] | None) -> Batch:
        prompts = [row.prompt for row in rows]
        batch: Batch = {
            "task_id": torch.tensor([row.task_id for row in rows]),
            "row_id": [row.row_id for row in rows],
            "text": [row.text for row in rows],
        }
        if self.kind != "causal" or answers is None:
            batch["input_ids"] = self._pad(prompts, self.pad_id)
            batch["attention_mask"] = self._pad([[1] * len(prompt) for prompt in prompts], 0)
            batch["prompt_mask"] = batch["attention_mask"].bool()
            if answers is not None:
                batch["labels"] = self._pad(answers, IGNORE_INDEX)
            return batch
        pairs = list(zip(prompts, answers, strict=True))
        batch["input_ids"] = self._pad([prompt + answer for prompt, answer in pairs], self.pad_id)
        batch["attention_mask"] = self._pad([[1] * (len(prompt) + len(answer)) for prompt, answer in pairs], 0)
        batch["prompt_mask"] = self._pad([[1] * len(prompt) + [0] * len(answer) for prompt, answer in pairs], 0).bool()
        batch["labels"] = self._pad([[IGNORE_INDEX] * len(prompt) + answer for prompt, answer in pairs], IGNORE_INDEX)
        return batch

    def _pad(self, sequences: list[list[int]], filler: int) -> Tensor:
        """Pads to the longest: [B, S] int64."""
        width = max(len(sequence) for sequence in sequences)
        if self.kind == "causal":
            padded = [[filler] * (width - len(sequence)) + sequence for sequence in sequences]
        else:
            padded = [sequence + [filler] * (width - len(sequence)) for sequence in sequences]
        return torch.tensor(padded, dtype=torch.int64)


def _option_of(row: EncodedRow) -> list[int]:
    """Gives 0 for every prompt token and k + 1 for every token of option k."""
    return [0] * len(row.prompt) + [index + 1 for index, option in enumerate(row.options) for _ in option]


def _targets(rows: Sequence[EncodedRow]) -> Tensor:
    values = [row.target for row in rows]
    missing = next((row.row_id for row in rows if row.target is None), None)
    if missing is not None:
        raise ValueError(f"row '{missing}' has a text answer, which a classifier cannot give; use a causal backbone.")
    return torch.tensor(
        values, dtype=torch.float32 if any(isinstance(value, float) for value in values) else torch.int64
    )
