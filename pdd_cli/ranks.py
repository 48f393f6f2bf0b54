"""The processes that `torchrun` started: they train together, or divide the files of `pdd upscale` among them."""

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

# The first process judges images and fetches weights while the others wait for it. One that ended is noticed at once,
# by its closed connection.
_PATIENCE = timedelta(hours=6)
_USAGE_ERROR = 2  # Typer's exit code
_POLL_SECONDS = 0.1
_CHUNK = 1 << 20  # a value of the store holds 8 MiB at most


@dataclass(frozen=True)
class Ranks:
    """The rank of this process and their number. With one process (the default) every method returns at once.

    All processes must call the collective methods in the same order; these raise PddError where another process has
    ended. Training calls `join` first and communicates through a process group. Without `join`, `barrier` and `gather`
    use the store that torchrun keeps: waiting takes no processor time, has no time limit and can be interrupted.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
        """As the variables of `torchrun`, or of a scheduler that sets the same ones, say."""
        if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= environment.keys():
            return Ranks()
        return Ranks(int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """What `--device wanted` means for this process: each takes the GPU of its number."""
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
        """What a comma list of devices means for this process: alone all of them, else that of its number."""
        names = [name.strip() for name in wanted.split(",")]
        if self.size == 1:
            return names
        return [names[self.local_rank % len(names)] if len(names) > 1 else self.device(names[0])]

    def per_rank(self, batch_size: int) -> int:
        """The number n of the batch's elements that each process takes: this one those from rank · n on."""
        if batch_size % self.size:
            raise InputError(
                f"batch_size {batch_size} is that of all processes together, and {self.size} can't share it equally",
                f"Give a multiple of {self.size}: --batch-size {-(-batch_size // self.size) * self.size}.",
            )
        return batch_size // self.size

    def join(self, device: torch.device) -> None:
        """Wait for all processes and connect to them; `device` is the one that this process computes on."""
        if self.size == 1:
            return
        import torch
        from torch import distributed

        with _talking():
            if device.type == "cuda":
                torch.cuda.set_device(device)
                distributed.init_process_group("cpu:gloo,cuda:nccl", timeout=_PATIENCE, device_id=device)
            else:
                distributed.init_process_group("gloo", timeout=_PATIENCE)

    def leave(self) -> None:
        """Disconnect, when nothing is left to be done together; no process closes a connection that another needs."""
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
        with _talking():
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

        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])  # one message, not hundreds
        with _talking():
            distributed.all_reduce(flat)
        parts = (flat / self.size).split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [part.view_as(tensor) for tensor, part in zip(tensors, parts, strict=True)])

    def norm(self, norms: Tensor) -> Tensor:
        """The norms over the whole batch, from those, (K), over this process's share of it.

        A mean over the batch may be computed of each share, and gradients be averaged (`average_`); a norm may not: its
        gradient is the sum of the shares'. Hence the factor.
        """
        if self.size == 1:
            return norms
        import torch
        from torch import distributed

        shares = [torch.empty_like(norms) for _ in range(self.size)]
        with _talking():
            distributed.all_gather(shares, norms.detach())
        shares[self.rank] = _with_gradient_times(norms, self.size)
        whole: Tensor = torch.linalg.vector_norm(torch.stack(shares), dim=0)
        return whole

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; waits for all."""
        if self.size == 1:
            return flag
        import torch
        from torch import distributed

        flags = torch.tensor([flag], dtype=torch.int32)
        with _talking():
            distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return bool(flags)

    def file(self, path: Path) -> Path | io.BytesIO:
        """The first process's file, for all: the path itself, or its content."""
        if self.size == 1:
            return path
        import torch
        from torch import distributed

        content = bytearray(path.read_bytes()) if self.is_first else bytearray()
        length = torch.tensor([len(content)])
        with _talking():
            distributed.broadcast(length, 0)
            content = content or bytearray(int(length))
            distributed.broadcast(torch.frombuffer(content, dtype=torch.uint8), 0)
        return io.BytesIO(content)

    def require_same(self, facts: Mapping[str, object]) -> None:
        """Raise InputError, naming the first of `facts` that isn't the first process's."""
        from torch import distributed

        gathered: list[Mapping[str, object]] = [{}] * self.size
        with _talking():
            distributed.all_gather_object(gathered, dict(facts))
        for rank, theirs in enumerate(gathered):
            for name, value in gathered[0].items():
                if theirs[name] != value:
                    raise InputError(
                        f"{name}: not the same in process {rank} as in the first",
                        "Give all machines the same command, images and weights.",
                    )

    def first_per_machine(self, work: Callable[[], T]) -> T:
        """`work()` in one process of each machine, then in the others, which find its downloads done."""
        if self.local_rank != 0:
            self.barrier()
            return work()
        result = work()
        self.barrier()
        return result

    @contextlib.contextmanager
    def one_voice(self) -> Iterator[None]:
        """Only the first process's output is seen."""
        if self.is_first:
            yield
            return
        with (
            Path(os.devnull).open("w") as nowhere,
            contextlib.redirect_stdout(nowhere),
            contextlib.redirect_stderr(nowhere),
        ):
            try:
                yield
            except SystemExit as left:
                if left.code == _USAGE_ERROR:  # the first has it, too, and must say it before torchrun ends all
                    with contextlib.suppress(KeyboardInterrupt):
                        time.sleep(60)
                raise

    def report_once(self, report: Callable[[], None]) -> None:
        """`report()` in the process that fails first; the others, whose errors follow from it, wait for it."""
        if self.size == 1:
            report()
            return
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        attempt = f"pdd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        try:  # torchrun's store, not the process group, which may be what failed
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
            failed_before = store.add(f"{attempt}/failed", 1) > 1
        except Exception:
            report()  # better twice than never
            return
        if not failed_before:
            report()
        with contextlib.suppress(Exception):
            if failed_before:
                store.wait([f"{attempt}/reported"])
            else:
                store.set(f"{attempt}/reported", "")


ALONE = Ranks()


class _Store:
    """torchrun's key-value store: texts are exchanged without a process group."""

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
        """The first process, which may host the store, leaves last."""
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
            raise PddError("the other processes of this run have ended", "Their last messages say why.") from error
        return data.decode("utf-8", "surrogateescape")


def _with_gradient_times(value: Tensor, factor: int) -> Tensor:
    """`value`, whose gradient is multiplied on the way back."""
    if not value.requires_grad:
        return value
    result = value.clone()
    result.register_hook(lambda gradient: gradient * factor)
    return result


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise PddError(
            "another process of this run has ended, or can't be reached",
            "Its message, torchrun's, or `pdd --debug adapt` says why; --resume continues from the last checkpoint.",
        ) from error
