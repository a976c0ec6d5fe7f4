"""How the C library treats the memory that a CPU program frees: it decides a fifth of an update's time."""

import ctypes
import platform

# Numbers of mallopt()'s parameters in glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for the next allocation to take.

    XLA asks for the intermediate results of every call of a CPU program as one block (600 MB for an update at the
    default sizes) and frees it after the call. By default glibc hands so large a block back to the system each time,
    and every page of the next one has to be mapped and zeroed anew. Switched off here: blocks of their own mapping,
    arenas per thread (they can hold no large block), and the return of what is free. The price: the process stays as
    large as it once was.

    To be called once, at the start of a program, before JAX starts its threads. Accelerators' memory is not concerned.

    Returns:
        Whether it was done: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _LARGEST_INT))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
