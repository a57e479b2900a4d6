// How the loops reach PyTorch's threads, without including any of its headers (see values.h on linkage).
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include "../arguments.h"

namespace brn {

struct Parallel {
  int threads;
  int64_t cache_bytes;       // of a core's own second-level cache
  int64_t last_cache_bytes;  // of the cache that cores share
  // Calls body(context, begin, end) for pieces of [0, tasks), each at least `grain` long.
  void (*run)(int64_t tasks, int64_t grain, void (*body)(void*, int64_t begin, int64_t end), void* context);
};

// The loops compiled for one instruction set.
struct Loops {
  const char* name;
  void (*forward)(const ForwardArguments&, const Parallel&);
  void (*backward)(const BackwardArguments&, const Parallel&);
};

namespace {

// for_each_task(parallel, tasks, grain, [&](int64_t begin, int64_t end) { ... })
template <typename Body>
inline __attribute__((always_inline)) void for_each_task(const Parallel& parallel, int64_t tasks, int64_t grain,
                                                         Body& body) {
  parallel.run(
      tasks, grain, [](void* context, int64_t begin, int64_t end) { (*static_cast<Body*>(context))(begin, end); },
      &body);
}

// Whether a result is written past the caches: it cannot stay there together with what it is computed from. Only where
// rows are whole lines, since a line of two writes would be fetched from memory after all.
inline __attribute__((always_inline)) bool goes_past_cache(const Parallel& parallel, const Layout& layout,
                                                           int64_t itemsize) {
  const int64_t values = layout.outer * (layout.channels_last ? 1 : layout.channels) * layout.inner;
  return layout.inner * itemsize % 64 == 0 && 4 * values * itemsize > parallel.last_cache_bytes;
}

// Memory for `count` values, aligned for vectors and with room for a group beyond the last.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count == 0 ? nullptr : static_cast<T*>(aligned_alloc(64, bytes(count)))) {
    if (data_ == nullptr && count > 0) abort();  // some values for each channel, no more
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  operator T*() const { return data_; }

 private:
  static size_t bytes(int64_t count) { return (static_cast<size_t>(count) * sizeof(T) + 1024 + 63) / 64 * 64; }
  T* data_;
};

}  // namespace
}  // namespace brn
