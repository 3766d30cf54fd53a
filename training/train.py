"""Trains the reader from nothing, on two CPU cores or one GPU, and goes on where an interrupted run
stopped.

scripts/train_reader --help
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, SmolLM3ForCausalLM

from training.batches import ANSWER_WEIGHT, Batch, make_batch
from training.checkpoint import TrainingProgress, load_checkpoint, save_checkpoint
from training.circuit import SIZES, Size, build_model
from training.plans import Stage, load_plan
from training.tokenizer import build_tokenizer
from training.vocabulary import study


@dataclass(frozen=True)
class TrainingRun:
    """What a run is made of; the same run gives the same weights on the same machine."""

    folder: Path
    size: Size
    stages: tuple[Stage, ...]
    start: Path | None = None  # weights to begin with instead of the circuit
    device: str = "cpu"
    compile: bool = False
    seed: int = 0
    save_every: int = 40
    log_every: int = 20

    @property
    def num_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[Stage, float]:
        """The stage of a step, and the learning rate there."""
        for stage in self.stages:
            if step < stage.steps:
                return stage, stage.lr_start + (stage.lr_end - stage.lr_start) * (
                    step + 1
                ) / stage.steps
            step -= stage.steps
        raise ValueError(f"step is past the end of a plan of {self.num_steps} steps")


def make_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), fused=True)


def losses(model: SmolLM3ForCausalLM, batch: Batch, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss of a batch; loss and accuracy over answer tokens alone, detached.

    Logits are computed only where a weight is set: most tokens of a document are not predicted.
    """
    ids, weights, positions = (
        t.to(device) for t in (batch.token_ids, batch.weights, batch.positions)
    )
    with torch.autocast(device.partition(":")[0], torch.bfloat16):
        # The mask says "all one text"; without it jumps in the positions would be taken for packed
        # texts.
        hidden = model.model(
            input_ids=ids[:, :-1],
            position_ids=positions[:, :-1],
            attention_mask=torch.ones_like(ids[:, :-1]),
            use_cache=False,
        ).last_hidden_state  # (B, S, D)
        wanted = weights[:, 1:] > 0
        logits = model.lm_head(hidden[wanted]).float()  # (W, V)
    target = ids[:, 1:][wanted]
    weight = weights[:, 1:][wanted]
    each = F.cross_entropy(logits, target, reduction="none")
    with torch.no_grad():
        answers = weight >= ANSWER_WEIGHT
        right = (logits.argmax(-1) == target)[answers].float().mean()
        answer_loss = each[answers].mean()
    return (each * weight).sum() / weight.sum(), answer_loss, right


def train(run: TrainingRun, until: int | None = None) -> TrainingProgress:
    """Runs, or goes on with, a training run up to step `until` (default: its end) and writes the
    weights.

    The folder gets `checkpoint/`, `curve.jsonl` and `weights/` (bf16, loadable by
    AutoModelForCausalLM).
    """
    weights_folder = run.folder / "weights"
    checkpoint = run.folder / "checkpoint"
    tokenizer = _tokenizer(run, weights_folder)
    model = _first_model(run, tokenizer).to(run.device)
    optimizer = make_optimizer(model)
    progress = load_checkpoint(checkpoint, model, optimizer)
    _forget_after(run.folder / "curve.jsonl", progress.step)
    if run.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    started = time.monotonic() - progress.seconds
    last = min(run.num_steps, until if until is not None else run.num_steps)
    records: list[dict[str, float]] = []
    while progress.step < last:
        records.append(_step(run, model, optimizer, progress, tokenizer))
        progress.seconds = time.monotonic() - started
        if progress.step % run.log_every == 0 or progress.step == last:
            means = {
                key: sum(record[key] for record in records) / len(records) for key in records[0]
            }
            means["length"] = records[-1]["length"]
            _log(run.folder / "curve.jsonl", {**asdict(progress), **means})
            records.clear()
        if progress.step % run.save_every == 0 or progress.step == last:
            save_checkpoint(checkpoint, model, optimizer, progress)
            write_weights(model, weights_folder)
    return progress


def _tokenizer(run: TrainingRun, folder: Path) -> PreTrainedTokenizerBase:
    if not (folder / "tokenizer.json").exists():
        if run.start:
            AutoTokenizer.from_pretrained(run.start).save_pretrained(folder)
        else:
            build_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def _first_model(run: TrainingRun, tokenizer: PreTrainedTokenizerBase) -> SmolLM3ForCausalLM:
    if run.start:
        return SmolLM3ForCausalLM.from_pretrained(run.start, dtype=torch.float32)
    return build_model(run.size, study(tokenizer), run.seed)


def _step(
    run: TrainingRun,
    model: SmolLM3ForCausalLM,
    optimizer: torch.optim.Optimizer,
    progress: TrainingProgress,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, float]:
    """One optimizer step; advances `progress` and returns what the curve records."""
    stage, lr = run.stage_at(progress.step)
    batch = make_batch(stage, progress.step, tokenizer, run.seed)
    loss, answer_loss, accuracy = losses(model, batch, run.device)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    progress.step += 1
    progress.tokens += batch.token_ids.numel()
    return {
        "length": stage.length,
        "lr": lr,
        "loss": loss.item(),
        "answer_loss": answer_loss.item(),
        "answer_accuracy": accuracy.item(),
    }


def write_weights(model: SmolLM3ForCausalLM, folder: Path) -> None:
    """The model in bf16 beside its tokenizer; training goes on in fp32."""
    state = {
        name: value.detach().to("cpu", torch.bfloat16) for name, value in model.state_dict().items()
    }
    copy = type(model)(model.config).to(torch.bfloat16)
    copy.load_state_dict(state)
    copy.save_pretrained(folder)


def _forget_after(curve: Path, step: int) -> None:
    """Drops what an interrupted run logged after its last checkpoint."""
    if curve.exists():
        lines = curve.read_text().splitlines(keepends=True)
        curve.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))


def _log(path: Path, record: dict[str, Any]) -> None:
    rounded = {
        key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()
    }
    with path.open("a") as file:
        file.write(json.dumps(rounded) + "\n")
    print(" ".join(f"{key} {value}" for key, value in rounded.items()), file=sys.stderr, flush=True)


def draw_curve(folder: Path) -> Path:
    """Draws curve.jsonl as curve.png; needs the extra `plot`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    tokens = [record["tokens"] / 1e6 for record in records]
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    above.plot(tokens, [record["answer_loss"] for record in records], linewidth=0.8)
    above.set(ylabel="answer loss", yscale="log")
    below.plot(tokens, [record["answer_accuracy"] for record in records], linewidth=0.8)
    below.set(ylabel="answer tokens right", xlabel="million tokens")
    for a, b in pairwise(records):
        if a["length"] != b["length"]:
            above.annotate(
                f"{b['length']:.0f} ",
                (b["tokens"] / 1e6, records[0]["answer_loss"]),
                rotation=90,
                va="top",
                fontsize=8,
            )
            for axis in (above, below):
                axis.axvline(b["tokens"] / 1e6, color="grey", linewidth=0.5)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", dpi=100)
    pyplot.close(figure)
    return folder / "curve.png"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_reader", description="Train the built-in reader from nothing."
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; an existing run is continued"
    )
    parser.add_argument(
        "--size", choices=sorted(SIZES), default="small", help="small: CPU, large: GPU"
    )
    parser.add_argument(
        "--plan", help="small, large, more, or a JSON file with a list of stages; default: as size"
    )
    parser.add_argument(
        "--start", type=Path, help="go on from these weights instead of the untrained circuit"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers: a minute a stage, then 1.6x faster",
    )
    parser.add_argument("--until", type=int, help="stop after this step")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first weights, and of the pages drawn"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """The command line of scripts/train_reader."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        stages = load_plan(options.plan or options.size)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(options.threads)
    run = TrainingRun(
        folder=options.out,
        size=SIZES[options.size],
        stages=stages,
        start=options.start,
        device=options.device,
        compile=options.compile,
        seed=options.seed,
    )
    progress = train(run, options.until)
    picture = draw_curve(options.out)
    print(
        json.dumps(
            {**asdict(progress), "weights": str(options.out / "weights"), "curve": str(picture)}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
