"""The processes of a tensor-parallel group: started here, or by torchrun, and a channel by which
rank 0 tells the others what to do."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from lazyahead.errors import ConfigError, RankError
from lazyahead.hf.ranks import accelerator
from lazyahead.parallel.messages import End, Message, Unload

PASS_TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others within a pass, or while a model is loaded."""
_IDLE_TIMEOUT = timedelta(days=365)
"""How long ranks wait for the leader to have something to do; one that dies is noticed at once."""
_END_TIMEOUT_S = 10.0
_PORT = "LAZYAHEAD_TP_PORT"


class Group:
    """Processes that run one model together; this one is rank `rank` of `size`.

    There is one group in a process at a time. `Group.start` begins it, `close` ends it, as does
    the end of the program. Raises RankError where a process has ended.
    """

    _open: Group | None = None

    def __init__(
        self, size: int, rank: int, processes: tuple[subprocess.Popen[bytes], ...] = ()
    ) -> None:
        self.size = size
        self.rank = rank
        self.is_used = False
        """Whether a model is loaded on it."""
        self._processes = processes
        self._channel: Any = None
        self._threads = torch.get_num_threads()

    @classmethod
    def start(cls, size: int) -> Group:
        """The group of this process: that of torchrun where it runs under it, else with `size` - 1
        processes started now. Raises ConfigError for a size that cannot be had."""
        if cls._open is not None:
            raise ConfigError(
                f"a group of tp={cls._open.size} is open in this process; close its LLM first"
            )
        _check_size(size)
        group = cls._join_launched(size) if _is_launched() else cls._lead(size)
        cls._open = group
        atexit.register(group.close)
        return group

    @classmethod
    def follow(cls) -> Group:
        """The group that the parent process started. For `parallel/follow.py`."""
        size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
        group = cls(size, rank)
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", int(os.environ[_PORT]), size, is_master=False
        )
        group._connect(store)
        return group

    @property
    def is_leader(self) -> bool:
        return self.rank == 0

    @property
    def is_open(self) -> bool:
        return self._channel is not None

    def tell(self, message: Message) -> None:
        """From the leader to all others."""
        if not self.is_open:
            raise RankError(f"the group of tp={self.size} has ended; load the model again")
        try:
            dist.broadcast_object_list([message], src=0, group=self._channel)
        except RuntimeError as error:
            raise self.failed(error) from error

    def hear(self) -> Message:
        """What the leader says next."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._channel)
        return cast(Message, heard[0])

    def check(self) -> None:
        """Raises RankError, and ends the group, where a process that was started here has
        ended."""
        if any(process.poll() is not None for process in self._processes):
            raise self.failed(RuntimeError("a process has ended"))

    def failed(self, error: BaseException) -> RankError:
        """Ends the group, and says why."""
        for process in self._processes:  # a process that has just died is not yet known to have
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
                break
        codes = [process.poll() for process in self._processes]
        ended = [
            f"rank {rank} ended with status {code}"
            for rank, code in enumerate(codes, 1)
            if code is not None
        ]
        lines = str(error).strip().splitlines()
        said = "; ".join(ended) or f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
        self._stop(kill=True)
        return RankError(f"the group of tp={self.size} has ended ({said}); load the model again")

    def close(self) -> None:
        """Ends the other processes. Twice is once."""
        if self.is_open and self.is_leader:
            with suppress(RankError):
                if self.is_used:
                    self.tell(Unload())
                self.tell(End())
        self._stop(kill=False)

    # --- starting and ending ------------------------------------------------------------------

    @classmethod
    def _lead(cls, size: int) -> Group:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", 0, size, is_master=True, wait_for_workers=False
        )
        processes = tuple(_spawn(rank, size, store.port) for rank in range(1, size))
        group = cls(size, 0, processes)
        try:
            group._connect(store)
        except BaseException as error:
            raise group.failed(error) from error
        return group

    @classmethod
    def _join_launched(cls, size: int) -> Group:
        world = int(os.environ["WORLD_SIZE"])
        if world != size:
            raise ConfigError(
                f"tp={size} under torchrun needs {size} processes, got {world}; start it with "
                f"--nproc-per-node {size}"
            )
        group = cls(size, int(os.environ["RANK"]))
        group._connect(None)
        return group

    def _connect(self, store: Any) -> None:
        device = accelerator()
        options: dict[str, Any] = {}
        if device == "cuda":
            local = int(os.environ.get("LOCAL_RANK", self.rank))
            torch.cuda.set_device(local)
            options["device_id"] = torch.device("cuda", local)
        else:
            torch.set_num_threads(max(1, self._threads // self.size))
        if store is not None:
            options |= {"store": store, "rank": self.rank, "world_size": self.size}
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PASS_TIMEOUT, **options)
        self._channel = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)

    def _stop(self, *, kill: bool) -> None:
        if not self.is_open and not self._processes:
            return
        self._channel = None
        for process in self._processes:
            if not kill:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_END_TIMEOUT_S)
            process.kill()
            process.wait()
        self._processes = ()
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(self._threads)
        atexit.unregister(self.close)
        if Group._open is self:
            Group._open = None


def _check_size(size: int) -> None:
    if not dist.is_available():
        raise ConfigError(f"tp={size} needs a torch with torch.distributed")
    if dist.is_initialized() and not _is_launched():
        raise ConfigError(f"tp={size}: this process already has a torch.distributed group")
    num = torch.cuda.device_count() if accelerator() == "cuda" else size
    if size > num:
        raise ConfigError(f"tp={size} needs {size} GPUs, this machine has {num}")


def _is_launched() -> bool:
    """Whether torchrun, or one like it, started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _spawn(rank: int, size: int, port: int) -> subprocess.Popen[bytes]:
    """A process that follows, with the leader's package path."""
    package = str(Path(__file__).parents[2])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        _PORT: str(port),
        "PYTHONPATH": os.pathsep.join(paths),
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    command = [sys.executable, "-m", "lazyahead.parallel.follow"]
    return subprocess.Popen(
        command, env={**os.environ, **own}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
