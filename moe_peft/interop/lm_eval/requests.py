"""What lm-eval asks, as rows of this package: the continuations of a document's context become one row's options.

Context and continuation are tokenised as prompt and answer are in training (`data.encoding`): apart, with the blanks
between them as the answer's. So scores, truncation, and what a router may read are those of the package's own test.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from moe_peft.backbones import Backbone
from moe_peft.data.encoding import EncodedRow, Encoder
from moe_peft.data.tasks import TaskSpec

UNKNOWN = -1
"""Task id of a row whose task the adapter does not know."""


class Request(NamedTuple):
    """One request of lm-eval."""

    task: str
    """lm-eval's name of its task."""
    document: str
    """Its id, by which batches are sorted as in the package's own test: equal batches give equal bits."""
    context: str
    continuation: str = ""


class Asked(NamedTuple):
    """A row and the requests that its options answer, by their numbers; one of a row without options."""

    row: EncodedRow
    numbers: list[int]


class RequestEncoder:
    """Encodes requests for one backbone.

    Args:
        backbone: whose tokenizer and kind decide the encoding.
        max_length: token limit of context and continuation together.
        bos: start token before a context (see `Encoder`).
        task_ids: the adapter's task by lm-eval's name; other tasks are `UNKNOWN`.
    """

    def __init__(
        self,
        backbone: Backbone,
        max_length: int,
        bos: Literal["auto", "always", "never"],
        task_ids: Mapping[str, int],
    ) -> None:
        self.backbone, self.max_length, self.task_ids = backbone, max_length, task_ids
        self.bos: Literal["auto", "always", "never"] = bos
        self.tokenizer = backbone.tokenizer()
        self.chat = False
        """Whether contexts are conversations in the tokenizer's own template, which brings its own start token."""
        self._encoders: dict[tuple[str, int], Encoder] = {}

    @property
    def start(self) -> int:
        """The token that stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def options(self, requests: Sequence[Request]) -> list[Asked]:
        """Makes a row of all continuations of the same context of a document."""
        groups: dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, str]]]] = {}
        for number, request in enumerate(requests):
            context, blank, answer = self._parts(request)
            rows = groups.setdefault((request.task, blank), {})
            rows.setdefault((request.document, context), []).append((number, answer))
        return [
            asked
            for (task, blank), rows in groups.items()
            for asked in self._encode(
                self._encoder(blank, self.max_length),
                TaskSpec(task, "multiple_choice", "accuracy", "{text}"),
                [(document, context, own) for (document, context), own in rows.items()],
            )
        ]

    def prompts(self, requests: Sequence[Request], new_tokens: int) -> list[Asked]:
        """Makes a row of every context, cut so that its continuation has room.

        Raises:
            ValueError: no room for any context.
        """
        room = self.max_length - (new_tokens if self.backbone.kind == "causal" else 0)
        if room < 1:
            raise ValueError(
                f"max_gen_toks: {new_tokens} new tokens leave no room for a prompt in max_length={self.max_length}: "
                "raise max_length, or --gen_kwargs max_gen_toks=N"
            )
        if self.backbone.kind == "causal":
            room += 1  # the encoder itself leaves room for one answer token
        encoder = self._encoder("", room)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(request.task, []).append(number)
        return [
            asked
            for task, numbers in groups.items()
            for asked in self._encode(
                encoder,
                TaskSpec(task, "generation", "exact_match", "{text}"),
                [(requests[number].document, requests[number].context, [(number, "")]) for number in numbers],
            )
        ]

    def windows(self, requests: Sequence[Request]) -> list[Asked]:
        """Cuts every context, all of which is to be scored, into windows; a window's own context is its prompt."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        found = []
        for number, request in enumerate(requests):
            tokens = self.tokenizer(request.context, add_special_tokens=False, verbose=False)["input_ids"]
            length = self.max_length - 1  # of what a model is fed, which is all but a window's last token
            cuts = get_rolling_token_windows(tokens, self.start, length, context_len=1)
            found += [
                Asked(self._window(request, *make_disjoint_window(cut), name=f"{number}.{at}"), [number])
                for at, cut in enumerate(cuts)
            ]
        return found

    def _window(self, request: Request, prompt: list[int], tokens: list[int], name: str) -> EncodedRow:
        text = self.tokenizer.decode(prompt, skip_special_tokens=True)
        task = self.task_ids.get(request.task, UNKNOWN)
        return EncodedRow(f"{request.task}/{name}", task, {}, text, prompt, [], [tokens], None, 0)

    def _parts(self, request: Request) -> tuple[str, str, str]:
        """Splits a request into its context, the blanks after it, and the answer."""
        context, continuation = request.context, request.continuation
        answer = continuation.lstrip()
        if self.backbone.kind == "seq2seq":  # an answer begins the decoder's text
            return context, "", answer
        blank = continuation[: len(continuation) - len(answer)]
        if not blank and not self.chat:  # a template's last line break is no answer's
            blank, context = context[len(context.rstrip()) :], context.rstrip()
        return context, blank, answer

    def _encoder(self, blank: str, max_length: int) -> Encoder:
        if (blank, max_length) not in self._encoders:
            bos = "never" if self.chat and self.bos == "auto" else self.bos
            self._encoders[blank, max_length] = Encoder(
                self.tokenizer, self.backbone.kind, max_length, bos=bos, answer_prefix=blank
            )
        return self._encoders[blank, max_length]

    def _encode(
        self, encoder: Encoder, spec: TaskSpec, asked: Iterable[tuple[str, str, list[tuple[int, str]]]]
    ) -> list[Asked]:
        """Encodes rows of one task: (document, context, [(number of the request, answer)])."""
        rows: list[dict[str, Any]] = []
        numbers: list[list[int]] = []
        for document, context, own in asked:
            rows.append({"id": f"{document}.{own[0][0]}", "text": context, "choices": [answer for _, answer in own]})
            numbers.append([number for number, _ in own])
        encoded = encoder.encode(spec, self.task_ids.get(spec.name, UNKNOWN), rows)
        for row in encoded:
            row.prompt = self._started(row.prompt)
        return [Asked(row, own) for row, own in zip(encoded, numbers, strict=True)]

    def _started(self, prompt: list[int]) -> list[int]:
        """Puts the start token that was asked for in the place of what a chat template wrote; no prompt is empty."""
        bos = self.tokenizer.bos_token_id
        if self.chat and self.bos != "auto":
            while prompt[:1] == [bos]:
                prompt = prompt[1:]
            prompt = [bos, *prompt] if self.bos == "always" else prompt
        return prompt or [self.start]
