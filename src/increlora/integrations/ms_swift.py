"""ms-swift: our methods as values of `--tuner_type`; docs/howto/frameworks.md shows how to register them.

Its trainers are Hugging Face Trainers, so our callback drives the ranks. Checked against the plugin interface of
ms-swift 4.6.0, not in a run: that release wants peft below 0.21, and this library needs 0.21.
"""

from typing import Any

from peft import get_peft_model
from swift.tuner_plugin import PeftTuner, tuners_map

from increlora.integrations.settings import ADAPTERS, config_of, task_type


def register(name: str, **options: Any) -> None:
    """Make the adapter `name` of ADAPTERS known to ms-swift; `options` of the method override its command line."""
    ADAPTERS[name](**options)  # a wrong option is refused here, not after the model is loaded
    tuners_map[name] = type(f"{name.title()}Tuner", (IncreLoraTuner,), {"adapter": name, "options": options})


class IncreLoraTuner(PeftTuner):
    """Abstract: makes the adapter; saving and loading are ms-swift's, as for any method of peft."""

    adapter: str
    options: dict[str, Any]

    @classmethod
    def prepare_model(cls, args: Any, model: Any) -> Any:
        from swift.pipelines.train.tuner import get_modules_to_save, get_target_modules  # imports users of this plugin

        given = {
            "r": args.lora_rank, "lora_alpha": args.lora_alpha, "lora_dropout": args.lora_dropout,
            "use_rslora": args.use_rslora, "use_dora": args.use_dora, "init_lora_weights": args.init_weights,
            "target_modules": get_target_modules(args, model), "target_parameters": args.target_parameters,
            "modules_to_save": get_modules_to_save(args, model, args.task_type), "task_type": task_type(model),
        }  # fmt: skip
        return get_peft_model(model, config_of(cls.adapter, given, cls.options))


for adapter in ADAPTERS:
    register(adapter)
