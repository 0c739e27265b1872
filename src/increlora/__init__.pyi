"""increlora: which rank, for which layer? Low-rank adapters that decide while the model is fine-tuned.

from peft import get_peft_model
from increlora import IncreLoraConfig

model = get_peft_model(base, IncreLoraConfig(r=8, target_modules="all-linear"))   # r: average rank per module
Trainer(model=model, args=args, train_dataset=data).train()                       # ranks grow by themselves
"""

# Written by scripts/stub.py out of the methods' settings: change those, then run `make stub`.
from collections.abc import Mapping
from typing import Literal, Self

from peft.utils.peft_types import TaskType

from .errors import IncreLoraError as IncreLoraError
from .export.allocation import allocation_to_lora_config as allocation_to_lora_config
from .export.engines import check_export as check_export
from .export.lora import export_lora as export_lora
from .export.merged import export_merged as export_merged
from .export.warm_start import warm_start as warm_start
from .hosts.peft.config import MethodConfig
from .hosts.peft.drive import attach as attach
from .hosts.peft.drive import block_states as block_states
from .hosts.peft.drive import rank_summary as rank_summary
from .runtime.attach import regularization_loss as regularization_loss

__all__ = [
    "AdaLoraConfig",
    "IncreLoraConfig",
    "IncreLoraError",
    "LoraMiniConfig",
    "LortaConfig",
    "MeLoraConfig",
    "MoraConfig",
    "PlainLoraConfig",
    "PriLoraConfig",
    "SoraConfig",
    "allocation_to_lora_config",
    "attach",
    "block_states",
    "check_export",
    "export_lora",
    "export_merged",
    "rank_summary",
    "regularization_loss",
    "warm_start",
]
__version__: str

class AdaLoraConfig(MethodConfig):
    """Every option of AdaLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
    Pruning
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up.
        warmup_steps: no cut at or before this step.   settle_steps: at the end, with the ranks that are left; ≥ 1.
        interval_steps: cuts at its multiples; between them dropped ranks may come back.
        beta, beta_uncertainty: moving averages of |w · ∂L/∂w|, in [0, 1).
    Form
        lora_alpha: numerator α of the scale α / average rank at the end.   use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        orthogonality: weight of the penalty, ≥ 0; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    total_ranks: int | None
    init_r: int | None
    warmup_steps: int | float
    settle_steps: int | float
    interval_steps: int | float
    beta: float
    beta_uncertainty: float
    orthogonality: float
    total_steps: int | None
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        init_r: int | None = ...,
        warmup_steps: int | float = ...,
        settle_steps: int | float = ...,
        interval_steps: int | float = ...,
        beta: float = ...,
        beta_uncertainty: float = ...,
        orthogonality: float = ...,
        total_steps: int | None = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        init_r: int | None = ...,
        warmup_steps: int | float = ...,
        settle_steps: int | float = ...,
        interval_steps: int | float = ...,
        beta: float = ...,
        beta_uncertainty: float = ...,
        orthogonality: float = ...,
        total_steps: int | None = ...,
        selection: Literal["exact", "published"] = ...,
        observe: Literal["before_step", "after_step"] = ...,
        scaling: Literal["constant", "initial_rank"] = ...,
        scale_epsilon: float = ...,
        start: Literal["lora", "published"] = ...,
        orthogonality_form: Literal["trainer", "squared"] = ...,
        penalty_place: Literal["after_clipping", "before_clipping"] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published code, step by step; `overrides` are further options by name.

        Unless given, init_r is that of the paper's tables (1 → 2, 2 → 4, 4 → 6, 8 → 12), and warmup_steps = 600,
        settle_steps = 1800, interval_steps = 1, lora_alpha = 32 (its RTE script).

        Switches of the published code
            selection: `published` (ties at the threshold all go; no parameter bound; `init_r` whatever the shape; the
                last cut waits for one step more unless it falls on a multiple of `interval_steps`), or `exact`.
            observe: entries are scored with the weights `after_step` (code), or `before_step` (as the paper states).
            scaling: α / (init_r + scale_epsilon) (`initial_rank`; α ≤ 0 stands for init_r), or α / average rank at the
                end (`constant`).   scale_epsilon: see `scaling`.
            start: initial values `published` (A, B ~ N(0, 0.02²), e = 0) or `lora` (A Kaiming, B = 0, e = 1).
            orthogonality_form: `trainer` (norms, code) or `squared` (paper).
            penalty_place: whether gradient clipping sees the penalty."""

class IncreLoraConfig(MethodConfig):
    """Every option of IncreLoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
        total_parameters: bound on Σ rank · (in + out); short by less than one grant.
    Growth
        init_r: rank of every module at the start.   grow_by: ranks per grant; default max(1, r // 2).
        top_h: modules per event, more where the run's last events would not meet the budget; default: the budget is
            spent in 10 events, or in as many as a short run has.
        warmup_steps: no event at or before this step.   interval_steps: events at its multiples.
        capacity: most ranks a module can ever hold; default max(8, 4 r).   capacity_pattern: per module name (regex).
    Score
        score: `delta`, or the cheap `signed`.   beta, beta_uncertainty: moving averages, in [0, 1).
        score_window: steps scored before an event; None: all.
        score_accumulation: over micro-batches: `mean` of their scores, or `exact`, the score of the whole batch.
    Form
        lora_alpha: numerator α of the scale α / average rank of the budget.   use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        birth_warmup: new ranks take so long to reach the host's learning rate.
        orthogonality: weight of the penalty, ≥ 0; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    total_ranks: int | None
    total_parameters: int | None
    init_r: int
    grow_by: int | None
    top_h: int | None
    warmup_steps: int | float
    interval_steps: int | float
    capacity: int | None
    capacity_pattern: Mapping[str, int]
    score: Literal["delta", "signed"]
    beta: float
    beta_uncertainty: float
    score_window: int | None
    birth_warmup: int | float
    orthogonality: float
    total_steps: int | None
    score_accumulation: Literal["mean", "exact"]
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        total_parameters: int | None = ...,
        init_r: int = ...,
        grow_by: int | None = ...,
        top_h: int | None = ...,
        warmup_steps: int | float = ...,
        interval_steps: int | float = ...,
        capacity: int | None = ...,
        capacity_pattern: Mapping[str, int] = ...,
        score: Literal["delta", "signed"] = ...,
        beta: float = ...,
        beta_uncertainty: float = ...,
        score_window: int | None = ...,
        birth_warmup: int | float = ...,
        orthogonality: float = ...,
        total_steps: int | None = ...,
        score_accumulation: Literal["mean", "exact"] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        total_parameters: int | None = ...,
        init_r: int = ...,
        grow_by: int | None = ...,
        top_h: int | None = ...,
        warmup_steps: int | float = ...,
        interval_steps: int | float = ...,
        capacity: int | None = ...,
        capacity_pattern: Mapping[str, int] = ...,
        score: Literal["delta", "signed"] = ...,
        beta: float = ...,
        beta_uncertainty: float = ...,
        score_window: int | None = ...,
        birth_warmup: int | float = ...,
        orthogonality: float = ...,
        total_steps: int | None = ...,
        selection: Literal["exact", "published"] = ...,
        reserve: Literal["trained", "frozen", "none"] = ...,
        finish: Literal["retire", "keep"] = ...,
        score_norm: Literal["sqrt_numel", "mean"] = ...,
        score_accumulation: Literal["mean", "last", "exact"] = ...,
        scaling: Literal["constant", "active_rank"] = ...,
        scale_epsilon: float = ...,
        start: Literal["lora", "published"] = ...,
        newborn: Literal["lora", "published"] = ...,
        clock: Literal["ramp", "published"] = ...,
        orthogonality_form: Literal["trainer", "squared"] = ...,
        penalty_place: Literal["after_clipping", "before_clipping"] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published code, step by step, its quirks included; `overrides` are further options by name.

        Unless given, warmup_steps = interval_steps = birth_warmup = 100 and top_h = 5 (its RTE script).

        Switches of the published code
            selection: `published` (ties and overshoot; no parameter bound), or `exact`.
            reserve: blocks next in line are `trained` in advance, `frozen` (published code without advance learning:
                they count in the penalty only), or there are `none`.
            finish: when the budget is spent, `keep` training the reserve without effect, or `retire` it.
            score_norm: of the score, over `sqrt_numel` (code) or `mean` (paper).
            score_accumulation: over micro-batches: the `last` decides, or `mean`, `exact`.
            scaling: α / (active rank + scale_epsilon) (`active_rank`; α ≤ 0 stands for init_r), or α / average rank of
                the budget (`constant`).   scale_epsilon: see `scaling`.
            start, newborn: initial values of the first and of later blocks: `published` (A, B ~ N(0, 0.02²); e = 0, in
                reserve 1e-5) or `lora` (A Kaiming, B = 0, e = 1).
            clock: newborn tensors follow the `published` restart of the host's linear schedule, whose warm-up is
                birth_warmup, or a `ramp` to its learning rate.
            orthogonality_form: `trainer` (norms, code) or `squared` (paper).
            penalty_place: whether gradient clipping sees the penalty."""

class LoraMiniConfig(MethodConfig):
    """Settings of LoRA-Mini. The published ones are not known: every default is ours.

    Attributes:
        r: rank of the inner pair, ≥ 1.   lora_alpha: numerator of the scale α/r.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r.
        inner_in: a, rows of A_aux, from 1 to the module's in features.   inner_out: b, columns of B_aux, from 1 to its
            out features. Default of both: a twentieth of the smaller of in and out, but at least r, and at most what
            the module has.
        reduction: ρ ≥ 1, instead of inner sizes: a = in/ρ and b = out/ρ, rounded, so that ρ times fewer parameters than
            LoRA's are trained.
        init: outer factors N(0, 1/a) and N(0, 1/b), a start and steps of LoRA's size (`matched`); N(0, 1), as in the
            published file (`official_aux`); orthonormal rows of A_aux and columns of B_aux (`orthonormal`). B starts at
            zero, A never.
        forward: multiply the weights first (`composed`), send the input through four factors and keep only a numbers of
            each token for the backward pass (`sequential`), or what takes fewer multiplications (`auto`).
        save_projection: write the outer factors to adapter files; False: draw them again on loading, and compare.
        rank_pattern, alpha_pattern: other ranks r ≥ 1 and α, by module name or its ending (regex, first match).
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    inner_in: int | None
    inner_out: int | None
    reduction: float | None
    init: Literal["matched", "official_aux", "orthonormal"]
    forward: Literal["auto", "composed", "sequential"]
    save_projection: bool
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        inner_in: int | None = ...,
        inner_out: int | None = ...,
        reduction: float | None = ...,
        init: Literal["matched", "official_aux", "orthonormal"] = ...,
        forward: Literal["auto", "composed", "sequential"] = ...,
        save_projection: bool = ...,
        rank_pattern: Mapping[str, int] = ...,
        alpha_pattern: Mapping[str, float] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...

class LortaConfig(MethodConfig):
    """Every option of LoRTA; by name or its ending (regex, first match) a module may have its own α.

    Attributes:
        r: rank of the tensor, ≥ 1, one for all modules: r · (d + d_h + H + L + 4) parameters in all (d: width of the
            model, d_h: of a head; H heads, L attention blocks).
        lora_alpha: numerator of the scale α/r.   alpha_pattern: other α.   use_rslora: scale α/√r (a published switch).
        lora_dropout: on the input of ΔW, in [0, 1); every module draws a mask of its own.
        orientation: which side of ΔW carries the heads: the one that has them (`head_aligned`), the input side of all
            modules (`official_peft`), or the output side of all modules (`official_litgpt`).
        init: `official` (A ~ U(±1/√r), C ~ U(±√(6/((1 + 5·init_scale²)·r)))), or `lora_matched` (A ~ U(±1/√d), C ~
            U(±√3)), which at every r starts with the variance that LoRA's A has; B = 0 in both.
        init_scale: the published slope, ≥ 0: larger values make C smaller.
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    Architecture
        heads: H, of q; None: as the model's config says.   head_dim: d_h, likewise.
        layers: names of the attention blocks, in the order of the rows of C_layer; None: all that the model has.
        matrices: what modules are, by the ending of their names: `q`, `k`, `v`, `o`, or several of q, k and v for
            stacked outputs (`qkv`); looked at before the known names.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    orientation: Literal["head_aligned", "official_peft", "official_litgpt"]
    init: Literal["official", "lora_matched"]
    init_scale: float
    heads: int | None
    head_dim: int | None
    layers: list[str] | None
    matrices: Mapping[str, str]
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        alpha_pattern: Mapping[str, float] = ...,
        orientation: Literal["head_aligned", "official_peft", "official_litgpt"] = ...,
        init: Literal["official", "lora_matched"] = ...,
        init_scale: float = ...,
        heads: int | None = ...,
        head_dim: int | None = ...,
        layers: list[str] | None = ...,
        matrices: Mapping[str, str] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        alpha_pattern: Mapping[str, float] = ...,
        orientation: Literal["head_aligned", "official_peft", "official_litgpt"] = ...,
        init: Literal["official", "lora_matched"] = ...,
        init_scale: float = ...,
        heads: int | None = ...,
        head_dim: int | None = ...,
        layers: list[str] | None = ...,
        matrices: Mapping[str, str] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published GLUE run: orientation = official_peft, lora_alpha = 1, unless given."""

class MeLoraConfig(MethodConfig):
    """Settings of MELoRA; by name or its ending (regex, first match) a module may have its own.

    Attributes:
        r: rank of every mini adapter, ≥ 1: the parameters are those of LoRA of this rank, the rank of ΔW is minis · r.
        minis: mini adapters per module, n ≥ 1; divides the module's in and out features.   minis_pattern: other n.
        lora_alpha: numerator of the scale α/r, r that of one mini adapter.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r, r that of one mini adapter.
        rank_pattern, alpha_pattern: other ranks r ≥ 1 and α.
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    minis: int
    minis_pattern: Mapping[str, int]
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        minis: int = ...,
        use_rslora: bool = ...,
        minis_pattern: Mapping[str, int] = ...,
        rank_pattern: Mapping[str, int] = ...,
        alpha_pattern: Mapping[str, float] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        minis: int = ...,
        use_rslora: bool = ...,
        minis_pattern: Mapping[str, int] = ...,
        rank_pattern: Mapping[str, int] = ...,
        alpha_pattern: Mapping[str, float] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published GLUE script: minis = 2, lora_alpha = 16, lora_dropout = 0.05, unless given."""

class MoraConfig(MethodConfig):
    """Every option of MoRA. Times are steps (int) or shares of the run (float in [0, 1]).

    Size
        r: rank ≥ 1 of the LoRA that has as many parameters; sets the side R of the square matrix of each module.
        side: `floor` of √((in + out) · r), never more parameters than LoRA, or `round` (published code; either is made
            even for rotation), or one int ≥ 1 for all modules.
    Maps
        operator: `sharing` sums inputs and repeats outputs over groups; `rotation` applies the matrix to every chunk of
            the input, turned; `decoupling` without turning; `truncation` to the first R inputs and outputs.
        compress, expand: groups of `sharing` for inputs and outputs: `stride` (interleaved) or `block` (runs).
        pad: where R does not divide the inputs, `wrap` counts the first ones twice (published code), `zero` none.
        pairing: entries that `rotation` turns: j with j + R/2 (`half`, published code) or neighbours (`adjacent`).
        dead_inputs: chunks of the input that a shorter output has no room for: `refuse` such a module, `ignore` them
            (published code), or `fold`, which adds them to other chunks.
        mora_type: the maps by their number in the published code, instead of the options above: 1, 2, 3, 4 or 6.
    Restarts
        restart_steps: ReMoRA: after so many steps what was learnt is put aside and the matrix starts anew; None: never.
        restart_maps: of the next round: `permute` inputs and outputs at random, `cycle` through types 1, 2, 3, 4,
            `alternate` between types 1 and 2, or the `same`.   restart_warmup: learning rate rises over so much of it.
    Form
        lora_dropout: on the input of ΔW, in [0, 1).   init_lora_weights: False draws the matrix at random, for tests.
        lora_alpha: MoRA has no scale; anything but LoRA's default is refused.
    Run
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of permutations.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    side: Literal["floor", "round"] | int
    operator: Literal["truncation", "sharing", "decoupling", "rotation"]
    compress: Literal["stride", "block"]
    expand: Literal["stride", "block"]
    pad: Literal["wrap", "zero"]
    pairing: Literal["half", "adjacent"]
    dead_inputs: Literal["refuse", "ignore", "fold"]
    mora_type: Literal[1, 2, 3, 4, 6] | None
    restart_steps: int | float | None
    restart_maps: Literal["permute", "cycle", "alternate", "same"]
    restart_warmup: int | float
    total_steps: int | None
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        side: Literal["floor", "round"] | int = ...,
        operator: Literal["truncation", "sharing", "decoupling", "rotation"] = ...,
        compress: Literal["stride", "block"] = ...,
        expand: Literal["stride", "block"] = ...,
        pad: Literal["wrap", "zero"] = ...,
        pairing: Literal["half", "adjacent"] = ...,
        dead_inputs: Literal["refuse", "ignore", "fold"] = ...,
        mora_type: Literal[1, 2, 3, 4, 6] | None = ...,
        restart_steps: int | float | None = ...,
        restart_maps: Literal["permute", "cycle", "alternate", "same"] = ...,
        restart_warmup: int | float = ...,
        total_steps: int | None = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        side: Literal["floor", "round"] | int = ...,
        operator: Literal["truncation", "sharing", "decoupling", "rotation"] = ...,
        compress: Literal["stride", "block"] = ...,
        expand: Literal["stride", "block"] = ...,
        pad: Literal["wrap", "zero"] = ...,
        pairing: Literal["half", "adjacent"] = ...,
        dead_inputs: Literal["refuse", "ignore", "fold"] = ...,
        mora_type: Literal[1, 2, 3, 4, 6] | None = ...,
        restart_steps: int | float | None = ...,
        restart_maps: Literal["permute", "cycle", "alternate", "same"] = ...,
        restart_warmup: int | float = ...,
        total_steps: int | None = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published code; unless given, mora_type = 1, its default (its authors: 1 for a large r, 6 for a small
        one), and lora_dropout = 0.05. Restarts, if any, cycle through the types."""

class PlainLoraConfig(MethodConfig):
    """Settings of LoRA, named as in peft.

    Attributes:
        r: rank of every module, ≥ 1.   lora_alpha: numerator of the scale α/r.   lora_dropout: on the branch's input.
        use_rslora: scale α/√r.
        rank_pattern, alpha_pattern: other ranks ≥ 1 and α, by module name or its ending (regex, first match).
        init_lora_weights: False draws B at random too (for tests).   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        rank_pattern: Mapping[str, int] = ...,
        alpha_pattern: Mapping[str, float] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...

class PriLoraConfig(MethodConfig):
    """Every option of PRILoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget, one of
        r: average rank per module, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters.
        total_ranks: ranks over all modules, met exactly.
    Ranks
        first_r: rank at the first layer, from 1 to 2 · mean − 1; the last layer gets 2 · mean − first_r. Default: half
            the mean.
        ramp: `per_stack` starts anew in each stack of layers (encoder, decoder); `whole` runs through all of them.
    Pruning
        prune_share: share p of the entries of A that a pruning sets to zero, in [0, 1); 0: nothing is pruned.
        group: p counts in each `row` of A, or in the `matrix`.
        interval_steps: prunings after so many steps, and at the multiples; default 40, in shorter runs half of the run.
        warmup_steps, settle_steps: no pruning in the first steps, and in the last.
        regrow: zeros may move again until the next pruning; False holds them at zero, from the first pruning of a run.
        beta: moving average of the input norms, in [0, 1).   statistic_interval: it is updated in each so many steps.
    Form
        lora_alpha: numerator α of the scale.   scaling: α / rank of the module (`per_rank`), or α / mean (`constant`).
        use_rslora: α over the root of that.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Run
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    total_ranks: int | None
    first_r: float | None
    ramp: Literal["per_stack", "whole"]
    prune_share: float
    group: Literal["row", "matrix"]
    interval_steps: int | float
    warmup_steps: int | float
    settle_steps: int | float
    regrow: bool
    beta: float
    statistic_interval: int
    scaling: Literal["per_rank", "constant"]
    total_steps: int | None
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        first_r: float | None = ...,
        ramp: Literal["per_stack", "whole"] = ...,
        prune_share: float = ...,
        group: Literal["row", "matrix"] = ...,
        interval_steps: int | float = ...,
        warmup_steps: int | float = ...,
        settle_steps: int | float = ...,
        regrow: bool = ...,
        beta: float = ...,
        statistic_interval: int = ...,
        scaling: Literal["per_rank", "constant"] = ...,
        total_steps: int | None = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...

class SoraConfig(MethodConfig):
    """Every option of SoRA. Counts are at least 1; times are steps (int) or shares of the run (float in [0, 1]).

    Budget
        r: average rank per module at the end, ≥ 1: r · modules ranks exactly, at most LoRA's adapter parameters. With
            a `threshold`: the rank of every module at the start; what is left at the end is found in training.
        total_ranks: ranks over all modules, met exactly; not with a `threshold`.
    Shrinking
        threshold: ξ > 0, taken from every |gate| after each step; None: chosen at each cut so that the budget is met.
        threshold_unit: `constant` (published code), or `learning_rate`: ξ = threshold · learning rate (paper's rule).
        levels: the threshold rises to its value in so many equal phases.   first_threshold: ξ during the warm-up, ≥ 0.
        spacing: of the levels, `linear`, `geometric` or `log_linear`.
        init_r: rank of every module at the start, at most what its shape can use; default 1.5 times the average at the
            end, rounded up; not with a `threshold`.
        warmup_steps: nothing shrinks and no cut yet, but for `first_threshold`.   settle_steps: at the end, with the
            ranks that are left; ≥ 1.   interval_steps: ranks are counted, and cut to the budget, at its multiples;
            between them a gate at zero may come back.
        close_after: a rank that did not count at so many counts in a row is not computed any more, and stays out unless
            the bound on parameters leaves no other choice; None: only once all is settled.
    Form
        lora_alpha: numerator α of the scale α / average rank at the end.   use_rslora: α over the root of that.
        gate_init: gates start at N(0, 1), `normal`, or at `ones`.
        init_lora_weights: False draws B at random, for tests.   lora_dropout: on the input of ΔW, in [0, 1).
    Training
        gate_penalty: weight λ ≥ 0 of mean |gate|, as a gradient; 0 turns it off.
        total_steps: optimizer steps of the run, for a loop without Trainer or `attach`.   seed: of the initial values.
    As in peft's LoraConfig
        target_modules: "all-linear", names of modules (or their endings), or a regular expression.
        exclude_modules: modules to leave out, named in the same way.
        layers_to_transform: numbers of the layers to adapt; default: all.
        layers_pattern: name of the list of layers, where peft does not know it.
        modules_to_save: modules that are trained in full and saved beside the adapter.
        fan_in_fan_out: weights are stored as (in, out); set by itself for Conv1D.
        task_type: peft's name of the task, "CAUSAL_LM" for instance.
        base_model_name_or_path: the base model; filled in from the model.
        revision: of the base model.
        inference_mode: load without gradients.
    """

    seed: int
    total_ranks: int | None
    init_r: int | None
    threshold: float | None
    threshold_unit: Literal["constant", "learning_rate"]
    levels: int
    first_threshold: float
    spacing: Literal["linear", "geometric", "log_linear"]
    warmup_steps: int | float
    settle_steps: int | float
    interval_steps: int | float
    close_after: int | None
    gate_init: Literal["normal", "ones"]
    gate_penalty: float
    total_steps: int | None
    def __init__(
        self,
        *,
        r: int = ...,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        init_r: int | None = ...,
        threshold: float | None = ...,
        threshold_unit: Literal["constant", "learning_rate"] = ...,
        levels: int = ...,
        first_threshold: float = ...,
        spacing: Literal["linear", "geometric", "log_linear"] = ...,
        warmup_steps: int | float = ...,
        settle_steps: int | float = ...,
        interval_steps: int | float = ...,
        close_after: int | None = ...,
        gate_init: Literal["normal", "ones"] = ...,
        gate_penalty: float = ...,
        total_steps: int | None = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> None: ...
    @classmethod
    def paper(
        cls,
        r: int = ...,
        *,
        lora_alpha: float = ...,
        lora_dropout: float = ...,
        init_lora_weights: bool = ...,
        seed: int = ...,
        use_rslora: bool = ...,
        total_ranks: int | None = ...,
        init_r: int | None = ...,
        threshold: float | None = ...,
        threshold_unit: Literal["constant", "learning_rate"] = ...,
        levels: int = ...,
        first_threshold: float = ...,
        spacing: Literal["linear", "geometric", "log_linear"] = ...,
        warmup_steps: int | float = ...,
        settle_steps: int | float = ...,
        interval_steps: int | float = ...,
        close_after: int | None = ...,
        gate_init: Literal["normal", "ones"] = ...,
        gate_penalty: float = ...,
        total_steps: int | None = ...,
        operator: Literal["exact", "published"] = ...,
        scaling: Literal["constant", "initial_rank"] = ...,
        penalty_place: Literal["after_clipping", "before_clipping"] = ...,
        target_modules: str | list[str] | set[str] | None = ...,
        exclude_modules: str | list[str] | set[str] | None = ...,
        layers_to_transform: int | list[int] | None = ...,
        layers_pattern: str | list[str] | None = ...,
        modules_to_save: list[str] | None = ...,
        fan_in_fan_out: bool = ...,
        task_type: str | TaskType | None = ...,
        base_model_name_or_path: str | None = ...,
        revision: str | None = ...,
        inference_mode: bool = ...,
    ) -> Self:
        """The published code, step by step; `overrides` are further options by name.

        Unless given, threshold = 3e-4, gate_penalty = 10 and lora_alpha = 16 (its STS-B script), and ranks are counted
        every 100 steps, which changes nothing in training.

        Switches of the published code
            operator: `published` (its dead zone is 2ξ wide), or the `exact` soft threshold.
            scaling: α / init_r, the rank of every module at the start (`initial_rank`), or α / average rank at the end
                (`constant`).
            penalty_place: whether gradient clipping sees the penalty (in your own loop: see `regularization_loss`)."""
