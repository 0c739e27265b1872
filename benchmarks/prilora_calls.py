"""How many torch operations does PRILoRA add to a training step? Counted as in `adalora_calls.py`, beside our LoRA.

    .venv/bin/python benchmarks/prilora_calls.py

A small BERT with 36 adapted linear maps of three shapes, which read 24 distinct inputs."""

from adalora_calls import TARGETS, counted

from increlora import PlainLoraConfig, PriLoraConfig

MOMENTS = {"between prunings": 15, "at a pruning": 19, "settled": 35}  # prunings after 10, 20 and 30 of 40 steps


def main() -> None:
    shared = {"r": 8, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    lora = counted(PlainLoraConfig(**shared), moments=MOMENTS)
    schedule = {"interval_steps": 10, "settle_steps": 10, "total_steps": 40}
    rows = {
        "default": {},
        "no ramp (`first_r=8`)": {"first_r": 8},
        "zeros held (`regrow=false`)": {"regrow": False},
    }
    print(f"| calls added to LoRA ({lora['settled']}) | {' | '.join(MOMENTS)} |\n| --- |{' --- |' * len(MOMENTS)}")
    for name, options in rows.items():
        found = counted(PriLoraConfig(**shared, **schedule, **options), moments=MOMENTS)
        print(f"| {name} | {' | '.join(str(found[moment] - lora[moment]) for moment in MOMENTS)} |")


if __name__ == "__main__":
    main()
