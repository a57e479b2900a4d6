// Which instruction set's loops run, found out once, PyTorch's threads for them to run on, and the memory they write.
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"
#include "parallel.h"

namespace brn {

// BRN_ONE_ISA: only the baseline was compiled, for the machine that compiled it.
#if defined(__x86_64__) && !defined(BRN_ONE_ISA)
#define BRN_X86_ISAS
#endif

#define BRN_DECLARE(isa)                                        \
  void forward_##isa(const ForwardArguments&, const Parallel&); \
  void backward_##isa(const BackwardArguments&, const Parallel&);
BRN_DECLARE(baseline)
#ifdef BRN_X86_ISAS
BRN_DECLARE(avx2)
BRN_DECLARE(avx512)
BRN_DECLARE(avx512bf16)
#endif

namespace {

// BRN_KERNELS_ISA asks for one by name: for tests and comparisons.
Loops choose() {
  const char* asked = std::getenv("BRN_KERNELS_ISA");
  if (asked != nullptr && *asked == 0) asked = nullptr;
  const auto allowed = [&](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
#ifdef BRN_X86_ISAS
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed("avx512bf16")) {
    return {"avx512bf16", forward_avx512bf16, backward_avx512bf16};
  }
  if (avx512 && allowed("avx512")) return {"avx512", forward_avx512, backward_avx512};
  if (avx2 && allowed("avx2")) return {"avx2", forward_avx2, backward_avx2};
#endif
  STD_TORCH_CHECK(allowed("baseline"), "BRN_KERNELS_ISA=", asked, ": this processor, or this build, has no such loops");
  return {"baseline", forward_baseline, backward_baseline};
}

const Loops& loops() {
  static const Loops chosen = choose();
  return chosen;
}

// Of a cache of the first core, as Linux knows it (sysconf's third level is far too large on some machines).
int64_t cache_size(const char* path, int64_t otherwise) {
  long kilobytes = 0;
  if (std::FILE* file = std::fopen(path, "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return kilobytes > 0 ? kilobytes * int64_t{1024} : otherwise;
}

int64_t cache_bytes() {
  static const int64_t found = cache_size("/sys/devices/system/cpu/cpu0/cache/index2/size", int64_t{512} << 10);
  return found;
}

int64_t last_cache_bytes() {
  static const int64_t found = cache_size("/sys/devices/system/cpu/cpu0/cache/index3/size", int64_t{16} << 20);
  return found;
}

void run_in_parallel(int64_t tasks, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
  torch::stable::parallel_for(0, tasks, grain, [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

Parallel parallel() {
  return {static_cast<int>(torch::stable::get_num_threads()), cache_bytes(), last_cache_bytes(), run_in_parallel};
}

// Asks for huge pages where a tensor that is about to be written covers them whole: of a fresh large tensor, the first
// touch of its 4 KB pages costs several times what the arithmetic does. Only pages within the tensor are asked for.
void advise_huge_pages([[maybe_unused]] const Layout& layout, [[maybe_unused]] DType dtype,
                       [[maybe_unused]] const Side& side) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = 2 << 20;
  const int64_t itemsize = dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
  const int64_t channels = layout.channels_last ? 1 : layout.channels;
  if (side.data == nullptr) return;
  const int64_t last = (layout.outer - 1) * side.outer_stride + (channels - 1) * side.channel_stride + layout.inner;
  if (last != layout.outer * channels * layout.inner) return;  // not dense: the gaps are not ours
  const uintptr_t begin = reinterpret_cast<uintptr_t>(side.data), end = begin + static_cast<uintptr_t>(last * itemsize);
  const uintptr_t first_page = (begin + kHugePage - 1) / kHugePage * kHugePage, end_page = end / kHugePage * kHugePage;
  if (first_page < end_page) madvise(reinterpret_cast<void*>(first_page), end_page - first_page, MADV_HUGEPAGE);
#endif
}

}  // namespace

void forward(const ForwardArguments& arguments) {
  advise_huge_pages(arguments.layout, arguments.dtype, arguments.y);
  loops().forward(arguments, parallel());
}

void backward(const BackwardArguments& arguments) {
  advise_huge_pages(arguments.layout, arguments.dtype, arguments.dx);
  advise_huge_pages(arguments.layout, arguments.dtype, arguments.dresidual);
  loops().backward(arguments, parallel());
}

const char* instruction_set() { return loops().name; }

}  // namespace brn
