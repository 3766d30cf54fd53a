"""Checkpoints of a training run: safetensors and JSON, written whole or not at all."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass
class TrainingProgress:
    """How far a run has come. Batches follow from `step`, so no generator state is needed."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def save_checkpoint(
    folder: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: TrainingProgress,
) -> None:
    """Writes a new folder and then points `latest.json` at it; an interruption leaves the previous
    one valid."""
    name = f"step-{progress.step:06d}"
    target = folder / name
    target.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in model.named_parameters()}
    save_file(weights, target / "model.safetensors")
    save_file(_optimizer_tensors(model, optimizer), target / "optimizer.safetensors")
    pointer = folder / "latest.new"
    pointer.write_text(json.dumps({"checkpoint": name, "progress": asdict(progress)}))
    os.replace(pointer, folder / "latest.json")
    for old in folder.glob("step-*"):
        if old.name != name:
            shutil.rmtree(old)


def load_checkpoint(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> TrainingProgress:
    """Restores model and optimizer in place; returns step 0 where there is none."""
    pointer = folder / "latest.json"
    if not pointer.exists():
        return TrainingProgress()
    latest = json.loads(pointer.read_text())
    weights = load_file(folder / latest["checkpoint"] / "model.safetensors")
    states = load_file(folder / latest["checkpoint"] / "optimizer.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            keys = [key for key in states if key.startswith(f"{name}/")]
            optimizer.state[parameter] = {
                key.rpartition("/")[2]: _placed(states[key], parameter) for key in keys
            }
    return TrainingProgress(**latest["progress"])


def _optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _placed(value: Tensor, parameter: Tensor) -> Tensor:
    return value.to(parameter.device)
