"""The checkpoint half of a method: adapters only; what belongs to another method, base or task list is refused."""

from typing import Any

from torch import Tensor

from moe_peft.agreement import from_all_ranks
from moe_peft.checkpoint import check_adapter_state, describe, first_not_finite, refuse_foreign
from moe_peft.methods.merging import merged_layers
from moe_peft.methods.training import Part
from moe_peft.optim import LOWER_THE_RATE
from moe_peft.sharding import like, local


class AdapterSaving(Part):
    """The checkpoint half of `MultitaskModule`."""

    def adapter_state(self) -> dict[str, Tensor]:
        """Returns what a checkpoint holds: adapters, routers, heads and priors; never the backbone."""
        return {name: value for name, value in self.state_dict().items() if not self.belongs_to_base(name)}

    def belongs_to_base(self, name: str) -> bool:
        """Whether a parameter or buffer of that name is the frozen backbone's."""
        return name.startswith("model.") and ".factors." not in name and ".router." not in name

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen base out and adds what is needed to refuse a wrong one."""
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not self.belongs_to_base(name)}
        own = {name: local(value) for name, value in self.adapter_state().items()}
        bad = [name for name in from_all_ranks(first_not_finite(own)) if name is not None]
        if bad:
            raise ValueError(
                f"this step's {bad[0]} holds values that are not finite; nothing is saved; {LOWER_THE_RATE}, and "
                "resume from the last checkpoint"
            )
        checkpoint["moe_peft"] = describe(self._module())

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another method, base or task list."""
        self._module().configure_model()
        refuse_foreign(checkpoint, describe(self._module()))

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads adapters; missing, unexpected or misshapen tensors are an error whatever `strict` says."""
        if merged_layers(self._module()):
            raise ValueError("loading adapters into a merged model would not move it: call unmerge() first")
        self._module().context.forget_held()
        own = self.adapter_state()
        check_adapter_state(own, state_dict)
        cut = {name: like(value, own[name]) for name, value in state_dict.items()}
        return super().load_state_dict(cut, strict=False, assign=assign)
