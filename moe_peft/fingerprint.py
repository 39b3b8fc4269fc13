"""What tells one frozen model from another, wherever it lies and in whatever precision it is loaded."""

import hashlib
import json

import torch
from torch import nn

INCIDENTAL = {
    *("dtype", "torch_dtype", "transformers_version", "architectures", "use_cache", "quantization_config"),
    *("output_hidden_states", "output_attentions", "return_dict", "id2label", "label2id", "problem_type"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "chunk_size_feed_forward", "is_encoder_decoder"),
}
"""Fields of a configuration that do not change what the model computes."""


def fingerprint(model: nn.Module) -> str:
    """Identifies the frozen model: a hash of configuration, names, shapes and sampled values.

    The same weights in float32 or bfloat16 have one fingerprint; path and machine do not matter, and adapters do
    not enter it.

    Args:
        model: a Hugging Face model, adapted or not.
    """
    config = model.config.to_dict()  # type: ignore[operator]
    telling = {key: value for key, value in config.items() if key not in INCIDENTAL and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(telling, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.state_dict().items()):
        if "factors." in name or "router." in name:
            continue
        name = name.replace(".base.", ".")
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().to(torch.bfloat16)
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]
