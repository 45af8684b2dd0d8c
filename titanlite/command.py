"""How every command ends: its exit code, and a mistake told in one line. Imports nothing slow."""

import io
import os
import sys
from collections.abc import Callable

from titanlite.config import ConfigError


def exit_code(
    work: Callable[[], bool],
    also: tuple[type[Exception], ...] = (),
    interrupted: str = "interrupted",
    speaks: bool = True,
) -> int:
    """Do a command's work. 0 where it is right, 1 where it is not or after one line on stderr, 130 after Ctrl-C.

    also: errors that are told as a user's mistakes (ValueError, OSError) are. speaks: of ranks that all meet the same,
    one.
    """
    mistakes: tuple[type[Exception], ...] = (ValueError, OSError, *also)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        right = work()
        sys.stdout.flush()
    except BrokenPipeError:  # `... | head`: give Python's own flush at exit somewhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        code, line = 130, f"\ntitanlite: {interrupted}"
    except ConfigError as error:
        code, line = 1, str(error)
    except mistakes as error:
        code, line = 1, f"titanlite: {' '.join(str(error).split())}"
    else:
        return 0 if right else 1
    if speaks:
        print(line, file=sys.stderr)
    return code
