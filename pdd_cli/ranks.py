"""The processes that `torchrun` started. They train together, or split the files of `pdd upscale`."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pdd_cli.errors import InputError, PddError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

# Long, because the other processes wait while the first one scores images and downloads weights. A process that has
# ended is noticed at once, by its closed connection.
_TIMEOUT = timedelta(hours=6)
_USAGE_ERROR = 2  # Typer's exit code
_POLL_SECONDS = 0.1
_CHUNK = 1 << 20  # bytes; a value in the store holds at most 8 MiB


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and the number of processes. With one process (the default) no method waits.

    All processes must call the collective methods in the same order; they raise PddError if another process has ended.
    Training calls `join` first and communicates through a process group. Without `join`, `barrier` and `gather` use
    torchrun's key-value store: waiting takes no processor time, has no time limit and can be interrupted.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
        """From the environment variables that `torchrun`, or a scheduler, sets."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return Ranks()
        return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this process for `--device wanted`: the GPU of its local rank."""
        if self.size == 1 or wanted == "cpu":
            return wanted
        import torch

        if wanted not in ("auto", "cuda"):
            raise InputError(
                f"--device {wanted}: {self.size} processes can't share one device", "Leave it out, or use --device cpu."
            )
        if wanted == "auto" and not torch.cuda.is_available():
            return "cpu"
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"more processes than the {torch.cuda.device_count()} GPUs of this machine",
                f"Start torchrun with --nproc-per-node {torch.cuda.device_count()}.",
            )
        return f"cuda:{self.local_rank}"

    def devices(self, wanted: str) -> list[str]:
        """The devices of this process for a comma-separated list: all for a single process, else that of its rank."""
        names = [name.strip() for name in wanted.split(",")]
        if self.size == 1:
            return names
        return [names[self.local_rank % len(names)] if len(names) > 1 else self.device(names[0])]

    def per_rank(self, batch_size: int) -> int:
        """The number n of batch elements of each process. A process takes the elements from rank · n on."""
        if batch_size % self.size:
            raise InputError(
                f"batch_size {batch_size} is the total of all processes and can't be divided by {self.size}",
                f"Give a multiple of {self.size}: --batch-size {-(-batch_size // self.size) * self.size}.",
            )
        return batch_size // self.size

    def join(self, device: torch.device) -> None:
        """Wait for all processes and form a process group. `device`: the device of this process."""
        if self.size == 1:
            return
        import torch

        # Functions of this module keep a reference to the process group that exists when it is first imported. Then
        # `leave` would not end the group's threads, and one that still frees a tensor aborts the ending process.
        import torch.distributed.nn
        from torch import distributed

        with _communication_errors():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_TIMEOUT, device_id=device)
            else:
                distributed.init_process_group("gloo", timeout=_TIMEOUT)

    def leave(self) -> None:
        """Disconnect after a barrier, so that no process closes a connection that another one still needs."""
        if self.size == 1:
            return
        from torch import distributed

        self.barrier()
        if distributed.is_initialized():
            distributed.destroy_process_group()
        else:
            self._store.leave(self)

    def gather(self, text: str) -> list[str]:
        """The `text` of every process, by rank."""
        if self.size == 1:
            return [text]
        from torch import distributed

        if not distributed.is_initialized():
            return self._store.gather(self, text)
        texts = [""] * self.size
        with _communication_errors():
            distributed.all_gather_object(texts, text)
        return texts

    def barrier(self) -> None:
        """Wait for all processes."""
        self.gather("")

    @functools.cached_property
    def _store(self) -> _Store:
        return _Store(self)

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Replace the tensors by their means over the processes; all have one dtype and device."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message instead of hundreds
        with _communication_errors():
            distributed.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)])

    def norm(self, norms: Tensor) -> Tensor:
        """The K norms over the whole batch, from the norms (K) over this process's part of it.

        The gradient of a norm over the whole batch is the sum of the processes' gradients. `average_` takes their mean,
        so the gradient is multiplied by the number of processes here.
        """
        if self.size == 1:
            return norms
        import torch
        from torch import distributed

        parts = [torch.empty_like(norms) for _ in range(self.size)]
        with _communication_errors():
            distributed.all_gather(parts, norms.detach())
        parts[self.rank] = _scale_gradient(norms, self.size)
        total: Tensor = torch.linalg.vector_norm(torch.stack(parts), dim=0)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; waits for all."""
        if self.size == 1:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor([flag], dtype=torch.int32)
        with _communication_errors():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def broadcast_file(self, path: Path) -> Path | io.BytesIO:
        """The first process's file in every process: the path for a single process, else the content."""
        if self.size == 1:
            return path
        import torch
        from torch import distributed

        content = bytearray(path.read_bytes()) if self.is_first else bytearray()
        length = torch.tensor([len(content)])
        with _communication_errors():
            distributed.broadcast(length, 0)
            content = content or bytearray(int(length))
            distributed.broadcast(torch.frombuffer(content, dtype=torch.uint8), 0)
        return io.BytesIO(content)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raise InputError naming the first of `facts` that differs from the first process's."""
        from torch import distributed

        gathered: list[Mapping[str, object]] = [{}] * self.size
        with _communication_errors():
            distributed.all_gather_object(gathered, dict(facts))
        for rank, theirs in enumerate(gathered):
            for name, value in gathered[0].items():
                if theirs[name] != value:
                    raise InputError(
                        f"{name}: not the same in process {rank} as in the first",
                        "Give all machines the same command, images and weights.",
                    )

    def first_per_machine(self, work: Callable[[], T]) -> T:
        """Run `work()` in one process of each machine, then in the others, which reuse its downloads."""
        if self.local_rank != 0:
            self.barrier()
            return work()
        result = work()
        self.barrier()
        return result

    @contextlib.contextmanager
    def silence_unless_first(self) -> Iterator[None]:
        """Discard the output of all processes but the first."""
        if self.is_first:
            yield
            return
        with (
            Path(os.devnull).open("w") as null,
            contextlib.redirect_stdout(null),
            contextlib.redirect_stderr(null),
        ):
            try:
                yield
            except SystemExit as exit:
                if exit.code == _USAGE_ERROR:  # the first process has it, too, and prints it before torchrun ends all
                    with contextlib.suppress(KeyboardInterrupt):
                        time.sleep(60)
                raise

    def report_once(self, report: Callable[[], None]) -> None:
        """Call `report()` in the process that fails first; the others, whose errors are consequences, wait for it."""
        if self.size == 1:
            report()
            return
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        attempt = f"pdd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        try:  # through torchrun's store: the process group may be what failed
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
            failed_before = store.add(f"{attempt}/failed", 1) > 1
        except Exception:
            report()  # twice rather than never
            return
        if not failed_before:
            report()
        with contextlib.suppress(Exception):
            if failed_before:
                store.wait([f"{attempt}/reported"])
            else:
                store.set(f"{attempt}/reported", "")


SINGLE_PROCESS = Ranks()


class _Store:
    """Exchanges texts through torchrun's key-value store, without a process group."""

    def __init__(self, ranks: Ranks) -> None:
        from torch.distributed.rendezvous import rendezvous

        self._exchanges = 0
        try:
            self._store: Any = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))[0]
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"process {ranks.rank} of {ranks.size} can't reach the others: {error}",
                "Start it through torchrun, or unset RANK and WORLD_SIZE.",
            ) from error

    def gather(self, ranks: Ranks, text: str) -> list[str]:
        self._exchanges += 1
        self._put(f"{self._exchanges}/{ranks.rank}", text)
        return [self._get(f"{self._exchanges}/{rank}") for rank in range(ranks.size)]

    def leave(self, ranks: Ranks) -> None:
        """Disconnect; the first process, which may host the store, last."""
        if not ranks.is_first:
            self._put(f"end/{ranks.rank}", "")
            return
        for rank in range(1, ranks.size):
            self._get(f"end/{rank}")

    def _put(self, key: str, text: str) -> None:
        data = text.encode("utf-8", "surrogateescape")
        parts = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
        for number, part in enumerate(parts):
            self._store.set(f"pdd/{key}/{number}", part)
        self._store.set(f"pdd/{key}", str(len(parts)))

    def _get(self, key: str) -> str:
        try:
            while not self._store.check([f"pdd/{key}"]):
                time.sleep(_POLL_SECONDS)
            count = int(self._store.get(f"pdd/{key}"))
            data = b"".join(self._store.get(f"pdd/{key}/{number}") for number in range(count))
        except RuntimeError as error:
            raise PddError(
                "the other processes of this run have ended", "Their last messages give the reason."
            ) from error
        return data.decode("utf-8", "surrogateescape")


def _scale_gradient(value: Tensor, factor: int) -> Tensor:
    """`value` with its gradient multiplied by `factor` in the backward pass."""
    if not value.requires_grad:
        return value
    result = value.clone()
    result.register_hook(lambda gradient: gradient * factor)
    return result


@contextlib.contextmanager
def _communication_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PddError(
            "another process of this run has ended, or can't be reached",
            "Its message, torchrun's report or `pdd --debug adapt` gives the reason; --resume continues the run.",
        ) from error
