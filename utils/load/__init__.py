"""Load on a service: requests that come when they come, what they met, and what the processes behind them used.

    arrivals = poisson(rate=20, seconds=5)
    requests = await open_loop(ask, arrivals)
    print(summary(requests, 1, 5))

The load is *open*: a request is sent when it is due, whether or not earlier ones have been answered. Tools that keep a
fixed number of users waiting (a *closed* load) send less as soon as the service becomes slow, and so never show a
queue. Latency counts from the moment at which a request was due, so that waiting in the generator itself is not left
out of the figures (coordinated omission: Gil Tene, "How NOT to Measure Latency").
"""

from utils.load.generator import OK, TIMEOUT, WRONG, Request, open_loop, poisson
from utils.load.report import outage, summary, timeline
from utils.load.usage import Usage

__all__ = ["OK", "TIMEOUT", "WRONG", "Request", "Usage", "open_loop", "outage", "poisson", "summary", "timeline"]
