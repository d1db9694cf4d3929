"""Batches that a thread prepares, and moves to the device, while the step before them runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from core.api.tree import map_tensors, tensors
from core.api.types import Batch, Purpose
from timetrial_stream_overlap.window import span

PREPARE = "stream_overlap.prepare"
"""The name under which a trace shows the preparation of one batch."""

WAIT = "stream_overlap.wait"
"""The name under which a trace shows that the steps waited for a batch."""

PlainFeed = Callable[[Iterable[Batch], Purpose], Iterator[Batch]]


@dataclass
class Counts:
    """What feeds of one kind handed out."""

    batches: int = 0
    ready: int = 0
    """Those among them that were ready when they were asked for."""

    @property
    def words(self) -> str:
        if self.batches == 0:
            return "no batch was asked for"
        return f"{self.ready} of {self.batches} batches were ready when asked for"


@dataclass(frozen=True)
class _End:
    """The last entry of a producer's queue."""

    error: BaseException | None = None


class Feed:
    """Replaces `plain`: yields the same batches in the same order, up to `depth` of them ahead of the consumer.

    One thread consumes the iterable. It ends with the iterable, or as soon as the iterator is closed or dropped; what
    the iterable raises is raised in its place. On an accelerator the batches are page-locked and then moved on a
    separate stream; the consumer's stream waits for that, the consumer's thread does not.
    """

    def __init__(self, plain: PlainFeed, device: torch.device, depth: int) -> None:
        self._plain, self._device, self._depth = plain, device, depth
        self._stream = None if device.type == "cpu" else torch.Stream(device)

    def __call__(self, batches: Iterable[Batch], purpose: Purpose, counts: Counts) -> Generator[Batch, None, None]:
        if isinstance(threading.current_thread(), _Producer):  # an iterable that is fed by another one
            yield from self._plain(batches, purpose)
            return
        if self._stream is not None:  # what the consumer has queued so far may be what the batches are made of
            self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        producer = _Producer(self._moved(batches, purpose), self._stream, self._depth)
        producer.start()
        try:
            while True:
                ready = not producer.queue.empty()
                with nullcontext() if ready else span(WAIT):
                    entry = producer.take()
                if isinstance(entry, _End):
                    if entry.error is not None:
                        raise entry.error
                    return
                counts.batches += 1
                counts.ready += ready
                yield self._received(*entry)
        finally:
            producer.stop()

    def _moved(
        self, batches: Iterable[Batch], purpose: Purpose
    ) -> Generator[tuple[Batch, torch.Event | None], None, None]:
        """Runs in the thread: each batch on the device, with the event after which it may be read."""
        try:
            if self._stream is None:
                for batch in self._plain(batches, purpose):
                    yield batch, None
            else:
                for batch in self._plain(map(_page_locked, batches), purpose):
                    yield batch, self._stream.record_event()
        finally:  # a generator ends in the thread that ran it
            getattr(batches, "close", lambda: None)()

    def _received(self, batch: Batch, moved: torch.Event | None) -> Batch:
        """Runs in the consumer's thread."""
        if moved is not None:
            stream = torch.accelerator.current_stream(self._device)
            stream.wait_event(moved)
            for tensor in tensors(batch):
                # Its memory belongs to the other stream, which must not use it again before this one has read it.
                tensor.record_stream(stream)
        return batch


class _Producer(threading.Thread):
    """Fills `queue` with what `entries` yields, at most `depth` ahead of `take`, then with an `_End`."""

    def __init__(self, entries: Generator[Any, None, None], stream: torch.Stream | None, depth: int) -> None:
        super().__init__(name="stream_overlap", daemon=True)  # a process that fails elsewhere must be able to end
        self.queue = SimpleQueue[Any]()
        self._entries, self._stream = entries, stream
        self._gradients = torch.is_grad_enabled()  # a property of the thread, as the stream is
        self._slots, self._stopped = threading.Semaphore(depth), False

    def take(self) -> Any:
        entry = self.queue.get()
        self._slots.release()
        return entry

    def stop(self) -> None:
        """Returns once the thread has ended; it finishes the item that it is working on."""
        self._stopped = True
        self._slots.release()
        self.join()

    def run(self) -> None:
        try:
            with torch.set_grad_enabled(self._gradients), self._stream or nullcontext():
                self._produce()
                self._entries.close()
        except BaseException as error:  # to be raised where the items are consumed
            self.queue.put(_End(error))
        else:
            self.queue.put(_End())

    def _produce(self) -> None:
        while True:
            self._slots.acquire()
            if self._stopped:
                return
            with span(PREPARE):
                entry = next(self._entries, None)
            if entry is None:
                return
            self.queue.put(entry)


def _page_locked(batch: Batch) -> Batch:
    """Its host tensors in page-locked memory, which the device reads without the host's help."""
    return map_tensors(lambda t: t.pin_memory() if t.device.type == "cpu" else t, batch)
