"""Task `sft`: instruction pairs, with the loss on the response.

    columns                         prompt
    prompt, response|completion     prompt
    instruction, output [, input]   instruction, blank line, input            (Alpaca)
    question, answer                question                                  (GSM8K)

The model reads the prompt through the tokenizer's chat template or, without one, followed by a blank line; then the
response and its end. A response is never cut: the prompt loses its beginning to make room, and a pair whose response
alone is too long is left out, as is one without prompt or response. The record says how many."""

from collections import Counter
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from ...errors import TaskError
from .base import Example, Task, TaskOptions
from .files import Rows, read_splits
from .lm import IGNORED, borders, causal_task, token_ids

LAYOUTS: tuple[tuple[str, ...], ...] = (
    ("prompt", "response"), ("prompt", "completion"), ("instruction", "output", "input"), ("instruction", "output"),
    ("question", "answer"),
)  # fmt: skip
BLANK_LINE = "\n\n"

Pair = tuple[str, str]  # prompt and response


def sft_task(tokenizer: PreTrainedTokenizerBase, options: TaskOptions) -> Task:
    """The task, tokenized; its limits count rows, before some are left out.

    Raises: TaskError without data, without known columns, or if no pair fits into `options.max_length`."""
    train, validation, source = read_splits(options.data)
    splits = train.parts() if validation is None else (train, validation)
    notes = Counter[str]()
    examples = [
        fitting(tokenizer, rows.sample(*drawn), options.max_length, notes)
        for rows, drawn in zip(splits, options.draws, strict=True)
    ]
    source = ", ".join([source, *(f"{count} {note}" for note, count in notes.items() if count)])
    return causal_task("sft", "eval_loss", source, examples[0], examples[1], tokenizer)


def fitting(tokenizer: PreTrainedTokenizerBase, rows: Rows, max_length: int, notes: Counter[str]) -> list[Example]:
    """The pairs that fit, tokenized; `notes` counts what is left out or cut."""
    pairs = read_pairs(rows)
    whole = [(prompt, response) for prompt, response in pairs if prompt.strip() and response.strip()]
    notes["rows without prompt or response left out"] += len(pairs) - len(whole)
    start, end = ([], []) if tokenizer.chat_template else borders(tokenizer)
    texts = [written(tokenizer, *pair) for pair in whole]
    # Each alone, as in generation, where the prompt is there first.
    prompts, responses = (token_ids(tokenizer, [pair[i] for pair in texts]) for i in (0, 1))
    examples = []
    for prompt, answer in zip(prompts, responses, strict=True):
        response = answer + end
        excess = max(0, len(start) + len(prompt) + len(response) - max_length)
        if excess >= len(prompt):
            notes[f"responses longer than {max_length} tokens left out"] += 1
            continue
        notes["prompts cut"] += excess > 0
        asked = start + prompt[excess:]
        examples.append({"input_ids": asked + response, "labels": [IGNORED] * len(asked) + response})
    if not examples:
        lacking = f"of {len(pairs)} rows, {len(pairs) - len(whole)} lack prompt or response"
        remedy = f"and {len(whole)} do not fit into {max_length} tokens; fill them or raise --max-length"
        raise TaskError(f"{rows.origin}: {lacking} {remedy}")
    return examples


def read_pairs(rows: Rows) -> list[Pair]:
    """Prompts and responses as they are in the table; a null reads as an empty text."""
    there = rows.table.column_names
    columns = next((layout for layout in LAYOUTS if set(layout) <= set(there)), None)
    if columns is None:
        known = " or ".join(" + ".join(layout) for layout in LAYOUTS if len(layout) == 2)
        raise TaskError(f"{rows.origin} has the columns {', '.join(there)}; sft reads {known}: rename two")
    return [
        (BLANK_LINE.join([prompt, *(text for text in context if text.strip())]), response)
        for prompt, response, *context in zip(*(rows.text(column, nulls=True) for column in columns), strict=True)
    ]


def written(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> Pair:
    """The pair as the model reads it: what generation starts from, and all that follows."""
    if not tokenizer.chat_template:
        return prompt + BLANK_LINE, response
    question, answer = {"role": "user", "content": prompt}, {"role": "assistant", "content": response}
    before = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    both = tokenizer.apply_chat_template([question, answer], tokenize=False)
    # All of `before`, unless the template makes generation begin with a thought that answers do not keep.
    cut = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(before, both, strict=False)))
    return both[:cut], both[cut:]
