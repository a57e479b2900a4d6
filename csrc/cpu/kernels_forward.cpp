// The forward's loops for one instruction set.
#include "kernels.h"

namespace brn {

void BRN_EXPORTED(forward)(const ForwardArguments& a, const Parallel& parallel);

void BRN_EXPORTED(forward)(const ForwardArguments& a, const Parallel& parallel) {
  const bool all_dense = is_dense(a.layout, a.x) && is_dense(a.layout, a.residual) && is_dense(a.layout, a.y);
  run_call<ForwardColumns, ForwardPlanes>(a, all_dense, parallel);
  if (a.counter != nullptr) ++*a.counter;
}

}  // namespace brn
