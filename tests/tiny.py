"""Tiny random models and batches for tests of mechanics; a random model proves no quality."""

from typing import Any

import torch
from torch import Tensor, nn

from moe_peft.backbones import Backbone, CausalLM, Classifier, Seq2SeqLM
from moe_peft.batch import IGNORE_INDEX, Batch
from moe_peft.data.tasks import TaskSpec

VOCABULARY = 97
LLAMA = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "model_type": "t5",
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.0,
}
BERT = {
    "model_type": "bert",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
TASKS = [
    TaskSpec("tone", "classification", "accuracy", "{text}", ("bad", "good")),
    TaskSpec("topic", "classification", "accuracy", "{text}", ("a", "b", "c")),
]


def tiny_backbone(kind: str = "causal", **arguments: Any) -> Backbone:
    """A random backbone of one kind, fp32, without files."""
    backbone = {"causal": CausalLM, "seq2seq": Seq2SeqLM, "classifier": Classifier}[kind]
    shape = {"causal": LLAMA, "seq2seq": T5, "classifier": BERT}[kind]
    return backbone(f"tiny-{kind}", dtype="float32", shape=shape, random_weights=True, **arguments)


def build(method: type, kind: str = "causal", seed: int = 0, backbone: Backbone | None = None, **arguments: Any) -> Any:
    """A method on a tiny backbone; the backbone's weights depend on the seed only."""
    torch.manual_seed(seed)
    module = method(**{"backbone": backbone or tiny_backbone(kind), "tasks": TASKS} | arguments)
    module.configure_model()
    return module


def randomise(module: nn.Module, seed: int = 1, scale: float = 0.3) -> None:
    """Sets every trainable tensor to seeded random values (gates stay in the sensitive range of their sigmoid)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            size = 0.01 if name.endswith(("omega", "magnitude")) else scale
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)


def fit_prior(module: Any, seed: int = 2) -> None:
    """Puts seeded random centroids and a zero centre into a module's prior, as if it had been fitted."""
    generator = torch.Generator().manual_seed(seed)
    prior = module.prior
    prior.embedder.center.zero_()
    prior.embedder.fitted.fill_(True)
    prior.set_centroids(torch.randn(prior.centroids.shape, generator=generator))


def batch_of(
    prompts: list[list[int]], answers: list[list[int]], kind: str = "causal", side: str = "left", extra: int = 0
) -> Batch:
    """A batch from token ids, padded on one side (with `extra` more padding columns)."""
    seqs = [p + a for p, a in zip(prompts, answers, strict=True)] if kind == "causal" else prompts
    width = max(map(len, seqs)) + extra
    ids, mask, prompt, labels = (torch.zeros(len(seqs), width, dtype=torch.int64) for _ in range(4))
    labels.fill_(IGNORE_INDEX)
    for i, (seq, p, a) in enumerate(zip(seqs, prompts, answers, strict=True)):
        at = width - len(seq) if side == "left" else 0
        ids[i, at : at + len(seq)] = torch.tensor(seq)
        mask[i, at : at + len(seq)] = 1
        prompt[i, at : at + len(p)] = 1
        if kind == "causal":
            labels[i, at + len(p) : at + len(seq)] = torch.tensor(a)
    if kind == "seq2seq":
        longest = max(map(len, answers))
        labels = torch.tensor([a + [IGNORE_INDEX] * (longest - len(a)) for a in answers])
    batch = Batch(
        input_ids=ids,
        attention_mask=mask,
        prompt_mask=prompt.bool(),
        labels=labels,
        task_id=torch.arange(len(seqs)) % len(TASKS),
        row_id=[f"row{i}" for i in range(len(seqs))],
        text=[" ".join(map(str, p)) for p in prompts],
        task_share=torch.bincount(torch.arange(len(seqs)) % len(TASKS))[torch.arange(len(seqs)) % len(TASKS)].float(),
        rows_share=float(len(seqs)),
        tokens_share=float(sum(map(len, answers))),
    )
    if kind == "classifier":
        del batch["labels"]
        batch["target"] = torch.arange(len(seqs)) % 2
    return batch


def random_batch(rows: int = 4, kind: str = "causal", seed: int = 3, side: str | None = None) -> Batch:
    """Rows with prompts of 4 to 9 tokens and answers of 1 to 4 tokens."""
    g = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=g))
        return torch.randint(3, VOCABULARY, (size,), generator=g).tolist()

    prompts, answers = [tokens(4, 10) for _ in range(rows)], [tokens(1, 5) for _ in range(rows)]
    return batch_of(prompts, answers, kind, side or ("left" if kind == "causal" else "right"))


def logits(module: Any, batch: Batch) -> Tensor:
    """The model's full logits on a begun batch, with this package's position ids."""
    from moe_peft.methods.scoring import position_ids

    module.begin(batch)
    mask = batch["attention_mask"]
    return module.model(input_ids=batch["input_ids"], attention_mask=mask, position_ids=position_ids(mask)).logits


def bare_logits(module: Any, batch: Batch) -> Tensor:
    """The logits of the frozen base under the adapters."""
    with module.context.disabled(), torch.no_grad():
        return logits(module, batch)


def output(module: Any, batch: Batch) -> Tensor:
    """What the model gives for a batch, whatever its kind: logits, or the last hidden state of an encoder."""
    module.begin(batch)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    if module.backbone.kind == "seq2seq":
        inputs["labels"] = batch["labels"]
    found = module.model(**inputs)
    return found.logits if hasattr(found, "logits") else found.last_hidden_state


def come_alive(module: Any, batch: Batch, seed: int = 1, scale: float = 0.3, prior: bool = True) -> Any:
    """Randomises all adapter tensors (and fits the prior) and proves that every one of them acts on this batch.

    Without that, a comparison of two forms of a method passes on any code: B starts at zero and hides everything.
    """
    if prior and module.prior is not None:
        fit_prior(module)
    randomise(module, seed, scale)
    with module.context.disabled(), torch.no_grad():
        bare = output(module, batch)
    adapted = output(module, batch)
    if module.adapted:
        assert (adapted - bare).abs().max() > 1e-3, "the adapters do not move the output"
    module(batch).sum().backward()
    owned = [p for name, p in module.named_parameters() if not name.startswith("model.") and p.requires_grad]
    if any(p.grad is None for p in owned):  # a router of whole rows, which learns by a loss of its own
        module.begin(batch)
        for term in module.method_loss_terms(batch).values():
            term.backward(retain_graph=True)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"no gradient at {name}"
        else:
            assert parameter.grad is None, f"a gradient at {name}"
    module.zero_grad(set_to_none=True)
    return module
