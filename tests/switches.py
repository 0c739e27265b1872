"""Single switches of the published code, in methods that are otherwise the default."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from increlora.hosts.peft.old import DEFAULT_SWITCHES
from increlora.hosts.peft.options import default_of
from increlora.registry import METHODS, PAPERS


def departing(make: Callable[..., Any], **options: Any) -> Any:
    """`make(**options)`, where a config class may also be given switches of the published code.

    These it has through `paper` alone: there every other option and switch is then given the value of the default."""
    if not switched(options, getattr(make, "switches", ())):
        return make(**options)
    return make.paper(**every_default(make.method_name) | options)  # type: ignore[attr-defined]


def settings_of(method: str, **options: Any) -> Any:
    """The same for a method's own settings."""
    if not switched(options, DEFAULT_SWITCHES.get(method, {})):
        return METHODS[method](**options)
    return PAPERS[method](**every_default(method) | options)


def switched(options: dict[str, Any], switches: Any) -> bool:
    return bool(options.keys() & set(switches)) or options.get("score_accumulation") == "last"


def every_default(method: str) -> dict[str, Any]:
    return {option.name: default_of(option) for option in fields(METHODS[method])} | DEFAULT_SWITCHES[method]
