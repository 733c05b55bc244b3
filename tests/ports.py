"""A port for a server that is started in a moment."""
import random
import socket
from pathlib import Path

# the system takes ports for connections from here, at any moment
RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int: # on the loopback interface
    """A port that is free, and that the system gives to nobody by itself: between closing it here and opening it there
    nothing comes in between but bad luck."""
    first = int(RANGE.read_text().split()[0]) if RANGE.exists() else 32768
    # not `random`: tests set its seed, and forks have the same
    for port in random.SystemRandom().sample(range(10_000 if first > 12_000 else 1_024, first), 200):
        with socket.socket() as probe:
            try: probe.bind(("127.0.0.1", port))
            except OSError: continue  # somebody has it
            return port
    raise RuntimeError(f"No port below {first} is free.")
