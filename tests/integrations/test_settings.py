"""What peft calls the task of a model: its own classes take the model under that name, and no other fits better."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from increlora.integrations.settings import task_type

TINY = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
T5 = {"vocab_size": 16, "d_model": 8, "d_kv": 8, "d_ff": 8, "num_layers": 1, "num_heads": 1}
EXPECTED = {
    "BertForSequenceClassification": "PeftModelForSequenceClassification",
    "BertForTokenClassification": "PeftModelForTokenClassification",
    "BertForQuestionAnswering": "PeftModelForQuestionAnswering",
    "BertForMaskedLM": "PeftModel",
    "BertModel": "PeftModelForFeatureExtraction",
    "LlamaModel": "PeftModelForFeatureExtraction",
    "LlamaForCausalLM": "PeftModelForCausalLM",
    "LlamaForQuestionAnswering": "PeftModelForQuestionAnswering",
    "GPT2LMHeadModel": "PeftModelForCausalLM",
    "T5ForConditionalGeneration": "PeftModelForSeq2SeqLM",
}


def tiny(name: str) -> nn.Module:
    kind = getattr(transformers, name)
    return kind(kind.config_class(**(T5 if name.startswith("T5") else TINY)))


@pytest.mark.parametrize("name", EXPECTED)
def test_peft_wraps_a_model_by_its_task(name: str) -> None:
    model = tiny(name)
    targets = ["query", "q_proj", "c_attn", "q"]
    config = LoraConfig(task_type=task_type(model), target_modules=targets, fan_in_fan_out=name.startswith("GPT2"))
    wrapped = get_peft_model(model, config)
    assert type(wrapped).__name__ == EXPECTED[name]
    given = {"decoder_input_ids": torch.tensor([[1]])} if name.startswith("T5") else {}
    assert wrapped(input_ids=torch.tensor([[1, 2, 3]]), **given)


def test_a_module_that_is_no_language_model_has_no_task() -> None:
    assert task_type(nn.Linear(2, 2)) is None
