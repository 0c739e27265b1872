"""The tuner: one for all methods. It counts the sites, puts a delta at each, and gives adaptive ones a controller."""

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from ...deltas import BlockDelta, Delta, Stored
from ...deltas.base import NAMES
from ...errors import ConfigError
from ...rules import holding_of
from . import checkpoint, weighted
from .bases import check_called, check_in_memory, check_matched, is_bypassed, read, refusal, warn_of_statistics
from .handle import SHARED, Handle, described_states, warn_of_budget
from .layer import AdapterLayer, SharedFactors, TunerLayer, adapter_layers, adapters_of, check_name, layer_over
from .loading import LOADING, check_source
from .mixed import mixed_batch
from .quantised import backend_of, check_mergeable, keep_layout, warn_of_rounding
from .states import check_dormant, check_together, watch


@contextmanager
def uncollected() -> Iterator[None]:
    """Makes many small objects, none of them garbage: looking for it again and again takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class AdapterModel(BaseTuner):
    """peft tuner of every method of this library."""

    prefix = "lora_"
    tuner_layer_cls = TunerLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Make and check every delta before any module is replaced: budgets and block sizes depend on the totals, and
        what is refused leaves the model as it was."""
        asked = peft_config.target_modules
        _maybe_include_all_linear_layers(peft_config, model)
        bases = self._targets(peft_config, model)
        if peft_config.target_modules is not asked:  # "all-linear": those that the method can adapt
            adapts, linear = peft_config.settings().adapts, bases
            bases = {
                name: base
                for name, base in linear.items()
                if adapts(name) and not refusal(base) and not is_bypassed(model, name)
            }
            if len(bases) < len(linear):
                peft_config.target_modules = set(bases)
            if linear and not bases:
                raise ConfigError(
                    f"{peft_config.method_name} can adapt none of the linear modules of this model "
                    f"({next(iter(linear))}, …)"
                )
        usual = self.target_module_mapping.get(self.get_model_config(model).get("model_type"), ())
        if not (self._by_state_dict or (bases and {*usual} == {*(peft_config.target_modules or ())})):
            check_matched(peft_config, model, bases)
        check_called(model, bases)
        if not (peft_config.inference_mode or self._low_memory):
            check_in_memory(bases)
        for option, value in peft_config.settings().completed(model, bases).items():
            setattr(peft_config, option, value)
        self._handle = Handle(peft_config, [read(base, name) for name, base in bases.items()])
        for name, delta in self._handle.deltas.items():
            self._take_over(peft_config, name, delta)
        check_source(self._handle, model)
        if bases and not peft_config.inference_mode:
            self._handle.method.check([*map(holding_of, self._handle.blocks.values())])

    def _own_shared(self, adapter_name: str, shared: Stored, like: AdapterLayer, inference_mode: bool) -> None:
        """Give the model what the modules of this adapter share, once: with the first of them."""
        owner = getattr(self.model, SHARED, None) or SharedFactors()
        if adapter_name in owner.lora_delta:
            return
        setattr(self.model, SHARED, owner)
        device, _ = like._get_base_layer_device_and_dtype(like.get_base_layer())
        later = self._low_memory or any(p.is_meta for p in shared.parameters())  # loading brings the values
        owner.lora_delta[adapter_name] = shared.to("meta" if later else device)
        owner.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _targets(self, peft_config: Any, model: nn.Module) -> dict[str, nn.Module]:
        inside = tuple(f"{name}." for name, m in model.named_modules() if isinstance(m, BaseTunerLayer))
        return {
            name: module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
            for name, module in model.named_modules()
            if name and not name.startswith(inside) and self._check_target_module_exists(peft_config, name)
        }

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, *, parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        layer = target if isinstance(target, AdapterLayer) else layer_over(target)
        layer.quantization_backend = backend_of(layer.get_base_layer(), self.model)  # type: ignore[assignment]
        peft_config.fan_in_fan_out = peft_config.fan_in_fan_out or layer.transposed
        handle = self._handle
        delta = handle.deltas.get(current_key)
        if delta is None:  # found by the keys of a state dict, not by `target_modules`
            delta = handle.make_delta(read(layer.get_base_layer(), current_key))
            self._take_over(peft_config, current_key, delta)
        if handle.shared is not None:
            self._own_shared(adapter_name, handle.shared, layer, peft_config.inference_mode)
        layer.lora_delta[adapter_name] = delta.to("meta") if self._low_memory else delta
        layer.handles[adapter_name] = handle
        first = next(delta.parameters(), None)  # all are alike
        device, dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        if first is None or (first.device, first.dtype) != (device, dtype):
            layer._move_adapter_to_device_of_base_layer(adapter_name)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """peft also copies weights; ours are wrapped and unwrapped as they are, and packed ones have none to copy."""
        setattr(parent, child_name, new_module)

    def _take_over(self, peft_config: Any, name: str, delta: Delta) -> None:
        """A further adapter made from the live config of another one starts at its ranks, and with its state if it has
        this very config object: so trainers make a reference, and then copy the parameters, but nothing else."""
        if not isinstance(delta, BlockDelta) or len(self.peft_config) == 1:
            return
        if states := described_states(peft_config, name, delta):
            delta.assign(status=states)
        held: Any = getattr(self.model.get_submodule(name), "lora_delta", {})
        alike = [held[n] for n, config in self.peft_config.items() if config is peft_config and n in held]
        if alike:
            delta.copy_state_from(alike[0])

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False, state_dict: dict[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        check_name(adapter_name)
        self._low_memory, self._by_state_dict = low_cpu_mem_usage, state_dict is not None
        with uncollected():
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        keep_layout(model)
        watch(model)
        config = self.peft_config[adapter_name]
        config.increlora_version = version("increlora")
        handle = self.__dict__.pop("_handle")
        handle.deltas = {layer.delta(adapter_name).name: layer.delta(adapter_name)
                         for layer in adapter_layers(model, adapter_name).values()}  # fmt: skip
        if not config.inference_mode:
            warn_of_statistics(model, config.modules_to_save or ())
        handle.drive()

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        names = kwargs.get("adapter_names")
        return nullcontext() if names is None else mixed_batch(self.model, names, adapters_of(self), kwargs)

    add_weighted_adapter = weighted.add

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        owner = getattr(self.model, SHARED, None)
        if owner is not None and not owner.lora_delta:
            delattr(self.model, SHARED)

    # -- merging -------------------------------------------------------------------------------------------------

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        check_mergeable(adapter_layers(self.model))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        super().merge_adapter(*args, **kwargs)
        warn_of_rounding(adapter_layers(self.model), stacklevel=3)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> Any:
        layers, handles = adapter_layers(self.model), adapters_of(self.model)  # the loop takes them out of the model
        for name in (kwargs.get("adapter_names") or self.active_adapters) if merge else ():
            if name in handles:
                handles[name].describe()
                warn_of_budget(handles[name].config.ranks, handles[name].method.budget, handles[name].steps)
        model: Any = super()._unload_and_optionally_merge(merge, **kwargs)
        if merge:
            warn_of_rounding(layers, stacklevel=4)
        if hasattr(model, SHARED):
            delattr(model, SHARED)
        return model

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor],
                                unwanted_adapter_names: list[str]) -> dict[str, Tensor]:  # fmt: skip
        checkpoint.check_ends_unmerged(model)
        handle = adapters_of(model).get(adapter_name)
        if handle is not None:
            check_dormant(handle)
            handle.describe()  # the config is written next
            warn_of_budget(config.ranks, handle.method.budget, handle.steps)
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        return checkpoint.compact(model, adapter_name, selected)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """`q.lora_delta.default.lora_A0` → `q.lora_A0`; `q.lora_delta.default._extra_state` → `q.lora_statistics`."""
        module, mark, entry = key.rpartition(f".lora_delta.{adapter_name}.")
        return f"{module}.{NAMES.get(entry, entry)}" if mark else key

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, config: Any, adapter_name: str,
                                           state_dict: dict[str, Tensor]) -> dict[str, Tensor]:  # fmt: skip
        handle = adapters_of(model).get(adapter_name)
        checkpoint.check_others(state_dict, model, adapter_name, biases=LOADING.get() is None)
        if handle is not None:
            checkpoint.check_parts(handle.stored, parts := checkpoint.split(state_dict))
            check_together(handle, parts)
        whole = checkpoint.fit(handle.stored if handle else {}, state_dict, trainable=not config.inference_mode)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, whole)
