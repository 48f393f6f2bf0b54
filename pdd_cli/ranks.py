"""Several processes of one run, as torchrun starts them: which of them this is, and what they tell each other."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from pdd_cli.errors import InputError, PddError

_POLL_SECONDS = 0.1
# A value of the store holds 8 MiB at most.
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Ranks:
    """This process is number `index` of `count`, and number `local` of those on its machine."""

    index: int = 0
    count: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the process that speaks for all."""
        return self.index == 0

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Ranks:
        """As RANK, WORLD_SIZE and LOCAL_RANK say; a process alone without them. Raises InputError for nonsense."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        texts = [environment.get(name, default) for name, default in zip(names, "010", strict=True)]
        try:
            index, count, local = (int(text) for text in texts)
        except ValueError:
            index, count, local = -1, 0, 0
        if not 0 <= index < count or local < 0:
            said = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True))
            raise InputError(f"{said} in the environment: not the numbers of a process", "Start it through torchrun.")
        return cls(index, count, local)


class Meeting:
    """Where the processes of one run wait for each other and exchange texts: the store that torchrun keeps.

    Waiting takes no processor time and can be interrupted; when a process dies, torchrun ends the others.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._store: Any = None
        if ranks.count == 1:
            return
        from torch.distributed.rendezvous import rendezvous

        try:
            self._store, _, _ = next(iter(rendezvous("env://", timeout=timedelta(minutes=5))))
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"process {ranks.index} of {ranks.count} can't meet the others: {error}",
                "Start it through torchrun, or unset RANK and WORLD_SIZE.",
            ) from error

    def gather(self, topic: str, text: str = "") -> list[str]:
        """The `text` of every process, in their order, once all have come here; `topic` must be new each time."""
        if self._store is None:
            return [text]
        self._put(f"{topic}/{self._ranks.index}", text)
        return [self._get(f"{topic}/{index}") for index in range(self._ranks.count)]

    def end(self) -> None:
        """Part: the first process, which may keep the store, goes last."""
        if self._store is None:
            return
        if not self._ranks.first:
            self._put(f"end/{self._ranks.index}", "")
            return
        for index in range(1, self._ranks.count):
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
