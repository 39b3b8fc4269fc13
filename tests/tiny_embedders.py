"""Embedders on tiny random backbones, with prompts and texts to embed."""

from typing import Any

import torch

from moe_peft.backbones import CausalLM, Classifier, Seq2SeqLM
from moe_peft.context import RoutingContext

LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 60, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
T5 = {"model_type": "t5", "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BACKBONES = {
    "llama": lambda: CausalLM("tiny", "float32", shape=LLAMA, random_weights=True),
    "gpt2": lambda: CausalLM("tiny", "float32", shape=GPT2, random_weights=True),
    "bert": lambda: Classifier("tiny", dtype="float32", shape=BERT, random_weights=True),
    "t5": lambda: Seq2SeqLM("tiny", "float32", shape=T5, random_weights=True),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13, 14], [20, 21, 22, 23, 24, 25, 26]]


def make_batch(
    prompts: list[list[int]], answers: list[list[int]] | None = None, side: str = "left", extra: int = 0
) -> dict[str, Any]:
    """Pads prompts (and answers after them) to one width, `extra` wider than need be."""
    answers = answers or [[] for _ in prompts]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True)) + extra
    shape = (len(prompts), width)
    ids, mask, prompt = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for row, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        start = width - len(p) - len(a) if side == "left" else 0
        ids[row, start : start + len(p) + len(a)] = torch.tensor(p + a)
        mask[row, start : start + len(p) + len(a)] = 1
        prompt[row, start : start + len(p)] = 1
    return {"input_ids": ids, "attention_mask": mask, "prompt_mask": prompt.bool()}


def texts(*rows: str) -> dict[str, Any]:
    """A batch of texts without tokens."""
    return {"text": list(rows)}


def bind(embedder: Any, backbone: str = "llama", seed: int = 0) -> Any:
    """Binds an embedder to a random backbone and returns it."""
    torch.manual_seed(seed)
    backbone = BACKBONES[backbone]()
    model = backbone.load()
    embedder.bind(backbone, model, RoutingContext())
    return embedder
