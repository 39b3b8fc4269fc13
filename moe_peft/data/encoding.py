"""From a row to token ids: the template is filled in, prompt and answer are tokenised apart.

Apart, so that the boundary between them is exact and an option's tokens never depend on its prompt (but do not begin
a text either, where a tokenizer tells the two). The prompt is cut
from the left where it is too long; the answer never is. How much is cut depends on the row's longest option, not on
the right one: the prompt's length must not give the answer away, and training must see the prompt that scoring sees.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from moe_peft.backbones import Kind
from moe_peft.data.tasks import Row, TaskSpec, template_fields

_MARK = "moepeftcontentmark"
_ANCHOR = "a"


@dataclass(slots=True)
class EncodedRow:
    """One row, ready to be padded.

    Args:
        row_id: `<task>/<id>`.
        task_id: Index of the task in the run's list.
        row: The plain row.
        text: The prompt as text, without chat template and special tokens.
        prompt: Prompt token ids, special tokens included.
        answer: Token ids of the right answer and the end token; empty for a classifier and without an answer.
        options: Token ids of every option, without an end token; empty where nothing is ranked.
        target: Class index or value; None where the answer is text or unknown.
        truncated: Prompt tokens that were cut off.
    """

    row_id: str
    task_id: int
    row: Row
    text: str
    prompt: list[int]
    answer: list[int]
    options: list[list[int]]
    target: int | float | None
    truncated: int


class Encoder:
    """Turns rows into token ids for one backbone.

    Args:
        tokenizer: The backbone's tokenizer.
        kind: causal (prompt and answer in one sequence), seq2seq (prompt, and answer as the decoder's labels) or
            classifier (the prompt with the tokenizer's own special tokens, and a target).
        max_length: Token limit of prompt and answer together; of each alone for seq2seq.
        style: plain text, or the tokenizer's own chat template.
        bos: Start token before a prompt: auto does what the tokenizer (or its chat template) does by itself.
        system: System message of the chat template; None leaves the template's default.
        answer_prefix: Text before every answer; " " where not given, and "" for chat and seq2seq.
        number_format: Format of a regression value that is written as text.
        number_steps: Steps per unit that a regression value is rounded to before it is written (5: multiples of 0.2);
            not rounded where not given.

    Raises:
        ValueError: A setting that this tokenizer or kind cannot honour.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: Kind,
        max_length: int = 160,
        style: Literal["plain", "chat"] = "plain",
        bos: Literal["auto", "always", "never"] = "auto",
        system: str | None = None,
        answer_prefix: str | None = None,
        number_format: str = ".1f",
        number_steps: int | None = None,
    ) -> None:
        if max_length < 2 or max_length > tokenizer.model_max_length:
            raise ValueError(
                f"max_length={max_length} must lie between 2 and the model's {tokenizer.model_max_length}."
            )
        if style == "chat" and not tokenizer.chat_template:
            raise ValueError(
                "style='chat' needs a tokenizer with a chat template; this one has none: use style='plain'."
            )
        if system is not None and style == "plain":
            raise ValueError("system is given but style='plain' has no system message; use style='chat' or drop it.")
        if kind == "classifier" and bos != "auto":
            raise ValueError(f"bos='{bos}': a classifier's special tokens are the tokenizer's own; use bos='auto'.")
        if bos == "always" and tokenizer.bos_token_id is None:
            raise ValueError("bos='always' needs a start token, which this tokenizer lacks; use bos='auto'.")
        if number_steps is not None and number_steps < 1:
            raise ValueError(f"number_steps={number_steps} must be 1 or more, or null for values as they are.")
        if kind != "classifier" and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no end token (eos_token), which ends every training answer; set one.")
        self.tokenizer, self.kind, self.max_length = tokenizer, kind, max_length
        self.style, self.bos, self.system = style, bos, system
        self.answer_prefix = (
            (" " if kind == "causal" and style == "plain" else "") if answer_prefix is None else answer_prefix
        )
        self.number_format, self.number_steps = number_format, number_steps
        self._anchored = self._needs_anchor()
        self._prefix, self._suffix = self._special_tokens()
        self._head, self._tail = self._chat_frame() if style == "chat" else ("", "")

    def encode(self, spec: TaskSpec, task_id: int, rows: Sequence[Row]) -> list[EncodedRow]:
        """Encodes rows of one task.

        Raises:
            ValueError: Answers that leave no room for a prompt within `max_length`: how many, and which rows.
        """
        template_fields(spec.template)
        texts = [spec.template.format_map(row) for row in rows]
        if self.style == "chat":
            texts = [text.strip() for text in texts]  # many chat templates strip, which would move the frame
        answers = [self._answer_text(spec, row) for row in rows]
        options = [row["choices"] if spec.has_options else [] for row in rows]
        tokens = self._answer_tokens(
            {text for row in options for text in row} | {text for text in answers if text is not None}
        )
        contents = self._tokenize(texts)
        framed = (
            self._tokenize([self._head + text + self._tail for text in texts]) if self.style == "chat" else contents
        )
        encoded: list[EncodedRow] = []
        too_long: list[str] = []
        for row, text, content, frame, answer, choices in zip(
            rows, texts, contents, framed, answers, options, strict=True
        ):
            scored = choices if answer is None else [answer, *choices]
            longest = max((len(tokens[option]) for option in scored), default=0) + 1
            prompt = self._prompt(content, frame, longest)
            if prompt is None:
                too_long.append(f"{row['id']} ({longest} answer tokens)")
                continue
            whole = len(self._with_special(frame))
            encoded.append(
                EncodedRow(
                    row_id=f"{spec.name}/{row['id']}",
                    task_id=task_id,
                    row=row,
                    text=text,
                    prompt=prompt,
                    answer=[] if answer is None or self.kind == "classifier" else [*tokens[answer], self._eos],
                    options=[] if self.kind == "classifier" else [tokens[option] for option in choices],
                    target=row.get("label") if spec.has_options else row.get("value"),
                    truncated=whole - len(prompt),
                )
            )
        if too_long:
            raise ValueError(
                f"task '{spec.name}': {len(too_long)} rows have an answer that leaves no room for a prompt within "
                f"max_length={self.max_length} ({', '.join(too_long[:5])}{', …' if len(too_long) > 5 else ''}); "
                "raise max_length or set the source's max_words."
            )
        return encoded

    @property
    def _eos(self) -> int:
        eos = self.tokenizer.eos_token_id
        assert isinstance(eos, int)
        return eos

    def _answer_text(self, spec: TaskSpec, row: Row) -> str | None:
        value = row.get("value")
        if spec.kind != "regression":
            return row.get("target")
        if value is not None and self.number_steps is not None:
            value = round(value * self.number_steps) / self.number_steps
        return None if value is None else format(value, self.number_format)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    def _answer_tokens(self, texts: set[str]) -> dict[str, list[int]]:
        if self.kind == "classifier":
            return dict.fromkeys(texts, [])
        ordered = sorted(texts)
        alone = self._tokenize([self.answer_prefix + text for text in ordered])
        if not self._anchored:
            return dict(zip(ordered, alone, strict=True))
        anchor, *joined = self._tokenize([_ANCHOR, *(_ANCHOR + self.answer_prefix + text for text in ordered)])
        return {
            text: whole[len(anchor) :] if whole[: len(anchor)] == anchor else tokens
            for text, tokens, whole in zip(ordered, alone, joined, strict=True)
        }

    def _needs_anchor(self) -> bool:
        """Whether the tokenizer writes a text another way when it begins with it than when it goes on with it.

        Sentencepiece-like ones put a blank before whatever they are given: " positive" alone would get two. The tokens
        of an answer are then those that it adds to a text before it. A prefix of "" leaves that blank to do the job.
        """
        if self.kind != "causal" or not self.answer_prefix:
            return False
        anchor, joined, alone = self._tokenize([_ANCHOR, _ANCHOR + self.answer_prefix + "b", self.answer_prefix + "b"])
        return joined[: len(anchor)] == anchor and joined[len(anchor) :] != alone

    def _prompt(self, content: list[int], framed: list[int], longest: int) -> list[int] | None:
        """Fits a prompt beside its longest answer; None where no prompt token would be left."""
        room = self.max_length - (longest if self.kind == "causal" else 0)
        if self.kind == "seq2seq" and longest > self.max_length:
            return None
        whole = self._with_special(framed)
        if len(whole) <= room:
            return whole
        head, tail = (self._tokenize([part])[0] if part else [] for part in (self._head, self._tail))
        keep = room - len(self._with_special([*head, *tail]))
        return self._with_special([*head, *content[-keep:], *tail]) if keep > 0 else None

    def _with_special(self, ids: list[int]) -> list[int]:
        if self.style == "chat" and self.bos != "auto":
            start = [self.tokenizer.bos_token_id]
            while ids[:1] == start:
                ids = ids[1:]
        return [*self._prefix, *ids, *self._suffix]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What goes before and after a prompt: the tokenizer's own tokens, the start token by option."""
        bare = self._tokenize(["a"])[0]
        whole: Any = self.tokenizer("a")["input_ids"]
        start = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
        prefix, suffix = list(whole[:start]), list(whole[start + len(bare) :])
        if self.style == "chat":  # the template writes its own
            prefix, suffix = [], []
        if self.bos == "always" and prefix[:1] != [self.tokenizer.bos_token_id]:
            prefix = [self.tokenizer.bos_token_id, *prefix]
        if self.bos == "never":
            prefix = []
        # A causal prompt goes on into its answer: no end token between them.
        return prefix, [] if self.kind == "causal" else suffix

    def _chat_frame(self) -> tuple[str, str]:
        messages = [{"role": "user", "content": _MARK}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head, mark, tail = str(text).partition(_MARK)
        if not mark:
            raise ValueError("the tokenizer's chat template drops the user's message; use style='plain'.")
        return head, tail
