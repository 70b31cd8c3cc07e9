"""How a reward is asked: threads, timeouts, several processes, HTTP."""
