"""Backbones: the frozen, unmodified Hugging Face model that a method adapts.

One interface for causal LMs, encoder-decoders and classifiers. A backbone is cheap to construct: files are read by
`load`, `tokenizer` and `config` only, so a configuration is checked and counted without weights.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn

from moe_peft.files import dequantised, resolve_name
from moe_peft.quirks import obeys_block_mask

Kind = Literal["causal", "seq2seq", "classifier"]
KINDS: tuple[Kind, ...] = ("causal", "seq2seq", "classifier")


def auto_dtype() -> torch.dtype:
    """Returns bfloat16 where the processor multiplies it natively, else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    cpu = torch.backends.cpu.get_cpu_capability()
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)() if "AVX512" in cpu else False
    return torch.bfloat16 if native else torch.float32


class Backbone:
    """A frozen Hugging Face model: where it comes from and how it is loaded.

    Args:
        name: hub id, local folder, or `package:<module>/<folder>` for a model shipped inside an installed package.
        dtype: of the frozen weights; "auto" is bfloat16 where the processor has bfloat16 instructions.
        gguf_file: a GGUF file in that folder; dequantised once and cached as safetensors.
        sha256: expected checksum of the GGUF file.
        revision: hub revision.
        shape: the model's configuration (`model_type` and its fields): builds the model without any file, for
            counting on the meta device, or with random weights where `random_weights` is set.
        random_weights: build from `shape` with random weights (tests and dry runs) instead of loading.
        gradient_checkpointing: recompute activations in backward (non-reentrant).
        offload_activations: keep what recomputation starts from, every block's input, in the host's memory; needs
            gradient_checkpointing.
        attention: transformers' attention implementation ("sdpa", "eager", ...); None takes the model's own. Eager is
            faster for short texts on a CPU.
    """

    kind: Kind
    auto_class: str

    def __init__(
        self,
        name: str,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        gguf_file: str | None = None,
        sha256: str | None = None,
        revision: str | None = None,
        shape: dict[str, Any] | None = None,
        random_weights: bool = False,
        gradient_checkpointing: bool = False,
        offload_activations: bool = False,
        attention: str | None = None,
    ) -> None:
        if random_weights and shape is None:
            raise ValueError(f"backbone {name!r}: random_weights needs a shape")
        if offload_activations and not gradient_checkpointing:
            raise ValueError(f"backbone {name!r}: offload_activations needs gradient_checkpointing: true")
        self.name, self.gguf_file, self.sha256, self.revision = name, gguf_file, sha256, revision
        self.shape, self.random_weights, self.gradient_checkpointing = shape, random_weights, gradient_checkpointing
        self.attention, self.offload_activations = attention, offload_activations
        self.dtype = auto_dtype() if dtype == "auto" else getattr(torch, dtype)
        self._given: nn.Module | None = None

    @cached_property
    def _config(self) -> Any:
        from transformers import AutoConfig

        if self.shape is not None:
            fields = dict(self.shape)
            return AutoConfig.for_model(fields.pop("model_type"), **fields)
        return self._read(AutoConfig, self._source())

    def config(self) -> Any:
        """Returns the HF configuration (from `shape` if given, else from the files)."""
        return self._config

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.config().hidden_size

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._read(AutoTokenizer, self._source())
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def tokenizer(self) -> Any:
        """Returns the tokenizer; its pad token is set (to EOS where the model has none)."""
        return self._tokenizer

    def adopt(self, model: nn.Module) -> None:
        """Takes a model that was loaded elsewhere: `load` returns it, in whatever dtype it has.

        Raises:
            ValueError: a model of another kind.
        """
        import transformers

        kinds = getattr(transformers, self.auto_class)._model_mapping.get(type(model.config), ())
        if not isinstance(model, kinds):
            raise ValueError(
                f"model: a {type(model).__name__} is no {type(self).__name__}; load the base with {self.auto_class}"
            )
        self._given, self.__dict__["_config"] = model, model.config
        self.dtype, self.gradient_checkpointing = next(model.parameters()).dtype, False

    @property
    def adopted(self) -> bool:
        """Whether the model was loaded elsewhere."""
        return self._given is not None

    def load(self) -> nn.Module:
        """Loads the model frozen, in eval mode, in this backbone's dtype (on the default device, also "meta")."""
        if self._given is not None:
            return self._given.requires_grad_(False).eval()
        import transformers

        auto = getattr(transformers, self.auto_class)
        if torch.get_default_device().type == "meta" or self.random_weights:
            model = auto.from_config(self.config(), dtype=self.dtype, attn_implementation=self.attention)
        else:
            options = {"dtype": self.dtype, "attn_implementation": self.attention, "output_loading_info": True}
            model, report = self._read(auto, self._source(), **options)
            self._check_loaded(model.config.to_dict(), sorted(report["missing_keys"]))
        return model.requires_grad_(False).eval()

    def _check_loaded(self, config: dict[str, Any], missing: list[str]) -> None:
        """Raises if the files lack weights (they would be random) or are of another shape than configured."""
        missing = [name for name in missing if "pooler" not in name]
        if missing:
            raise ValueError(
                f"backbone {self.name!r}: its files lack {len(missing)} weights, first {missing[0]!r}; "
                f"{type(self).__name__} is the wrong class for them, or the download is incomplete"
            )
        for field, value in (self.shape or {}).items():
            if field in config and config[field] != value:
                raise ValueError(
                    f"backbone {self.name!r}: shape says {field} {value}, its files {config[field]}; correct it"
                )

    def packs_options(self, max_length: int) -> bool:
        """Whether a row's options may be scored side by side, behind one prompt in sequences up to `max_length`."""
        return self.kind == "causal" and obeys_block_mask(self.config(), max_length)

    def _read(self, auto: Any, source: str, **kwargs: Any) -> Any:
        """Calls `auto.from_pretrained`, turning a missing hub or folder into one line."""
        try:
            return auto.from_pretrained(source, revision=self.revision, **kwargs)
        except (OSError, ValueError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"backbone {self.name!r} cannot be read ({reason}): "
                "give a local folder, or a hub id where a hub is in reach"
            ) from None

    def _source(self) -> str:
        """Returns what `from_pretrained` reads: the name itself, or the cached folder of a dequantised GGUF."""
        source = resolve_name(self.name)
        if self.gguf_file is None:
            return source
        return str(dequantised(Path(source) / self.gguf_file, self.sha256, self.auto_class))

    def describe(self) -> str:
        """Returns what a results file calls this backbone."""
        return json.dumps({"class": type(self).__name__, "name": self.name, "dtype": str(self.dtype).split(".")[-1]})


class CausalLM(Backbone):
    """A decoder-only language model: options are ranked by log-likelihood, answers generated."""

    kind = "causal"
    auto_class = "AutoModelForCausalLM"


class Seq2SeqLM(Backbone):
    """An encoder-decoder language model (T5 and relatives)."""

    kind = "seq2seq"
    auto_class = "AutoModelForSeq2SeqLM"

    @property
    def hidden_size(self) -> int:
        """Width of the encoder's states."""
        return getattr(self.config(), "d_model", None) or self.config().hidden_size


class Classifier(Backbone):
    """A bare encoder or decoder; the method adds one head per task on its pooled last hidden state.

    Args:
        name: see `Backbone`.
        pooling: "cls" (first token), "mean" (masked) or "last" (last real token); "auto" is "last" for decoders and
            "mean" otherwise.
        source: the other arguments of `Backbone`.
    """

    kind = "classifier"
    auto_class = "AutoModel"

    def __init__(self, name: str, pooling: Literal["auto", "cls", "mean", "last"] = "auto", **source: Any) -> None:
        super().__init__(name, **source)
        if pooling not in ("auto", "cls", "mean", "last"):
            raise ValueError(f"pooling: {pooling!r} is unknown; use auto, cls, mean or last")
        self.pooling = pooling

    def load(self) -> nn.Module:
        """Loads the model without its own pooler, which no task uses and nothing would train."""
        model = super().load()
        if getattr(model, "pooler", None) is not None:
            setattr(model, "pooler", None)  # noqa: B010  (typed as a module)
        return model

    @property
    def pooled_by(self) -> str:
        """The pooling in use: "cls", "mean" or "last"."""
        if self.pooling != "auto":
            return self.pooling
        from transformers import MODEL_FOR_MASKED_LM_MAPPING

        return "mean" if type(self.config()) in MODEL_FOR_MASKED_LM_MAPPING else "last"

    def pool(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Pools hidden states [B, S, D] to [B, D]; mask [B, S] marks real tokens."""
        pooling = self.pooled_by
        if pooling == "mean":
            weights = mask.to(hidden.dtype).unsqueeze(-1)
            return (hidden * weights).sum(1) / weights.sum(1)
        positions = torch.arange(mask.shape[1], device=mask.device)
        index = mask.argmax(1) if pooling == "cls" else (mask * positions).argmax(1)
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), index]
