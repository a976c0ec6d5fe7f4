"""How every command of the project starts and fails: one clear line and a non-zero exit code, no traceback."""

import argparse
import functools
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from absl import app, flags, logging

from mmei_jax.types import InputError

EXIT_INPUT_ERROR = 2
# What a shell reports of a process ended by SIGTERM: a supervisor restarts it, and the run goes on.
EXIT_TERMINATED = 143


def mark_flags_parsed() -> None:
    """Lets libraries that read absl flags of their own be used as functions, without a command line."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def run(
    main: Callable[[], int], *, define: Callable[[], None] = lambda: None, keys_file: str = "configs/default.py"
) -> None:
    """Parses absl flags, calls ``main`` and exits with the code that it returns.

    :class:`~mmei_jax.types.InputError` and ``OSError`` (missing file, full disk, unwritable folder) become one line on
    standard error and exit code 2.

    Args:
        main: does the work.
        define: defines flags; a configuration with a default file has to be defined here, because config_flags reads
            the command line then.
        keys_file: explains every key of the command's configuration, if it has one.
    """
    # Orbax tells every file that it touches at the level below.
    logging.set_verbosity(logging.WARNING)
    app.run(lambda _: sys.exit(report_errors(main)), flags_parser=functools.partial(_parse_flags, define, keys_file))


class CommandParser(argparse.ArgumentParser):
    """A parser that tells what is wrong in one line, as every command does, where argparse adds its usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        print(f"error: {message}; --help lists what is accepted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INPUT_ERROR)


def report_errors(main: Callable[[], int]) -> int:
    """Calls ``main``; on bad input prints its one line and returns exit code 2."""
    try:
        return main()
    except (InputError, OSError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr, flush=True)
        return EXIT_INPUT_ERROR


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_flags(define: Callable[[], None], keys_file: str, argv: list[str]) -> list[str]:
    """Flags as absl parses them; what absl and config_flags raise is told in one line."""
    try:
        define()
        return list(flags.FLAGS(argv))
    except SystemExit:
        # absl's flags of help print it and end with 1, as if something were wrong.
        sys.exit(0)
    except flags.Error as error:
        message = _one_line(error)
    except (AttributeError, KeyError) as error:
        # config_flags lets through what ConfigDict raises for a key that it lacks, and names only the key.
        # "Key 'dimm' does not exist", or "<class 'int'>.wide does not exist" for a key below a value.
        name = re.search(r">\.(\w+) does not exist", str(error)) or re.search(r"'(\w+)", str(error))
        guilty = next((item for item in argv if name and name[1] in item.split("=")[0].split(".")), _one_line(error))
        message = f"{guilty}: unknown configuration key"
    except (TypeError, ValueError, OSError) as error:
        message = _one_line(error)
    has_keys = "config" in flags.FLAGS or any(item.startswith("--config") for item in argv)
    keys = f", {keys_file} every key" if has_keys else ""
    print(f"error: {message}; --help lists the flags{keys}", file=sys.stderr, flush=True)
    sys.exit(EXIT_INPUT_ERROR)
