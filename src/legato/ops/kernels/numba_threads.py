"""Numba kernels in torch's own threads: what ``numba_recurrence.py`` and ``numba_gated.py`` share.

A kernel is a C function of an array of 64-bit words, the first of which number its tasks: one for each batch row, block
of channels and piece of time. It takes tasks until none is left, and is called once in each of torch's OpenMP threads.
A second pool would compete with torch's, whose threads keep a core busy for milliseconds after each torch op (measured:
half the speed on 2 cores).
"""

import ctypes
import os
import re
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic as _numba_intrinsic

from legato._shapes import Shaped, Tensor
from legato.ops.kernels.numba_cache import compiled

intrinsic: Any = _numba_intrinsic  # it changes the signature of what it decorates

# The words that ``next_task`` reads: a ticket counter, pieces of time, batch rows, blocks of channels a row, channels a
# block, and the address of a counter for each row and block: how many pieces have passed their state on.
HEADER = 6
_TICKET, _PIECES, _ROWS, _BLOCKS, _WIDTH, _PASSED_ON = range(HEADER)
# Narrower blocks than this waste cache lines and the prefetcher.
NARROWEST_BYTES = 256
# Below this many numbers, waking a second thread costs more than it saves.
_SERIAL_BELOW = 32768
# Rows this far ahead in time are asked for early: the processor's own prefetcher loses short rows that run backwards
# (measured: without it 0.8 of the copy bandwidth forward and 0.4 backward, with it 1.0 and 0.7).
PREFETCH_BYTES = 1024
# Memory of this size is new at every call, and asked for in pages of 2 MiB.
_HUGE_PAGES_FROM = 1 << 25
_UNIX = hasattr(os, "sched_yield")


def threads_for(numbers: int) -> int:
    """How many threads a launch over arrays of that many numbers is worth."""
    return 1 if numbers < _SERIAL_BELOW or _in_forked_child else torch.get_num_threads()


def cores() -> int:
    """How many processors this process may use at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def block_width(batch: int, channels: int, widest: int, item: int, threads: int) -> int:
    """Channels a task: at most ``widest``, and narrower where the batch is too small for the threads."""
    width = min(channels, widest)
    if threads > batch:
        parts = -(-threads // batch)
        width = min(width, max(NARROWEST_BYTES // item, -(-channels // parts)))
    return width


def launch(
    kernel: Any, pieces: int, batch: int, channels: int, width: int, threads: int, words: tuple[int, ...]
) -> None:
    """Run a compiled ``c_function`` on all tasks; ``words`` are its own, after the header.

    The tensors behind addresses among the words must stay alive during the call.
    """
    blocks = -(-channels // width)
    passed_on = np.zeros(batch * blocks, dtype=np.int64)
    array = np.array([0, pieces, batch, blocks, width, passed_on.ctypes.data, *words], dtype=np.int64)
    address, threads = array.ctypes.data, min(threads, pieces * batch * blocks)
    run, openmp = _RUN(kernel.address), _torch_openmp()
    if threads == 1:
        run(address)
    elif openmp is not None:
        openmp(run, address, threads, 0)
    else:
        others = [_pool(threads).submit(run, address) for _ in range(threads - 1)]
        run(address)
        for other in others:
            other.result()


def empty(like: Shaped[Tensor, "..."], *shape: int) -> Shaped[Tensor, "..."]:
    """like.new_empty(shape), in large pages where it is large.

    The C library returns arrays over 32 MiB to the system at every free, and the next one meets a page fault every 4
    KiB: 64 MiB took 29 ms to touch, 5 ms in pages of 2 MiB, where writing them takes 6 ms. Linux only; else a no-op.
    """
    x = like.new_empty(shape)
    size, madvise = x.numel() * x.element_size(), _madvise()
    if size >= _HUGE_PAGES_FROM and madvise is not None:
        start = -(-x.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        madvise(start, x.data_ptr() + size - start, _MADV_HUGEPAGE)
    return x


# --- inside kernels ---

_sched_yield: Any = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def _count(_, counter):
    """The value of the counter at the front of ``counter``, which is then one higher: an atomic operation."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counter), generate


@intrinsic
def _counted(_, counter):
    """The counter's value, read anew."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(arguments[0], "acquire", 8)

    return types.int64(counter), generate


@compiled
def next_task(words, channels):
    """The piece of time, batch row and channels of a task that nobody has taken yet; a row of -1 when there is none.

    The pieces of a row are taken in order, so that whoever waits for a piece waits for one that is being walked.
    """
    task, tasks = _count(words), words[_ROWS] * words[_BLOCKS]
    if task >= words[_PIECES] * tasks:
        return -1, -1, 0, 0
    piece, task = divmod(task, tasks)
    start = task % words[_BLOCKS] * words[_WIDTH]
    return piece, task // words[_BLOCKS], start, min(start + words[_WIDTH], channels)


@compiled
def _yield():
    if _UNIX:
        _sched_yield()


@compiled
def wait_for(words, b, d0, pieces):
    """Return when so many pieces of a batch row and block of channels have passed their state on."""
    counter, looks = _counter(words, b, d0), 0
    while _counted(counter) < pieces:
        looks += 1
        if looks % 1000 == 0:  # the thread that is waited for may be in want of this processor
            _yield()


@compiled
def pass_on(words, b, d0):
    """Say that the next piece of this batch row and block of channels may read its state."""
    _count(_counter(words, b, d0))


@compiled
def _counter(words, b, d0):
    return _word(words[_PASSED_ON] + 8 * (b * words[_BLOCKS] + d0 // words[_WIDTH]))


@intrinsic
def _word(_, address):
    """An address as a pointer to 64-bit words."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.int64)(address), generate


@intrinsic
def pointer(_, address):
    """An address as the pointer that ``carray`` takes."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@intrinsic
def _prefetch_line(_, address):
    """Ask for the cache line at ``address``, to be kept in all levels."""

    def generate(context, builder, signature, arguments):
        i32 = ir.IntType(32)
        prefetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, i32, i32, i32]), "llvm.prefetch.p0"
        )
        builder.call(prefetch, [builder.inttoptr(arguments[0], cgutils.voidptr_t), i32(0), i32(3), i32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@compiled
def prefetch(row, ahead):
    """Ask early for a row that lies ``ahead`` bytes on; it need not exist."""
    for byte in range(0, row.size * row.itemsize, 64):
        _prefetch_line(row.ctypes.data + ahead + byte)


# --- the process: its OpenMP, its C library, its forks ---

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@cache
def _torch_openmp() -> Any:
    """The entry of the OpenMP library that torch has loaded, or None where it has another kind of threads.

    ``void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags)`` is the stable interface
    that compilers emit calls to; GNU's, Intel's and LLVM's libraries on Linux all have it.
    """
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\S*", maps.read_text())) if maps.exists() else set()
    # A process may hold several (scikit-learn brings one): torch's is the one beside torch.
    home = str(Path(torch.__file__).parent)
    for path in sorted(loaded, key=lambda path: not path.startswith(home)):
        entry = getattr(ctypes.CDLL(path), "GOMP_parallel", None)
        if entry is not None:
            entry.argtypes = [_RUN, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            entry.restype = None
            return entry
    return None


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="legato")


@cache
def _madvise() -> Any:
    """The C library's madvise, where large pages are had for the asking."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def _after_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


# A forked child (a DataLoader worker) has none of its parent's threads and would wait for them for ever: run serially.
_in_forked_child = False
os.register_at_fork(after_in_child=_after_fork)
