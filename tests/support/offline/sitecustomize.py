"""No network but loopback, for the tests and every Python that they start (this folder is on their PYTHONPATH).

An audit hook refuses connections and look-ups of names at the interpreter itself, whichever library asks, and notes
them in the file that REACHED names, so that a test fails even where what it calls takes the error for an outage.
"""

import errno
import os
import sys

REACHED = "BAYESLORA_TESTS_REACHED"
"""Environment variable: the file of what was tried."""
ALLOWED = "BAYESLORA_TESTS_MAY_REACH"
"""Environment variable: set while a test marked ``network`` runs."""
HOST_FIRST = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
ADDRESS_SECOND = ("socket.connect", "socket.sendto", "socket.sendmsg")
LOCAL = ("", "localhost", "0.0.0.0", "::", "::1")


def refuse(event: str, args: tuple[object, ...]) -> None:
    """Raise OSError where an event of the interpreter goes to another machine."""
    if event in HOST_FIRST:
        host = args[0]
    elif event in ADDRESS_SECOND:
        host = args[1][0] if isinstance(args[1], tuple) else None  # else the path of a Unix socket
    else:
        return
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if name in LOCAL or name.startswith("127.") or ALLOWED in os.environ:
        return
    if path := os.environ.get(REACHED):
        with open(path, "a", encoding="utf-8") as log:
            log.write(f"{event} {name}\n")
    raise OSError(errno.ENETUNREACH, f"tests have no network: {event} {name}")


sys.addaudithook(refuse)
