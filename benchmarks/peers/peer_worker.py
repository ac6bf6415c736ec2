"""One peer in a process of its own, driven over pipes; started by ``peer_rounds.py``, never by hand.

The first argument is a JSON document: ``module`` (a file of this folder with a class ``Peer``), ``options``
for it, ``threads``, ``path`` (folders to import from first) and ``first`` (a picture to classify at once, the
phases told, after which the process ends). Every line on standard input is a request, every line on standard
output its answer; whatever a library prints goes to standard error. The peer times itself, so the pipes cost
its times nothing.

Imports here are few: a process that is timed from its start pays for each of them.
"""

import sys
import time

BEGAN_NS = time.clock_gettime_ns(time.CLOCK_MONOTONIC)

import json
import os


def main() -> None:
    """Open the peer and answer until standard input ends."""
    spec = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path[:0] = [os.path.dirname(os.path.abspath(__file__)), *spec["path"]]  # noqa: PTH100, PTH120
    peer = __import__(spec["module"]).Peer(threads=spec["threads"], **spec["options"])
    opened_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    if spec.get("first"):
        label = peer.classify(spec["first"])
        labelled_ns = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        for _ in range(spec["more"]):
            peer.classify(spec["first"])
        told = {"began_ns": BEGAN_NS, "opened_ns": opened_ns, "labelled_ns": labelled_ns, "label": label}
        answers.write(json.dumps({**told, "peak_rss_bytes": peak_rss_bytes()}) + "\n")
        answers.flush()
        os._exit(0)  # no library gets to tidy up on the parent's time
    answers.write(json.dumps({"ready": True}) + "\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        call, given = getattr(peer, request["do"]), request["given"]
        for _ in range(request["untimed"]):
            call(given)
        if request["for_s"]:
            taken_ns, value = median_ns(call, given, request["for_s"]), None
        else:
            start_ns = time.perf_counter_ns()
            value = call(given)
            taken_ns = time.perf_counter_ns() - start_ns
        answers.write(json.dumps({"ns": taken_ns, "value": value if request["tell"] else None}) + "\n")
        answers.flush()


def median_ns(call, given, for_s):  # noqa: ANN001, ANN201 - any method of any peer
    """Return the median of calls without a pause, as `benchmark_app` takes it."""
    taken = []
    until_ns = time.perf_counter_ns() + round(for_s * 1e9)
    while not taken or time.perf_counter_ns() < until_ns:
        start_ns = time.perf_counter_ns()
        call(given)
        taken.append(time.perf_counter_ns() - start_ns)
    return sorted(taken)[(len(taken) - 1) // 2]


def peak_rss_bytes() -> int | None:
    """Return the largest resident memory of this process; Linux alone tells it so."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:  # noqa: PTH123
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


if __name__ == "__main__":
    main()
