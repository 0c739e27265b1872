"""All methods with tiny configs: in a run of STEPS steps on the tiny Llama, whatever moves their ranks has happened."""

from collections.abc import Callable
from typing import Any

from increlora import (
    AdaLoraConfig,
    IncreLoraConfig,
    LoraMiniConfig,
    LortaConfig,
    MeLoraConfig,
    MoraConfig,
    PlainLoraConfig,
    PriLoraConfig,
    SoraConfig,
)

STEPS = 10
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
RUN = {"warmup_steps": 1, "interval_steps": 2, "total_steps": STEPS} | TARGETS
METHODS: dict[str, Callable[..., Any]] = {
    "lora": lambda **options: PlainLoraConfig(r=3, **TARGETS, **options),
    "increlora": lambda **options: IncreLoraConfig(r=3, top_h=8, **RUN, **options),
    "adalora": lambda **options: AdaLoraConfig(r=3, settle_steps=3, **RUN, **options),
    "sora": lambda **options: SoraConfig(r=3, settle_steps=3, **RUN, **options),
    "prilora": lambda **options: PriLoraConfig(r=3, interval_steps=2, total_steps=STEPS, **TARGETS, **options),
    "melora": lambda **options: MeLoraConfig(r=2, minis=2, **TARGETS, **options),
    "mora": lambda **options: MoraConfig(r=3, **TARGETS, **options),
    "lorta": lambda **options: LortaConfig(r=3, target_modules=[f"{x}_proj" for x in "qkvo"], **options),
    "lora_mini": lambda **options: LoraMiniConfig(r=1, inner_in=3, inner_out=3, **TARGETS, **options),
}
MOVING = {"increlora", "adalora", "sora"}  # their ranks change on the way
