"""What the tests of the tasks share: the data beside the repository, and a tokenizer of whole words."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2].parent / "shared"


@pytest.fixture(scope="session")
def data():
    """The folder of real data sets, which is no part of the repository."""
    folder = SHARED / "data"
    if not (folder / "glue").is_dir():
        pytest.skip(f"no data sets at {folder}")
    return folder


@pytest.fixture(scope="session")
def stories():
    """The folder of a tiny Llama that was trained on TinyStories, which is no part of the repository."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"no model at {folder}")
    return folder


@pytest.fixture
def word_tokenizer():
    """(text, opening=True) → a tokenizer that knows the words of `text`; `</s>` ends, and pads in front."""

    def make(text, *, opening=False):
        words = dict.fromkeys(["<s>", "</s>", "<unk>", *text.split()])
        inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        if opening:
            inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        return PreTrainedTokenizerFast(
            tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
            padding_side="left",
        )  # fmt: skip

    return make
