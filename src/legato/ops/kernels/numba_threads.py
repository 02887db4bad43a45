"""Runs Numba kernels in torch's own threads; used by ``numba_recurrence.py`` and
``numba_gated.py``.

A kernel is a C function of an array of 64-bit words. The first words describe its tasks: one for
each batch row, block of channels and chunk of time. The function is called once in each of torch's
OpenMP threads and takes tasks until none is left. A second thread pool would compete with torch's,
whose threads occupy a core for milliseconds after each torch op (measured: half the speed on 2
cores).
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

intrinsic: Any = _numba_intrinsic  # it changes the signature of the decorated function

# The words that ``next_task`` reads: a ticket counter, chunks of time, batch rows, blocks of
# channels per row, channels per block, and the address of one counter per row and block: the number
# of chunks whose final state is available.
HEADER = 6
_TICKET, _CHUNKS, _ROWS, _BLOCKS, _WIDTH, _AVAILABLE = range(HEADER)
# Narrower blocks make poor use of cache lines and of the hardware prefetcher.
NARROWEST_BYTES = 256
# Below this many numbers, starting a second thread costs more than it saves.
_SERIAL_BELOW = 32768
# Rows this far ahead in time are prefetched: the hardware prefetcher does not follow short rows in
# reverse time (measured as fractions of the copy bandwidth: without it 0.8 forward and 0.4
# backward, with it 1.0 and 0.7).
PREFETCH_BYTES = 1024
# Arrays of this size are newly mapped at every call; they are requested in pages of 2 MiB.
_HUGE_PAGES_FROM = 1 << 25
_UNIX = hasattr(os, "sched_yield")


def threads_for(numbers: int) -> int:
    """The number of threads for a launch over arrays of that many numbers."""
    return 1 if numbers < _SERIAL_BELOW or _in_forked_child else torch.get_num_threads()


def cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def block_width(batch: int, channels: int, widest: int, item: int, threads: int) -> int:
    """Channels per task: at most ``widest``, fewer if there are more threads than batch rows."""
    width = min(channels, widest)
    if threads > batch:
        parts = -(-threads // batch)
        width = min(width, max(NARROWEST_BYTES // item, -(-channels // parts)))
    return width


def launch(
    kernel: Any, chunks: int, batch: int, channels: int, width: int, threads: int, words: tuple[int, ...]
) -> None:
    """Run a compiled ``c_function`` on all tasks; its arguments, ``words``, follow the header.

    Tensors whose addresses are among the words must stay alive during the call.
    """
    blocks = -(-channels // width)
    available = np.zeros(batch * blocks, dtype=np.int64)
    array = np.array([0, chunks, batch, blocks, width, available.ctypes.data, *words], dtype=np.int64)
    address, threads = array.ctypes.data, min(threads, chunks * batch * blocks)
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
    """like.new_empty(shape), in pages of 2 MiB if it is large.

    The C library returns arrays over 32 MiB to the system when they are freed, and the next array
    causes a page fault every 4 KiB. For 64 MiB the page faults took 29 ms, 5 ms with pages of 2
    MiB; writing the array takes 6 ms. Linux only; elsewhere this is plain ``new_empty``.
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
def _increment(_, counter):
    """Atomically increments the counter at address ``counter`` and returns its previous value."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", arguments[0], context.get_constant(types.int64, 1), "acq_rel")

    return types.int64(counter), generate


@intrinsic
def _load_counter(_, counter):
    """Atomically loads the value of the counter."""

    def generate(context, builder, signature, arguments):
        return builder.load_atomic(arguments[0], "acquire", 8)

    return types.int64(counter), generate


@compiled
def next_task(words, channels):
    """The chunk of time, batch row and channels of the next task; a row of -1 if none is left.

    The chunks of a row are taken in order, so a thread only waits for a chunk that another thread
    is computing.
    """
    task, tasks = _increment(words), words[_ROWS] * words[_BLOCKS]
    if task >= words[_CHUNKS] * tasks:
        return -1, -1, 0, 0
    chunk, task = divmod(task, tasks)
    start = task % words[_BLOCKS] * words[_WIDTH]
    return chunk, task // words[_BLOCKS], start, min(start + words[_WIDTH], channels)


@compiled
def _yield():
    if _UNIX:
        _sched_yield()


@compiled
def wait_for(words, b, d0, chunks):
    """Wait for the final states of that many chunks of a batch row and block of channels."""
    counter, polls = _counter(words, b, d0), 0
    while _load_counter(counter) < chunks:
        polls += 1
        if polls % 1000 == 0:  # the other thread may need this processor
            _yield()


@compiled
def signal(words, b, d0):
    """Signal that the next chunk of this row and block may read its initial state."""
    _increment(_counter(words, b, d0))


@compiled
def _counter(words, b, d0):
    return _word(words[_AVAILABLE] + 8 * (b * words[_BLOCKS] + d0 // words[_WIDTH]))


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
    """Prefetch the cache line at ``address`` into all cache levels."""

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
    """Prefetch the row that is ``ahead`` bytes after ``row``; it need not exist."""
    for byte in range(0, row.size * row.itemsize, 64):
        _prefetch_line(row.ctypes.data + ahead + byte)


# --- the process: its OpenMP, its C library, its forks ---

_RUN = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@cache
def _torch_openmp() -> Any:
    """``GOMP_parallel`` of the OpenMP library of torch, or None if torch uses other threads.

    ``void GOMP_parallel(void (*run)(void *), void *data, unsigned threads, unsigned flags)`` is the stable interface
    that compilers emit calls to; GNU's, Intel's and LLVM's libraries on Linux all have it.
    """
    maps = Path("/proc/self/maps")
    loaded = set(re.findall(r"/\S*/lib(?:gomp|iomp5|omp)\S*", maps.read_text())) if maps.exists() else set()
    # A process may have loaded several (scikit-learn has its own): torch's is in the folder of
    # torch.
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
    """The madvise of the C library, or None if the system has no large pages."""
    if not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise


def _after_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


# A forked child (a DataLoader worker) has none of its parent's threads and would wait for them
# forever: run serially.
_in_forked_child = False
os.register_at_fork(after_in_child=_after_fork)
