"""Settings of the trainer that would change what is trained, refused before any work."""

from typing import Any

# Precisions that were tried with fsdp2.
SHARDED = ("None", "32-true", "32", "bf16-mixed", "bf16")
OTHER_SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")
# Precisions that cast the whole module, adapters included.
HALF = ("16-true", "bf16-true", "transformer-engine", "transformer-engine-float16")


def refuse_unsupported(trainer: Any) -> None:
    """Refuses trainer settings that would change what is trained."""
    if trainer.precision in HALF:
        raise ValueError(
            f"trainer.precision: {str(trainer.precision)!r} would store the adapters in half precision too; "
            "set the backbone's dtype instead and use 32-true or bf16-mixed"
        )
    strategy = trainer.strategy if isinstance(trainer.strategy, str) else trainer.strategy.get("class_path", "")
    if strategy.startswith(("fsdp_", "deepspeed")) or strategy == "fsdp" or strategy.endswith(OTHER_SHARDING):
        raise ValueError(
            f"trainer.strategy: {strategy!r} does not shard these models right; use fsdp2 "
            "(--config configs/trainer/fsdp.yaml)"
        )
    if (strategy == "fsdp2" or strategy.endswith("ShardedStrategy")) and str(trainer.precision) not in SHARDED:
        raise ValueError(
            f"trainer.precision: {str(trainer.precision)!r} is not supported by fsdp2; use 32-true or bf16-mixed"
        )
