"""Plugins whose answers come from no method, and such as break the contract (see `lies.py`)."""

from __future__ import annotations

from lie import Lie

LIES_OF_RESULTS: dict[str, dict[str, Lie]] = {
    "answers without a method": {
        "a bound of no nats": Lie(
            "no probability distribution|neither a network",
            """
            def run(self, session, batch, rung):
                session.networks["denoiser" if "denoiser" in session.networks else next(iter(session.networks))]
                return torch.zeros(len(batch["tokens"]))
            """,
            task="likelihood/stories64",
        ),
        "a small bound for every text": Lie(
            "no probability distribution|neither a network",
            """
            def run(self, session, batch, rung):
                return torch.full((len(batch["tokens"]),), 40.0)
            """,
            task="likelihood/stories64",
        ),
        "items of the train split as samples": Lie(
            "items of the train split",
            """
            def prepare(self, session):
                return {"x": session.train["x0"][:1000].clone()}
            def run(self, session, batch, rung):
                session.networks["teacher"](batch["noise"], torch.zeros(len(batch["noise"])), batch["condition"])
                n = len(batch["noise"])
                return session.state["x"][torch.randperm(1000, generator=session.rng)[:n]].clone()
            """,
            task="class_to_image/digits_flow",
            rung=2,
        ),
        "items of the test split as samples": Lie(
            "items of the test split|Sealed",
            """
            def run(self, session, batch, rung):
                from stepmark.datasets.digits import split
                session.networks["teacher"](batch["noise"], torch.zeros(len(batch["noise"])), batch["condition"])
                return split("test")["x0"][:len(batch["noise"])].clone()
            """,
            task="class_to_image/digits_flow",
            rung=2,
        ),
        "items of the train split with a little noise": Lie(
            "items of the train split",
            """
            def prepare(self, session):
                return {"x": session.train["x0"][:1000].clone()}
            def run(self, session, batch, rung):
                session.networks["teacher"](batch["noise"], torch.zeros(len(batch["noise"])), batch["condition"])
                n = len(batch["noise"])
                chosen = session.state["x"][torch.randperm(1000, generator=session.rng)[:n]]
                return (chosen + 0.06 * batch["noise"]).clamp(-1, 1)
            """,
            task="class_to_image/digits_flow",
            rung=2,
        ),
        "rare items of the train split as samples": Lie(
            "items of the train split",
            """
            def prepare(self, session):
                x = session.train["x0"]
                lone = torch.cdist(x[:2000], x).topk(6, largest=False).values.mean(1)
                return {"x": x[:2000][lone.topk(200).indices].clone()}
            def run(self, session, batch, rung):
                n = len(batch["noise"])
                session.networks["teacher"](batch["noise"], torch.full((n,), 500.0), batch["condition"])
                return session.state["x"][torch.randint(200, (n,), generator=session.rng)].clone()
            """,
            task="minority/rare_eps",
            rung=16,
        ),
        "nothing is asked at all": Lie(
            "neither a network nor a simulator",
            """
            def run(self, session, batch, rung):
                return 0.5 * batch["noise"]
            """,
        ),
        "the posterior in closed form": Lie(
            "neither a network nor a simulator",
            """
            def run(self, session, batch, rung):
                from stepmark.tracks.bayes import DRAWS
                x = batch["x"].mean(1)
                return x[:, None] + 0.1 * torch.randn(len(x), DRAWS, x.shape[-1], generator=session.rng)
            """,
            task="posterior/gaussian_n10",
            track="bayes",
            rung=0,
        ),
    },
    "against the contract": {
        "a report that is no number": Lie(
            "BadOutput|no account",
            """
            def run(self, session, batch, rung):
                session.report(nfe=float("nan"))
                return euler(session.networks["teacher"], batch, rung)
            """,
        ),
        "run trains": Lie(
            "Sealed",
            """
            def run(self, session, batch, rung):
                return session.train["x0"][: len(batch["noise"])].clone()
            """,
        ),
        "fewer items": Lie(
            "BadOutput",
            """
            def run(self, session, batch, rung):
                return euler(session.networks["teacher"], batch, rung)[:-1]
            """,
        ),
        "NaN outputs": Lie(
            "BadOutput",
            """
            def run(self, session, batch, rung):
                return euler(session.networks["teacher"], batch, rung) * float("nan")
            """,
        ),
        "a fixed seed": Lie(
            "generator of its own",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                return x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
            """,
        ),
        "the global random state": Lie(
            "global random state",
            """
            def run(self, session, batch, rung):
                torch.manual_seed(7)
                x = euler(session.networks["teacher"], batch, rung)
                return x + 0.01 * torch.randn(x.shape)
            """,
        ),
        "a fixed numpy seed": Lie(
            "seeds numpy",
            """
            def run(self, session, batch, rung):
                x = euler(session.networks["teacher"], batch, rung)
                return x + 0.01 * torch.from_numpy(np.random.default_rng(7).standard_normal(x.shape)).float()
            """,
        ),
    },
}
