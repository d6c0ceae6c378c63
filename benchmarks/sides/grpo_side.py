"""One side of benchmarks/rollouts.py that trains: a GRPO step each time that a line of standard input asks for one.

    grpo_side.py {ours,mlx-lm-lora} '{"model": ..., "rank": 8, "scale": 2.0, "prompts": 1, "group": 8, "tokens": 32, ...}'

Both run their own loop, which waits in the report of each step. End tokens are ignored, so that all answers have
`tokens` tokens. mlx-lm-lora runs in a Python of its own. Each line of output that begins with @ is an answer; the first
one of ours has the prompts' token ids, which the other side is given in its settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives both sides the same fast BLAS)
import mlx.core as mx
from letters_reward import odd_letters
from mlx.utils import tree_flatten

NEVER = 10**9
RATE, DECAY = 1e-5, 0.01
SUBJECTS = ("rain", "snow", "milk", "gold", "salt", "wood", "sand", "wool")  # one token each, so one prompt length
QUESTION = "Tell me in a few plain words where {} comes from, and what people do with it."


class Turns:
    """Waits for a line of input, and answers with the time since the line before and what the step did."""

    def __init__(self) -> None:
        self._begun_s = self._cpu_s = 0.0

    def ready(self, facts: dict[str, Any]) -> None:
        """Say that the model is loaded, and wait for the first step to be asked for."""
        print("@" + json.dumps(facts), flush=True)
        self._wait()

    def done(self, facts: dict[str, Any]) -> None:
        """Answer with a step's figures, and wait for the next one."""
        spent = {"seconds": time.perf_counter() - self._begun_s, "cpu_seconds": time.process_time() - self._cpu_s}
        print("@" + json.dumps({**facts, **spent, "peak_bytes": mx.get_peak_memory()}), flush=True)
        self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self._begun_s, self._cpu_s = time.perf_counter(), time.process_time()


def ours(settings: dict[str, Any]) -> None:
    """Train with `mlx_lora.train`, which is the train command's code."""
    from mlx_lora.adapters.inject import adapter_parameters, inject
    from mlx_lora.adapters.targets import select_targets

    base, turns = mlx_lora.load(settings["model"]), Turns()
    base.tokenizer._eos_token_ids = set()
    asked = [QUESTION.format(subject) for subject in SUBJECTS]
    rows = settings["prompts"] * settings["group"]

    class Pause(mlx_lora.Callback):
        def on_start(self, facts: dict[str, Any]) -> None:
            turns.ready(ready)

        def on_report(self, facts: dict[str, Any]) -> None:
            tokens = round(facts["length"] * rows)
            sampling_s = tokens / facts["rollout_tokens_per_s"]
            turns.done({"tokens": tokens, "trained": facts["real_tokens"], "sampling_s": sampling_s})

    ready = {"prompts": [encoded(base.loaded.hf_tokenizer, text) for text in asked], "blas": mlx_lora.BLAS.name}
    with base.loaded.lent() as lent:
        inject(lent.model, select_targets(lent.model).paths, settings["rank"], settings["scale"])
        ready["trainable"] = sum(p.size for p in adapter_parameters(lent.model).values())
    mlx_lora.train(
        base,
        [{"prompt": text, "answer": "."} for text in asked],
        settings["folder"],
        objective="grpo",
        reward=f"{Path(__file__).parent / 'letters_reward.py'}:{odd_letters.__name__}",
        grpo_loss="grpo",
        group_size=settings["group"],
        max_new_tokens=settings["tokens"],
        temp=settings["temperature"],
        batch_size=settings["prompts"],
        iters=settings["most_steps"],
        rank=settings["rank"],
        alpha=settings["scale"] * settings["rank"],
        learning_rate=RATE,
        lr_schedule="constant",
        warmup=0,
        weight_decay=DECAY,
        max_grad_norm=0,
        valid_fraction=0,
        val_batches=0,
        save_every=0,
        steps_per_report=1,
        sample_tokens=0,
        callbacks=[Pause()],
        progress=False,
    )


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's token ids with the chat template."""
    turns = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    return tokenizer.encode(rendered, add_special_tokens=False)


def mlx_lm_lora(settings: dict[str, Any]) -> None:
    """Train with its `train_grpo`, wired as `mlx_lm_lora.train.run` does it; without a reference, as beta is 0."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.callbacks import TrainingCallback
    from mlx_lm_lora.trainer import grpo_trainer
    from mlx_lm_lora.utils import from_pretrained

    config = {"rank": settings["rank"], "dropout": 0.0, "scale": settings["scale"], "use_dora": False, "num_layers": -1}
    model, tokenizer, _ = from_pretrained(model=settings["model"], lora_config=config)
    tokenizer._eos_token_ids = set()
    turns, sampling, rows = Turns(), Stopwatch(grpo_trainer.generate_grpo), settings["prompts"] * settings["group"]
    grpo_trainer.generate_grpo = sampling

    class Pause(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            tokens = round(train_info["train_average_generated_tokens"] * rows)
            turns.done({"tokens": tokens, "sampling_s": sampling.read()})

    data = [(ids, [0], str(number), ".") for number, ids in enumerate(settings["token_ids"])]
    args = grpo_trainer.GRPOTrainingArgs(
        batch_size=settings["prompts"],
        iters=settings["most_steps"],
        steps_per_report=1,
        steps_per_eval=NEVER,
        steps_per_save=NEVER,
        adapter_file=str(Path(settings["folder"]) / "adapters.safetensors"),
        group_size=settings["group"],
        beta=0.0,
        epsilon=0.2,
        max_completion_length=settings["tokens"],
        temperature=settings["temperature"],
        top_p=1.0,
        top_k=0,
        grpo_loss_type="grpo",
    )
    optimizer = optim.AdamW(learning_rate=RATE, weight_decay=DECAY, bias_correction=True)
    trainable = sum(p.size for _, p in tree_flatten(model.trainable_parameters()))
    turns.ready({"trainable": trainable, "blas": mlx_lora.BLAS.name})
    grpo_trainer.train_grpo(
        model, None, tokenizer, optimizer, data, None, [odd_letters], args, training_callback=Pause(), end_answer_token=""
    )  # fmt: skip


class Stopwatch:
    """A function that also adds up the time that it takes."""

    def __init__(self, function: Callable[..., Any]):
        self._function, self._spent_s = function, 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        begun = time.perf_counter()
        found = self._function(*arguments, **named)
        self._spent_s += time.perf_counter() - begun
        return found

    def read(self) -> float:
        """Return the seconds since the last look."""
        spent_s, self._spent_s = self._spent_s, 0.0
        return spent_s


def main() -> None:
    """Load, then take steps."""
    {"ours": ours, "mlx-lm-lora": mlx_lm_lora}[sys.argv[1]](json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
