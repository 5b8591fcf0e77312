"""Functions in processes of their own: JSON goes in, JSON comes out, and none of them outlives the process that asked.

python -m timm_vix.measure.process timm_vix.measure.job:measure '{"model": "vix_nystrom_tiny"}'
"""

import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from typing import Any

import torch

from .._files import one_line

# begins the result, as in JSON text sequences (RFC 7464), so that no other printed line is taken for the result
RECORD_SEPARATOR = "\x1e"
# what torch says where it raises a RuntimeError for memory that it doesn't get
OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate",
    "Storage size calculation",
)


def call_in_process(function: Callable[[Any], Any], argument: Any, interactive: bool = False) -> Any:
    """What ``function(argument)`` returns in a fresh process; a failure comes back as ``{"error": reason}``.

    Args:
        function: One that can be imported by its name. Argument and result are what JSON holds.
        interactive: Show what the process prints, indented, and on Ctrl-C wait until it has saved what it has done.
            Otherwise nothing is shown, and Ctrl-C ends it at once.

    Raises:
        KeyboardInterrupt: for Ctrl-C, when the process has ended.
    """
    name = f"{function.__module__}:{function.__qualname__}"
    command = [sys.executable, "-m", "timm_vix.measure.process", name, json.dumps(argument)]
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # open as long as this process lives, see ``end_with_parent``
            stdout=subprocess.PIPE,
            stderr=None if interactive else errors,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C reaches it through this process alone
        ) as process:
            try:
                for line in process.stdout or ():
                    printed, found, result = line.partition(RECORD_SEPARATOR)  # a last line may lack its end
                    if interactive and printed:
                        print(f"  {printed}", end="\n" if found else "", flush=True)
                    if found:
                        return json.loads(result)
                code = process.wait()
            except KeyboardInterrupt:
                if interactive:
                    process.send_signal(signal.SIGINT)
                    process.wait()
                raise
            finally:
                process.kill()
        if code < 0:
            perhaps = ", perhaps out of memory" if -code == signal.SIGKILL else ""
            return dict(error=f"killed by signal {-code}{perhaps}")
        errors.seek(0)
        lines = errors.read().splitlines()
        return dict(error=f"exit {code}: {one_line(lines[-1]) if lines else 'no message'}")


def explain(error: BaseException) -> str:
    """The reason of a failure in one line; it begins with "out of memory" if the memory was too small."""
    text = one_line(error, 200)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in text for sign in OUT_OF_MEMORY):
        return f"out of memory: {text}"
    return text


def end_with_parent() -> None:
    """End this process when its input is closed, as it is when the process that asked was killed."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Call the function that the command line names, and print its result."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    function, argument = pkgutil.resolve_name(sys.argv[1]), json.loads(sys.argv[2])
    try:
        result = function(argument)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # models, devices and file systems may raise anything
        result = dict(error=explain(error))
    print(f"{RECORD_SEPARATOR}{json.dumps(result)}", flush=True)


if __name__ == "__main__":
    main()
