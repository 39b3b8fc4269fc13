"""The building half of a method: loads the backbone, puts the adapters in, keeps both in the right mode."""

from typing import Any, Self

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_peft.backbones import Classifier
from moe_peft.fingerprint import fingerprint
from moe_peft.layers.allocation import places
from moe_peft.layers.injection import inject, output_head
from moe_peft.methods.heads import TaskHeads
from moe_peft.methods.training import Part
from moe_peft.optim import trained_parameters
from moe_peft.quirks import HeadInput, entries, input_of, offload_input, past_of, silence_dropout
from moe_peft.sharding import is_sharded, shard


class Building(Part):
    """The building half of `MultitaskModule`."""

    model: nn.Module | None
    recomputed: list[nn.Module]
    """Blocks whose forward is made again in the backward."""

    def configure_model(self) -> None:
        """Builds the model, and cuts it over all ranks where the strategy asks for that; idempotent."""
        module = self._module()
        if self.model is None:
            self.assemble()
        if self._device_mesh is not None and not is_sharded(self):
            if module.embedder is not None:
                module.embedder.fingerprint()  # it can be taken of a whole base only
            parameters = trained_parameters(module)
            start = {f"the start of {name}": str(own.double().sum().item()) for name, own in parameters.items()}
            module.cut_from = {"the frozen base": module.fingerprint, **start}
            shard(module, self._device_mesh["data_parallel"])

    def assemble(self) -> None:
        """Loads the backbone and injects the adapters; a method that has more to build extends it."""
        module = self._module()
        model = module.backbone.load()
        module.fingerprint = "" if next(model.parameters()).is_meta else fingerprint(model)
        slots = module.slots(model)
        module.places = places(slots)
        module.adapted = inject(model, slots, module.adapt)
        self.model = model
        if isinstance(module.backbone, Classifier):
            device = next(model.parameters()).device
            module.heads = TaskHeads(module.backbone.hidden_size, module.specs, device=device)
            module.heads.requires_grad_(module.train_heads)
        if module.prior is not None:
            module.prior.bind(module.backbone, model, module.context)
        for entry in entries(model):
            entry.register_forward_pre_hook(self._check_input, with_kwargs=True)
        head = output_head(model)
        if head is not None:
            head.register_forward_pre_hook(HeadInput())
        if module.backbone.gradient_checkpointing:
            self._recompute(model)
        self.train(self.training)

    def _recompute(self, model: nn.Module) -> None:
        """Has the model's blocks keep their inputs only, and make the rest again in the backward."""
        module = self._module()
        checkpointing = {"use_reentrant": False, "context_fn": module.context.checkpoint_fns}
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(checkpointing)  # type: ignore[operator]
        self.recomputed = [block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)]
        for block in self.recomputed:
            silence_dropout(block)
            if module.backbone.offload_activations:
                offload_input(block)

    def built(self) -> nn.Module:
        """Returns the adapted model, building it if need be."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    def _check_input(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids, mask, cached = input_of(args, kwargs)
        context = self._module().context
        context.goes_on(past_of(kwargs))
        context.check_input(ids, mask, cached)

    def train(self, mode: bool = True) -> Self:
        """Sets the adapters' mode; the frozen backbone stays in eval mode (its own dropout is off)."""
        super().train(mode)
        self._module().context.forget_held()
        if self.model is not None:
            self.model.eval()
            for layer in self._module().adapted.values():
                layer.train(mode)
            for block in self.recomputed:
                block.training = mode  # HF recomputes only blocks whose own flag says training
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self._module().context.forget_held()  # moved or cast
        return super()._apply(fn, recurse)
