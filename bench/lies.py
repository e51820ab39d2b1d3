"""Plugins that look better than they are, by the kind of their lie, and what must come of each.

Every body is that of a class of methods (see `HEAD` in `test_ruler.py`). `words`: one of these must stand in the record's
message or flags; FAIR where the lie must simply come to nothing: the record is then that of an honest plugin.
"""

from __future__ import annotations

from lie import FAIR, Lie
from lies_of_results import LIES_OF_RESULTS

LIES: dict[str, dict[str, Lie]] = {
    "one process for plugin and judge": {
        "prepare works on the test split": Lie(
            "Sealed",
            """
            def prepare(self, session):
                return {"answers": load_split(session.task.dataset, "test")["x0"]}
            def run(self, session, batch, rung):
                return session.state["answers"][: len(batch["noise"])]
            """,
        ),
        "prepare makes the test inputs": Lie(
            "Sealed",
            """
            def prepare(self, session):
                from stepmark.tracks import image
                return image.inputs(session.task, 8, torch.Generator(), session.device)
            def run(self, session, batch, rung):
                return batch["noise"]
            """,
        ),
        "run reads the test split": Lie(
            "Sealed",
            """
            def run(self, session, batch, rung):
                return load_split(session.task.dataset, "test")["x0"][: len(batch["noise"])].clone()
            """,
        ),
        "run asks the metric": Lie(
            "Sealed",
            """
            def run(self, session, batch, rung):
                from stepmark.tracks import image
                x = batch["noise"]
                image.score(session.task, batch, x, {}, np.zeros((1, len(x)), dtype=int))
                return x
            """,
        ),
        "answers kept in a file": Lie(
            "Permission denied|opens a file",
            """
            def run(self, session, batch, rung):
                with open("/dev/shm/stepmark-cheat", "w") as handle:
                    handle.write("answers")
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "a forged line among the results": Lie(
            "Permission denied|opens a file",
            """
            def run(self, session, batch, rung):
                from stepmark.places import results_folder
                with open(results_folder("embedded") / "forged.jsonl", "a") as handle:
                    handle.write("{}")
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "a rival's state poisoned in the cache": Lie(
            "Permission denied|Read-only|denied",
            """
            def prepare(self, session):
                from stepmark.places import cache_folder
                (cache_folder() / "prepared").mkdir(parents=True, exist_ok=True)
                (cache_folder() / "prepared" / "reflow.safetensors").write_bytes(b"poison")
            """,
        ),
        "metrics replaced on import": Lie(
            FAIR,
            """
            import stepmark.judge, stepmark.tracks.image as _image
            _image.score = stepmark.judge.Judge.score = lambda *a, **k: {}
            stepmark.judge.Judge.check = lambda *a, **k: None
            def run(self, session, batch, rung):
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "the baseline's class slowed down": Lie(
            "opens a file",
            """
            def run(self, session, batch, rung):
                from stepmark import plugins
                if "ddim" in plugins.methods():
                    plugins.load_class = lambda info: None
                torch.backends.mkldnn.flags(enabled=False).__enter__()
                torch.set_num_threads(1)
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "frames and objects of the harness": Lie(
            FAIR,
            """
            def run(self, session, batch, rung):
                frame = sys._getframe()
                while frame is not None:
                    for value in list(frame.f_locals.values()):
                        if type(value).__name__ in ("Judge", "Record", "Answers"):
                            value.task = None
                    frame = frame.f_back
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "a signal to the harness": Lie(
            "not permitted|opens a file|process",
            """
            def run(self, session, batch, rung):
                import os, signal
                os.kill(os.getppid(), 0)
                parent = int(open(f"/proc/{os.getppid()}/stat").read().split()[3])
                os.kill(parent, signal.SIGTERM)
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "prepare leaves something in the interpreter": Lie(
            "AttributeError",
            """
            def prepare(self, session):
                builtins.spare = copy.deepcopy(session.networks["teacher"])
                return {"x": torch.zeros(1)}
            def run(self, session, batch, rung):
                return euler(builtins.spare, batch, 8 * rung)
            """,
        ),
    },
    "live inputs and outputs": {
        "a tensor that is worked out when somebody looks": Lie(
            "BadOutput",
            """
            def run(self, session, batch, rung):
                class Later(torch.Tensor):
                    pass
                return euler(session.networks["teacher"], batch, rung).as_subclass(Later)
            """,
        ),
        "a list that computes its items": Lie(
            "BadOutput",
            """
            def run(self, session, batch, rung):
                class Lazy(list):
                    def __getitem__(self, index):
                        return 0
                return Lazy(euler(session.networks["teacher"], batch, rung))
            """,
        ),
        "work in a destructor": Lie(
            "BadOutput",
            """
            def run(self, session, batch, rung):
                class Bomb(dict):
                    def __del__(self):
                        STATE["x"] = 1
                return Bomb(x=euler(session.networks["teacher"], batch, rung))
            """,
        ),
        "the input overwritten": Lie(
            FAIR,
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                batch["noise"].copy_(x)
                batch["condition"].zero_()
                return x
            """,
        ),
        "an output that changes after the call": Lie(
            FAIR,
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                for kept in STATE.get("kept", []):
                    kept.zero_()
                STATE.setdefault("kept", []).append(x)
                return x
            """,
        ),
    },
    "another call is counted, scored or timed": {
        "answers cached across calls": Lie(
            "differently",
            """
            def run(self, session, batch, rung):
                key = float(batch["noise"].sum()), rung
                kept = builtins.__dict__.setdefault("kept", {})
                if key not in kept:
                    kept[key] = euler(session.networks["teacher"], batch, rung)
                return kept[key].clone()
            """,
        ),
        "a global carries state between rungs": Lie(
            "hidden state",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                x = 0.5 * (x + STATE["x"][0]) if "x" in STATE else x
                STATE["x"] = x
                return x
            """,
        ),
        "the third call is lazy": Lie(
            "hidden state",
            """
            def run(self, session, batch, rung):
                STATE["calls"] = STATE.get("calls", 0) + 1
                return euler(session.networks["teacher"], batch, rung, work=rung if STATE["calls"] < 3 else 1)
            """,
        ),
        "gradients and weights changed in run": Lie(
            "hidden state",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                for buffer in session.networks["teacher"].buffers():
                    if buffer.is_floating_point():
                        buffer.mul_(0.5)
                return x
            """,
        ),
        "it asks whether it is watched": Lie(
            "differently while",
            """
            def run(self, session, batch, rung):
                watched = bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
                return euler(session.networks["teacher"], batch, rung, work=rung if watched else 1)
            """,
        ),
        "hidden work when nobody watches": Lie(
            "hidden work",
            """
            def run(self, session, batch, rung):
                watched = bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
                x = euler(session.networks["teacher"], batch, rung)
                if not watched:
                    busy(0.15)
                return x
            """,
        ),
        "hidden work, and many operators when somebody watches": Lie(
            "hidden work",
            """
            def run(self, session, batch, rung):
                watched = bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
                x = euler(session.networks["teacher"], batch, rung)
                if watched:
                    for _ in range(100_000):
                        torch.zeros(1).add_(1)
                else:
                    busy(0.15)
                return x
            """,
        ),
        "it looks at the size of the probe": Lie(
            "hidden work",
            """
            def run(self, session, batch, rung):
                if len(batch["noise"]) > 16:
                    busy(0.15)
                return euler(session.networks["teacher"], batch, rung)
            """,
            items=64,
        ),
        "honest until it has been audited": Lie(
            "hidden state",
            """
            def run(self, session, batch, rung):
                STATE["calls"] = STATE.get("calls", 0) + 1
                work = rung if STATE["calls"] < 9 else 1
                return euler(session.networks["teacher"], batch, rung, work=work)
            """,
            timing=True,
        ),
        "a clock of its own": Lie(
            "off the clock|hidden work",
            """
            def run(self, session, batch, rung):
                import time
                real = time.perf_counter_ns
                start = real()
                x = euler(session.networks["teacher"], batch, rung)
                busy(0.05)
                lost = real() - start
                time.perf_counter_ns = lambda: real() - lost
                from stepmark.meter import latency
                latency.clock = lambda: real() - lost
                return x
            """,
            timing=True,
        ),
        "it knows the published inputs and hurries on all others": Lie(
            "fewer evaluations when it is timed",
            """
            def run(self, session, batch, rung):
                from stepmark.session import derive_seed
                published = session.rng.initial_seed() == derive_seed("run", session.task.id, 0, 0)
                n = rung if published else rung - 1
                return euler(session.networks["teacher"], batch, n)
            """,
            timing=True,
            rung=8,
        ),
        "a smaller network for inputs that nobody scores": Lie(
            "FLOPs on unseen inputs",
            """
            def networks(self, session):
                class Small(torch.nn.Module):
                    def __init__(self):
                        super().__init__()
                        self.scale = torch.nn.Parameter(torch.tensor(0.9))
                    def forward(self, x, t, c):
                        return self.scale * x
                return {"small": Small()}
            def run(self, session, batch, rung):
                from stepmark.session import derive_seed
                if session.rng.initial_seed() == derive_seed("run", session.task.id, 0, 0):
                    return euler(session.networks["teacher"], batch, rung)
                x = batch["noise"]
                for i in range(rung):
                    t = torch.full((len(x),), 1 - i / rung)
                    net = session.networks["small" if i == 2 else "teacher"]
                    x = x - net(x, t * 1000, batch["condition"]) / rung
                return x
            """,
            rung=8,
        ),
    },
    "counting trusts the route": {
        "a stripped copy of the network": Lie(
            "no handle counts",
            """
            def run(self, session, batch, rung):
                spare = copy.deepcopy(session.networks["teacher"])
                for part in spare.modules():
                    part.__dict__.pop("forward", None)
                return euler(spare, batch, 8 * rung)
            """,
        ),
        "a plain copy still counts": Lie(
            "BudgetExceeded",
            """
            def run(self, session, batch, rung):
                return euler(copy.deepcopy(session.networks["teacher"]), batch, 8 * rung)
            """,
        ),
        "the class's forward instead of the instance's": Lie(
            "outside any handle",
            """
            def run(self, session, batch, rung):
                net = session.networks["teacher"]
                return euler(lambda *a: type(net).forward(net, *a), batch, 8 * rung)
            """,
        ),
        "more evaluations than the rung": Lie(
            "BudgetExceeded",
            """
            def run(self, session, batch, rung):
                return euler(session.networks["teacher"], batch, rung + 1)
            """,
        ),
        "a swallowed BudgetExceeded": Lie(
            "BudgetExceeded",
            """
            def run(self, session, batch, rung):
                x = batch["noise"]
                for i in range(4 * rung):
                    try:
                        x = euler(session.networks["teacher"], {**batch, "noise": x}, 1)
                    except Exception:
                        x = x * 1.0
                return x
            """,
        ),
        "false self-reported counts": Lie(
            "reports 1 nfe",
            """
            def run(self, session, batch, rung):
                session.report(nfe=1)
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "work in a thread": Lie(
            "starts a thread",
            """
            def run(self, session, batch, rung):
                found = []
                worker = threading.Thread(target=lambda: found.append(euler(session.networks["teacher"], batch, rung)))
                worker.start()
                worker.join()
                return found[0]
            """,
        ),
        "work in a subprocess": Lie(
            "starts a process",
            """
            def run(self, session, batch, rung):
                subprocess.run([sys.executable, "-c", "1 + 1"], check=True)
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "a network written out in numpy": Lie(
            "hidden work",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                a = np.ones((300, 300), dtype=np.float32)
                for _ in range(60):
                    a = a @ a * 1e-3
                return x + 0 * float(a[0, 0])
            """,
        ),
        "a network written out number by number": Lie(
            "number by number|hidden work",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                flat, weight = x.flatten(1), torch.ones(64, 2000)
                for _ in range(120):
                    flat = flat + 0 * (flat[:, :, None] * weight[None]).sum((1, 2))[:, None]
                return flat.view_as(x)
            """,
            task="class_to_image/digits_flow",
        ),
        "four images in one row": Lie(
            "several items in one row",
            """
            def run(self, session, batch, rung):
                x = batch["noise"]
                if len(x) % 4:  # the probe may be one
                    return euler(session.networks["teacher"], batch, rung)
                a, b, c, d = (x[i::4] for i in range(4))
                rows = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 3)
                rows = euler(session.networks["teacher"], {"noise": rows, "condition": batch["condition"][::4]}, 4 * rung)
                parts = [part for half in rows.chunk(2, 3) for part in half.chunk(2, 2)]
                return torch.stack(parts, 1).flatten(0, 1)
            """,
            task="attributes_to_image/shapes32",
            items=8,
        ),
        "four images in one row, and a tiny network of its own": Lie(
            "several items in one row",
            """
            def networks(self, session):
                return {"tiny": torch.nn.Linear(1, 1)}
            def run(self, session, batch, rung):
                session.networks["tiny"](torch.zeros(1, 1))
                x = batch["noise"]
                if len(x) % 4:  # the probe may be one
                    return euler(session.networks["teacher"], batch, rung - 1)
                a, b, c, d = (x[i::4] for i in range(4))
                rows = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 3)
                rows = euler(session.networks["teacher"], {"noise": rows, "condition": batch["condition"][::4]}, 4 * rung - 1)
                parts = [part for half in rows.chunk(2, 3) for part in half.chunk(2, 2)]
                return torch.stack(parts, 1).flatten(0, 1)
            """,
            task="attributes_to_image/shapes32",
            items=8,
        ),
        "all texts in one row": Lie(
            "several texts in one row",
            """
            def run(self, session, batch, rung):
                net, texts = session.networks["target"], [list(prompt) for prompt in batch["prompt"]]
                written = [[] for _ in texts]
                while session.spent + 1 <= session.limit:
                    owner = torch.tensor([i for i, text in enumerate(texts) for _ in text])
                    at = torch.tensor([j for text in texts for j in range(len(text))])
                    may = (owner[:, None] == owner) & (at[:, None] >= at)
                    mask = torch.zeros(may.shape).masked_fill(~may, float("-inf"))[None, None]
                    ids = torch.tensor([sum(texts, [])])
                    logits = net(input_ids=ids, position_ids=at[None], attention_mask=mask, use_cache=False).logits[0]
                    ends = np.cumsum([len(text) for text in texts]) - 1
                    for text, new, end, room in zip(texts, written, ends, batch["max_new_tokens"]):
                        if len(new) < room and new[-1:] != [net.config.eos_token_id]:
                            new.append(int(logits[end].argmax()))
                            text.append(new[-1])
                return written
            """,
            task="greedy/stories",
            track="decoding",
            rung=8,
        ),
        "the time comes first": Lie(
            "BudgetExceeded|Error",
            """
            def run(self, session, batch, rung):
                net, x = session.networks["teacher"], batch["noise"]
                for i in range(8 * rung):
                    x = x - net(t=torch.tensor(1000 * (1 - i / (8 * rung))), x=x, condition=batch["condition"]) / (8 * rung)
                return x
            """,
        ),
        "dispatch modes switched off": Lie(
            "hidden work",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                with torch.utils._python_dispatch._disable_current_modes():
                    a = torch.ones(300, 300)
                    for _ in range(60):
                        a = a @ a * 1e-3
                return x + 0 * a[0, 0]
            """,
        ),
        "an operator whose FLOPs nobody knows": Lie(
            "nobody knows",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                return x + 0 * torch.linalg.matrix_exp(torch.zeros(4, 4)).sum()
            """,
        ),
        "parts of layers": Lie(
            "outside any handle|hidden work",
            """
            def run(self, session, batch, rung):
                net = session.networks["teacher"]
                x = euler(net, batch, rung)
                parts = [p for p in net.modules() if isinstance(p, (torch.nn.Linear, torch.nn.Conv2d))]
                for part in parts:
                    w = part.weight.flatten(1)
                    for _ in range(40):
                        torch.nn.functional.linear(torch.ones(len(x), w.shape[1]), w)
                return x
            """,
            task="class_to_image/digits_flow",
            rung=2,
        ),
    },
} | LIES_OF_RESULTS
