"""Streams and graphs of the GPU. Where there is none, stand-ins do everything at once and in the order of the calls."""

import contextlib
import time

import torch

IS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if IS_GPU else "cpu")
CYCLES_PER_SECOND = 2_000_000_000  # no GPU's clock is much faster


def scaled(on_a_gpu, interpreted):
    """A size or a number: kernels are a million times slower interpreted."""
    return on_a_gpu if IS_GPU else interpreted


def streams(number):
    return [torch.cuda.Stream() if IS_GPU else None for _ in range(number)]


def on(stream):
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def synchronize():
    if IS_GPU:
        torch.cuda.synchronize()


def is_busy(stream):
    """Whether work is left on the stream; the stand-ins' never end."""
    return stream is None or not stream.query()


def seconds_of(call):
    """The host's time, with nothing left to do before it."""
    synchronize()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Gate:
    """Holds streams for ``seconds``: what has been queued behind it by then begins everywhere at once."""

    def __init__(self, held, seconds):
        if not IS_GPU:
            return
        self.opened = torch.cuda.Event()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(int(seconds * CYCLES_PER_SECOND))
            self.opened.record()
        for stream in held:
            stream.wait_event(self.opened)

    def is_closed(self):
        return not IS_GPU or not self.opened.query()


class Captured:
    """A function in a CUDA graph. Recording runs nothing; after each ``replay`` its results are in ``results``."""

    def __init__(self, function):
        self.function, self.results = function, None
        if IS_GPU:
            synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.results = function()

    def replay(self):
        if IS_GPU:
            self.graph.replay()
        else:
            self.results = self.function()


def warm_up(function, times=1):
    """Calls before a capture, on a stream of their own, as CUDA graphs want it."""
    if not IS_GPU:
        function()
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(times):
            function()
    torch.cuda.current_stream().wait_stream(stream)
