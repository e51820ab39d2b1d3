"""The process that the processes of methods are forked from: it has imported what they need, and knows no plugin.

    python -m stepmark.nursery FD

It is started by `stepmark.remote` and ends when that process does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import warnings


def main(number: int) -> None:
    """Serve births on the socket with that file number."""
    from stepmark import backbones, child, confine, plugins
    from stepmark.wire import Closed, Link

    confine.end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for track in plugins.tracks():
        importlib.import_module(f"stepmark.tracks.{track}")
    backbones.recipes()
    plugins.fixed_tasks()
    _warm_up()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    link = Link(socket.socket(fileno=number))
    built: set[str] = set()
    with contextlib.suppress(Closed):
        while True:
            request = link.receive()
            _, ends, _, _ = socket.recv_fds(link.end, 1, 1)
            _import_networks(set(request["networks"]), built)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # of threads: there are none
                born = os.fork()
            if born == 0:
                link.close()
                child.serve(socket.socket(fileno=ends[0]), request)
            os.close(ends[0])
            link.send({"born": born})


def _import_networks(names: set[str], built: set[str]) -> None:
    """Build each of these backbones once and let it go: their libraries are slow to import, and every process that is born
    would import them again. Those that nobody trains are left out: they may be made of data, which a process reads itself.
    What cannot be built is for the process that needs it to report."""
    from stepmark import backbones

    known = backbones.recipes()
    new = {name for name in names - built if name in known and known[name].train is not None}
    built |= names
    if new:
        for name in new:
            with contextlib.suppress(Exception):
                known[name].build()
        gc.collect()
        gc.freeze()


def _warm_up() -> None:
    """A counted call of next to nothing: the counters load a good part of torch when they are first used."""
    import torch

    from stepmark.audit import Guard
    from stepmark.meter.counts import Ledger, watch
    from stepmark.meter.flops import count_flops

    torch.set_num_threads(1)
    ledger = Ledger()
    network = watch(ledger, "warm", torch.nn.Linear(1, 1))
    with torch.no_grad(), count_flops(ledger, [network], Guard(torch.Generator(), 0, [])):
        network(torch.zeros(1, 1)).numpy()


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # what libraries do when they end is not worth a wait
