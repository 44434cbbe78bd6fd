"""The rules of docs/placement.md written down a second time, slowly, from their definition.

Nothing here is shared with plait: no heaps, no counters, no arrays. At each instant everything is
looked at anew, and memory is the sum over the intervals that cover an instant.
"""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

Json = dict[str, Any]


def random_problem(rng: random.Random, ops: int, devices: int, tight: bool = False) -> Json:
    """A problem with many ties: times and sizes are small dyadic numbers, some of them zero."""
    m = devices
    names = [f"op{i}" for i in range(ops)]
    items = []
    for name in names:
        time: Any = rng.choice([0, 0.25, 0.5, 1, 1, 2])
        if rng.random() < 0.2:
            time = [rng.choice([0.25, 1, 2]) for _ in range(m)]
            if m > 1 and rng.random() < 0.3:
                time[rng.randrange(m)] = None
        item: Json = {"name": name, "time_s": time, "param_bytes": rng.choice([0, 1, 4]),
                      "temp_bytes": rng.choice([0, 2]),
                      "output_bytes": rng.choice([0, 1, 2, 8])}  # fmt: skip
        if rng.random() < 0.2:
            item["keep"] = True
        if rng.random() < 0.3 and not isinstance(time, list):
            item["group"] = f"g{rng.randrange(2)}"
        items.append(item)
    edges = []
    for a, b in itertools.combinations(range(ops), 2):
        for _ in range(2):
            if rng.random() < 1.2 / ops:
                edges.append({"src": names[a], "dst": names[b], "bytes": rng.choice([0, 1, 2, 4]),
                              "tensor": rng.choice(["", "", "x"])})  # fmt: skip
    rng.shuffle(edges)
    need = sum(x["param_bytes"] + x["output_bytes"] + x["temp_bytes"] for x in items)
    room = need / m * 0.9 + 4 if tight else 4 * need + 8
    links = [
        {"src": f"d{a}", "dst": f"d{b}", "latency_s": 0.5, "bandwidth_Bps": 4}
        for a in range(m)
        for b in range(m)
        if a != b and rng.random() < 0.2
    ]
    return {
        "format": "placement-problem v1",
        "name": "random",
        "memory_model": rng.choice(["dynamic", "static"]),
        "devices": [
            {"name": f"d{k}", "memory_bytes": room, "speed": rng.choice([1, 1, 2, 0.5])}
            for k in range(m)
        ],
        "default_link": {"latency_s": rng.choice([0, 0.25]), "bandwidth_Bps": rng.choice([1, 8])},
        "links": links,
        "ops": items,
        "edges": edges,
    }


def seconds(problem: Json, op: Json, device: str) -> float | None:
    """How long an op takes on a device; None where it may not run."""
    names = [d["name"] for d in problem["devices"]]
    k = names.index(device)
    if isinstance(op["time_s"], list):
        return op["time_s"][k]
    return op["time_s"] / problem["devices"][k].get("speed", 1)


def play(problem: Json, assign: dict[str, str], order: dict[str, list[str]] | None, mode: str):
    """(makespan, peak bytes by device); None where the order deadlocks."""
    ops = {op["name"]: op for op in problem["ops"]}
    index = {name: i for i, name in enumerate(ops)}
    devices = [d["name"] for d in problem["devices"]]
    tensors: dict[tuple[str, str], Json] = {}
    for edge in problem["edges"]:
        t = tensors.setdefault((edge["src"], edge.get("tensor", "")), {"bytes": 0, "to": []})
        t["bytes"] = max(t["bytes"], edge["bytes"])
        if edge["dst"] not in t["to"]:
            t["to"].append(edge["dst"])
    default = problem["default_link"]
    links = {(x["src"], x["dst"]): x for x in problem["links"]}

    def transfer(key: tuple[str, str], a: str, b: str) -> float:
        link = links.get((a, b), default)
        return link["latency_s"] + tensors[key]["bytes"] / link["bandwidth_Bps"]

    def level(name: str) -> float:
        longest = 0.0
        for key, t in tensors.items():
            for v in t["to"] if key[0] == name else ():
                far = assign[v] != assign[name]
                longest = max(
                    longest, level(v) + (transfer(key, assign[name], assign[v]) if far else 0.0)
                )
        return longest + seconds(problem, ops[name], assign[name])

    if order:
        first = {n: k for names in order.values() for k, n in enumerate(names)}
        rank = {n: (first.get(n, len(ops)), index[n]) for n in ops}
    else:
        rank = {n: (-level(n), index[n]) for n in ops}
    begin: dict[str, float] = {}
    end: dict[str, float] = {}
    sent: list[tuple[tuple[str, str], str, float, float]] = []  # tensor, to, start, end
    free = {(a, b): 0.0 for a in devices for b in devices}
    done: set[str] = set()
    now = 0.0
    while True:
        for name in sorted((n for n in end if n not in done and end[n] == now), key=index.get):
            done.add(name)
            for key, t in tensors.items():
                if key[0] != name:
                    continue
                for to in sorted({assign[v] for v in t["to"]} - {assign[name]}):
                    link = assign[name], to
                    start = max(now, free[link])
                    free[link] = start + transfer(key, *link)
                    sent.append((key, to, start, free[link]))

        def here(name: str, instant: float = now) -> bool:
            for key, t in tensors.items():
                if name in t["to"]:
                    if assign[key[0]] == assign[name]:
                        if key[0] not in done:
                            return False
                    elif not any(k == key and d == assign[name] and e <= instant
                                 for k, d, _, e in sent):  # fmt: skip
                        return False
            return True

        for device in devices:
            if any(assign[n] == device and n in begin and n not in done for n in ops):
                continue
            waiting = [n for n in ops if assign[n] == device and n not in begin]
            if mode == "strict":
                rest = [n for n in (order or {}).get(device, []) if n not in begin]
                waiting = [n for n in rest[:1] if n in waiting]
            ready = [n for n in waiting if here(n)]
            if ready:
                name = min(ready, key=rank.get)
                begin[name] = now
                end[name] = now + seconds(problem, ops[name], device)
        later = [e for n, e in end.items() if n not in done]
        later += [e for _, _, _, e in sent if e > now]
        if not later:
            break
        now = min(later)
    if len(done) < len(ops):
        return None
    makespan = max(end.values(), default=0.0)
    peak = {}
    for device in devices:
        holds = []  # start, end, bytes
        base = sum(op["param_bytes"] for n, op in ops.items() if assign[n] == device)
        if problem["memory_model"] == "static":
            peak[device] = base + sum(
                op["temp_bytes"] + op["output_bytes"]
                for n, op in ops.items() if assign[n] == device
            )  # fmt: skip
            continue
        for n, op in ops.items():
            if assign[n] != device:
                continue
            last = [end[n]]
            for key, t in tensors.items():
                if key[0] == n:
                    last += [end[v] for v in t["to"] if assign[v] == device]
                    last += [e for k, _, _, e in sent if k == key]
            holds.append((begin[n], makespan if op.get("keep") else max(last), op["output_bytes"]))
            holds.append((begin[n], end[n], op["temp_bytes"]))
        for key, to, start, _ in sent:
            if to == device:
                until = max(end[v] for v in tensors[key]["to"] if assign[v] == device)
                holds.append((start, until, tensors[key]["bytes"]))
        instants = {s for s, _, _ in holds} | {0.0}
        peak[device] = base + max(sum(b for s, e, b in holds if s <= x < e) for x in instants)
    return makespan, peak


def fits(problem: Json, peak: dict[str, float]) -> bool:
    """Whether all peaks are within their devices."""
    return all(peak[d["name"]] <= d["memory_bytes"] for d in problem["devices"])


def assignments(problem: Json):
    """All assignments that keep groups together and ops where they may run."""
    devices = [d["name"] for d in problem["devices"]]
    keys = [op.get("group", op["name"]) for op in problem["ops"]]
    for choice in itertools.product(devices, repeat=len(set(keys))):
        by_key = dict(zip(dict.fromkeys(keys), choice, strict=True))
        assign = {op["name"]: by_key[k] for op, k in zip(problem["ops"], keys, strict=True)}
        if all(seconds(problem, op, assign[op["name"]]) is not None for op in problem["ops"]):
            yield assign


def optimum(problem: Json) -> float:
    """Least makespan that fits, over all assignments and all orders; infinite where none does."""
    best = math.inf
    names = [op["name"] for op in problem["ops"]]
    for assign in assignments(problem):
        seen: set[str] = set()
        for permutation in itertools.permutations(names):
            order: dict[str, list[str]] = {}
            for name in permutation:
                order.setdefault(assign[name], []).append(name)
            if str(sorted(order.items())) in seen:
                continue
            seen.add(str(sorted(order.items())))
            for mode in ("priority", "strict"):
                played = play(problem, assign, order, mode)
                if played is not None and fits(problem, played[1]):
                    best = min(best, played[0])
    return best
