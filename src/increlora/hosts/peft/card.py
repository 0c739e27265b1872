"""Our section of an adapter's model card: ranks, budget, and how to load it natively and as plain LoRA.

peft writes README.md before the config, and only in the main process; so the config's `save_pretrained` adds to it.
The section stands between two comments and is replaced on every save; the rest of the card is peft's and the user's. An
adapter in a subfolder (any name but "default") gets a card there.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from ...naming import natural, rank_rows, span

BEGIN, END = "<!-- increlora: begin (rewritten by save_pretrained) -->", "<!-- increlora: end -->"
TAGS = {"increlora", "lora"}
COLUMNS = 16  # module types that fit beside each other; with more of them modules are listed
ROWS = 40  # modules in such a list

SECTION = f"""{BEGIN}
## Ranks, and how to load this adapter

Trained with `{{config}}` of increlora. {{modules}} modules hold {{ranks}} and {{parameters}}; a module has {{span}}.

{{table}}

To load it, `base` being the base model (increlora makes its methods known to peft when it is imported):

```python
import increlora
from peft import PeftModel

model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

For use without increlora, write it as a plain LoRA adapter of the same function, which peft and serving engines load
(where a module has no low rank, the command names the alternatives):

```sh
increlora export path/to/this/folder lora
```

```python
model = PeftModel.from_pretrained(base, "lora")
```
{END}"""


def update_card(folder: Path, config: Any) -> None:
    """Write our section and tags into the README.md of an adapter folder; nothing happens where no weights are."""
    saved = any((folder / name).is_file() for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME))
    if not saved or not config.ranks:
        return
    path = folder / "README.md"
    if path.exists():
        card = ModelCard.load(path)
    else:
        card = ModelCard(f"---\nlibrary_name: peft\n---\n\n# {escaped(folder.name)}\n")
        if config.base_model_name_or_path:
            card.data["base_model"] = config.base_model_name_or_path
    card.data["tags"] = sorted(TAGS | set(card.data.get("tags") or ()))
    ranks = list(config.ranks.values())
    budget = {unit: f" (budget {amount:,})" for unit, amount in config.budget.items() if amount is not None}
    section = SECTION.format(
        config=type(config).__name__,
        ranks=f"{sum(ranks):,} ranks{budget.get('ranks', '')}",
        parameters=f"{config.parameters:,} parameters{budget.get('parameters', '')}",
        modules=len(ranks),
        span=span(ranks),
        table=rank_table(config.ranks),
    )
    card.text = with_section(card.text, section)
    card.save(path)


def with_section(text: str, section: str) -> str:
    """The card's text with its section replaced, or put before its first second-level heading."""
    if old := re.search(rf"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}).)*?{re.escape(END)}", text, re.DOTALL):
        return text[: old.start()] + section + text[old.end() :]
    if heading := re.search(r"^## ", text, re.MULTILINE):
        return f"{text[: heading.start()]}{section}\n\n{text[heading.start() :]}"
    return f"{text.rstrip()}\n\n{section}\n"


def rank_table(ranks: Mapping[str, int]) -> str:
    """Ranks by layer and module type; numbered modules of a layer (experts) share a column and show their range. With
    too many types for columns: the modules with the most ranks, and a line for the rest."""
    types, cells = rank_rows({name: ranks[name] for name in sorted(ranks, key=natural)})
    head, rows = ["layer", *types], [[layer, *map(span, row)] for layer, row in cells.items()]
    if len(types) > COLUMNS:
        head, ordered = ["module", "rank"], sorted(ranks.items(), key=lambda item: (-item[1], natural(item[0])))
        rows = [[name, str(rank)] for name, rank in ordered[:ROWS]]
        if rest := [rank for _, rank in ordered[ROWS:]]:
            rows.append([f"{len(rest)} more", span(rest)])
    lines = [[escaped(cell) for cell in row] for row in (head, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text from outside as Markdown that shows it literally: a character reference is never markup."""
    return re.sub(r"(?<!\w)_|_(?!\w)|[^\w .–·-]", lambda found: f"&#{ord(found[0])};", text)
