"""Self-play on one core, per CPU second: against what the network alone would allow, and against open_spiel's Python
MCTS bot with the same network.

    uv run python tools/bench_selfplay.py
    uv run python tools/bench_selfplay.py --networks 16x2 --precisions fp32 --rounds 7
    uv run python tools/bench_selfplay.py --device cuda --networks 64x5 256x19 --size 19     # against the ceiling only

A position is one move of one game, chosen by a search of `--simulations`, each of which shows the network one new
position; nothing is kept from one search to the next. Our side does all that self-play does for a move: it draws noise,
searches, keeps the position and its policy target, chooses a move in proportion to the visits and plays it. The games
are many, and at their 1st to 60th move. The *ceiling* is the network's evaluations/s, divided by the simulations: what
self-play would reach if rules, trees and planes cost nothing. It is taken at the memory format that is best for the
network, and in each round at the batch size that is best; ours has one format and batch size, those that were best
before the race.

Each contender is a separate process with one torch thread, which works when it is its turn, and is timed in CPU
seconds of its process (on CUDA in seconds); ratios are taken within a round. Figures are medians (minimum to maximum).
The networks' weights are random. open_spiel's bot is shown the present position only, without history, which costs it
less than ours.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from core.api.errors import exit_status
from core.api.statistics import processes, race, ratios, row, spread, table

NETWORKS = ("16x2", "32x3", "64x5")
"""Width x residual blocks."""
PRECISIONS = {"cpu": ("fp32", "bf16"), "cuda": ("fp32", "bf16, cuda_graphs")}
CONTENDERS = ("ours", "ceiling", "open_spiel")
HISTORY = 8
"""Positions that the network sees, as in the v1.1 reference."""
BATCHES = {"cpu": (32, 64, 128, 256, 512), "cuda": (256, 512, 1024, 2048, 4096)}
LATEST_MOVE = 60
TURN_S, SHORT_TURN_S = 1.5, 0.4
"""CPU seconds of a turn of open_spiel, about, and of one batch size in a turn of the ceiling."""
TRIES = 2
UCT_C = 2.0
KEPT = 31 * 2**20
"""The C library's allocator hands back to the system whatever exceeds the largest block that was freed so far, up to 32
MiB, and has it cleared again. A contender whose blocks are all small would pay for that with each evaluation."""


# ------------------------------------------------------------------------------------- one contender, in its process


def make_network(arguments: argparse.Namespace) -> Any:
    """`planes -> (logits, value)`."""
    import torch

    from timetrial_minigo.network import PolicyValueNet, Sizes, batch_norm, initialise

    width, blocks = (int(n) for n in arguments.networks[0].split("x"))
    sizes = Sizes(
        board=arguments.size, history=HISTORY, width=width, blocks=blocks,
        policy_channels=2, value_channels=1, value_hidden=width,
    )  # fmt: skip
    device = torch.device(arguments.device)
    model = PolicyValueNet(sizes, batch_norm(False, device))
    initialise(model, torch.Generator().manual_seed(0))
    model = model.eval().to(device)
    low, form = "bf16" in arguments.precisions[0], torch.contiguous_format
    if arguments.channels_last:
        form = torch.channels_last
        model = model.to(memory_format=form)

    def evaluate(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast(device.type, torch.bfloat16, enabled=low):
            return model(planes.contiguous(memory_format=form))

    if "cuda_graphs" not in arguments.precisions[0]:
        return evaluate
    from timetrial_cuda_graphs.cuda import CudaCapture, leave_the_default_stream, refusing
    from timetrial_cuda_graphs.graphed import Graphed

    leave_the_default_stream(device)
    capture = refusing(CudaCapture(), "the network", "leave out cuda_graphs")
    return Graphed(evaluate, capture, eager_calls=3, max_graphs=2)


def clock(arguments: argparse.Namespace) -> float:
    if arguments.device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def evaluations(arguments: argparse.Namespace) -> Callable[[int], float]:
    """`rate(batch)`: positions/s that the evaluations of batches of this size would be enough for."""
    import torch

    evaluate, shape = make_network(arguments), (2 * HISTORY + 1, arguments.size, arguments.size)
    planes = {n: (torch.rand(n, *shape, device=arguments.device) < 0.3).float() for n in BATCHES[arguments.device]}

    def rate(batch: int) -> float:
        start, done = clock(arguments), 0
        while (spent := clock(arguments) - start) < SHORT_TURN_S:
            for _ in range(3):
                evaluate(planes[batch])
                done += batch
        return done / spent / arguments.simulations

    return rate


def ceiling(arguments: argparse.Namespace) -> Callable[[], dict[str, float]]:
    """Each turn tries all batch sizes, and counts the best one's."""
    rate = evaluations(arguments)
    return lambda: {"positions": max(rate(batch) for batch in BATCHES[arguments.device]), "seconds": 1}


def best_batch(arguments: argparse.Namespace) -> dict[str, Any]:
    """The network's best batch size and memory format."""
    forms = {form: evaluations(argparse.Namespace(**vars(arguments) | {"channels_last": form})) for form in (0, 1)}
    tries = [(form, batch) for form in forms for batch in BATCHES[arguments.device]]
    rates = dict.fromkeys(tries, 0.0)
    for _ in range(1 + TRIES):  # the first, in which caches fill, is seldom the best
        for form, batch in tries:
            rates[form, batch] = max(rates[form, batch], forms[form](batch))
    form, batch = max(tries, key=lambda key: rates[key])
    return {"batch": batch, "channels_last": bool(form)}


def ours(arguments: argparse.Namespace) -> Callable[[], dict[str, float]]:
    import torch

    from timetrial_minigo.go import Go, Rules
    from timetrial_minigo.search import Search, SearchSettings, draw_noise

    go, network, outside = Go(Rules(arguments.size, 7.5), arguments.device), make_network(arguments), [0.0, 0]

    def evaluate(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.process_time()
        found = network(planes)
        outside[0] -= time.process_time() - start
        outside[1] += len(planes)
        return found

    settings = SearchSettings(
        simulations=arguments.simulations, value_init_penalty=0.2, network_batch=arguments.batch, leaves=1
    )
    games = arguments.games
    search = Search(go, settings, evaluate if arguments.device == "cpu" else network, games, HISTORY)
    draw = torch.Generator(arguments.device).manual_seed(0)
    boards, history, seen = openings(go, games, draw)
    number = 0

    def turn() -> dict[str, float]:
        nonlocal number
        number += 1
        search.root(boards, history, seen)
        outside[:] = [0.0, 0]
        start = clock(arguments)
        search.run(noise=draw_noise(settings, games, go.points, number).to(go.device))
        kept = search.boards.stones, search.policy.half(), search.value
        moves = torch.multinomial(search.visits, 1, generator=draw).squeeze(1)
        search.advance(moves)
        spent = clock(arguments) - start
        assert len(kept[0]) == games
        return {"positions": games, "seconds": spent, "outside_us": 1e6 * (spent + outside[0]) / max(1, outside[1])}

    return turn


def openings(go: Any, games: int, draw: Any) -> tuple[Any, Any, Any]:
    """Positions of games of random moves, the first of them after no move and the last after LATEST_MOVE, with history
    and hashes."""
    import torch

    boards = go.start(games)
    last = torch.linspace(0, LATEST_MOVE, games, device=go.device).round()
    history, seen = boards.stones[:, None].repeat(1, HISTORY, 1), [boards.hash]
    for move in range(LATEST_MOVE):
        legal = go.legal(boards, torch.stack(seen, 1)).float()
        legal[:, -1] = 1e-9  # a pass only where there is nothing else
        after = go.play(boards, torch.multinomial(legal, 1, generator=draw).squeeze(1))
        plays = last > move
        later = torch.cat([after.stones[:, None], history[:, :-1]], 1)
        history = torch.where(plays[:, None, None], later, history)
        chosen = ((plays.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(after, boards, strict=True))
        boards = type(boards)(*(torch.where(*three) for three in chosen))
        seen.append(torch.where(plays, boards.hash, go.NO_POSITION))
    return boards, history, torch.stack(seen, 1)


def open_spiel(arguments: argparse.Namespace) -> Callable[[], dict[str, float]]:
    import numpy as np
    import pyspiel
    import torch
    from open_spiel.python.algorithms import mcts

    network, points = make_network(arguments), arguments.size**2

    class OneAtATime(mcts.Evaluator):
        """Evaluates a position once: its value is asked for first, its prior when the bot comes by again."""

        def __init__(self) -> None:
            self.known: dict[str, tuple[Any, float]] = {}
            self.planes = torch.zeros(1, 2 * HISTORY + 1, arguments.size, arguments.size)

        def _see(self, state: Any) -> tuple[Any, float]:
            key = state.history_str()
            if key not in self.known:
                seen = np.asarray(state.observation_tensor(), dtype=np.float32).reshape(4, arguments.size, -1)
                black = state.current_player() == 0
                self.planes[0, 0], self.planes[0, 1] = torch.from_numpy(seen[:2] if black else seen[1::-1].copy())
                self.planes[0, -1] = float(black)
                logits, value = network(self.planes)
                self.known[key] = logits[0].float().numpy(), float(value)
            return self.known[key]

        def evaluate(self, state: Any) -> Any:
            value = self._see(state)[1] * (1 if state.current_player() == 0 else -1)
            return np.array([value, -value])

        def prior(self, state: Any) -> list[tuple[int, float]]:
            legal = state.legal_actions()
            logits = self._see(state)[0][legal]
            weights = np.exp(logits - logits.max())
            return list(zip(legal, weights / weights.sum(), strict=True))

    game = pyspiel.load_game(f"go(board_size={arguments.size},komi=7.5)")
    random, evaluator = np.random.RandomState(0), OneAtATime()
    bot = mcts.MCTSBot(
        game, UCT_C, arguments.simulations, evaluator, solve=False, random_state=random,
        child_selection_fn=mcts.SearchNode.puct_value, dirichlet_noise=(0.25, 10 / points),
    )  # fmt: skip

    def turn() -> dict[str, float]:
        start, done = time.process_time(), 0
        while (spent := time.process_time() - start) < TURN_S or not done:
            paused = time.process_time()
            state = game.new_initial_state()
            for _ in range(random.randint(LATEST_MOVE + 1)):
                legal = [a for a in state.legal_actions() if a < points]
                state.apply_action(random.choice(legal) if legal else points)
            start += time.process_time() - paused
            evaluator.known.clear()
            root = bot.mcts_search(state)
            visits = np.array([child.explore_count for child in root.children])
            state.apply_action(root.children[random.choice(len(visits), p=visits / visits.sum())].action)
            done += 1
        return {"positions": done, "seconds": spent}

    return turn


def begin() -> None:
    import torch

    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.empty(KEPT, dtype=torch.uint8)


def serve(arguments: argparse.Namespace) -> None:
    """A turn for each line of stdin."""
    begin()
    turn = {"ours": ours, "ceiling": ceiling, "open_spiel": open_spiel}[arguments.serve](arguments)
    turn()  # caches fill
    for _ in sys.stdin:
        print(json.dumps(turn()), flush=True)


# ------------------------------------------------------------------------------------------------------------ race


def command(arguments: argparse.Namespace, **also: Any) -> list[str]:
    """This program again, with one network and other settings."""
    keys = ("device", "size", "simulations", "games", "batch", "networks", "precisions")
    given = {key: getattr(arguments, key) for key in keys} | also
    parts = [sys.executable, __file__]
    for key, value in given.items():
        if value is True:
            parts.append(f"--{key.replace('_', '-')}")
        elif value is not False and value is not None:
            parts += [f"--{key.replace('_', '-')}", str(value)]
    return parts


def compare(network: str, precision: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What each contender answered in each round, and the batch size."""
    one = {"networks": network, "precisions": precision}
    with processes({"best_batch": command(arguments, **one, serve="best_batch")}) as asked:
        best = asked["best_batch"]()
    names = CONTENDERS if arguments.device == "cpu" else CONTENDERS[:2]
    with processes({name: command(arguments, **one, **best, serve=name) for name in names}) as contenders:
        answers = race(contenders, arguments.rounds, title=f"{network} {precision}")
    return {"answers": answers, **best}


def cells(network: str, precision: str, found: dict[str, Any]) -> list[str]:
    """Of one row of the table."""
    rates = {n: [a["positions"] / a["seconds"] for a in all_of] for n, all_of in found["answers"].items()}
    ours, ceiling = rates["ours"], rates["ceiling"]
    columns = [network, precision, f"{spread(ours):,.1f}", f"{spread(ceiling):,.1f}"]
    columns.append(f"{spread(ratios(ours, ceiling)):.0%}")
    if "open_spiel" in rates:
        peer = rates["open_spiel"]
        outside = [answer["outside_us"] for answer in found["answers"]["ours"] if answer["outside_us"]]
        columns += [f"{spread(peer):,.1f}", f"{spread(ratios(ours, peer)):.1f}", f"{spread(outside):.1f}"]
    form = "channels last" if found["channels_last"] else "contiguous"
    return [*columns, f"{found['batch']}, {form}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="WIDTHxBLOCKS")
    parser.add_argument("--precisions", nargs="+", help=f"of {PRECISIONS}; all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, default=9, help="of the board")
    parser.add_argument("--simulations", type=int, default=64)
    parser.add_argument("--games", type=int, default=1024, help="side by side; the batch size of rules and trees")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--batch", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--channels-last", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--serve", choices=(*CONTENDERS, "best_batch"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve == "best_batch":
        begin()
        print(json.dumps(best_batch(arguments)))
        return 0
    if arguments.serve:
        serve(arguments)
        return 0
    peer = ["open_spiel, positions/s", "times as fast", "µs a leaf outside the network"]
    columns = ["network", "precision", "positions/s", "ceiling", "share of the ceiling"]
    print(table([*columns, *(peer if arguments.device == "cpu" else []), "network's batch"]))
    figures: dict[str, Any] = {}
    for network in arguments.networks:
        for precision in arguments.precisions or PRECISIONS[arguments.device]:
            figures[f"{network} {precision}"] = found = compare(network, precision, arguments)
            print(row(cells(network, precision, found)), flush=True)
    measured = ("torch", "open_spiel") if arguments.device == "cpu" else ("torch",)
    versions = {name: metadata.version(name) for name in measured} | {"python": platform.python_version()}
    setting = f"{arguments.size}x{arguments.size}, {arguments.simulations} simulations, {arguments.games} games"
    print(f"\nn={arguments.rounds}, {setting}, {arguments.device}; {versions}")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps({"versions": versions, "command": sys.argv, "rounds": figures}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_status(main))
