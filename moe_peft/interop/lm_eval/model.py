"""The model `moe_peft` of lm-eval: a trained adapter, routed, whose every number is computed as in our own test."""

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import resolve_max_length
from torch import Tensor
from tqdm import tqdm

from moe_peft.batch import Batch
from moe_peft.data.collate import Collator
from moe_peft.data.encoding import EncodedRow
from moe_peft.data.evaluation import group_for_evaluation
from moe_peft.interop.lm_eval.answering import Answer, Generation, continuations, option_answers
from moe_peft.interop.lm_eval.loading import load, serves_unknown, task_ids
from moe_peft.interop.lm_eval.requests import UNKNOWN, Asked, Request, RequestEncoder

T = TypeVar("T")
R = TypeVar("R")
AUTO = 64
"""Sequences in a batch where lm-eval says "auto"."""


@register_model("moe_peft")
class MoePeftLM(LM):
    """A trained adapter as lm-eval asks it, every row routed as the method routes.

    A row is served as the adapter's task that is called as its lm-eval task. A method that needs no task, or finds the
    expert by itself, takes any task. Of a row a router reads the context alone. A batch that does not fit into a GPU's
    memory is halved. lm-eval's response cache (`--use_cache`) tells neither tasks nor adapters apart: give every pair a
    file of its own.

    Args:
        adapter: a run's folder, a checkpoint, or an exported adapter's folder.
        base: where the backbone's files lie, if not where they lay in training.
        dtype: of the backbone, if not the one it was trained in: "float32", "bfloat16", "float16" or "auto".
        tasks: which of the adapter's tasks serves an lm-eval task of another name: "THEIRS:OURS;THEIRS:OURS".
        routing: of a TT-LoRA MoE: "learned" by its router, or "oracle": every row to its own task's expert.
        unknown_task: of MoRE: "nearest" or "mean" serves tasks that the adapter does not know.
        max_length: token limit of context and continuation together, `data.max_length` of a fit; the model's where not
            given.
        bos: start token before a context, `data.bos` of a fit.
        batch_size: sequences in a batch, or "auto".
        max_batch_size: the largest that "auto" may take.
        device: where to compute; the CPU where there is no GPU.
        unknown: arguments that there are not.

    Raises:
        ValueError: an argument that there is not, is missing, or does not fit the adapter.
    """

    def __init__(
        self,
        adapter: str | None = None,
        base: str | None = None,
        dtype: str | None = None,
        tasks: str = "",
        routing: str | None = None,
        unknown_task: str | None = None,
        max_length: int | None = None,
        bos: Literal["auto", "always", "never"] = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"model_args: there is no argument {next(iter(unknown))!r}; use adapter, base, dtype, tasks, routing, "
                "unknown_task, max_length or bos"
            )
        if adapter is None:
            raise ValueError("model_args: adapter is missing; give a run, a checkpoint or an exported adapter")
        if bos not in ("auto", "always", "never"):
            raise ValueError(f"bos: {bos!r} is none of auto, always and never; use one of them")
        most = counted("max_batch_size", max_batch_size or AUTO)
        self.batch_size = min(AUTO, most) if "auto" in str(batch_size) else counted("batch_size", batch_size)
        self.module = load(str(adapter), base, dtype, routing=routing, unknown_task=unknown_task)
        backbone = self.module.backbone
        self.tokenizer = backbone.tokenizer()
        gpu = torch.cuda.is_available()
        if device and device.startswith("cuda") and not gpu:
            device = "cpu"  # lm-eval's own default
        self._device = torch.device(device or ("cuda" if gpu else "cpu"))
        self.module.to(self._device)
        own = resolve_max_length(backbone.config(), self.tokenizer)
        length = own if max_length is None else counted("max_length", max_length)
        self.encoder = RequestEncoder(backbone, length, bos, task_ids(self.module, str(tasks)))
        self.collator = Collator(backbone.kind, self.tokenizer.pad_token_id, backbone.packs_options(length))

    # ---- what lm-eval asks ------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[Answer]:
        """Returns every continuation's summed log-likelihood, and whether it is what greedy decoding gives."""
        found: dict[int, Answer] = {}
        for asked, answers in self._scored(self.encoder.options(plain(requests)), disable_tqdm):
            for number, answer in zip(asked.numbers, answers, strict=True):
                found[number] = answer
                self.cache_hook.add_partial("loglikelihood", requests[number].args, answer)
        return [found[number] for number in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihoods of whole texts, window by window; a router reads what comes before a window."""
        sums = [0.0] * len(requests)
        for asked, ((score, _),) in self._scored(self.encoder.windows(plain(requests)), disable_tqdm):
            sums[asked.numbers[0]] += score
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues every context; rows of all tasks side by side."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.arguments[1], sort_keys=True, default=str), []).append(number)
        found: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="moe_peft: generate_until") as bar:
            for numbers in groups.values():
                how = Generation.of(requests[numbers[0]].arguments[1])
                asked = self.encoder.prompts(plain([requests[number] for number in numbers]), how.new_tokens)
                for batch, texts in self._continued(asked, how):
                    for each, text in zip(batch, texts, strict=True):
                        number = numbers[each.numbers[0]]
                        found[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return [found[number] for number in range(len(requests))]

    # ---- batches ----------------------------------------------------------------------------------------------------

    def _scored(self, asked: list[Asked], disable_tqdm: bool) -> Iterator[tuple[Asked, list[Answer]]]:
        """Gives every row with the answers of its options, longest rows first."""

        def score(rows: list[EncodedRow]) -> list[list[Answer]]:
            return option_answers(
                self.module, self._begun(self.collator.evaluate(rows)), [len(row.options) for row in rows]
            )

        of = {each.row.row_id: each for each in asked}
        batches = group_for_evaluation([each.row for each in asked], self.batch_size, packed=self.collator.pack)
        with tqdm(total=len(asked), disable=disable_tqdm, desc="moe_peft: loglikelihood") as bar:
            for rows in batches:
                for row, answers in zip(rows, halving(rows, score), strict=True):
                    yield of[row.row_id], answers
                bar.update(len(rows))

    def _continued(self, asked: list[Asked], how: Generation) -> Iterator[tuple[list[Asked], list[str]]]:
        """Gives batches with their texts, longest prompts first; rows whose tasks are unknown stay among themselves."""

        def write(batch: list[Asked]) -> list[str]:
            return continuations(self.module, self._begun(self.collator.prompts([each.row for each in batch])), how)

        for unknown in (True, False):
            own = [each for each in asked if (each.row.task_id == UNKNOWN) == unknown]
            own.sort(key=lambda each: -len(each.row.prompt))
            for at in range(0, len(own), self.batch_size):
                batch = own[at : at + self.batch_size]
                yield batch, halving(batch, write)

    @torch.no_grad()
    def _begun(self, batch: Batch) -> Batch:
        """Moves a batch to the device and begins it.

        Raises:
            ValueError: rows of an unknown task, and a method that needs one.
        """
        batch = {name: own.to(self._device) if isinstance(own, Tensor) else own for name, own in batch.items()}  # type: ignore
        if int(batch["task_id"][0]) != UNKNOWN or serves_unknown(self.module):
            self.module.begin(batch)
            return batch
        del batch["task_id"]
        try:
            self.module.begin(batch)
        except ValueError as error:
            theirs, ours = batch["row_id"][0].rpartition("/")[0], ", ".join(spec.name for spec in self.module.specs)
            raise ValueError(
                f"lm-eval's task {theirs!r} is none of the adapter's ({ours}): say which one serves it, "
                f"--model_args tasks={theirs}:TASK ({error})"
            ) from None
        return batch

    # ---- chat templates, and what a results file says ---------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Writes a conversation as the tokenizer's own template does, which brings its own start token."""
        self.encoder.chat = True
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Chooses a template, by name where the tokenizer has several, and returns it."""
        if not chat_template:
            return None
        name = chat_template if isinstance(chat_template, str) else None
        self.tokenizer.chat_template = self.tokenizer.get_chat_template(name)
        return self.tokenizer.chat_template

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval keeps rendered prompts."""
        return self.module.backbone.name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Returns what lm-eval's results file says of the model."""
        return {
            "method": type(self.module).__name__,
            "backbone": self.module.backbone.describe(),
            "fingerprint": self.module.fingerprint,
            "tasks": [spec.name for spec in self.module.specs],
            "trainable_parameters": self.module.trainable_parameters(),
            "max_length": self.encoder.max_length,
        }


def counted(name: str, value: int | str) -> int:
    """Reads a number of at least 1."""
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}: {value!r} is no number of 1 or more; correct it")
    return int(value)


def plain(requests: list[Instance]) -> list[Request]:
    """Returns requests without what lm-eval keeps with them."""
    found = []
    for request in requests:
        context, *rest = request.args
        continuation = rest[0] if rest and isinstance(rest[0], str) else ""
        document = str(request.doc.get("id", request.doc_id) if isinstance(request.doc, dict) else request.doc_id)
        found.append(Request(request.task_name or "", document, context, continuation))
    return found


def halving(batch: list[T], work: Callable[[list[T]], list[R]]) -> list[R]:
    """Works on a batch, in halves where it does not fit into the GPU's memory."""
    try:
        return work(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    middle = len(batch) // 2  # out of the handler, which would keep the failed batch's tensors alive
    torch.cuda.empty_cache()
    return [*halving(batch[:middle], work), *halving(batch[middle:], work)]
