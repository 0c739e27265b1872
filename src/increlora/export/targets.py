"""Names for modules, as peft matches them: whole, or the ending after a dot; patterns as regular expressions."""

import re
from collections.abc import Mapping

from ..errors import ExportError
from .adapters import Adapter
from .lora_format import matched


def targets(modules: list[str], adapter: Adapter) -> list[str] | str:
    """The shortest names that match these modules of the base model and no others; a regular expression where no list
    can. Without the base model at hand: the adapter's own names if all its modules are meant, else names in full."""
    chosen, native = set(modules), adapter.config
    if adapter.every is None:
        plain = isinstance(native.target_modules, list | set) and chosen == set(adapter.factors)
        filtered = native.exclude_modules or native.layers_to_transform is not None
        return sorted(native.target_modules) if plain and not filtered else sorted(chosen)
    others = [f".{name}" for name in adapter.every - chosen]
    endings = {name: name.rpartition(".")[2] for name in chosen}
    names = {
        name if any(other.endswith(f".{ending}") for other in others) else ending for name, ending in endings.items()
    }
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(names)


def check_patterns(patterns: Mapping[str, float]) -> None:
    """Raise ExportError if peft would read another module's entry for some module: it takes the first that matches."""
    ordered = dict(sorted(patterns.items()))  # as adapter_config.json lists them
    for name, value in patterns.items():
        if matched(ordered, name, None) != value:
            raise ExportError(f"no pattern matches {name} alone: use layout='uniform' (--layout uniform)")
