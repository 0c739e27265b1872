"""Methods by name. Adding one is a line here, and a file in `methods/` or in `structural/`."""

from .methods import AdaLora, IncreLora, PlainLora, PriLora, Settings, Sora
from .methods.adalora_paper import AdaLoraPaper
from .methods.increlora_paper import IncreLoraPaper
from .methods.sora_paper import SoraPaper
from .structural.lora_mini.method import LoraMini
from .structural.lorta.method import Lorta
from .structural.melora import MeLora
from .structural.mora.method import Mora

METHODS: dict[str, type[Settings]] = {
    "adalora": AdaLora, "increlora": IncreLora, "lora": PlainLora, "lora_mini": LoraMini, "lorta": Lorta,
    "melora": MeLora, "mora": Mora, "prilora": PriLora, "sora": Sora,
}  # fmt: skip
# The published code, where it takes more than other values of the method's own options.
PAPERS: dict[str, type[Settings]] = {"adalora": AdaLoraPaper, "increlora": IncreLoraPaper, "sora": SoraPaper}
