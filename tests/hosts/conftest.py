"""Before anything imports the hub client: tests never ask the network. And models that several files look at."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
from peft import PeftModel


@pytest.fixture(scope="module")
def models() -> dict[str, PeftModel]:
    """One model in mid-growth of each kind; tests leave them as they are."""
    from tests.hosts.test_peft_models import KINDS, fresh
    from tests.hosts.tiny import grow

    return {kind: grow(fresh(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models: dict[str, PeftModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their adapters on disk."""
    root = tmp_path_factory.mktemp("adapters")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
    return {kind: root / kind for kind in models}
