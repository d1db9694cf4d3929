"""The two-level all-reduce: within nodes first, so that data crosses each network link once.

With n ranks on a node, each is left with a share of S/n of S bytes after a reduce-scatter inside the node. Only these
shares are all-reduced between the m nodes, and an all-gather inside the node makes them whole again: a node sends
2 S (m-1)/m. In a flat ring of N ranks it sends 2 S (N-1)/N for each edge of the ring that leaves it.

One phase after the other, the link would idle while the nodes work inside, and what was gained would be lost. So a
bucket is cut into chunks, and the phases of different chunks run at the same time.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future

from timetrial_sharp.nodes import Nodes

STOP_SECONDS = 1.0
"""How long the end of the process waits for a thread that a dead peer may hold in a collective."""


@dataclass
class Traffic:
    """What this rank has exchanged so far."""

    buckets: int = 0
    chunks: int = 0
    gradient_bytes: int = 0
    """Of the gradients themselves."""
    across_bytes: int = 0
    """Of the shares that this rank all-reduced with its counterparts on other nodes."""


class Phases:
    """The three collectives for one chunk. Each has its own process groups, so that they can run side by side:
    collectives of one group are matched by their order, which must be the same on every rank."""

    def __init__(self, sets: Sequence[Nodes], rank: int, device: torch.device, timeout: timedelta) -> None:
        self.nodes = next(nodes for nodes in sets if any(rank in node for node in nodes.ranks))
        self.device = device
        within = [node for nodes in sets for node in nodes.ranks]
        self._reduce = _join(within, rank, timeout)
        self._across = _join([place for nodes in sets for place in nodes.across], rank, timeout)
        self._gather = _join(within, rank, timeout)

    def reduce_within(self, chunk: Tensor) -> Tensor:
        """This rank's share of the node's sum, divided by the number of ranks, from the whole chunk (one dimension).

        gloo's own reduce-scatter sends as much as an all-reduce (measured with torch 2.11): ranks send each other the
        pieces instead, and add up what they get.
        """
        n = self.nodes.ranks_per_node
        whole = nn.functional.pad(chunk, (0, -chunk.numel() % n)) if chunk.numel() % n else chunk
        if self.device.type == "cpu":
            pieces = torch.empty_like(whole)
            dist.all_to_all_single(pieces, whole, group=self._reduce)
            share = pieces.view(n, -1).sum(0)
        else:
            share = whole.new_empty(whole.numel() // n)
            dist.reduce_scatter_tensor(share, whole, group=self._reduce)
        return share.div_(self.nodes.world_size)

    def reduce_across(self, share: Tensor) -> dist.Work:
        """Begins to sum the shares of all nodes in place."""
        work = dist.all_reduce(share, group=self._across, async_op=True)
        assert work is not None  # this rank is in the group
        return work

    def gather_within(self, chunk: Tensor, share: Tensor) -> None:
        """All shares of the node, back into the chunk."""
        n = self.nodes.ranks_per_node
        whole = share.new_empty(share.numel() * n) if chunk.numel() % n else chunk
        dist.all_gather_into_tensor(whole, share, group=self._gather)
        if whole is not chunk:
            chunk.copy_(whole[: chunk.numel()])


def _join(groups: Iterable[Sequence[int]], rank: int, timeout: timedelta) -> dist.ProcessGroup:
    """This rank's group of them; every rank takes part in making each."""
    made = {ranks: dist.new_group(list(ranks), timeout=timeout) for ranks in map(tuple, groups)}
    return next(group for ranks, group in made.items() if rank in ranks)


class TwoLevel:
    """Averages tensors over ranks; `exchange` is a communication hook for DistributedDataParallel.

    Each of `sets` holds ranks that average with one another: one set, or several where the model is split over ranks.
    Every rank makes this object at the same time and with the same sets. Where a collective fails, the future carries
    the error (RuntimeError) to whoever waits for it.
    """

    def __init__(
        self, sets: Sequence[Nodes], rank: int, device: torch.device, chunk_bytes: int, timeout: timedelta
    ) -> None:
        self.traffic = Traffic()
        self._chunk_bytes = chunk_bytes
        phases = Phases(sets, rank, device, timeout)
        self.nodes = phases.nodes
        self._pipeline = _ThreadPipeline(phases) if device.type == "cpu" else _StreamPipeline(phases)

    def exchange(self, state, bucket):  # torch refuses annotations that are strings
        return self.average(bucket.buffer())

    def average(self, buffer: Tensor) -> Future[Tensor]:
        """Begins to replace `buffer` (one dimension) by its mean over this rank's set; the future holds it."""
        n = self.nodes.ranks_per_node
        chunks = buffer.split(max(self._chunk_bytes // buffer.element_size() // n, 1) * n)
        self.traffic.buckets += 1
        self.traffic.chunks += len(chunks)
        self.traffic.gradient_bytes += buffer.nbytes
        self.traffic.across_bytes += -(-buffer.numel() // n) * buffer.element_size()
        return self._pipeline.average(buffer, chunks)


@dataclass
class _Chunk:
    data: Tensor
    done: Callable[[], None]
    failed: Callable[[Exception], None]
    share: Tensor = field(init=False)
    across: dist.Work = field(init=False)


class _Stage:
    """A thread that works on chunk after chunk, in the order in which they came, and hands each on."""

    def __init__(self, work: Callable[[_Chunk], None], hand_on: Callable[[_Chunk], None]) -> None:
        self._queue: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._work, self._hand_on = work, hand_on
        self._thread = threading.Thread(target=self._run, daemon=True)  # daemon: a dead peer must not hold the process
        self._thread.start()
        atexit.register(self._stop)

    def put(self, chunk: _Chunk) -> None:
        self._queue.put(chunk)

    def _run(self) -> None:
        while (chunk := self._queue.get()) is not None:
            try:
                self._work(chunk)
            except Exception as error:  # of torch's: a peer is gone, or too late
                chunk.failed(error)
            else:
                self._hand_on(chunk)

    def _stop(self) -> None:
        self._queue.put(None)
        self._thread.join(STOP_SECONDS)


class _ThreadPipeline:
    """For collectives that block a thread until they are done: one thread reduces within the node and begins what goes
    across, which gloo's threads carry on; another waits for that and gathers."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        gather = _Stage(self._gather, lambda chunk: chunk.done())
        self._first = _Stage(self._reduce, gather.put)

    def average(self, buffer: Tensor, chunks: Sequence[Tensor]) -> Future[Tensor]:
        future: Future[Tensor] = Future()

        def fail(error: Exception) -> None:
            if not future.done():
                future.set_exception(error)

        def finish() -> None:
            if not future.done():  # a chunk before the last may have failed
                future.set_result(buffer)

        for chunk in chunks[:-1]:
            self._first.put(_Chunk(chunk, lambda: None, fail))
        self._first.put(_Chunk(chunks[-1], finish, fail))
        return future.then(
            lambda done: done.value()
        )  # an exception set in Python is an error to C++ only behind `then`

    def _reduce(self, chunk: _Chunk) -> None:
        chunk.share = self._phases.reduce_within(chunk.data)
        chunk.across = self._phases.reduce_across(chunk.share)

    def _gather(self, chunk: _Chunk) -> None:
        chunk.across.wait()
        self._phases.gather_within(chunk.data, chunk.share)


class _StreamPipeline:
    """For collectives that are queued on the device: one stream for each phase, and the host waits for none."""

    def __init__(self, phases: Phases) -> None:
        self._phases = phases
        self._streams = [torch.Stream(phases.device) for _ in range(3)]

    def average(self, buffer: Tensor, chunks: Sequence[Tensor]) -> Future[Tensor]:
        phases, (reduce, across, gather) = self._phases, self._streams
        reduce.wait_stream(torch.accelerator.current_stream(phases.device))
        for chunk in chunks:
            with reduce:
                share = phases.reduce_within(chunk)
            across.wait_stream(reduce)
            with across:
                phases.reduce_across(share).wait()  # the stream waits, not the host
            gather.wait_stream(across)
            with gather:
                phases.gather_within(chunk, share)
            share.record_stream(across)  # the memory belongs to the first stream, which must not reuse it too early
            share.record_stream(gather)
        future: Future[Tensor] = Future(devices=[phases.device])
        with gather:  # what waits for the future waits for this stream
            future.set_result(buffer)
        return future
