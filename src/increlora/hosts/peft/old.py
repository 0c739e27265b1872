"""Adapter folders that earlier versions wrote: their types, and their options, by today's names."""

from typing import Any

from ...errors import CheckpointError
from ...patterns import shown
from .config import CONFIGS, type_name

# Our types before they had a prefix, by method.
OLD_TYPES = {"INCRELORA": "increlora", "PLAINLORA": "lora"} | {
    name.upper(): name for name in ("lora_mini", "lorta", "melora", "mora", "prilora", "sora")
}
# Switches of the published code as they are where the method is not the published code: once options of every folder.
DEFAULT_SWITCHES: dict[str, dict[str, Any]] = {
    "increlora": {
        "selection": "exact", "reserve": "none", "finish": "retire", "score_norm": "sqrt_numel",
        "scaling": "constant", "scale_epsilon": 0.0, "start": "lora", "newborn": "lora", "clock": "ramp",
        "orthogonality_form": "trainer", "penalty_place": "after_clipping",
    },
    "adalora": {
        "selection": "exact", "observe": "before_step", "scaling": "constant", "scale_epsilon": 0.0, "start": "lora",
        "orthogonality_form": "trainer", "penalty_place": "after_clipping",
    },
    "sora": {"operator": "exact", "scaling": "constant", "penalty_place": "after_clipping"},
}  # fmt: skip


def translated(raw: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config as read from disk, by today's names if it is one of ours: the old types may come to be
    peft's, and ours are known by an entry that no config of peft has."""
    kind = raw.get("peft_type")
    if "increlora_version" not in raw:
        return raw
    kind = type_name(OLD_TYPES[kind]) if isinstance(kind, str) and kind in OLD_TYPES else kind
    if not (isinstance(kind, str) and kind in CONFIGS):
        raise CheckpointError(
            f"peft_type={shown(kind)} is no method of increlora here: restore adapter_config.json from a copy, upgrade "
            f"increlora, or call `register_method` first if the method is your own"
        )
    usual = DEFAULT_SWITCHES.get(CONFIGS[kind].method_name, {})
    if "published" in raw or not usual.keys() & raw.keys():
        return raw | {"peft_type": kind}
    switches = {name: raw.get(name, value) for name, value in usual.items()}
    departs = switches != usual or raw.get("score_accumulation") == "last"
    others = {name: value for name, value in raw.items() if name not in usual}
    return others | {"peft_type": kind, "published": switches if departs else {}}
