"""Where the processes of one run wait for each other, for hours where need be, and exchange texts."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from pdd_cli.distributed import World
from pdd_cli.errors import InputError, PddError

_POLL_SECONDS = 0.1
# A value of the store holds 8 MiB at most.
_CHUNK = 1 << 20


class Meeting:
    """The store that torchrun keeps, without a process group: nothing is exchanged while images are computed.

    Waiting takes no processor time, has no end, and can be interrupted; when a process dies, torchrun ends the others.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._store: Any = None
        if world.size == 1:
            return
        from torch.distributed.rendezvous import rendezvous

        try:
            self._store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"process {world.rank} of {world.size} can't meet the others: {error}",
                "Start it through torchrun, or unset RANK and WORLD_SIZE.",
            ) from error

    def gather(self, topic: str, text: str = "") -> list[str]:
        """The `text` of every process, in their order, once all have come here; `topic` must be new each time."""
        if self._store is None:
            return [text]
        self._put(f"{topic}/{self.world.rank}", text)
        return [self._get(f"{topic}/{index}") for index in range(self.world.size)]

    def end(self) -> None:
        """Part: the first process, which may keep the store, goes last."""
        if self._store is None:
            return
        if not self.world.is_first:
            self._put(f"end/{self.world.rank}", "")
            return
        for index in range(1, self.world.size):
            self._get(f"end/{index}")

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
            raise PddError("the other processes of this run are gone", "What they said last tells why.") from error
        return data.decode("utf-8", "surrogateescape")
