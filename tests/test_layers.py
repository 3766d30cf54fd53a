"""Imports point downward: each room imports only its own floor and the floors below it."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent / "src" / "lazyahead"
FLOORS = [
    ["errors", "checks", "folders", "sampling", "text", "report"],
    ["draft", "results", "prefill.schedule", "prefill.score", "prefill.select", "stream"],
    ["cache.safetensors_header", "cache.blocks"],
    ["prefill.config", "config", "strategies", "prefill.progress", "cache.kv", "cache.stash"],
    ["inputs"],
    ["hf"],
    ["cache", "prefill"],
    ["engine"],
    ["answer", "build", "reader", "parallel"],
    ["llm"],
    ["documents"],
    ["integrations", "server"],
    ["bench", "tune"],
    ["cli", "__init__", "__main__"],
]


def floor_of(module: str) -> int:
    """The floor of the longest entry that names this module or a package above it."""
    found = [
        (len(room), floor)
        for floor, rooms in enumerate(FLOORS)
        for room in rooms
        if module == room or module.startswith(f"{room}.")
    ]
    assert found, f"{module} has no floor"
    return max(found)[1]


def test_imports_point_downward() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ImportFrom) or not node.module:
                continue
            target = node.module.removeprefix("lazyahead.")
            if target == node.module or module == "__init__":
                continue
            if floor_of(target) > floor_of(module):
                wrong.append(f"{module} imports {target}")
    assert not wrong
