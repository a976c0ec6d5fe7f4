"""How every command of the project starts and fails: one clear line and a non-zero exit code, no traceback."""

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging

from mmei_jax.types import InputError, OutOfMemoryError

# Flags that are defined here belong to the command that asks for them, whose --help lists them.
flags.disclaim_key_flags()

EXIT_INPUT_ERROR = 2
# What a shell reports of a process ended by SIGTERM: a supervisor restarts it, and the run goes on.
EXIT_TERMINATED = 143
# The same of one that Ctrl-C ended.
EXIT_INTERRUPTED = 130
# Who may start the processes of one job, see mmei_jax.processes.
LAUNCHERS = ("auto", "none", "slurm", "kubernetes", "cloud_tpu")


def mark_flags_parsed() -> None:
    """Lets libraries that read absl flags of their own be used as functions, without a command line."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def run(
    main: Callable[[], int], *, define: Callable[[], None] = lambda: None, keys_file: str = "configs/default.py"
) -> None:
    """Parses absl flags, calls ``main`` and exits with the code that it returns.

    :class:`~mmei_jax.types.InputError` and ``OSError`` (missing file, full disk, unwritable folder) become one line on
    standard error and exit code 2; what does not fit into a device's memory, a table below it.

    Args:
        main: does the work.
        define: defines flags; a configuration with a default file has to be defined here, because config_flags reads
            the command line then.
        keys_file: explains every key of the command's configuration, if it has one.
    """
    # Orbax tells every file that it touches at the level below.
    logging.set_verbosity(logging.WARNING)
    app.run(lambda _: sys.exit(report_errors(main)), flags_parser=functools.partial(_parse_flags, define, keys_file))


def define_process_flags() -> Callable[[], dict[str, Any]]:
    """Flags of a command that several processes run together; what is returned gives :func:`processes.join` its values.

    The flags are defined without importing JAX, so that --help answers at once.
    """
    launcher = flags.DEFINE_enum("launcher", "auto", LAUNCHERS, "Who started the processes of a job of several.")
    address = flags.DEFINE_string("coordinator_address", None, "Host and port of process 0, in a job of several.")
    count = flags.DEFINE_integer("num_processes", None, "Processes of the job.")
    index = flags.DEFINE_integer("process_index", None, "Which of them this one is, from 0.")
    return lambda: {
        "launcher": launcher.value,
        "address": address.value,
        "count": count.value,
        "index": index.value,
    }


class CommandParser(argparse.ArgumentParser):
    """A parser that tells what is wrong in one line, as every command does, where argparse adds its usage."""

    def error(self, message: str) -> NoReturn:
        """Prints the line and exits with code 2."""
        print(f"error: {message}; --help lists what is accepted", file=sys.stderr, flush=True)
        sys.exit(EXIT_INPUT_ERROR)


def report_errors(main: Callable[[], int]) -> int:
    """Calls ``main``; on bad input prints its one line and returns exit code 2, on Ctrl-C 130."""
    try:
        return main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except (InputError, OSError) as error:
        message = _one_line(error)
        # A key that another command's configuration would have: the file says more than the key.
        place = f"{_config_file(sys.argv)}: " if re.match(r"config\.\S+: (unknown|missing) key", message) else ""
        details = error.details if isinstance(error, OutOfMemoryError) else ()
        print("\n".join([f"error: {place}{message}", *details]), file=sys.stderr, flush=True)
        return EXIT_INPUT_ERROR


def _config_file(argv: list[str]) -> str:
    """The flag that names the configuration file, as it was given."""
    for place, item in enumerate(argv):
        if item.startswith("--config="):
            return item
        if item == "--config":
            return "=".join(argv[place : place + 2])
    return "--config"


def _require_config_file() -> None:
    """Tells a missing configuration file before config_flags does, in words of its own and only when it is read."""
    flag = _config_file(sys.argv)
    path = flag.partition("=")[2]
    if path and "config" in flags.FLAGS and not os.path.isfile(path.partition(":")[0]):
        raise FileNotFoundError(f"{flag}: no such file; expected a configuration such as configs/quickstart.py")


def _plain_value_error(message: str) -> str:
    """What absl says of a value of the wrong type, without Python's words for it."""
    wrong = re.fullmatch(
        r"flag (--\S+?=.*): (?:invalid literal for int\(\)|(could not convert string to float)).*", message
    )
    if not wrong:
        return message
    return f"{wrong[1]}: expected {'a number' if wrong[2] else 'an integer'}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parse_flags(define: Callable[[], None], keys_file: str, argv: list[str]) -> list[str]:
    """Flags as absl parses them; what absl and config_flags raise is told in one line."""
    # absl would take it for the value of a flag before it.
    argv = [argv[0], "--help"] if "--help" in argv else argv
    try:
        define()
        rest = list(flags.FLAGS(argv))
        _require_config_file()
        return rest
    except SystemExit:
        # absl's flags of help print it and end with 1, as if something were wrong.
        sys.exit(0)
    except flags.Error as error:
        message = _plain_value_error(_one_line(error))
    except SyntaxError as error:
        message = f"{error.filename}, line {error.lineno}: {error.msg}"
    except (AttributeError, KeyError) as error:
        # config_flags lets through what ConfigDict raises for a key that it lacks, and names only the key.
        # "Key 'dimm' does not exist", or "<class 'int'>.wide does not exist" for a key below a value.
        name = re.search(r">\.(\w+) does not exist", str(error)) or re.search(r"'(\w+)", str(error))
        guilty = next((item for item in argv if name and name[1] in item.split("=")[0].split(".")), None)
        message = f"{guilty}: unknown configuration key" if guilty else f"{_config_file(argv)}: {_one_line(error)}"
    except (TypeError, ValueError, OSError) as error:
        message = _one_line(error)
    has_keys = "config" in flags.FLAGS or any(item.startswith("--config") for item in argv)
    keys = f", {keys_file} every key" if has_keys else ""
    print(f"error: {message}; --help lists the flags{keys}", file=sys.stderr, flush=True)
    sys.exit(EXIT_INPUT_ERROR)
